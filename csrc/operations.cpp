#include "operations.hpp"

#include <cstring>
#include <stdexcept>

#include "dispatch.hpp"

namespace roialign {
namespace {

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

void require_fit(const Tensor& map, const Rois& rois, const Tensor& pooled) {
  require(
      pooled.shape[0] == rois.count && pooled.shape[1] == map.shape[1] && pooled.dtype == map.dtype,
      "roialign: the map, the boxes and the pooled array do not fit");
  require(map.dtype != DType::int64 && rois.boxes_dtype != DType::int64,
          "roialign: maps and boxes must be of a float type");
}

int64_t size_of(const Tensor& tensor) {
  return tensor.shape[0] * tensor.shape[1] * tensor.shape[2] * tensor.shape[3];
}

}  // namespace

void forward(const Tensor& features, const Rois& rois, const void* tangent, const Params& params,
             const Tensor& output, int threads) {
  require_fit(features, rois, output);
  if (size_of(output) == 0) return;
  require_pixels(features, output);
  engine().forward(features, rois, tangent, params, output, threads);
}

void adjoint(const Tensor& d_output, const Rois& rois, const void* tangent, const Params& params,
             const Tensor& d_features, int threads) {
  require_fit(d_features, rois, d_output);
  require(d_output.shape[2] > 0 && d_output.shape[3] > 0, "roialign: d_output has no bins");
  if (size_of(d_features) == 0) return;
  if (rois.count) require_pixels(d_features, d_output);
  engine().adjoint(d_output, rois, tangent, params, d_features, threads);
}

void box_gradient(const Tensor& d_output, const Tensor& features, const Rois& rois,
                  const Params& params, void* d_boxes, int threads) {
  require_fit(features, rois, d_output);
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
