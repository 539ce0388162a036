// The three operations for one instruction set. dispatch.cpp chooses among them.
#pragma once

#include "params.hpp"

namespace roialign {

// Box tangents and gradients are (K, 4) contiguous arrays of the coordinate type. A null tangent
// means none.
struct Engine {
  const char* name;

  void (*forward)(Maps features, const Rois& rois, const void* tangent, const Rule& rule,
                  const Tensor& output, int threads);
  void (*adjoint)(const Tensor& d_output, const Rois& rois, const void* tangent, const Rule& rule,
                  Maps d_features, int threads);
  void (*box_gradient)(const Tensor& d_output, Maps features, const Rois& rois, const Rule& rule,
                       void* d_boxes, int threads);
};

}  // namespace roialign
