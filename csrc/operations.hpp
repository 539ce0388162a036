// The three operations as bindings call them: shapes, dtypes and numbers that do not fit throw
// std::invalid_argument before any memory is touched, and every element of a result is written. A
// RoI whose image index is bad pools to 0 and has gradient 0; bad_image_index (windows.hpp) finds
// it.
#pragma once

#include "params.hpp"

namespace roialign {

// `tangent`, and `d_boxes` below: (K, 4) contiguous, of coordinate_type(the map); a null one means
// none.
void forward(const Tensor& features, const Rois& rois, const void* tangent, const Params& params,
             const Tensor& output, int threads);
void adjoint(const Tensor& d_output, const Rois& rois, const void* tangent, const Params& params,
             const Tensor& d_features, int threads);
void box_gradient(const Tensor& d_output, const Tensor& features, const Rois& rois,
                  const Params& params, void* d_boxes, int threads);

// A contiguous array (N, C, H, W).
Tensor dense(void* data, DType dtype, const int64_t* shape);

constexpr DType coordinate_type(DType map) {
  return map == DType::float64 ? DType::float64 : DType::float32;
}

}  // namespace roialign
