// The Python module roialign._core: NumPy's buffers and torch's tensors as pointers, shapes and
// strides. The adapters check everything that a user can get wrong; what is checked here keeps
// memory safe.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
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
#include "xla.hpp"

namespace nb = nanobind;

namespace roialign::python {
namespace {

// What a library of tensors offers by DLPack in C (its version 1.2): reading one makes no Python
// object.
struct Exchange {
  uint32_t major, minor;
  Exchange* older;
  void *allocate, *managed_from_object, *object_from_managed;
  int (*describe)(void* object, nb::dlpack::dltensor* described);
  void* current_stream;
};

PyTypeObject* tensor_type = nullptr;
const Exchange* exchange = nullptr;

// From now on tensors of this type, or of a subclass, are arrays too.
void accept(const nb::type_object& type) {
  const nb::object capsule = type.attr("__dlpack_c_exchange_api__");
  const auto* api =
      static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw nb::python_error();
  while (api && api->major != 1) api = api->older;
  if (!api) throw nb::import_error("roialign needs DLPack 1 of a library of tensors");
  exchange = api;
  tensor_type = reinterpret_cast<PyTypeObject*>(type.ptr());
}

// An array of at most four dimensions, as long as its object lives: of NumPy (bfloat16 as uint16, a
// view that every NumPy can export), or a tensor.
struct Array {
  void* data = nullptr;
  DType dtype = DType::float32;
  bool integers = false;  // by its own dtype
  nb::dlpack::device device{nb::device::cpu::value, 0};
  int ndim = 0;
  int64_t shape[4] = {}, stride[4] = {};
};

bool take_dtype(const nb::dlpack::dtype& t, Array& array) {
  using Code = nb::dlpack::dtype_code;
  const auto is = [&](Code code, int bits) {
    return t.code == uint8_t(code) && t.bits == bits && t.lanes == 1;
  };
  if (is(Code::Float, 32))
    array.dtype = DType::float32;
  else if (is(Code::Float, 64))
    array.dtype = DType::float64;
  else if (is(Code::Float, 16))
    array.dtype = DType::float16;
  else if (is(Code::Bfloat, 16) || is(Code::UInt, 16))
    array.dtype = DType::bfloat16;
  else if (is(Code::Int, 64))
    array.dtype = DType::int64;
  else
    return false;
  array.integers = t.code != uint8_t(Code::Float) && t.code != uint8_t(Code::Bfloat);
  return true;
}

bool is_tensor(const nb::handle& object) {
  return tensor_type && PyType_IsSubtype(Py_TYPE(object.ptr()), tensor_type);
}

// Whether a tensor has memory where its elements are: there are wrappers, and storages that were
// freed.
bool describe(const nb::handle& tensor, nb::dlpack::dltensor& given) {
  if (exchange->describe(tensor.ptr(), &given)) {
    PyErr_Clear();
    return false;
  }
  return given.data ||
         std::any_of(given.shape, given.shape + given.ndim, [](int64_t n) { return n == 0; });
}
bool has_memory(const nb::object& object) {
  nb::dlpack::dltensor given;
  return is_tensor(object) && describe(object, given);
}

// Never converts: a silent copy of an output would lose the result.
template <class NdArray>
bool read(const nb::handle& object, Array& array) {
  const auto take = [&](const auto& dtype, const auto& ndim, const auto& shape,
                        const auto& stride) {
    if (!take_dtype(dtype, array) || ndim > 4) return false;
    array.ndim = int(ndim);
    for (int i = 0; i < array.ndim; ++i) {
      array.shape[i] = int64_t(shape(i));
      array.stride[i] = stride(i);
    }
    return true;
  };
  if (is_tensor(object)) {
    nb::dlpack::dltensor given;
    if (!describe(object, given)) return false;
    array.data = static_cast<char*>(given.data) + given.byte_offset;
    array.device = given.device;
    return (given.strides || !given.ndim) &&
           take(
               given.dtype, given.ndim, [&](int i) { return given.shape[i]; },
               [&](int i) { return given.strides[i]; });
  }
  NdArray given;
  if (!nb::try_cast(object, given, false)) return false;
  array.data = const_cast<void*>(static_cast<const void*>(given.data()));
  return take(
      given.dtype(), given.ndim(), [&](int i) { return given.shape(size_t(i)); },
      [&](int i) { return given.stride(size_t(i)); });
}

template <class NdArray>
Array array_of(const nb::handle& object) {
  Array array;
  if (!read<NdArray>(object, array) || array.device.device_type != nb::device::cpu::value) {
    throw nb::type_error(
        "_core: not an array of a supported dtype, with at most 4 dimensions, in memory");
  }
  return array;
}
using Input = nb::ndarray<nb::ro, nb::device::cpu>;
Array input(const nb::handle& object) {
  return array_of<Input>(object);
}
Array output(const nb::handle& object) {
  return array_of<nb::ndarray<nb::device::cpu>>(object);
}

size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float16:
    case DType::bfloat16:
      return 2;
    case DType::float32:
      return 4;
    default:
      return 8;
  }
}

// Whether typed reads and writes are allowed.
bool is_aligned(const Array& array) {
  const bool empty = std::find(array.shape, array.shape + array.ndim, 0) < array.shape + array.ndim;
  return empty || uintptr_t(array.data) % size_of(array.dtype) == 0;
}

Tensor tensor_of(const Array& array) {
  if (array.ndim != 4) throw nb::value_error("_core: array must have 4 dimensions");
  if (!is_aligned(array)) throw nb::value_error("_core: array must be aligned");
  Tensor tensor{array.data, array.dtype, {}, {}};
  std::copy(array.shape, array.shape + 4, tensor.shape);
  std::copy(array.stride, array.stride + 4, tensor.stride);
  // The engine chooses its way by the strides: along an axis of length 1 any will do, and these
  // make an array of its neighbours one without gaps.
  const int64_t *shape = tensor.shape, *stride = tensor.stride;
  if (shape[3] == 1) tensor.stride[3] = shape[2] == 1 ? 1 : stride[2];
  if (shape[2] == 1) tensor.stride[2] = shape[3] * stride[3];
  if (shape[1] == 1) tensor.stride[1] = shape[2] * stride[2];
  if (shape[0] == 1) tensor.stride[0] = 0;
  return tensor;
}

// Whether these are what most calls bring, of which no check of types and shapes can complain: a
// map of pixels (N, C, H, W) and rows (K, 5), of float dtypes, aligned in the memory of one CPU or
// GPU.
bool are_ordinary(const nb::object& features, const nb::object& rois) {
  Array map, rows;
  if (!read<Input>(features, map) || !read<Input>(rois, rows)) return false;
  const auto [type, id] = map.device;
  if (type != nb::device::cpu::value && type != nb::device::cuda::value &&
      type != nb::device::rocm::value) {
    return false;
  }
  if (rows.device.device_type != type || rows.device.device_id != id) return false;
  for (const Array& array : {map, rows}) {
    if (array.integers || !is_aligned(array)) return false;
  }
  for (const int64_t side : map.shape) {
    if (side < 1 || side > INT32_MAX) return false;
  }
  return map.ndim == 4 && rows.ndim == 2 && rows.shape[1] == 5;
}

// Rows (K, 5), or a tuple: boxes (K, 4) and an image index (K,).
Rois rois_of(const nb::object& object) {
  if (!nb::isinstance<nb::tuple>(object)) {
    const Array rows = input(object);
    if (rows.ndim != 2 || rows.shape[1] != 5) throw nb::value_error("_core: rois must be (K, 5)");
    const auto boxes =
        static_cast<char*>(rows.data) + rows.stride[1] * int64_t(size_of(rows.dtype));
    return {rows.shape[0], boxes,      rows.dtype,    {rows.stride[0], rows.stride[1]},
            rows.data,     rows.dtype, rows.stride[0]};
  }
  const nb::tuple pair = nb::borrow<nb::tuple>(object);
  if (pair.size() != 2) throw nb::value_error("_core: rois as a tuple are (boxes, image_index)");
  const Array boxes = input(pair[0]), image_index = input(pair[1]);
  if (boxes.ndim != 2 || boxes.shape[1] != 4 || image_index.ndim != 1 ||
      image_index.shape[0] != boxes.shape[0]) {
    throw nb::value_error("_core: boxes must be (K, 4) and image_index (K,)");
  }
  return {
      boxes.shape[0],   boxes.data,        boxes.dtype,          {boxes.stride[0], boxes.stride[1]},
      image_index.data, image_index.dtype, image_index.stride[0]};
}

// A box gradient, or tangent: (K, 4) contiguous, of the coordinate type. A single row has any
// stride.
void* boxes_like(const Array& array, const Rois& rois, DType map) {
  const bool contiguous = array.stride[1] == 1 && (rois.count == 1 || array.stride[0] == 4);
  if (array.ndim != 2 || array.shape[0] != rois.count || array.shape[1] != 4 ||
      array.dtype != coordinate_type(map) || !is_aligned(array) || (rois.count && !contiguous)) {
    throw nb::value_error("_core: box tangents and gradients must be aligned, contiguous (K, 4)");
  }
  return array.data;
}
const void* tangent_of(const nb::object& object, const Rois& rois, DType map) {
  return object.is_none() ? nullptr : boxes_like(input(object), rois, map);
}

// Runs without the interpreter's lock. Before Python 3.14 a daemon thread that asks for the lock
// while the interpreter is shutting down is unwound through frames that forbid it, and the process
// aborts. So shutting down waits for the calls under way, and calls after that keep the lock.
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

// (scale_y, scale_x, sampling_ratio, pixel_offset, input_offset, end_offset, min_size or None,
// floor)
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

int64_t forward(const nb::object& features_object, const nb::object& rois_object,
                const nb::object& tangent_object, const Rule& rule, const nb::object& output_object,
                int threads) {
  const Tensor features = tensor_of(input(features_object)),
               pooled = tensor_of(output(output_object));
  const Rois rois = rois_of(rois_object);
  const Params params = params_of(rule);
  const void* tangent = tangent_of(tangent_object, rois, features.dtype);
  return run(rois, features.shape[0],
             [&] { roialign::forward(features, rois, tangent, params, pooled, threads); });
}

int64_t adjoint(const nb::object& d_output_object, const nb::object& rois_object,
                const nb::object& tangent_object, const Rule& rule,
                const nb::object& d_features_object, int threads) {
  const Tensor d_output = tensor_of(input(d_output_object)),
               d_features = tensor_of(output(d_features_object));
  const Rois rois = rois_of(rois_object);
  const Params params = params_of(rule);
  const void* tangent = tangent_of(tangent_object, rois, d_output.dtype);
  return run(rois, d_features.shape[0],
             [&] { roialign::adjoint(d_output, rois, tangent, params, d_features, threads); });
}

int64_t box_gradient(const nb::object& d_output_object, const nb::object& features_object,
                     const nb::object& rois_object, const Rule& rule,
                     const nb::object& d_boxes_object, int threads) {
  const Tensor d_output = tensor_of(input(d_output_object)),
               features = tensor_of(input(features_object));
  const Rois rois = rois_of(rois_object);
  const Params params = params_of(rule);
  void* d_boxes = boxes_like(output(d_boxes_object), rois, features.dtype);
  return run(rois, features.shape[0],
             [&] { roialign::box_gradient(d_output, features, rois, params, d_boxes, threads); });
}

// `bytes` of memory for a result; NumPy keeps it alive, the cache of freed buffers takes it back.
nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>> allocate(size_t bytes) {
  struct Buffer {
    explicit Buffer(size_t bytes) : bytes(bytes), memory(take_buffer(bytes)) {}
    ~Buffer() { give_buffer(memory, bytes); }
    const size_t bytes;
    void* const memory;
  };
  auto buffer = std::make_unique<Buffer>(bytes);
  const nb::capsule owner(buffer.get(), [](void* p) noexcept { delete static_cast<Buffer*>(p); });
  return nb::ndarray<nb::numpy, uint8_t, nb::ndim<1>>(buffer.release()->memory, {bytes}, owner);
}

}  // namespace
}  // namespace roialign::python

NB_MODULE(_core, m) {
  using namespace roialign;
  m.doc() = "Native core of roialign. Internal: use the functions of roialign.";
  try {
    engine();
    cache_limit();
  } catch (const std::runtime_error& error) {
    throw nb::import_error(error.what());
  }
  const auto names = [](const std::vector<std::string>& list) { return nb::tuple(nb::cast(list)); };
  m.attr("isa") = engine().name;
  m.attr("compiled_isas") = names(compiled_isas());
  m.attr("usable_isas") = names(usable_isas());
  m.def("available_cpus", &available_cpus, nb::arg("cgroup") = "/sys/fs/cgroup");
  m.def("accept", &python::accept);
  m.def("has_memory", &python::has_memory);
  m.def("are_ordinary", &python::are_ordinary);
  m.def("allocate", &python::allocate);
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&python::wait_for_calls));
  m.def("forward", &python::forward, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg());
  m.def("adjoint", &python::adjoint, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(),
        nb::arg());
  m.def("box_gradient", &python::box_gradient);
  nb::dict xla_handlers;  // operation: a capsule, to be registered with XLA
  for (const xla::NamedHandler& named : xla::kHandlers) {
    xla_handlers[named.name] = nb::capsule(reinterpret_cast<const void*>(named.handler));
  }
  m.attr("xla_handlers") = xla_handlers;
  m.def("set_xla_threads", &xla::set_num_threads);
#if defined(ROIALIGN_FAIL_ALLOCATIONS)
  m.def("fail_allocation", &fail_allocation);
#endif
}
