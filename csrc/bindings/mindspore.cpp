// The C entries that mindspore.ops.Custom finds in this library by name. Each gets the addresses,
// shapes and dtypes of its inputs and then of its results, all contiguous, and returns 0 or a code
// with which MindSpore raises. A RoI whose image index or level is bad pools to 0 and has gradient
// 0.
//
// The first input is a vector of float64: (threads, number of maps, the scales y and x of each map,
// the numbers of the rule). Then come
//   forward:       the maps, boxes, image_index, levels if there are several maps, tangent
//   adjoint:       d_output, boxes, image_index, levels if there are several maps, tangent
//   box_gradient:  d_output, the maps, boxes, image_index, levels if there are several maps
// A tangent of one dimension is none.
#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <vector>

#include "../operations.hpp"

#if defined(_WIN32)
#define ROIALIGN_ENTRY extern "C" __declspec(dllexport) int
#else
#define ROIALIGN_ENTRY extern "C" __attribute__((visibility("default"))) int
#endif

namespace roialign::mindspore {
namespace {

enum Code { done, refused, failed, second_derivative };

struct Call {
  int count;
  void** data;
  const int* ndims;
  int64_t** shapes;
  const char** dtypes;
};

struct Refused {};

void require(bool condition) {
  if (!condition) throw Refused();
}

DType dtype_of(const char* name) {
  constexpr std::array<const char*, 12> names{"float16", "bfloat16", "float32", "float64",
                                              "int8",    "int16",    "int32",   "int64",
                                              "uint8",   "uint16",   "uint32",  "uint64"};
  static_assert(int(DType::float16) == 0 && int(DType::uint64) == 11);
  const auto found = std::find_if(names.begin(), names.end(),
                                  [&](const char* known) { return std::strcmp(known, name) == 0; });
  require(found != names.end());
  return DType(found - names.begin());
}

// Reads a call's arrays, one after another.
class Reader {
 public:
  explicit Reader(const Call& call) : call_(call) {
    const double* numbers = static_cast<const double*>(vector(DType::float64));
    const int64_t count = call.shapes[0][0];
    require(count >= 2 && numbers[1] >= 1 && numbers[1] <= double(count - 2) / 2);
    threads = numbers[0] > 1 ? int(std::min(numbers[0], 0x1p15)) : 1;
    maps_.resize(size_t(numbers[1]));
    for (Map& map : maps_) {
      map.scale[0] = numbers[2 + 2 * (&map - maps_.data())];
      map.scale[1] = numbers[3 + 2 * (&map - maps_.data())];
    }
    const int64_t rule_at = 2 + 2 * int64_t(maps_.size());
    rule = rule_of(numbers + rule_at, count - rule_at);
  }

  int threads;
  Rule rule;

  Tensor tensor() {
    const int i = next(4);
    return contiguous(call_.data[i], dtype_of(call_.dtypes[i]), call_.shapes[i]);
  }
  Maps maps() {
    for (Map& map : maps_) map.array = tensor();
    return {maps_.data(), int64_t(maps_.size())};
  }
  Rois rois() {
    const int i = next(2);
    Rois rois{call_.shapes[i][0], call_.data[i], dtype_of(call_.dtypes[i]), {4, 1}, {}, {}};
    require(rois.count >= 0 && call_.shapes[i][1] == 4);
    rois.image_index = column(rois.count);
    if (maps_.size() > 1) rois.level = column(rois.count);
    return rois;
  }
  // A box tangent, or box gradient: of the coordinate type.
  void* boxes_like(const Rois& rois, DType map) {
    const int i = next(2);
    require(call_.shapes[i][0] == rois.count && call_.shapes[i][1] == 4 &&
            dtype_of(call_.dtypes[i]) == coordinate_type(map));
    return call_.data[i];
  }
  const void* tangent(const Rois& rois, DType map) {
    require(at_ < call_.count);
    if (call_.ndims[at_] != 1) return boxes_like(rois, map);
    ++at_;
    return nullptr;
  }
  void finish() const { require(at_ == call_.count); }

 private:
  // The array at hand, which must have so many dimensions.
  int next(int ndim) {
    require(at_ < call_.count && call_.ndims[at_] == ndim);
    return at_++;
  }
  void* vector(DType dtype) {
    const int i = next(1);
    require(dtype_of(call_.dtypes[i]) == dtype);
    return call_.data[i];
  }
  Column column(int64_t count) {
    const int i = next(1);
    require(call_.shapes[i][0] == count);
    return {call_.data[i], dtype_of(call_.dtypes[i]), 1};
  }

  const Call& call_;
  int at_ = 0;
  std::vector<Map> maps_;
};

void run_forward(const Call& call) {
  Reader read(call);
  const Maps maps = read.maps();
  const Rois rois = read.rois();
  const void* tangent = read.tangent(rois, maps.first().dtype);
  const Tensor output = read.tensor();
  read.finish();
  forward(maps, rois, tangent, read.rule, output, read.threads);
}

void run_adjoint(const Call& call) {
  Reader read(call);
  const Tensor d_output = read.tensor();
  const Rois rois = read.rois();
  const void* tangent = read.tangent(rois, d_output.dtype);
  const Maps maps = read.maps();
  read.finish();
  adjoint(d_output, rois, tangent, read.rule, maps, read.threads);
}

void run_box_gradient(const Call& call) {
  Reader read(call);
  const Tensor d_output = read.tensor();
  const Maps maps = read.maps();
  const Rois rois = read.rois();
  void* d_boxes = read.boxes_like(rois, d_output.dtype);
  read.finish();
  box_gradient(d_output, maps, rois, read.rule, d_boxes, read.threads);
}

// No exception may reach a caller in C.
template <class Body>
int code_of(const Body& body) {
  try {
    body();
    return done;
  } catch (const Refused&) {
    return refused;
  } catch (const std::exception&) {
    return failed;
  }
}

}  // namespace

ROIALIGN_ENTRY roialign_forward(int count, void** data, int* ndims, int64_t** shapes,
                                const char** dtypes, void*, void*) {
  return code_of([&] { run_forward({count, data, ndims, shapes, dtypes}); });
}

ROIALIGN_ENTRY roialign_adjoint(int count, void** data, int* ndims, int64_t** shapes,
                                const char** dtypes, void*, void*) {
  return code_of([&] { run_adjoint({count, data, ndims, shapes, dtypes}); });
}

ROIALIGN_ENTRY roialign_box_gradient(int count, void** data, int* ndims, int64_t** shapes,
                                     const char** dtypes, void*, void*) {
  return code_of([&] { run_box_gradient({count, data, ndims, shapes, dtypes}); });
}

// What a graph runs where a second derivative in the boxes is used: MindSpore's error names it.
ROIALIGN_ENTRY roialign_has_no_second_derivative_in_the_boxes(int, void**, int*, int64_t**,
                                                              const char**, void*, void*) {
  return second_derivative;
}

}  // namespace roialign::mindspore
