#include "operations.hpp"

#include <cstring>
#include <stdexcept>

#include "dispatch.hpp"

namespace roialign {
namespace {

constexpr int64_t kMostElements = INT64_MAX / 32;  // of an array: 32 bytes are a box of float64
constexpr int64_t kMostSamples = 4096;  // if fixed, per bin and axis: it bounds a call's time

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// A map that RoIs can sample, and their bins: the engine counts the pixels of an axis and the bins
// of a RoI in 32 bits.
void require_pixels(const Tensor& map, const Tensor& pooled) {
  for (const int axis : {2, 3}) {
    require(map.shape[axis] > 0 && map.shape[axis] <= INT32_MAX, "roialign: no map to be sampled");
    require(pooled.shape[axis] > 0 && pooled.shape[axis] <= INT32_MAX, "roialign: too many bins");
  }
  require(pooled.shape[2] * pooled.shape[3] <= INT32_MAX, "roialign: too many bins");
}

// How many elements an array has. What comes as a shape may be anything: whatever is counted in
// this library, of elements and of bytes, shall fit in 64 bits.
int64_t size_of(const Tensor& tensor) {
  int64_t size = 1, without_empty = 1;
  for (const int64_t side : tensor.shape) {
    require(side >= 0, "roialign: a dimension is negative");
    require(side <= kMostElements / without_empty, "roialign: an array is too large");
    size *= side;
    if (side > 0) without_empty *= side;
  }
  return size;
}

void require_fit(const Tensor& map, const Rois& rois, const Tensor& pooled, const Params& params) {
  size_of(map);
  size_of(pooled);
  require(params.sampling_ratio <= kMostSamples,
          "roialign: sampling_ratio must be at most 4096; 0 adapts to the box");
  require(
      pooled.shape[0] == rois.count && pooled.shape[1] == map.shape[1] && pooled.dtype == map.dtype,
      "roialign: the map, the boxes and the pooled array do not fit");
  require(map.dtype != DType::int64 && rois.boxes_dtype != DType::int64,
          "roialign: maps and boxes must be of a float type");
}

}  // namespace

Tensor dense(void* data, DType dtype, const int64_t* shape) {
  Tensor tensor{data, dtype, {shape[0], shape[1], shape[2], shape[3]}, {}};
  size_of(tensor);
  int64_t stride = 1;
  for (int i = 3; i >= 0; stride *= shape[i--]) tensor.stride[i] = stride;
  return tensor;
}

void forward(const Tensor& features, const Rois& rois, const void* tangent, const Params& params,
             const Tensor& output, int threads) {
  require_fit(features, rois, output, params);
  if (size_of(output) == 0) return;
  require_pixels(features, output);
  engine().forward(features, rois, tangent, params, output, threads);
}

void adjoint(const Tensor& d_output, const Rois& rois, const void* tangent, const Params& params,
             const Tensor& d_features, int threads) {
  require_fit(d_features, rois, d_output, params);
  require(d_output.shape[2] > 0 && d_output.shape[3] > 0, "roialign: d_output has no bins");
  if (size_of(d_features) == 0) return;
  if (rois.count) require_pixels(d_features, d_output);
  engine().adjoint(d_output, rois, tangent, params, d_features, threads);
}

void box_gradient(const Tensor& d_output, const Tensor& features, const Rois& rois,
                  const Params& params, void* d_boxes, int threads) {
  require_fit(features, rois, d_output, params);
  require(d_output.shape[2] > 0 && d_output.shape[3] > 0, "roialign: d_output has no bins");
  if (rois.count == 0) return;
  if (features.shape[1] == 0) {  // no channel: nothing depends on the boxes
    const bool wide = coordinate_type(features.dtype) == DType::float64;
    std::memset(d_boxes, 0, size_t(rois.count) * 4 * (wide ? sizeof(double) : sizeof(float)));
    return;
  }
  require_pixels(features, d_output);
  engine().box_gradient(d_output, features, rois, params, d_boxes, threads);
}

}  // namespace roialign
