// The three operations for one instruction set. dispatch.cpp chooses among them.
#pragma once

#include "params.hpp"

namespace roialign {

// Box tangents and gradients are (K, 4) contiguous arrays of the coordinate type: double where the
// features (d_output for the adjoint) are float64, else float. A null tangent means none.
struct Engine {
  const char* name;

  void (*forward)(const Tensor& features, const Rois& rois, const void* tangent,
                  const Params& params, const Tensor& output, int threads);
  void (*adjoint)(const Tensor& d_output, const Rois& rois, const void* tangent,
                  const Params& params, const Tensor& d_features, int threads);
  void (*box_gradient)(const Tensor& d_output, const Tensor& features, const Rois& rois,
                       const Params& params, void* d_boxes, int threads);
};

}  // namespace roialign
