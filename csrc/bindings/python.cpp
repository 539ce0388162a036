// The Python module roialign._core: NumPy's buffers as pointers, shapes and strides. The adapters
// check everything that a user can get wrong; what is checked here keeps memory safe.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "../dispatch.hpp"
#include "../memory.hpp"
#include "../parallel.hpp"
#include "../windows.hpp"

namespace nb = nanobind;
using namespace roialign;

namespace {

const Engine* engine = nullptr;

using Input = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;

// bfloat16 arrives as uint16, a view that every NumPy can export.
template <class Array>
DType dtype_of(const Array& array) {
  const nb::dlpack::dtype t = array.dtype();
  if (t == nb::dtype<float>()) return DType::float32;
  if (t == nb::dtype<double>()) return DType::float64;
  if (t == nb::dtype<uint16_t>()) return DType::bfloat16;
  if (t == nb::dtype<int64_t>()) return DType::int64;
  if (t.code == uint8_t(nb::dlpack::dtype_code::Float) && t.bits == 16) return DType::float16;
  throw nb::type_error("_core: unsupported dtype");
}

template <class Array>
Tensor tensor_of(const Array& array) {
  if (array.ndim() != 4) throw nb::value_error("_core: array must have 4 dimensions");
  Tensor tensor{const_cast<void*>(static_cast<const void*>(array.data())), dtype_of(array), {}, {}};
  if (tensor.dtype == DType::int64) throw nb::type_error("_core: unsupported dtype");
  for (int i = 0; i < 4; ++i) {
    tensor.shape[i] = int64_t(array.shape(i));
    tensor.stride[i] = array.stride(i);
  }
  return tensor;
}

Rois rois_of(const Input& boxes, const Input& image_index) {
  if (boxes.ndim() != 2 || boxes.shape(1) != 4 || image_index.ndim() != 1 ||
      image_index.shape(0) != boxes.shape(0)) {
    throw nb::value_error("_core: boxes must be (K, 4) and image_index (K,)");
  }
  const Rois rois{int64_t(boxes.shape(0)), boxes.data(), dtype_of(boxes),
                  {boxes.stride(0), boxes.stride(1)}, image_index.data(), dtype_of(image_index),
                  image_index.stride(0)};
  if (rois.boxes_dtype == DType::int64) throw nb::type_error("_core: unsupported dtype");
  return rois;
}

// The box tangent or gradient: (K, 4) contiguous, of the coordinate type.
template <class Array>
void* boxes_like(const Array& array, const Rois& rois, DType dtype) {
  const DType coordinate = dtype == DType::float64 ? DType::float64 : DType::float32;
  if (array.ndim() != 2 || int64_t(array.shape(0)) != rois.count || array.shape(1) != 4 ||
      dtype_of(array) != coordinate ||
      (rois.count > 0 && (array.stride(0) != 4 || array.stride(1) != 1))) {
    throw nb::value_error("_core: box tangents and gradients must be contiguous (K, 4)");
  }
  return const_cast<void*>(static_cast<const void*>(array.data()));
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

void require(bool condition, const char* message) {
  if (!condition) throw nb::value_error(message);
}

// A map that RoIs can sample: the engine counts the pixels of an axis in 32 bits.
void require_pixels(const Tensor& map) {
  for (const int axis : {2, 3}) {
    require(map.shape[axis] > 0 && map.shape[axis] <= INT32_MAX, "_core: no map to be sampled");
  }
}

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
int64_t forward(const Input& features_array, const Input& boxes, const Input& image_index,
                const nb::object& tangent_array, const Rule& rule, const Output& output_array,
                int threads) {
  const Tensor features = tensor_of(features_array), output = tensor_of(output_array);
  const Rois rois = rois_of(boxes, image_index);
  const Params params = params_of(rule);
  require(output.shape[0] == rois.count && output.shape[1] == features.shape[1] &&
              output.dtype == features.dtype,
          "_core: output does not fit features and boxes");
  void* tangent = nullptr;
  if (!tangent_array.is_none()) {
    tangent = boxes_like(nb::cast<Input>(tangent_array), rois, features.dtype);
  }
  const Unlocked unlocked;
  const int64_t bad = bad_image_index(rois, features.shape[0]);
  const int64_t size = output.shape[0] * output.shape[1] * output.shape[2] * output.shape[3];
  if (bad >= 0 || size == 0) return bad;
  require_pixels(features);
  engine->forward(features, rois, tangent, params, output, threads);
  return bad;
}

int64_t adjoint(const Input& d_output_array, const Input& boxes, const Input& image_index,
                const nb::object& tangent_array, const Rule& rule, const Output& d_features_array,
                int threads) {
  const Tensor d_output = tensor_of(d_output_array), d_features = tensor_of(d_features_array);
  const Rois rois = rois_of(boxes, image_index);
  const Params params = params_of(rule);
  require(d_output.shape[0] == rois.count && d_output.shape[1] == d_features.shape[1] &&
              d_output.dtype == d_features.dtype && d_output.shape[2] > 0 && d_output.shape[3] > 0,
          "_core: d_features does not fit d_output and boxes");
  void* tangent = nullptr;
  if (!tangent_array.is_none()) {
    tangent = boxes_like(nb::cast<Input>(tangent_array), rois, d_output.dtype);
  }
  const Unlocked unlocked;
  const int64_t bad = bad_image_index(rois, d_features.shape[0]);
  const int64_t size =
      d_features.shape[0] * d_features.shape[1] * d_features.shape[2] * d_features.shape[3];
  if (bad >= 0 || size == 0) return bad;
  if (rois.count) require_pixels(d_features);
  engine->adjoint(d_output, rois, tangent, params, d_features, threads);
  return bad;
}

int64_t box_gradient(const Input& d_output_array, const Input& features_array, const Input& boxes,
                     const Input& image_index, const Rule& rule, const Output& d_boxes_array,
                     int threads) {
  const Tensor d_output = tensor_of(d_output_array), features = tensor_of(features_array);
  const Rois rois = rois_of(boxes, image_index);
  const Params params = params_of(rule);
  require(d_output.shape[0] == rois.count && d_output.shape[1] == features.shape[1] &&
              d_output.dtype == features.dtype && d_output.shape[2] > 0 && d_output.shape[3] > 0,
          "_core: d_output does not fit features and boxes");
  void* d_boxes = boxes_like(d_boxes_array, rois, features.dtype);
  const Unlocked unlocked;
  const int64_t bad = bad_image_index(rois, features.shape[0]);
  if (bad >= 0 || rois.count == 0) return bad;
  if (features.shape[1] == 0) {  // no channel: nothing depends on the boxes
    std::memset(d_boxes, 0, size_t(d_boxes_array.nbytes()));
    return bad;
  }
  require_pixels(features);
  engine->box_gradient(d_output, features, rois, params, d_boxes, threads);
  return bad;
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

NB_MODULE(_core, m) {
  m.doc() = "Native core of roialign. Internal: use the functions of roialign.";
  try {
    engine = &choose_engine();
  } catch (const std::runtime_error& error) {
    throw nb::import_error(error.what());
  }
  const auto names = [](const std::vector<std::string>& list) { return nb::tuple(nb::cast(list)); };
  m.attr("isa") = engine->name;
  m.attr("compiled_isas") = names(compiled_isas());
  m.attr("usable_isas") = names(usable_isas());
  m.def("available_cpus", &available_cpus);
  m.def("allocate", &allocate);
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&wait_for_calls));
  // Arrays are never converted: a silent copy of an output would lose the result.
  m.def("forward", &forward, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
        nb::arg().none(), nb::arg(), nb::arg().noconvert(), nb::arg());
  m.def("adjoint", &adjoint, nb::arg().noconvert(), nb::arg().noconvert(), nb::arg().noconvert(),
        nb::arg().none(), nb::arg(), nb::arg().noconvert(), nb::arg());
  m.def("box_gradient", &box_gradient, nb::arg().noconvert(), nb::arg().noconvert(),
        nb::arg().noconvert(), nb::arg().noconvert(), nb::arg(), nb::arg().noconvert(), nb::arg());
}
