// The way bin by bin: each bin adds up its own pixels where they are.
//
// Nothing is copied: this is for maps whose channels are innermost. Lanes are channels.
#pragma once

#include "arrays.hpp"

namespace roialign {
namespace ROIALIGN_ISA {
namespace {

constexpr int kBinTaps = 4;                      // of x at a time
constexpr int kBinLines = kVectors > 1 ? 1 : 4;  // lines of a pixel: as many sums in registers

// What a task works in: lines of one bin if the output's channels are innermost too, else of all
// bins of a RoI.
template <class T, class Real>
struct BinWorkspace : Scratch {
  Real* tile;
  T* stage;  // the same, in the array's dtype
  int64_t blocks, bins;
  bool one;
  int64_t step;  // from one block of a bin to the next

  BinWorkspace(int64_t blocks, const Tensor& output)
      : blocks(blocks),
        bins(output.shape[2] * output.shape[3]),
        one(output.stride[1] == 1),
        step((one ? 1 : bins) * kLanes<Real>) {
    take([&](Cut& cut) {
      cut(tile, blocks * step);
      cut(stage, blocks * step);
    });
  }
  Real* lines(int64_t bin) const { return one ? tile : tile + bin * kLanes<Real>; }

  // Writes a bin, or with the last one all.
  void put(const Plane<T>& out, int64_t bin, bool streamed) const {
    if (!one) {
      if (bin + 1 == bins) store_lines(out, 0, bins, tile, step, stage, streamed).finish();
      return;
    }
    const void* from = tile;
    if (!same(stage, tile)) {
      for (int64_t b = 0; b < blocks; ++b)
        narrow_line(tile + b * kLanes<Real>, stage + b * kLanes<Real>);
      from = stage;
    }
    T* to = out.data + bin / out.width * out.row_stride + bin % out.width * out.pixel_stride;
    const size_t bytes = size_t(out.channels) * sizeof(T);
    if (streamed)
      stream(to, from, bytes);
    else
      std::memcpy(to, from, bytes);
  }
};

// Calls body(Count<lines>, first, count) for runs of channels that are lines, whole ones but for
// the last.
template <class Real, class Body>
ROIALIGN_INLINE void for_lines(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + kBinLines * kLanes<Real> <= channels; c += kBinLines * kLanes<Real>)
    body(Count<kBinLines>{}, c, kLanes<Real>);
  for (; c < channels; c += kLanes<Real>)
    body(Count<1>{}, c, least_of<int64_t>(kLanes<Real>, channels - c));
}

// out += lines of bin (p, q), Ay[p] F Ax[q]^T, from x's entries [at, at + taps).
template <int taps, int lines, bool whole, class T, class Real>
ROIALIGN_NOINLINE void pool_lines(const Term<Real>& term, int64_t p, int64_t at,
                                  const Plane<const T>& map, int64_t c, int64_t rest, Real* out,
                                  int64_t step) {
  const Axis<Real>&y = term.y, &x = term.x;
  const T* column[taps];
#pragma GCC unroll 4
  for (int s = 0; s < taps; ++s) column[s] = map.data + c + x.index[at + s] * map.pixel_stride;
  Line<Real> pooled[taps][lines] = {};
  for (int64_t t = p * y.taps; t < p * y.taps + y.entries[p]; ++t) {
    const int64_t row = y.index[t] * map.row_stride;
    const Vector<Real> w = broadcast(y.weight[0][t]);
#pragma GCC unroll 4
    for (int s = 0; s < taps; ++s) {
#pragma GCC unroll 4
      for (int l = 0; l < lines; ++l) {
        const T* line = column[s] + row + l * kLanes<Real>;
        multiply_add(pooled[s][l], w,
                     whole ? load_wide(line, Real{}) : load_part(line, rest, Real{}));
      }
    }
  }
#pragma GCC unroll 4
  for (int l = 0; l < lines; ++l) {
    Line<Real> sum = load(out + l * step);
#pragma GCC unroll 4
    for (int s = 0; s < taps; ++s) multiply_add(sum, broadcast(x.weight[0][at + s]), pooled[s][l]);
    store(out + l * step, sum);
  }
}

// out = the lines of bin (p, q).
template <class T, class Real>
void pool_bin(const Window<Real>& window, int64_t p, int64_t q, const Plane<const T>& map,
              Real* out, int64_t step) {
  for (int64_t b = 0; b < map.blocks(); ++b) store(out + b * step, Line<Real>{});
  for (int i = 0; i < window.term_count; ++i) {
    const Axis<Real>& x = window.term[i].x;
    for_taps<kBinTaps>(x.entries[q], [&](auto taps, int64_t first) ROIALIGN_LAMBDA {
      constexpr int n = decltype(taps)::value;
      const int64_t at = q * x.taps + first;
      for_lines<Real>(map.channels, [&](auto lines, int64_t c, int64_t count) ROIALIGN_LAMBDA {
        constexpr int k = decltype(lines)::value;
        Real* to = out + c / kLanes<Real> * step;
        if (count == kLanes<Real>)
          pool_lines<n, k, true>(window.term[i], p, at, map, c, count, to, step);
        else
          pool_lines<n, 1, false>(window.term[i], p, at, map, c, count, to, step);
      });
    });
  }
}

}  // namespace
}  // namespace ROIALIGN_ISA
}  // namespace roialign
