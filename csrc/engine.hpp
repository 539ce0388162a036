// The operations for one instruction set. dispatch.cpp chooses among them.
#pragma once

#include "params.hpp"

namespace roialign {

// Box tangents and gradients are contiguous arrays of the coordinate type, (K, 4), or (K, 5) of
// boxes that are turned. A null tangent means none.

// Where a bin is its largest sample. `selectors`, maps like the features, say which sample that is;
// in the forward there may be none: then the features do.
struct Sampled {
  void (*forward)(Maps features, Maps selectors, const Rois& rois, const void* tangent,
                  const Rule& rule, const Tensor& output, int threads);
  void (*adjoint)(const Tensor& d_output, Maps selectors, const Rois& rois, const void* tangent,
                  const Rule& rule, Maps d_features, int threads);
  void (*box_gradient)(const Tensor& d_output, Maps features, Maps selectors, const Rois& rois,
                       const Rule& rule, void* d_boxes, int threads);
};

// Where it is their mean.
struct Engine {
  const char* name;
  const Sampled& sampled;

  void (*forward)(Maps features, const Rois& rois, const void* tangent, const Rule& rule,
                  const Tensor& output, int threads);
  void (*adjoint)(const Tensor& d_output, const Rois& rois, const void* tangent, const Rule& rule,
                  Maps d_features, int threads);
  void (*box_gradient)(const Tensor& d_output, Maps features, const Rois& rois, const Rule& rule,
                       void* d_boxes, int threads);
};

}  // namespace roialign
