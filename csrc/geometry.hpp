// Coordinates and taps of one axis. It knows nothing of the other axis, of channels or threads.
#pragma once

#include <cstdint>
#include <vector>

#include "rule.hpp"

namespace roialign {

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
