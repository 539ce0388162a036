// The Python module roialign._core: NumPy's buffers as pointers, shapes and strides. The adapters
// check everything that a user can get wrong; what is checked here keeps memory safe.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <stdexcept>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "../dispatch.hpp"
#include "../memory.hpp"
#include "../operations.hpp"
#include "../parallel.hpp"
#include "../windows.hpp"

namespace nb = nanobind;

namespace roialign::python {
namespace {

// An array of at most four dimensions. It comes as an object of NumPy (bfloat16 as uint16, a view that
// every NumPy can export), or as what an adapter knows of a tensor that it has checked and keeps alive:
// (address, dtype, shape, strides in elements).
struct Array {
  nb::object owner;
  void* data = nullptr;
  DType dtype = DType::float32;
  int ndim = 0;
  int64_t shape[4] = {}, stride[4] = {};
};

DType dtype_of(const nb::dlpack::dtype& t) {
  if (t == nb::dtype<float>()) return DType::float32;
  if (t == nb::dtype<double>()) return DType::float64;
  if (t == nb::dtype<uint16_t>()) return DType::bfloat16;
  if (t == nb::dtype<int64_t>()) return DType::int64;
  if (t.code == uint8_t(nb::dlpack::dtype_code::Float) && t.bits == 16) return DType::float16;
  throw nb::type_error("_core: unsupported dtype");
}

Array described(const nb::tuple& tuple) {
  if (tuple.size() != 4) throw nb::type_error("_core: an array is (address, dtype, shape, strides)");
  const int dtype = nb::cast<int>(tuple[1]);
  if (dtype < 0 || dtype > int(DType::int64)) throw nb::type_error("_core: unsupported dtype");
  Array array;
  array.data = reinterpret_cast<void*>(nb::cast<uintptr_t>(tuple[0]));
  array.dtype = DType(dtype);
  const nb::tuple shape = nb::cast<nb::tuple>(tuple[2]), stride = nb::cast<nb::tuple>(tuple[3]);
  if (shape.size() > 4 || stride.size() != shape.size()) {
    throw nb::value_error("_core: array must have at most 4 dimensions");
  }
  array.ndim = int(shape.size());
  for (int i = 0; i < array.ndim; ++i) {
    array.shape[i] = nb::cast<int64_t>(shape[size_t(i)]);
    array.stride[i] = nb::cast<int64_t>(stride[size_t(i)]);
  }
  return array;
}

// Never converted: a silent copy of an output would lose the result.
template <class NdArray>
Array array_of(const nb::handle& object) {
  if (nb::isinstance<nb::tuple>(object)) return described(nb::borrow<nb::tuple>(object));
  const NdArray given = nb::cast<NdArray>(object, false);
  if (given.ndim() > 4) throw nb::value_error("_core: array must have at most 4 dimensions");
  Array array;
  array.owner = nb::borrow(object);
  array.data = const_cast<void*>(static_cast<const void*>(given.data()));
  array.dtype = dtype_of(given.dtype());
  array.ndim = int(given.ndim());
  for (int i = 0; i < array.ndim; ++i) {
    array.shape[i] = int64_t(given.shape(size_t(i)));
    array.stride[i] = given.stride(size_t(i));
  }
  return array;
}
Array input(const nb::handle& object) { return array_of<nb::ndarray<nb::ro, nb::device::cpu>>(object); }
Array output(const nb::handle& object) { return array_of<nb::ndarray<nb::device::cpu>>(object); }

Tensor tensor_of(const Array& array) {
  if (array.ndim != 4) throw nb::value_error("_core: array must have 4 dimensions");
  Tensor tensor{array.data, array.dtype, {}, {}};
  std::copy(array.shape, array.shape + 4, tensor.shape);
  std::copy(array.stride, array.stride + 4, tensor.stride);
  return tensor;
}

Rois rois_of(const Array& boxes, const Array& image_index) {
  if (boxes.ndim != 2 || boxes.shape[1] != 4 || image_index.ndim != 1 ||
      image_index.shape[0] != boxes.shape[0]) {
    throw nb::value_error("_core: boxes must be (K, 4) and image_index (K,)");
  }
  return {boxes.shape[0], boxes.data, boxes.dtype, {boxes.stride[0], boxes.stride[1]},
          image_index.data, image_index.dtype, image_index.stride[0]};
}

// A box gradient, or tangent: (K, 4) contiguous, of the coordinate type.
void* boxes_like(const Array& array, const Rois& rois, DType map) {
  if (array.ndim != 2 || array.shape[0] != rois.count || array.shape[1] != 4 ||
      array.dtype != coordinate_type(map) ||
      (rois.count > 0 && (array.stride[0] != 4 || array.stride[1] != 1))) {
    throw nb::value_error("_core: box tangents and gradients must be contiguous (K, 4)");
  }
  return array.data;
}
const void* tangent_of(const nb::object& object, const Rois& rois, DType map) {
  return object.is_none() ? nullptr : boxes_like(input(object), rois, map);
}

// Runs without the interpreter's lock. Before Python 3.14 a daemon thread that asks for the lock while
// the interpreter is shutting down is unwound through frames that forbid it, and the process aborts. So
// shutting down waits for the calls under way, and calls after that keep the lock.
std::atomic<int> calls_under_way{0};
std::atomic<bool> shutting_down{false};

class Unlocked {
 public:
  Unlocked() {
    ++calls_under_way;
    if (!shutting_down) state_ = PyEval_SaveThread();
  }
  ~Unlocked() {
    if (state_) PyEval_RestoreThread(state_);
    --calls_under_way;
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_ = nullptr;
};

void wait_for_calls() {
  shutting_down = true;
  const nb::gil_scoped_release released;
  while (calls_under_way) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

#if !defined(_WIN32)
// The parent's other threads do not live in a forked child.
const int forget_in_child = pthread_atfork(nullptr, nullptr, [] { calls_under_way = 0; });
#endif

// (scale_y, scale_x, sampling_ratio, pixel_offset, input_offset, end_offset, min_size or None, floor)
using Rule = std::tuple<double, double, int64_t, double, double, double, nb::object, bool>;

Params params_of(const Rule& rule) {
  const auto& [scale_y, scale_x, sampling_ratio, pixel, input, end, min_size, floor] = rule;
  const bool has_min = !min_size.is_none();
  return {{scale_y, scale_x},
          sampling_ratio,
          {pixel, input, end, has_min ? nb::cast<double>(min_size) : 0.0, has_min, floor}};
}

// Each operation returns the first RoI whose image index is bad, having done nothing; or -1.
template <class Operation>
int64_t run(const Rois& rois, int64_t images, Operation&& operation) {
  const Unlocked unlocked;
  const int64_t bad = bad_image_index(rois, images);
  if (bad < 0) operation();
  return bad;
}

int64_t forward(const nb::object& features_object, const nb::object& boxes_object,
                const nb::object& index_object, const nb::object& tangent_object, const Rule& rule,
                const nb::object& output_object, int threads) {
  const Array features_array = input(features_object), boxes = input(boxes_object),
              image_index = input(index_object), output_array = python::output(output_object);
  const Tensor features = tensor_of(features_array), output = tensor_of(output_array);
  const Rois rois = rois_of(boxes, image_index);
  const Params params = params_of(rule);
  const void* tangent = tangent_of(tangent_object, rois, features.dtype);
  return run(rois, features.shape[0],
             [&] { roialign::forward(features, rois, tangent, params, output, threads); });
}

int64_t adjoint(const nb::object& d_output_object, const nb::object& boxes_object,
                const nb::object& index_object, const nb::object& tangent_object, const Rule& rule,
                const nb::object& d_features_object, int threads) {
  const Array d_output_array = input(d_output_object), boxes = input(boxes_object),
              image_index = input(index_object), d_features_array = output(d_features_object);
  const Tensor d_output = tensor_of(d_output_array), d_features = tensor_of(d_features_array);
  const Rois rois = rois_of(boxes, image_index);
  const Params params = params_of(rule);
  const void* tangent = tangent_of(tangent_object, rois, d_output.dtype);
  return run(rois, d_features.shape[0],
             [&] { roialign::adjoint(d_output, rois, tangent, params, d_features, threads); });
}

int64_t box_gradient(const nb::object& d_output_object, const nb::object& features_object,
                     const nb::object& boxes_object, const nb::object& index_object, const Rule& rule,
                     const nb::object& d_boxes_object, int threads) {
  const Array d_output_array = input(d_output_object), features_array = input(features_object),
              boxes = input(boxes_object), image_index = input(index_object),
              d_boxes_array = output(d_boxes_object);
  const Tensor d_output = tensor_of(d_output_array), features = tensor_of(features_array);
  const Rois rois = rois_of(boxes, image_index);
  const Params params = params_of(rule);
  void* d_boxes = boxes_like(d_boxes_array, rois, features.dtype);
  return run(rois, features.shape[0],
             [&] { roialign::box_gradient(d_output, features, rois, params, d_boxes, threads); });
}

// `bytes` of memory for a result; NumPy keeps it alive, the cache of freed buffers takes it back.
nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> allocate(size_t bytes) {
  struct Buffer {
    void* memory;
    size_t bytes;
  };
  void* memory = take_buffer(bytes);
  auto* buffer = new (std::nothrow) Buffer{memory, bytes};
  if (!buffer) {
    give_buffer(memory, bytes);
    throw std::bad_alloc();
  }
  const nb::capsule owner(buffer, [](void* p) noexcept {
    auto* b = static_cast<Buffer*>(p);
    give_buffer(b->memory, b->bytes);
    delete b;
  });
  return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(memory, {bytes}, owner);
}

}  // namespace
}  // namespace roialign::python

NB_MODULE(_core, m) {
  using namespace roialign;
  m.doc() = "Native core of roialign. Internal: use the functions of roialign.";
  try {
    engine();
  } catch (const std::runtime_error& error) {
    throw nb::import_error(error.what());
  }
  const auto names = [](const std::vector<std::string>& list) { return nb::tuple(nb::cast(list)); };
  nb::dict dtypes;  // the second item of an array that is described
  dtypes["float16"] = int(DType::float16);
  dtypes["bfloat16"] = int(DType::bfloat16);
  dtypes["float32"] = int(DType::float32);
  dtypes["float64"] = int(DType::float64);
  dtypes["int64"] = int(DType::int64);
  m.attr("dtypes") = dtypes;
  m.attr("isa") = engine().name;
  m.attr("compiled_isas") = names(compiled_isas());
  m.attr("usable_isas") = names(usable_isas());
  m.def("available_cpus", &available_cpus);
  m.def("allocate", &python::allocate);
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&python::wait_for_calls));
  m.def("forward", &python::forward, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg());
  m.def("adjoint", &python::adjoint, nb::arg(), nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg());
  m.def("box_gradient", &python::box_gradient);
}
