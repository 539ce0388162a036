// The three operations as bindings call them. Shapes, dtypes and numbers that do not fit throw
// std::invalid_argument before any memory is touched, and every element of a result is written. A
// RoI on no map (level -1), or whose level or image index is bad, pools to 0 and has gradient 0;
// first_bad_index (numbers.hpp) finds it.
#pragma once

#include <stdexcept>

#include "params.hpp"

namespace roialign {

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

// The rule of `count` numbers, in the order of ROIALIGN_RULE; those that are missing have their
// defaults.
Rule rule_of(const double* numbers, int64_t count);

// `tangent`, and `d_boxes` below: contiguous (K, 4), or (K, 5) of boxes that are turned, of the
// maps' coordinate type; a null one means none. `selectors`: where bins are their largest samples,
// maps like the features that say which those are; only the adjoint needs them, elsewhere the
// features stand in for none.
void forward(Maps features, const Rois& rois, const void* tangent, const Rule& rule,
             const Tensor& output, int threads, Maps selectors = {});
void adjoint(const Tensor& d_output, const Rois& rois, const void* tangent, const Rule& rule,
             Maps d_features, int threads, Maps selectors = {});
void box_gradient(const Tensor& d_output, Maps features, const Rois& rois, const Rule& rule,
                  void* d_boxes, int threads, Maps selectors = {});

// A contiguous array (N, C, H, W).
Tensor contiguous(void* data, DType dtype, const int64_t* shape);

}  // namespace roialign
