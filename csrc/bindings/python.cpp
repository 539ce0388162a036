// The Python module roialign._core: NumPy's buffers and torch's tensors as pointers, shapes and
// strides. The adapters check everything that a user can get wrong; what is checked here keeps
// memory safe.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "../dispatch.hpp"
#include "../geometry.hpp"
#include "../log.hpp"
#include "../memory.hpp"
#include "../numbers.hpp"
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

// An array of at most four dimensions, as long as its object lives: of NumPy (maps of bfloat16 as
// uint16, a view that every NumPy can export), or a tensor.
struct Array {
  void* data = nullptr;
  DType dtype = DType::float32;
  bool stands = false;  // for bfloat16, perhaps
  nb::dlpack::device device{nb::device::cpu::value, 0};
  int ndim = 0;
  int64_t shape[4] = {}, stride[4] = {};
};

// `stands`: 16-bit unsigned integers stand for bfloat16, which NumPy has not.
bool take_dtype(const nb::dlpack::dtype& t, bool stands, Array& array) {
  using Code = nb::dlpack::dtype_code;
  struct Known {
    Code code;
    int bits;
    DType dtype;
  };
  constexpr Known known[] = {
      {Code::Float, 32, DType::float32}, {Code::Float, 64, DType::float64},
      {Code::Float, 16, DType::float16}, {Code::Bfloat, 16, DType::bfloat16},
      {Code::Int, 64, DType::int64},     {Code::Int, 32, DType::int32},
      {Code::Int, 16, DType::int16},     {Code::Int, 8, DType::int8},
      {Code::UInt, 8, DType::uint8},     {Code::UInt, 16, DType::uint16},
      {Code::UInt, 32, DType::uint32},   {Code::UInt, 64, DType::uint64},
      {Code::Bool, 8, DType::uint8},
  };
  const nb::dlpack::dtype bfloat16{uint8_t(Code::Bfloat), 16, 1};
  const bool is_stand_in = stands && t.code == uint8_t(Code::UInt) && t.bits == 16 && t.lanes == 1;
  const nb::dlpack::dtype read = is_stand_in ? bfloat16 : t;
  for (const Known& k : known) {
    if (read.code != uint8_t(k.code) || read.bits != k.bits || read.lanes != 1) continue;
    array.dtype = k.dtype;
    array.stands = is_stand_in;
    return true;
  }
  return false;
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
// Whether a tensor's elements are where a kernel can reach them, and aligned there.
bool has_memory(const nb::object& object) {
  nb::dlpack::dltensor given;
  if (!is_tensor(object) || !describe(object, given)) return false;
  return uintptr_t(given.data) % std::max(given.dtype.bits / 8, 1) == 0;
}

// Never converts: a silent copy of an output would lose the result.
template <class NdArray>
bool read(const nb::handle& object, Array& array) {
  const bool stands = !is_tensor(object);
  const auto take = [&](const auto& dtype, const auto& ndim, const auto& shape,
                        const auto& stride) {
    if (!take_dtype(dtype, stands, array) || ndim > 4) return false;
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

// Whether typed reads and writes are allowed.
bool is_aligned(const Array& array) {
  const bool empty = std::find(array.shape, array.shape + array.ndim, 0) < array.shape + array.ndim;
  return empty || uintptr_t(array.data) % uintptr_t(size_of(array.dtype)) == 0;
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

// Whether these are a map of pixels (N, C, H, W) and rows (K, 5) of which no check of types and
// shapes can complain, of float dtypes, aligned in the memory of one CPU or GPU.
bool takes_rows(const nb::object& features, const nb::object& rois) {
  Array map, rows;
  if (!read<Input>(features, map) || !read<Input>(rois, rows)) return false;
  const auto [type, id] = map.device;
  if (type != nb::device::cpu::value && type != nb::device::cuda::value &&
      type != nb::device::rocm::value) {
    return false;
  }
  if (rows.device.device_type != type || rows.device.device_id != id) return false;
  for (const Array& array : {map, rows}) {
    if (!is_float(array.dtype) || array.stands || !is_aligned(array)) return false;
  }
  for (const int64_t side : map.shape) {
    if (side < 1 || side > INT32_MAX) return false;
  }
  return map.ndim == 4 && rows.ndim == 2 && rows.shape[1] == 5;
}

Column column_of(const Array& array, int64_t count) {
  if (array.ndim != 1 || array.shape[0] != count) {
    throw nb::value_error("_core: an index must be (K,)");
  }
  if (array.stands) throw nb::type_error("_core: an index may not be uint16");
  return {array.data, array.dtype, array.stride[0]};
}

// Of rows: an image index, and as many numbers of the box as there are.
Rois rois_of(const Array& rows, int64_t numbers = 4) {
  if (rows.ndim != 2 || rows.shape[1] != 1 + numbers)
    throw nb::value_error("_core: rois must be (K, 5), or turned (K, 6)");
  const auto boxes = static_cast<char*>(rows.data) + rows.stride[1] * size_of(rows.dtype);
  Rois rois{rows.shape[0], boxes, rows.dtype, {rows.stride[0], rows.stride[1]}, {}, {}};
  rois.image_index = {rows.data, rows.dtype, rows.stride[0]};
  rois.numbers = numbers;
  return rois;
}

// Rows (K, 5), or a tuple: boxes (K, 4) and an image index (K,).
Rois rois_of(const nb::object& object, const nb::object& levels, const Rule& rule) {
  const int64_t numbers = rule.turn != 0 ? kTurnedNumbers : 4;
  Rois rois{};
  if (nb::isinstance<nb::tuple>(object)) {
    const nb::tuple pair = nb::borrow<nb::tuple>(object);
    if (pair.size() != 2) {
      throw nb::value_error("_core: rois as a tuple are (boxes, image_index)");
    }
    const Array boxes = input(pair[0]);
    if (boxes.ndim != 2 || boxes.shape[1] != numbers)
      throw nb::value_error("_core: boxes must be (K, 4), or turned (K, 5)");
    if (boxes.stands) throw nb::type_error("_core: boxes may not be uint16");
    rois = {boxes.shape[0], boxes.data, boxes.dtype, {boxes.stride[0], boxes.stride[1]}, {}, {}};
    rois.image_index = column_of(input(pair[1]), rois.count);
    rois.numbers = numbers;
  } else {
    rois = rois_of(input(object), numbers);
  }
  if (!levels.is_none()) rois.level = column_of(input(levels), rois.count);
  return rois;
}

// A box gradient, or tangent: (K, 4) contiguous, of the coordinate type. An axis of length 1 has
// any stride.
void* boxes_like(const Array& array, const Rois& rois, DType map) {
  const bool contiguous =
      array.stride[1] == 1 && (rois.count == 1 || array.stride[0] == rois.numbers);
  if (array.ndim != 2 || array.shape[0] != rois.count || array.shape[1] != rois.numbers ||
      array.dtype != coordinate_type(map) || !is_aligned(array) || (rois.count && !contiguous)) {
    throw nb::value_error("_core: box tangents and gradients must be aligned, contiguous (K, 4)");
  }
  return array.data;
}
const void* tangent_of(const nb::object& object, const Rois& rois, DType map) {
  return object.is_none() ? nullptr : boxes_like(input(object), rois, map);
}

// Numbers of a tuple or list. (nanobind's own conversion ends the process if memory is short.)
std::vector<double> numbers_of(const nb::handle& sequence) {
  std::vector<double> numbers(nb::len(sequence));
  for (size_t i = 0; i < numbers.size(); ++i) {
    const nb::object number = nb::steal(PySequence_GetItem(sequence.ptr(), Py_ssize_t(i)));
    numbers[i] = number ? PyFloat_AsDouble(number.ptr()) : -1;
    if (numbers[i] == -1 && PyErr_Occurred()) throw nb::python_error();
  }
  return numbers;
}

// The maps of a call: an array, or a tuple or list of them. `scales`: y, x of each.
class MapList {
 public:
  MapList() = default;  // none
  MapList(const nb::object& arrays, const nb::handle& scales, bool written) {
    const auto add = [&](const nb::handle& array) {
      maps_.push_back({tensor_of(written ? output(array) : input(array)), {}});
    };
    if (nb::isinstance<nb::tuple>(arrays) || nb::isinstance<nb::list>(arrays)) {
      for (const nb::handle array : arrays) add(array);
    } else {
      add(arrays);
    }
    const std::vector<double> numbers = numbers_of(scales);
    if (maps_.empty() || numbers.size() != 2 * maps_.size()) {
      throw nb::value_error("_core: every map must have a scale, y and x");
    }
    for (size_t i = 0; i < numbers.size(); ++i) maps_[i / 2].scale[i % 2] = numbers[i];
  }
  operator Maps() const { return {maps_.data(), int64_t(maps_.size())}; }
  DType dtype() const { return maps_[0].array.dtype; }

 private:
  std::vector<Map> maps_;
};

// The features that select largest samples, or None.
MapList selectors_of(const nb::object& arrays, const nb::handle& scales) {
  return arrays.is_none() ? MapList() : MapList(arrays, scales, false);
}

Rule rule_of(const nb::handle& sequence) {
  const std::vector<double> numbers = numbers_of(sequence);
  return roialign::rule_of(numbers.data(), int64_t(numbers.size()));
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

// The thread in which Python runs the handlers of signals.
unsigned long main_thread = 0;

#if !defined(_WIN32)
// The parent's other threads do not live in a forked child.
const int forget_in_child = pthread_atfork(nullptr, nullptr, [] {
  calls_under_way = 0;
  main_thread = PyThread_get_thread_ident();
});
#endif

// A handler has raised an exception, which is set.
struct Interrupted {};

void run_signal_handlers() {
  const PyGILState_STATE state = PyGILState_Ensure();
  const bool raised = PyErr_CheckSignals() != 0;
  PyGILState_Release(state);
  if (raised) throw Interrupted();
}

// A column of indices, each to be an integer in [least, end).
struct Indices {
  const char* name;
  Column column;
  int64_t count, least, end;

  int64_t first_bad() const {
    return column.data ? first_bad_index(column, count, least, end) : -1;
  }
  [[noreturn]] void raise(int64_t bad) const {
    const int64_t at = bad * column.stride;
    nb::object got;
    if (is_float(column.dtype)) {
      got = nb::float_(float_at(column.data, column.dtype, at));
    } else if (column.dtype == DType::uint64) {
      got = nb::int_(element<uint64_t>(column.data, at));
    } else {
      got = nb::int_(integer_at(column.data, column.dtype, at));
    }
    const nb::str message = nb::str("`{}` of RoI {} must be an integer in [{}, {}), got {}")
                                .format(name, bad, least, end, got);
    throw nb::index_error(message.c_str());
  }
};

// Runs an operation, after a look at the indices: on a bad one nothing is done.
template <class Operation>
void run(const Rois& rois, Maps maps, Operation&& operation) {
  const Indices all[] = {
      {"image_index", rois.image_index, rois.count, 0, maps.first().shape[0]},
      {"levels", rois.level, rois.count, -1, maps.count},
  };
  const Indices* wrong = nullptr;
  int64_t bad = -1;
  const bool sees_signals = PyThread_get_thread_ident() == main_thread;
  try {
    const Unlocked unlocked;
    const Polling polling(sees_signals ? run_signal_handlers : nullptr);
    for (const Indices& indices : all) {
      if (!wrong && (bad = indices.first_bad()) >= 0) wrong = &indices;
    }
    if (!wrong) operation();
  } catch (const Interrupted&) {
    throw nb::python_error();
  }
  if (wrong) wrong->raise(bad);
}

// For what cannot raise by itself: an index (K,) of a program that runs without Python.
void check_index(const char* name, const nb::object& object, int64_t end, int64_t least) {
  const Array index = input(object);
  const int64_t count = index.shape[0];
  const Indices indices{name, column_of(index, count), count, least, end};
  const int64_t bad = indices.first_bad();
  if (bad >= 0) indices.raise(bad);
}

void forward(const nb::object& features, const nb::object& scales, const nb::object& rois_object,
             const nb::object& levels, const nb::object& tangent_object, const nb::object& numbers,
             const nb::object& output_object, int threads, const nb::object& selectors) {
  const MapList maps(features, scales, false), deciding = selectors_of(selectors, scales);
  const Rule rule = rule_of(numbers);
  const Rois rois = rois_of(rois_object, levels, rule);
  const Tensor pooled = tensor_of(output(output_object));
  const void* tangent = tangent_of(tangent_object, rois, maps.dtype());
  run(rois, maps, [&] { roialign::forward(maps, rois, tangent, rule, pooled, threads, deciding); });
}

// The first byte of an array and the one behind its last.
std::pair<const char*, const char*> memory_of(const Array& array) {
  const int64_t size = size_of(array.dtype);
  const char *first = static_cast<const char*>(array.data), *last = first;
  for (int i = 0; i < array.ndim; ++i) {
    if (array.shape[i] == 0) return {first, first};
    const int64_t bytes = (array.shape[i] - 1) * array.stride[i] * size;
    (bytes < 0 ? first : last) += bytes;
  }
  return {first, last + size};
}

// Whether the strides show that no two elements share memory: each is beyond what the smaller span.
bool is_apart_from_itself(const Array& array) {
  std::pair<int64_t, int64_t> axes[4];
  for (int i = 0; i < array.ndim; ++i) axes[i] = {array.stride[i], array.shape[i] - 1};
  std::sort(axes, axes + array.ndim);
  int64_t extent = 1;
  for (int i = 0; i < array.ndim; ++i) {
    const auto [stride, steps] = axes[i];
    if (steps > 0 && stride < extent) return false;
    if (steps > 0) extent += steps * stride;
  }
  return true;
}

// Whether this can be the result (K, C, P, Q) of a map and rows: of the map's dtype, aligned, in
// memory apart from itself and both.
bool is_result(const Array& result, const Array& map, const Array& rows, int64_t p, int64_t q) {
  const int64_t shape[] = {rows.shape[0], map.shape[1], p, q};
  if (result.ndim != 4 || result.dtype != map.dtype || !is_aligned(result) ||
      !std::equal(shape, shape + 4, result.shape) || !is_apart_from_itself(result)) {
    return false;
  }
  const auto [first, end] = memory_of(result);
  for (const Array* array : {&map, &rows}) {
    const auto [begin, last] = memory_of(*array);
    if (first < last && begin < end) return false;
  }
  return true;
}

// The same of what `takes_rows` takes, if it is clear that `result` fits. Otherwise nothing is
// done.
bool forward_rows(const nb::object& features, const nb::object& rows_object,
                  const nb::object& result, int64_t p, int64_t q, const nb::object& scales,
                  const nb::object& numbers, int threads) {
  const Array map = input(features), rows = input(rows_object);
  Array output;
  if (!read<nb::ndarray<nb::device::cpu>>(result, output)) return false;  // or not writeable
  if (!is_result(output, map, rows, p, q)) return false;
  const Rois rois = rois_of(rows);
  const Tensor pooled = tensor_of(output);
  const std::vector<double> scale = numbers_of(scales);
  if (scale.size() != 2) throw nb::value_error("_core: a map must have a scale, y and x");
  const Map only{tensor_of(map), {scale[0], scale[1]}};
  const Rule rule = rule_of(numbers);
  run(rois, {&only, 1},
      [&] { roialign::forward({&only, 1}, rois, nullptr, rule, pooled, threads); });
  return true;
}

void adjoint(const nb::object& d_output_object, const nb::object& scales,
             const nb::object& rois_object, const nb::object& levels,
             const nb::object& tangent_object, const nb::object& numbers,
             const nb::object& d_features, int threads, const nb::object& selectors) {
  const Tensor d_output = tensor_of(input(d_output_object));
  const MapList maps(d_features, scales, true), deciding = selectors_of(selectors, scales);
  const Rule rule = rule_of(numbers);
  const Rois rois = rois_of(rois_object, levels, rule);
  const void* tangent = tangent_of(tangent_object, rois, maps.dtype());
  run(rois, maps,
      [&] { roialign::adjoint(d_output, rois, tangent, rule, maps, threads, deciding); });
}

void box_gradient(const nb::object& d_output_object, const nb::object& features,
                  const nb::object& scales, const nb::object& rois_object, const nb::object& levels,
                  const nb::object& numbers, const nb::object& d_boxes_object, int threads,
                  const nb::object& selectors) {
  const Tensor d_output = tensor_of(input(d_output_object));
  const MapList maps(features, scales, false), deciding = selectors_of(selectors, scales);
  const Rule rule = rule_of(numbers);
  const Rois rois = rois_of(rois_object, levels, rule);
  void* d_boxes = boxes_like(output(d_boxes_object), rois, maps.dtype());
  run(rois, maps,
      [&] { roialign::box_gradient(d_output, maps, rois, rule, d_boxes, threads, deciding); });
}

using Pair = std::pair<int64_t, int64_t>;

// For roialign.sampling_grid: samples of a bin, then edges, positions and pixels with weights, in y
// and in x. Of a turned box the pixels are those of all its bins, (first, y, x, weight).
template <class Real>
nb::tuple grid_of(const std::vector<double>& numbers, Pair bins_of_box, Pair map_size,
                  const std::vector<double>& scales, const Rule& rule, int64_t most) {
  const bool turned = rule.turn != 0;
  const int64_t bins[] = {bins_of_box.first, bins_of_box.second};
  const int64_t size[] = {map_size.first, map_size.second};
  const std::vector<Real> box(numbers.begin(), numbers.end());
  if (int(box.size()) != (turned ? kTurnedNumbers : 4) || scales.size() != 2)
    throw nb::value_error("_core: a box has 4 numbers, a turned one 5; a map has two scales");
  const Real scale[] = {Real(scales[0]), Real(scales[1])};
  const Places places = places_of(box.data(), rule, bins, size, scale, most);
  nb::list pixels;
  if (turned) {
    Cells<Real> cells;
    cells.first.assign(size_t(bins[0] * bins[1] + 1), 0);
    if (!places.positions[0].empty())
      turned_cells(box.data(), rule, bins, size, scale[0], static_cast<const Real*>(nullptr), false,
                   cells);
    nb::list y, x;
    for (const Pixel& pixel : cells.pixel) {
      y.append(pixel.y);
      x.append(pixel.x);
    }
    pixels.append(nb::make_tuple(cells.first, y, x, cells.weight));
  } else {
    for (int axis = 0; axis < 2; ++axis) {
      Taps taps;
      taps.first.assign(size_t(bins[axis] + 1), 0);
      if (!places.positions[axis].empty())
        axis_taps(box[1 - axis], box[3 - axis], rule, bins[axis], size[axis], scale[axis], taps,
                  static_cast<Taps*>(nullptr));
      taps.index.resize(size_t(taps.count()));
      taps.weight[0].resize(size_t(taps.count()));
      pixels.append(nb::make_tuple(taps.first, taps.index, taps.weight[0]));
    }
  }
  const auto both = [](const auto* of_axes) { return nb::make_tuple(of_axes[0], of_axes[1]); };
  return nb::make_tuple(both(places.samples), both(places.edges), both(places.positions), pixels);
}

nb::tuple sampling_grid(const std::vector<double>& box, Pair bins, Pair map_size,
                        const std::vector<double>& scales, const nb::object& numbers, bool wide,
                        int64_t most) {
  const auto grid = wide ? grid_of<double> : grid_of<float>;
  return grid(box, bins, map_size, scales, rule_of(numbers), most);
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
    m.attr("logging") = logging();
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
  m.def("takes_rows", &python::takes_rows);
  m.def("check_index", &python::check_index, nb::arg(), nb::arg(), nb::arg(), nb::arg("least") = 0);
  m.def("allocate", &python::allocate);
  m.def("force_way", [](int way) { force_way(Way(way)); });
  m.def("log", &log_line);
  python::main_thread = nb::cast<unsigned long>(
      nb::module_::import_("threading").attr("main_thread")().attr("ident"));
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&python::wait_for_calls));
  nb::list rule_names, rule_defaults;
  for (const char* name : kRuleNames) rule_names.append(name);
  for (const double number : kRuleDefaults) rule_defaults.append(number);
  m.attr("rule_names") = nb::tuple(rule_names);
  m.attr("rule_defaults") = nb::tuple(rule_defaults);
  const nb::arg any;
  const auto optional = nb::arg().none();
  const auto none = nb::arg("selectors").none() = nb::none();
  m.def("forward", &python::forward, any, any, any, optional, optional, any, any, any, none);
  m.def("forward_rows", &python::forward_rows);
  m.def("adjoint", &python::adjoint, any, any, any, optional, optional, any, any, any, none);
  m.def("box_gradient", &python::box_gradient, any, any, any, any, optional, any, any, any, none);
  m.def("sampling_grid", &python::sampling_grid);
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
