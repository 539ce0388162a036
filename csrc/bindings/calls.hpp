// A call that comes through C, from XLA or MindSpore: contiguous arrays and numbers.
#pragma once

#include <vector>

#include "../operations.hpp"

namespace roialign {

struct Array {
  void* data;
  DType dtype;
  int64_t ndim;
  const int64_t* shape;
};

// The arrays are boxes (K, 4), or (K, 5) where they are turned, image_index (K,), levels (K,),
// which one map may lack, selectors like the maps where the reduction is none of means; then
//   forward:       the maps, tangent, output
//   adjoint:       d_output, tangent, a gradient for each map
//   box_gradient:  d_output, the maps, d_boxes
// A tangent may be missing, or one number stands for none. Maps and pooled arrays come as (N, C, H,
// W) and (K, C, P, Q), or with channels last.
struct Call {
  std::vector<Array> arrays;
  std::vector<Map> maps;  // their scales; operations read their arrays
  Rule rule;
  bool channels_last = false;
  int threads = 1;
};

// They take no shape, dtype or number of arrays on trust: what does not fit throws
// std::invalid_argument.
void run_forward(Call& call);
void run_adjoint(Call& call);
void run_box_gradient(Call& call);

}  // namespace roialign
