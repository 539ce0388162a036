// The way by rows: the rows of a window's bins, read from the map where it is.
//
// Row r = c * P + p is the strip of bin p of channel c: strip[r] = Ay[p] F[c], along the window's
// columns. As many rows as a line has lanes become lines, one for each column, whose lanes are rows
// where those of packed pixels are channels: the products with Ax are the same.
#pragma once

#include "arrays.hpp"

namespace roialign {
namespace ROIALIGN_ISA {
namespace {

constexpr int kRowTaps = 4;  // rows of the map read at a time

// How many elements of a map a run of its columns has for each: with few channels that follow each
// other in memory, those of all. Else 1.
template <class T>
int64_t interleaved(const Plane<T>& map) {
  const bool dense = map.channel_stride == 1 && map.pixel_stride == map.channels;
  return dense && map.channels <= kInterleaved ? map.channels : 1;
}

// The columns of a window's axis x in a row of a map, and where each is in a strip.
template <class Real>
class Columns {
 public:
  // `places` gets those of x.pixels: room for all of them.
  template <class T>
  Columns(const Term<Real>& term, const Plane<T>& map, int32_t* places)
      : pixels_(term.x.pixels),
        count_(term.x.pixel_count),
        stride_(map.pixel_stride),
        places_(places),
        each_(std::is_const<T>::value ? interleaved(map) : 1) {
    run_ = stride_ == each_ && term.extent <= kSparse * count_;
    first_ = run_ ? term.least : 0;
    length_ = run_ ? term.extent : count_;
    for (int64_t i = 0; i < count_; ++i) places_[i] = int32_t(run_ ? pixels_[i] - term.least : i);
  }
  static int64_t longest(int64_t max_columns) { return kSparse * max_columns; }
  int64_t length() const { return length_; }  // of a strip
  Places places() const { return places_; }
  bool has_gaps() const { return length_ > count_; }

  // Calls body(channel of a map from which to gather, where to) for channel c and its strip. What
  // is gathered from a run of several channels, in `wide`, has them all.
  template <class T, class Body>
  void gathered(const Plane<const T>& map, int64_t c, Real* strip, Real* wide, Body body) const {
    if (!run_ || each_ == 1) return body(map.data + c * map.channel_stride, strip);
    body(map.data, wide);
    for (int64_t j = 0; j < length_; ++j) strip[j] = wide[j * each_ + c];
  }

  // strip (+)= sum over t of weight[t] * row t of the map.
  template <int taps, bool accumulate, class T>
  ROIALIGN_NOINLINE void gather(const Axis<Real>& y, int64_t at, const T* map, int64_t row_stride,
                                Real* strip) const {
    const T* row[taps];
    const Real* weight = y.weight[0] + at;
#pragma GCC unroll 4
    for (int t = 0; t < taps; ++t)
      row[t] = map + y.pixels[y.index[at + t]] * row_stride + first_ * each_;
    if (!run_) {
      for (int64_t j = 0; j < count_; ++j) {
        const int64_t x = pixels_[j] * stride_;
        Real sum = accumulate ? strip[j] : 0;
#pragma GCC unroll 4
        for (int t = 0; t < taps; ++t) sum += weight[t] * widen(row[t][x]);
        strip[j] = sum;
      }
      return;
    }
    Vector<Real> w[taps];
#pragma GCC unroll 4
    for (int t = 0; t < taps; ++t) w[t] = broadcast(weight[t]);
    const int64_t length = length_ * each_;
    int64_t j = 0;
    for (; j + kLanes<Real> <= length; j += kLanes<Real>) {
      Line<Real> sum = accumulate ? load(strip + j) : Line<Real>{};
#pragma GCC unroll 4
      for (int t = 0; t < taps; ++t) multiply_add(sum, w[t], load_wide(row[t] + j, Real{}));
      store(strip + j, sum);
    }
    if (j < length) {
      Line<Real> sum = accumulate ? load(strip + j) : Line<Real>{};
#pragma GCC unroll 4
      for (int t = 0; t < taps; ++t)
        multiply_add(sum, w[t], load_part(row[t] + j, length - j, Real{}));
      store(strip + j, sum);
    }
  }

  // row += weight * strip.
  ROIALIGN_NOINLINE void add(Real weight, const Real* strip, Real* row) const {
    if (!run_) {
      for (int64_t j = 0; j < count_; ++j) row[pixels_[j] * stride_] += weight * strip[j];
      return;
    }
    row += first_;
    const Vector<Real> w = broadcast(weight);
    int64_t j = 0;
    for (; j + kLanes<Real> <= length_; j += kLanes<Real>) {
      Line<Real> sum = load(row + j);
      multiply_add(sum, w, load(strip + j));
      store(row + j, sum);
    }
    if (j < length_) {
      Line<Real> sum = load_part(row + j, length_ - j, Real{});
      multiply_add(sum, w, load(strip + j));
      store_part(row + j, length_ - j, sum);
    }
  }

  // strip . row, as a line whose lanes are to be added.
  template <class T>
  ROIALIGN_NOINLINE Line<Real> dot(const Real* strip, const T* row) const {
    Line<Real> sum{};
    if (!run_ || each_ > 1 ||
        has_gaps()) {  // what lies in a gap has no weight, and may be no number
      Real sums[kLanes<Real>] = {};
      for (int64_t j = 0; j < count_; ++j)
        sums[j % kLanes<Real>] += strip[places_[j]] * widen(row[pixels_[j] * stride_]);
      return load(sums);
    }
    row += first_;
    int64_t j = 0;
    for (; j + kLanes<Real> <= length_; j += kLanes<Real>)
      multiply_add(sum, load(strip + j), load_wide(row + j, Real{}));
    if (j < length_) {
      const int64_t rest = length_ - j;
      multiply_add(sum, load_part(strip + j, rest, Real{}), load_part(row + j, rest, Real{}));
    }
    return sum;
  }

 private:
  const int32_t* pixels_;
  int64_t count_, stride_;
  int32_t* places_;
  int64_t each_;
  bool run_;  // from the first to the last, with those between
  int64_t first_, length_;
};

// What a task works in.
template <class T, class Real>
struct RowWorkspace : Scratch {
  Real* strips;     // [lanes] of `step` columns
  Real* wide;       // `step` columns of interleaved channels
  Real* lines;      // [step] lines of rows
  Real* tile;       // [Q] lines of rows: of the output or of d_output
  T* stage;         // the same, in the array's dtype
  int32_t* places;  // of columns
  int64_t step;

  template <class M>
  RowWorkspace(const Plane<M>& map, int64_t max_columns, int64_t bins) {
    constexpr int64_t lanes = kLanes<Real>;
    const int64_t longest = least_of(map.width, Columns<Real>::longest(max_columns));
    step = (longest + lanes - 1) / lanes * lanes;
    take([&](Cut& cut) {
      cut(strips, step * lanes);
      cut(wide, step * interleaved(map));
      cut(lines, step * lanes);
      cut(tile, bins * lanes);
      cut(stage, bins * lanes);
      cut(places, max_columns);
    });
  }
};

// Rows that become lanes together: from bin `bin` of `channel` on, through all bins of a channel.
struct Rows {
  int64_t channel, bin, count, bins;

  // Calls body(i, channel, bin) for each.
  template <class Body>
  void each(Body body) const {
    int64_t c = channel, p = bin;
    for (int64_t i = 0; i < count; ++i) {
      body(i, c, p);
      if (++p == bins) {
        p = 0;
        ++c;
      }
    }
  }
};

// The rows of a RoI in an array (K, C, P, Q): pixels are its columns, channels its rows.
template <class T>
Plane<T> plane_of(const Tensor& pooled, int64_t roi, Range channels, const Rows& rows) {
  T* data = static_cast<T*>(pooled.data) + roi * pooled.stride[0] +
            (channels.begin + rows.channel) * pooled.stride[1] + rows.bin * pooled.stride[2];
  const int64_t width = pooled.shape[3];
  return {data,      width, width, pooled.stride[2], width * pooled.stride[3], pooled.stride[3],
          rows.count};
}

// Calls body(rows) for all rows of a RoI. They may go on in the next channel where those of
// `pooled` lie evenly.
template <class Real, class Body>
void for_lanes(const Tensor& pooled, int64_t channels, Body body) {
  int64_t bins = pooled.shape[2];
  const bool even = pooled.stride[1] == bins * pooled.stride[2];
  const int64_t planes = even ? 1 : channels, all = even ? channels * bins : bins;
  for (int64_t c = 0; c < planes; ++c) {
    for (int64_t r = 0; r < all; r += kLanes<Real>)
      body(Rows{c + r / bins, r % bins, least_of<int64_t>(kLanes<Real>, all - r), bins});
  }
}

// lines = (Ay F)^T of these rows.
template <class T, class Real, class Work>
void pool_rows(const Axis<Real>& y, const Rows& rows, const Plane<const T>& map,
               const Columns<Real>& columns, const Work& work) {
  rows.each([&](int64_t i, int64_t c, int64_t p) {
    Real* strip = work.strips + i * work.step;
    const int64_t entries = y.entries[p];
    if (!entries) {
      std::memset(strip, 0, size_t(columns.length()) * sizeof(Real));
      return;
    }
    columns.gathered(map, c, strip, work.wide, [&](const T* channel, Real* to) {
      for_taps<kRowTaps>(entries, [&](auto taps, int64_t first) ROIALIGN_LAMBDA {
        constexpr int n = decltype(taps)::value;
        const int64_t at = p * y.taps + first;
        if (first)
          columns.template gather<n, true>(y, at, channel, map.row_stride, to);
        else
          columns.template gather<n, false>(y, at, channel, map.row_stride, to);
      });
    });
  });
  for (int64_t j = 0; j < columns.length(); j += kLanes<Real>)
    transpose_rows(work.strips + j, work.step, work.lines + j * kLanes<Real>, kLanes<Real>,
                   int(rows.count));
}

// strips = d_out Ax, d_out in the tile.
template <class Real, class Work>
void pull_rows(const Axis<Real>& x, const Columns<Real>& columns, const Work& work) {
  if (columns.has_gaps()) std::memset(work.lines, 0, size_t(columns.length() * kLineBytes));
  multiply(x, x.pixel_count, 1, work.tile, 0, work.lines, 0, false, InOrder{}, columns.places());
  for (int64_t j = 0; j < columns.length(); j += kLanes<Real>)
    transpose(work.lines + j * kLanes<Real>, kLanes<Real>, work.strips + j, work.step);
}

}  // namespace
}  // namespace ROIALIGN_ISA
}  // namespace roialign
