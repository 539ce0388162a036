// The way by samples: each bin adds up its samples where they are, from coordinates that are found
// for many RoIs at once. This is for RoIs of few samples and channels. Those whose bins take the
// largest sample use the same coordinates (sampled.cpp).
#pragma once

#include "../parallel.hpp"
#include "../samples.hpp"
#include "arrays.hpp"

namespace roialign {
namespace ROIALIGN_ISA {
namespace {

// Calls body(where the samples of RoIs lie, the first RoI, how many) for chunks of the RoIs.
template <class Real, class Body>
void for_sampled_rois(Maps maps, const Rois& rois, const Rule& rule, const int64_t bins[2],
                      int threads, Body body) {
  struct Work : Scratch {
    SampledRois<Real>* rois;
    Work() {
      take([&](Cut& cut) { cut(rois, 1); });
    }
  };
  parallel_for((rois.count + kSampledRois - 1) / kSampledRois, threads, [&](int64_t task) {
    const Work work;
    const int64_t first = task * kSampledRois, count = least_of(kSampledRois, rois.count - first);
    find_samples(maps, rois, rule, bins, first, count, *work.rois);
    body(*work.rois, first, count);
  });
}

// The taps of a bin in one axis: of its samples two each, where those share pixels merged. The last
// one is repeated with weight 0.
template <int taps, class Real>
struct BinTaps {
  int count;
  int64_t pixel[taps];
  Real weight[taps];
};

// From the samples of one bin, which are kSampledRois apart.
template <int taps, class Real>
ROIALIGN_INLINE BinTaps<taps, Real> taps_of(const int32_t* low, const Real* fraction) {
  BinTaps<taps, Real> bin;
  bin.count = 0;
  double weight[taps] = {};
  const auto add = [&](int64_t pixel, double w) ROIALIGN_LAMBDA {
    for (int t = bin.count - 1; t >= 0 && t >= bin.count - 2; --t) {
      if (bin.pixel[t] == pixel) {
        weight[t] += w;
        return;
      }
    }
    bin.pixel[bin.count] = pixel;
    weight[bin.count++] = w;
  };
  constexpr int64_t last = (taps / 2 - 1) * kSampledRois;
  const bool descending = low[last] < low[0];  // those of a negative size
#pragma GCC unroll 2
  for (int64_t i = 0; i <= last; i += kSampledRois) {
    const int64_t at = descending ? last - i : i;
    if (low[at] < 0) continue;
    add(low[at], 1 - double(fraction[at]));
    if (fraction[at] != 0) add(low[at] + 1, double(fraction[at]));
  }
  if (!bin.count) return bin;
  for (int t = bin.count; t < taps; ++t) bin.pixel[t] = bin.pixel[bin.count - 1];
  for (int t = 0; t < taps; ++t) bin.weight[t] = Real(weight[t] * (2.0 / taps));
  return bin;
}

// Calls body(RoI, p, q, taps of y, taps of x) for all bins of the RoIs of a chunk; there are no
// taps where no sample is on a map.
template <int taps, class Real, class Body>
void for_bins(const SampledRois<Real>& rois, int64_t count, const int64_t bins[2],
              const Body& body) {
  for (int64_t r = 0; r < count; ++r) {
    BinTaps<taps, Real> x[kMostSamples];
    const auto find = [&](int axis, int64_t k) ROIALIGN_LAMBDA {
      const int64_t at = k * (taps / 2) * kSampledRois + r;
      return taps_of<taps>(rois.low[axis] + at, rois.fraction[axis] + at);
    };
    for (int64_t q = 0; q < bins[1]; ++q) x[q] = find(1, q);
    for (int64_t p = 0; p < bins[0]; ++p) {
      const BinTaps<taps, Real> y = find(0, p);
      for (int64_t q = 0; q < bins[1]; ++q) body(r, p, q, y, x[q]);
    }
  }
}

// out[c * step] = the sum over the taps y and x of channel c. Gives whether a sum is a NaN.
template <int taps, class T, class Real, class Pool>
ROIALIGN_INLINE bool add_padded(const BinTaps<taps, Real>& y, const BinTaps<taps, Real>& x,
                                const Plane<const T>& map, Pool* out, int64_t step) {
  int64_t at[taps * taps];
#pragma GCC unroll 4
  for (int s = 0; s < taps; ++s) {
#pragma GCC unroll 4
    for (int t = 0; t < taps; ++t)
      at[s * taps + t] = y.pixel[t] * map.row_stride + x.pixel[s] * map.pixel_stride;
  }
  int64_t c = 0;
  bool nan = false;
  if (map.channel_stride == 1 && step == 1) {
    for (; c + kLanes<Real> <= map.channels; c += kLanes<Real>) {
      Line<Real> sum{};
#pragma GCC unroll 4
      for (int s = 0; s < taps; ++s) {
        Line<Real> pooled{};
#pragma GCC unroll 4
        for (int t = 0; t < taps; ++t) {
          multiply_add(pooled, broadcast(y.weight[t]),
                       load_wide(map.data + at[s * taps + t] + c, Real{}));
        }
        multiply_add(sum, broadcast(x.weight[s]), pooled);
      }
      Real line[kLanes<Real>];
      store(line, sum);
      for (int l = 0; l < kLanes<Real>; ++l) nan |= line[l] != line[l];
      narrow_line(line, out + c);
    }
  }
  for (const T* channel = map.data + c * map.channel_stride; c < map.channels;
       ++c, channel += map.channel_stride) {
    Real sum = 0;
#pragma GCC unroll 4
    for (int s = 0; s < taps; ++s) {
      Real pooled = 0;
#pragma GCC unroll 4
      for (int t = 0; t < taps; ++t) pooled += y.weight[t] * widen(channel[at[s * taps + t]]);
      sum += x.weight[s] * pooled;
    }
    nan |= sum != sum;
    narrow(sum, out[c * step]);
  }
  return nan;
}

// Sums that are not finite once more without the padding, which makes a NaN of an infinite pixel.
template <int taps, class T, class Real, class Pool>
ROIALIGN_NOINLINE void add_unpadded(const BinTaps<taps, Real>& y, const BinTaps<taps, Real>& x,
                                    const Plane<const T>& map, Pool* out, int64_t step) {
  for (int64_t c = 0; c < map.channels; ++c) {
    const T* channel = map.data + c * map.channel_stride;
    Real sum = 0;
    for (int s = 0; s < x.count; ++s) {
      Real pooled = 0;
      for (int t = 0; t < y.count; ++t) {
        pooled += y.weight[t] *
                  widen(channel[y.pixel[t] * map.row_stride + x.pixel[s] * map.pixel_stride]);
      }
      sum += x.weight[s] * pooled;
    }
    if (sum - sum != 0) narrow(sum, out[c * step]);
  }
}

template <int taps, class T, class Real, class Pool>
ROIALIGN_INLINE void add_samples(const BinTaps<taps, Real>& y, const BinTaps<taps, Real>& x,
                                 const Plane<const T>& map, Pool* out, int64_t step) {
  const bool nan = add_padded(y, x, map, out, step);
  if (nan && (y.count < taps || x.count < taps)) add_unpadded(y, x, map, out, step);
}

// The map += the taps y and x times d_out, whose channels are `step` apart.
template <int taps, class Real>
void spread_samples(const BinTaps<taps, Real>& y, const BinTaps<taps, Real>& x, const Real* d_out,
                    int64_t step, const Plane<Real>& map) {
  for (int t = 0; t < y.count; ++t) {
    for (int s = 0; s < x.count; ++s) {
      Real* pixel = map.data + y.pixel[t] * map.row_stride + x.pixel[s] * map.pixel_stride;
      const Real weight = y.weight[t] * x.weight[s];
      for (int64_t c = 0; c < map.channels; ++c)
        pixel[c * map.channel_stride] += weight * d_out[c * step];
    }
  }
}

}  // namespace
}  // namespace ROIALIGN_ISA
}  // namespace roialign
