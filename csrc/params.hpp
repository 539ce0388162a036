// What a call is made of, beside the numbers of the rule: arrays as pointers, shapes and strides.
#pragma once

#include <cstdint>

#include "rule.hpp"

namespace roialign {

// The element types, and their bytes: those of floats first.
// clang-format off
#define ROIALIGN_DTYPES(DTYPE)                                             \
  DTYPE(float16, 2) DTYPE(bfloat16, 2) DTYPE(float32, 4) DTYPE(float64, 8) \
  DTYPE(int8, 1)    DTYPE(int16, 2)    DTYPE(int32, 4)   DTYPE(int64, 8)   \
  DTYPE(uint8, 1)   DTYPE(uint16, 2)   DTYPE(uint32, 4)  DTYPE(uint64, 8)
// clang-format on

#define ROIALIGN_DTYPE(name, bytes) name,
enum class DType { ROIALIGN_DTYPES(ROIALIGN_DTYPE) };
#undef ROIALIGN_DTYPE
#define ROIALIGN_NAME_OF(name, bytes) #name,
constexpr const char* kDTypeNames[] = {ROIALIGN_DTYPES(ROIALIGN_NAME_OF)};
#undef ROIALIGN_NAME_OF
#define ROIALIGN_BYTES_OF(name, bytes) bytes,
constexpr int64_t kDTypeBytes[] = {ROIALIGN_DTYPES(ROIALIGN_BYTES_OF)};
#undef ROIALIGN_BYTES_OF

constexpr bool is_float(DType dtype) {
  return dtype <= DType::float64;
}

constexpr int64_t size_of(DType dtype) {
  return kDTypeBytes[int(dtype)];
}

// What a map of this dtype is pooled to: bytes are read as they are, and have no gradient.
constexpr DType pooled_type(DType map) {
  return map == DType::uint8 ? DType::float32 : map;
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
  int64_t count;  // K
  // (K, 4): x1, y1, x2, y2 in image pixels, any float dtype; or, of boxes that are turned, (K, 5):
  // the centre x, y, width, height, angle
  const void* boxes;
  DType boxes_dtype;
  int64_t boxes_stride[2];
  Column image_index;
  Column level;         // which map, -1 for none; without data: the first
  int64_t numbers = 4;  // of a box
};

}  // namespace roialign
