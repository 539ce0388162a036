// Coordinates and taps of one axis. It knows nothing of the other axis, of channels or threads.
#pragma once

#include <cstdint>
#include <vector>

#include "rule.hpp"

namespace roialign {

// docs/spec.md, equation (1): where a box starts, and how long it is.
template <class Real>
struct Extent {
  Real start, size;
  bool clamped;  // min_size holds the size, so it does not move with the box's end
};

template <class Real>
Extent<Real> extent_of(Real lo, Real hi, const Rule& rule, Real scale) {
  const Real input = Real(rule.input_offset), pixel = Real(rule.pixel_offset);
  const Real start = (lo + input) * scale - pixel;
  const Real end = (hi + input + Real(rule.end_offset)) * scale - pixel;
  const Real size = end - start, least = Real(rule.min_size);
  return {start, size < least ? least : size, size < least};
}

// Equation (2): the position of sample i of bin k is start + k * bin + offset_of(i, bin, samples).
template <class Real>
Real offset_of(Real i, Real bin, Real samples) {
  return ((i + Real(0.5)) * bin) / samples;
}

// A sparse matrix of `bins` rows: the entries of bin k are [first[k], first[k + 1]); what lies
// beyond the last is room. `weight[0]` alone holds values; slopes use both: in the box's start and
// in its end.
struct Taps {
  std::vector<int64_t> first, index;
  std::vector<double> weight[2];

  int64_t bins() const { return int64_t(first.size()) - 1; }
  int64_t count() const { return first.back(); }
};

// The taps of one box on one axis of `size` pixels: row k of `values` averages the samples of bin
// k; `slopes` (may be null) is its derivative in `lo` and in `hi`. Real is the coordinate type.
template <class Real>
void axis_taps(Real lo, Real hi, const Rule& rule, int64_t bins, int64_t size, Real scale,
               Taps& values, Taps* slopes);

}  // namespace roialign
