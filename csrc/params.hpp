// What a call is made of, beside the numbers of the rule: arrays as pointers, shapes and strides.
#pragma once

#include <cstdint>

#include "rule.hpp"

namespace roialign {

enum class DType {
  float16,
  bfloat16,
  float32,
  float64,
  int8,
  int16,
  int32,
  int64,
  uint8,
  uint16,
  uint32,
  uint64
};

constexpr bool is_float(DType dtype) {
  return dtype <= DType::float64;
}

constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::int8:
    case DType::uint8:
      return 1;
    case DType::float16:
    case DType::bfloat16:
    case DType::int16:
    case DType::uint16:
      return 2;
    case DType::float32:
    case DType::int32:
    case DType::uint32:
      return 4;
    default:
      return 8;
  }
}

// Coordinates, box tangents and box gradients of a map of this dtype.
constexpr DType coordinate_type(DType map) {
  return map == DType::float64 ? DType::float64 : DType::float32;
}

// A four-dimensional array: (N, C, H, W) or (K, C, P, Q). Strides count elements.
struct Tensor {
  void* data;
  DType dtype;
  int64_t shape[4];
  int64_t stride[4];
};

struct Map {
  Tensor array;     // (N, C, H, W)
  double scale[2];  // y, x: feature pixels per image pixel
};

// The maps of a call: of one dtype, with the same images and channels.
struct Maps {
  const Map* at;
  int64_t count;

  const Map& operator[](int64_t i) const { return at[i]; }
  const Tensor& first() const { return at[0].array; }
};

// One number for each RoI, of any dtype.
struct Column {
  const void* data;
  DType dtype;
  int64_t stride;
};

struct Rois {
  int64_t count;      // K
  const void* boxes;  // (K, 4): x1, y1, x2, y2 in image pixels, any float dtype
  DType boxes_dtype;
  int64_t boxes_stride[2];
  Column image_index;
  Column level;  // which map, -1 for none; without data: the first
};

}  // namespace roialign
