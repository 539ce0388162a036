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

// The samples of a bin on one axis that can have its largest value. A bilinear cell, between two
// pixels, has its extremes at its outermost samples: these are the first and the last one of each
// cell, in the order of the definition. Those of bin k are [first[k], first[k + 1]).
template <class Real>
struct Extremes {
  struct Sample {
    int64_t low;      // between this pixel and the next one
    Real fraction;    // 0: the next one has no weight
    double moves[2];  // with the box's start and end, in pixels; 0: held at a border
  };
  struct Outside {
    bool before, after;  // there are samples that are not inside, earlier or later than these
  };
  std::vector<int64_t> first;
  std::vector<Sample> samples;
  std::vector<Outside> outside;
};

// Of one box on one axis, as above. `size`, `scale`: as in axis_taps.
template <class Real>
void axis_extremes(Real lo, Real hi, const Rule& rule, int64_t bins, int64_t size, Real scale,
                   Extremes<Real>& extremes);

// The bins of one turned box: those of bin k are the pixels [first[k], first[k + 1]), each once.
template <class Real>
struct Cells {
  std::vector<int64_t> first;
  std::vector<Pixel> pixel;
  std::vector<Real> weight;
  std::vector<Real>
      slopes;  // of the weight in the numbers of the box, kTurnedNumbers for each pixel
};

// The pixels that they can have, y and x: [first, first + side); and about how many together.
struct TurnedBounds {
  int64_t first[2] = {0, 0}, sides[2] = {0, 0};
  double count = 0;

  int64_t pixels() const { return sides[0] * sides[1]; }
};
template <class Real>
TurnedBounds turned_bounds(const Real* box, const Rule& rule, const int64_t bins[2],
                           const int64_t size[2], Real scale);

// `size`: of the map. `along`: a tangent of the box; weights are then its product with the slopes.
// `sloped`: slopes are listed too.
template <class Real>
void turned_cells(const Real* box, const Rule& rule, const int64_t bins[2], const int64_t size[2],
                  Real scale, const Real* along, bool sloped, Cells<Real>& cells);

// Where the bins and the samples of a box lie, in y and x, for people to look at: their numbers are
// exact in double. Of a box that is not turned `edges` are those of an axis, and sample i of bin k
// is at k * samples + i. Of a turned one they are in rows: corners of bins (P + 1, Q + 1), samples
// (P, Q, samples of y, samples of x).
struct Places {
  int64_t samples[2];  // of a bin on each axis
  std::vector<double> edges[2], positions[2];
};

// `positions` are left empty where they are more than `most`.
template <class Real>
Places places_of(const Real* box, const Rule& rule, const int64_t bins[2], const int64_t size[2],
                 const Real scale[2], int64_t most);

}  // namespace roialign
