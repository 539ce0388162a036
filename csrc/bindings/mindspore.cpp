// The C entries that mindspore.ops.Custom finds in this library by name. Each gets the addresses,
// shapes and dtypes of its inputs and then of its result, all contiguous, and returns 0 or a code
// with which MindSpore raises. A RoI whose image index is bad pools to 0 and has gradient 0.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <exception>

#include "../operations.hpp"

#if defined(_WIN32)
#define ROIALIGN_ENTRY extern "C" __declspec(dllexport) int
#else
#define ROIALIGN_ENTRY extern "C" __attribute__((visibility("default"))) int
#endif

namespace roialign::mindspore {
namespace {

enum Code { done, refused, failed, second_derivative };

// (scale_y, scale_x, sampling_ratio, pixel_offset, input_offset, end_offset, min_size or NaN,
// floor, threads), float64
constexpr int64_t kRule = 9;

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
  constexpr std::array<const char*, 5> names{"float16", "bfloat16", "float32", "float64", "int64"};
  static_assert(int(DType::float16) == 0 && int(DType::int64) == 4);
  const auto found = std::find_if(names.begin(), names.end(),
                                  [&](const char* known) { return std::strcmp(known, name) == 0; });
  require(found != names.end());
  return DType(found - names.begin());
}

Tensor tensor(const Call& call, int i) {
  require(call.ndims[i] == 4);
  return dense(call.data[i], dtype_of(call.dtypes[i]), call.shapes[i]);
}

bool is_boxes(const Call& call, int i, int64_t count) {
  return call.ndims[i] == 2 && call.shapes[i][0] == count && call.shapes[i][1] == 4;
}

// The inputs `boxes` and `image_index`, of which the boxes are the i-th.
Rois rois(const Call& call, int i) {
  require(call.ndims[i] == 2 && call.ndims[i + 1] == 1);
  const int64_t count = call.shapes[i][0];
  require(is_boxes(call, i, count) && call.shapes[i + 1][0] == count);
  return {count,  call.data[i],     dtype_of(call.dtypes[i]),
          {4, 1}, call.data[i + 1], dtype_of(call.dtypes[i + 1]),
          1};
}

// A box tangent, or box gradient: of the coordinate type.
void* boxes_like(const Call& call, int i, const Rois& rois, DType map) {
  require(is_boxes(call, i, rois.count) && dtype_of(call.dtypes[i]) == coordinate_type(map));
  return call.data[i];
}

struct Rule {
  Params params;
  int threads;
};

Rule rule(const Call& call, int i) {
  require(call.ndims[i] == 1 && call.shapes[i][0] == kRule &&
          dtype_of(call.dtypes[i]) == DType::float64);
  const double* r = static_cast<const double*>(call.data[i]);
  const bool has_min = !std::isnan(r[6]);
  const int64_t ratio = r[2] > 0 ? int64_t(std::min(r[2], 0x1p62)) : -1;
  const int threads = r[8] > 1 ? int(std::min(r[8], 0x1p15)) : 1;
  return {{{r[0], r[1]}, ratio, {r[3], r[4], r[5], has_min ? r[6] : 0.0, has_min, r[7] != 0}},
          threads};
}

// forward and adjoint: (array, boxes, image_index, tangent, rule) -> result. A tangent of one
// dimension is none.
template <class Operation>
void pooled(const Call& call, const Operation& operation) {
  require(call.count == 6);
  const Tensor array = tensor(call, 0), result = tensor(call, 5);
  const Rois r = rois(call, 1);
  const bool has_tangent = call.ndims[3] != 1;
  const void* tangent = has_tangent ? boxes_like(call, 3, r, array.dtype) : nullptr;
  const Rule numbers = rule(call, 4);
  operation(array, r, tangent, numbers.params, result, numbers.threads);
}

// (d_output, features, boxes, image_index, rule) -> d_boxes
void boxes(const Call& call) {
  require(call.count == 6);
  const Tensor d_output = tensor(call, 0), features = tensor(call, 1);
  const Rois r = rois(call, 2);
  const Rule numbers = rule(call, 4);
  void* d_boxes = boxes_like(call, 5, r, features.dtype);
  box_gradient(d_output, features, r, numbers.params, d_boxes, numbers.threads);
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
  return code_of([&] { pooled({count, data, ndims, shapes, dtypes}, roialign::forward); });
}

ROIALIGN_ENTRY roialign_adjoint(int count, void** data, int* ndims, int64_t** shapes,
                                const char** dtypes, void*, void*) {
  return code_of([&] { pooled({count, data, ndims, shapes, dtypes}, roialign::adjoint); });
}

ROIALIGN_ENTRY roialign_box_gradient(int count, void** data, int* ndims, int64_t** shapes,
                                     const char** dtypes, void*, void*) {
  return code_of([&] { boxes({count, data, ndims, shapes, dtypes}); });
}

// What a graph runs where a second derivative in the boxes is used: MindSpore's error names it.
ROIALIGN_ENTRY roialign_has_no_second_derivative_in_the_boxes(int, void**, int*, int64_t**,
                                                              const char**, void*, void*) {
  return second_derivative;
}

}  // namespace roialign::mindspore
