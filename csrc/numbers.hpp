// Numbers of any dtype, one at a time: boxes, image indices and levels. Memory may be unaligned.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "params.hpp"

namespace roialign {

inline float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const int exponent = (bits >> 10) & 0x1f, mantissa = bits & 0x3ff;
  float value;
  if (exponent == 31)
    value = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    value = std::ldexp(float(mantissa), -24);
  else
    value = std::ldexp(float(mantissa + 1024), exponent - 25);
  return sign ? -value : value;
}

template <class T>
T element(const void* data, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + i * int64_t(sizeof(T)), sizeof(T));
  return value;
}

// Element i, of a float dtype.
inline double float_at(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float16:
      return half_to_float(element<uint16_t>(data, i));
    case DType::bfloat16: {
      const uint32_t bits = uint32_t(element<uint16_t>(data, i)) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    case DType::float32:
      return element<float>(data, i);
    default:
      return element<double>(data, i);
  }
}

// Element i, of an integer dtype; INT64_MIN beyond int64.
inline int64_t integer_at(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::int8:
      return element<int8_t>(data, i);
    case DType::int16:
      return element<int16_t>(data, i);
    case DType::int32:
      return element<int32_t>(data, i);
    case DType::uint8:
      return element<uint8_t>(data, i);
    case DType::uint16:
      return element<uint16_t>(data, i);
    case DType::uint32:
      return element<uint32_t>(data, i);
    case DType::uint64:
      return int64_t(std::min(element<uint64_t>(data, i), uint64_t{1} << 63));
    default:
      return element<int64_t>(data, i);
  }
}

constexpr int64_t kNoIndex = INT64_MIN;

// Number k of a column, or kNoIndex if it is no integer in [least, end).
inline int64_t index_at(const Column& column, int64_t k, int64_t least, int64_t end) {
  const int64_t i = k * column.stride;
  if (!is_float(column.dtype)) {
    const int64_t index = integer_at(column.data, column.dtype, i);
    return index >= least && index < end ? index : kNoIndex;
  }
  const double index = float_at(column.data, column.dtype, i);
  const bool good = index >= double(least) && index < double(end) && index == std::floor(index);
  return good ? int64_t(index) : kNoIndex;
}

// Number i of a box: x1, y1, x2, y2.
template <class Real>
Real coordinate(const Rois& rois, int64_t k, int64_t i) {
  return Real(
      float_at(rois.boxes, rois.boxes_dtype, k * rois.boxes_stride[0] + i * rois.boxes_stride[1]));
}

// Where a RoI is; -1, -1: on no map or no image.
struct Place {
  int64_t map, image;
};
inline Place place_of(const Rois& rois, int64_t k, Maps maps) {
  const int64_t image = index_at(rois.image_index, k, 0, maps.first().shape[0]);
  const int64_t map = rois.level.data ? index_at(rois.level, k, 0, maps.count) : 0;
  return image < 0 || map < 0 ? Place{-1, -1} : Place{map, image};
}

// The first of `count` numbers of a column that is no integer in [least, end), or -1.
inline int64_t first_bad_index(const Column& column, int64_t count, int64_t least, int64_t end) {
  for (int64_t k = 0; k < count; ++k) {
    if (index_at(column, k, least, end) == kNoIndex) return k;
  }
  return -1;
}

}  // namespace roialign
