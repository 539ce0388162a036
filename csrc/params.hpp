// What a call is made of: arrays as pointers, shapes and strides, and the numbers of the rule.
#pragma once

#include <cstdint>

namespace roialign {

enum class DType { float16, bfloat16, float32, float64, int64 };

// A four-dimensional array: (N, C, H, W) or (K, C, P, Q). Strides count elements.
struct Tensor {
  void* data;
  DType dtype;
  int64_t shape[4];
  int64_t stride[4];
};

struct Rois {
  int64_t count;      // K
  const void* boxes;  // (K, 4): x1, y1, x2, y2 in image pixels, any float dtype
  DType boxes_dtype;
  int64_t boxes_stride[2];
  const void* image_index;  // (K,): int64 or any float dtype
  DType index_dtype;
  int64_t index_stride;
};

// The numbers of a convention: docs/spec.md, equations (1) to (3).
struct Convention {
  double pixel_offset;
  double input_offset;
  double end_offset;
  double min_size;
  bool has_min_size;
  bool adaptive_floor;
};

struct Params {
  double scale[2];         // y, x: feature pixels per image pixel
  int64_t sampling_ratio;  // samples per bin and axis; <= 0 adapts to the box
  Convention convention;
};

}  // namespace roialign
