// RoIs with few samples, many at a time: neither windows nor lists of pixels are made for them.
#pragma once

#include <cstdint>

#include "windows.hpp"

namespace roialign {

constexpr int64_t kSampledRois = 64;  // at a time
constexpr int64_t kMostSamples = 64;  // of an axis

// Where the samples of RoIs lie. Sample i of bin k, in axis y or x, of RoI r is at
// [axis][(k * samples + i) * kSampledRois + r]: between pixel `low` and the next one, or outside
// the map (-1).
template <class Real>
struct SampledRois {
  int64_t map[kSampledRois], image[kSampledRois];  // -1: none
  int32_t low[2][kMostSamples * kSampledRois];
  Real fraction[2][kMostSamples * kSampledRois];
};

// Whether an operation goes by samples: in the adjoint a matter of the rule, the channels and the
// bins alone, in the forward, whose bits are the same in each way, of the first map and the number
// of RoIs too. Noted for the log.
bool by_samples(Operation operation, const Tensor& map, int64_t rois, const Rule& rule,
                const int64_t bins[2], bool tangent);

// Finds the samples of `count` RoIs from `first` on.
template <class Real>
void find_samples(Maps maps, const Rois& rois, const Rule& rule, const int64_t bins[2],
                  int64_t first, int64_t count, SampledRois<Real>& found);

}  // namespace roialign
