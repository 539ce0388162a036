// The kernels over lines: what an operation does to the packed pixels of one block of channels.
//
// A strip holds a line for each column of a window, a run of strips is for a run of bins of y. How
// many taps a kernel adds at a time is a constant of its instantiation: all entries of a row from
// `first` on.
#pragma once

#include "simd.hpp"

namespace roialign {
namespace ROIALIGN_ISA {
namespace {

#define ROIALIGN_LAMBDA __attribute__((always_inline))
#define ROIALIGN_NOINLINE __attribute__((noinline))
constexpr int kTaps = 8;  // rows read or added to at a time: more weights leave the registers of v3
constexpr int kDots = 4;  // dot products held in registers: of v2, a line takes 4 of 16
constexpr int64_t kRows =
    7;  // bins of y whose strips are made at a time: of 1 to 14, 7 was fastest

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
struct AccumulatorOf<const T> : AccumulatorOf<T> {};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

// The elements of d_output and of the output, for maps of T.
template <class T>
struct PooledOf {
  using type = T;
};
template <>
struct PooledOf<uint8_t> {
  using type = float;
};
template <class T>
using Pooled = typename PooledOf<T>::type;

template <class T>
constexpr T least_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T most_of(T a, T b) {
  return a < b ? b : a;
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls body(Count<n>, first) until all of an axis's taps are added.
template <int most = kTaps, class Body>
ROIALIGN_INLINE void for_taps(int64_t all, const Body& body) {
  for (int64_t first = 0; first < all; first += most) {
    switch (least_of<int64_t>(most, all - first)) {
      case 1:
        body(Count<1>{}, first);
        break;
      case 2:
        body(Count<2>{}, first);
        break;
      case 3:
        body(Count<3>{}, first);
        break;
      case 4:
        body(Count<4>{}, first);
        break;
      case 5:
        body(Count<least_of(5, most)>{}, first);
        break;
      case 6:
        body(Count<least_of(6, most)>{}, first);
        break;
      case 7:
        body(Count<least_of(7, most)>{}, first);
        break;
      default:
        body(Count<most>{}, first);
    }
  }
}

struct Range {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// The lines of one block's map, by the pixels of a window's axis y.
template <class Real>
struct Lines {
  Real* at;
  const int32_t* rows;
  Real* row(const Axis<Real>& y, int64_t entry) const {
    return at + int64_t(rows[y.index[entry]]) * kLanes<Real>;
  }
};

// strips[p][j] (+)= sum over t of y[p][t] * map[row t][column j], for bins p of y.
template <int taps, bool accumulate, class Real>
ROIALIGN_NOINLINE void gather(const Axis<Real>& y, Range p, int64_t first, Lines<Real> map,
                              const Axis<Real>& x, Real* strips) {
  const int32_t* columns = x.pixels;
  const int64_t count = x.pixel_count;
  for (; p.begin < p.end; ++p.begin) {
    if (!y.entries[p.begin]) {
      std::memset(strips, 0, size_t(count * kLineBytes));
      strips += count * kLanes<Real>;
      continue;
    }
    Vector<Real> w[taps];
    const Real* row[taps];
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) {
      w[t] = broadcast(y.weight[0][p.begin * y.taps + first + t]);
      row[t] = map.row(y, p.begin * y.taps + first + t);
    }
    for (int64_t j = 0; j < count; ++j, strips += kLanes<Real>) {
      const int64_t at = int64_t(columns[j]) * kLanes<Real>;
      Line<Real> sum = accumulate ? load(strips) : Line<Real>{};
#pragma GCC unroll 8
      for (int t = 0; t < taps; ++t) multiply_add(sum, w[t], load(row[t] + at));
      store(strips, sum);
    }
  }
}

// map[row t][column j] += y[p][t] * strips[p][j].
template <int taps, class Real>
ROIALIGN_NOINLINE void scatter(const Axis<Real>& y, Range p, int64_t first, Lines<Real> map,
                               const Axis<Real>& x, const Real* strips) {
  const int32_t* columns = x.pixels;
  const int64_t count = x.pixel_count;
  for (; p.begin < p.end; ++p.begin, strips += count * kLanes<Real>) {
    if (y.entries[p.begin] <= first) continue;
    Vector<Real> w[taps];
    Real* row[taps];
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) {
      w[t] = broadcast(y.weight[0][p.begin * y.taps + first + t]);
      row[t] = map.row(y, p.begin * y.taps + first + t);
    }
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = int64_t(columns[j]) * kLanes<Real>;
      const Line<Real> line = load(strips + j * kLanes<Real>);
#pragma GCC unroll 8
      for (int t = 0; t < taps; ++t) {
        Line<Real> sum = load(row[t] + at);
        multiply_add(sum, w[t], line);
        store(row[t] + at, sum);
      }
    }
  }
}

// Where lines are that belong to the bins or pixels of an axis: in their order, or elsewhere.
struct InOrder {
  int64_t operator[](int64_t i) const { return i; }
};
using Places = const int32_t*;

// out[k][i] (+)= sum over t of x[i][t] * in[k][index[i][t]], for rows i of x and `count` lines k,
// which are `in_step` and `out_step` apart.
template <int taps, bool accumulate, class Real, class InPlaces, class OutPlaces>
ROIALIGN_NOINLINE void combine(const Axis<Real>& x, Range i, int64_t first, int64_t count,
                               const Real* in, int64_t in_step, InPlaces in_places, Real* out,
                               int64_t out_step, OutPlaces out_places) {
  for (; i.begin < i.end; ++i.begin) {
    const int64_t at = i.begin * x.taps + first;
    Vector<Real> w[taps];
    const Real* from[taps];
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) {
      w[t] = broadcast(x.weight[0][at + t]);
      from[t] = in + int64_t(in_places[x.index[at + t]]) * kLanes<Real>;
    }
    Real* to = out + int64_t(out_places[i.begin]) * kLanes<Real>;
    if (!x.entries[i.begin]) {
      for (int64_t k = 0; !accumulate && k < count; ++k, to += out_step) store(to, Line<Real>{});
      continue;
    }
    for (int64_t k = 0, step = 0; k < count; ++k, step += in_step, to += out_step) {
      Line<Real> sum = accumulate ? load(to) : Line<Real>{};
#pragma GCC unroll 8
      for (int t = 0; t < taps; ++t) multiply_add(sum, w[t], load(from[t] + step));
      store(to, sum);
    }
  }
}

// Both products in one, for bins of x that share few columns: no strips.
//   out[p][q] = sum over c of x[q][c] * sum over t of y[p][t] * map[row t][column c]
template <int y_taps, int x_taps, class Real>
ROIALIGN_NOINLINE void pool(const Axis<Real>& y, Range p, Lines<Real> map, const Axis<Real>& x,
                            int64_t bins, Real* out) {
  for (; p.begin < p.end; ++p.begin) {
    if (!y.entries[p.begin]) {
      std::memset(out, 0, size_t(bins * kLineBytes));
      out += bins * kLanes<Real>;
      continue;
    }
    Vector<Real> w[y_taps];
    const Real* row[y_taps];
#pragma GCC unroll 4
    for (int t = 0; t < y_taps; ++t) {
      w[t] = broadcast(y.weight[0][p.begin * y_taps + t]);
      row[t] = map.row(y, p.begin * y_taps + t);
    }
    const int32_t *index = x.index, *pixels = x.pixels;
    const Real* weight = x.weight[0];
    for (int64_t q = 0; q < bins; ++q, index += x_taps, weight += x_taps, out += kLanes<Real>) {
      Line<Real> sum{};
      if (!x.entries[q]) {
        store(out, sum);
        continue;
      }
#pragma GCC unroll 4
      for (int c = 0; c < x_taps; ++c) {
        const int64_t at = int64_t(pixels[index[c]]) * kLanes<Real>;
        Line<Real> pooled{};
#pragma GCC unroll 4
        for (int t = 0; t < y_taps; ++t) multiply_add(pooled, w[t], load(row[t] + at));
        multiply_add(sum, broadcast(weight[c]), pooled);
      }
      store(out, sum);
    }
  }
}

// sums[t] = sum over j of strip[j] * map[row t][column j]: of one bin of y, entries from `at` on.
template <int taps, class Real>
ROIALIGN_NOINLINE void dot(const Axis<Real>& y, int64_t at, Lines<Real> map, const Axis<Real>& x,
                           const Real* strip, Line<Real>* sums) {
  Line<Real> sum[taps] = {};
  const Real* row[taps];
  for (int t = 0; t < taps; ++t) row[t] = map.row(y, at + t);
  for (int64_t j = 0; j < x.pixel_count; ++j) {
    const Line<Real> line = load(strip + j * kLanes<Real>);
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t)
      multiply_add(sum[t], line, load(row[t] + int64_t(x.pixels[j]) * kLanes<Real>));
  }
  for (int t = 0; t < taps; ++t) sums[t] = sum[t];
}

// The same, and from the same lines pooled[j] (+)= sum over t of weight[t] * map[row t][column j].
template <int taps, bool accumulate, class Real>
ROIALIGN_NOINLINE void dot_and_gather(const Axis<Real>& y, int64_t at, const Real* weight,
                                      Lines<Real> map, const Axis<Real>& x, const Real* strip,
                                      Real* pooled, Line<Real>* sums) {
  Line<Real> sum[taps] = {};
  Vector<Real> w[taps];
  const Real* row[taps];
#pragma GCC unroll 8
  for (int t = 0; t < taps; ++t) {
    w[t] = broadcast(weight[t]);
    row[t] = map.row(y, at + t);
  }
  for (int64_t j = 0; j < x.pixel_count; ++j) {
    const Line<Real> line = load(strip + j * kLanes<Real>);
    Line<Real> column = accumulate ? load(pooled + j * kLanes<Real>) : Line<Real>{};
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) {
      const Line<Real> pixel = load(row[t] + int64_t(x.pixels[j]) * kLanes<Real>);
      multiply_add(sum[t], line, pixel);
      multiply_add(column, w[t], pixel);
    }
    store(pooled + j * kLanes<Real>, column);
  }
  for (int t = 0; t < taps; ++t) sums[t] = sum[t];
}

// sums[t] = sum over p of d_out[p] * strips[p][index[t]]: of one bin of x, entries from `at` on. A
// bin of y without entries has no samples: its d_out is not read.
template <int taps, class Real, class InPlaces>
ROIALIGN_NOINLINE void dot_bins(const Axis<Real>& x, int64_t at, const int32_t* y_entries, Range p,
                                const Real* strips, InPlaces places, const Real* d_out,
                                int64_t bins, Line<Real>* sums) {
  Line<Real> sum[taps] = {};
  const Real* in[taps];
  for (int t = 0; t < taps; ++t) in[t] = strips + int64_t(places[x.index[at + t]]) * kLanes<Real>;
  const int64_t strip = x.pixel_count * kLanes<Real>;
  for (int64_t k = p.begin, step = 0; k < p.end; ++k, step += strip, d_out += bins * kLanes<Real>) {
    if (!y_entries[k]) continue;
    const Line<Real> line = load(d_out);
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) multiply_add(sum[t], line, load(in[t] + step));
  }
  for (int t = 0; t < taps; ++t) sums[t] = sum[t];
}

// Products of these kernels.

// strips = Ay F.
template <class Real>
void pool_columns(const Term<Real>& term, Range p, Lines<Real> map, Real* strips) {
  for_taps(term.y.taps, [&](auto taps, int64_t first) ROIALIGN_LAMBDA {
    constexpr int n = decltype(taps)::value;
    if (first)
      gather<n, true>(term.y, p, first, map, term.x, strips);
    else
      gather<n, false>(term.y, p, first, map, term.x, strips);
  });
}

// out (+)= in x^T for `count` lines, x with `rows` rows.
template <class Real, class InPlaces = InOrder, class OutPlaces = InOrder>
void multiply(const Axis<Real>& x, int64_t rows, int64_t count, const Real* in, int64_t in_step,
              Real* out, int64_t out_step, bool accumulate, InPlaces in_places = {},
              OutPlaces out_places = {}) {
  if (x.singles) {
    const Range all{0, x.singles};
    if (accumulate)
      combine<1, true>(x, all, 0, count, in, in_step, in_places, out, out_step, out_places);
    else
      combine<1, false>(x, all, 0, count, in, in_step, in_places, out, out_step, out_places);
  }
  if (x.singles == rows) return;
  for_taps(x.taps, [&](auto taps, int64_t first) ROIALIGN_LAMBDA {
    constexpr int n = decltype(taps)::value;
    const Range rest{x.singles, rows};
    if (accumulate || first)
      combine<n, true>(x, rest, first, count, in, in_step, in_places, out, out_step, out_places);
    else
      combine<n, false>(x, rest, first, count, in, in_step, in_places, out, out_step, out_places);
  });
}

// out (+)= Ay F Ax^T, for bins p of y and all `bins` of x.
template <class Real>
void pool_bins(const Term<Real>& term, Range p, int64_t bins, Lines<Real> map, Real* strips,
               Real* out, bool accumulate) {
  const Axis<Real>&y = term.y, &x = term.x;
  if (!y.taps || !x.taps) {
    if (!accumulate) std::memset(out, 0, size_t(p.count() * bins * kLineBytes));
  } else if (x.separate && y.taps <= kSeparateTaps && !accumulate) {
    for_taps<kSeparateTaps>(y.taps, [&](auto y_taps, int64_t) ROIALIGN_LAMBDA {
      for_taps<kSeparateTaps>(x.taps, [&](auto x_taps, int64_t) ROIALIGN_LAMBDA {
        pool<decltype(y_taps)::value, decltype(x_taps)::value>(y, p, map, x, bins, out);
      });
    });
  } else {
    const int64_t strip = x.pixel_count * kLanes<Real>;
    pool_columns(term, p, map, strips);
    multiply(x, bins, p.count(), strips, strip, out, bins * kLanes<Real>, accumulate);
  }
}

// strips = d_out Ax, lines d_out of `bins` bins.
template <class Real>
void pull_columns(const Axis<Real>& x, int64_t count, const Real* d_out, int64_t bins,
                  Real* strips) {
  multiply(x, x.pixel_count, count, d_out, bins * kLanes<Real>, strips,
           x.pixel_count * kLanes<Real>, false);
}

// The map += Ay^T strips.
template <class Real>
void spread_columns(const Term<Real>& term, Range p, const Real* strips, Lines<Real> map) {
  for_taps(term.y.taps, [&](auto taps, int64_t first) ROIALIGN_LAMBDA {
    scatter<decltype(taps)::value>(term.y, p, first, map, term.x, strips);
  });
}

// d[e] += slope_e * line for the box's start and end e. A slope of zero multiplies nothing.
template <class Real>
inline void add_slopes(const Axis<Real>& slopes, int64_t at, const Line<Real>& line,
                       Line<Real> d[2]) {
  for (int e = 0; e < 2; ++e) {
    if (slopes.weight[e][at] != 0) multiply_add(d[e], broadcast(slopes.weight[e][at]), line);
  }
}

// d[e] += <strips, Ay_e F>, Ay_e the slopes of y.
template <class Real>
void dot_y_slopes(const Term<Real>& term, Range p, Lines<Real> map, const Real* strips,
                  Line<Real> d[2]) {
  for (; p.begin < p.end; ++p.begin, strips += term.x.pixel_count * kLanes<Real>) {
    const int64_t begin = p.begin * term.y.taps;
    for_taps<kDots>(term.y.entries[p.begin], [&](auto taps, int64_t first) ROIALIGN_LAMBDA {
      constexpr int n = decltype(taps)::value;
      Line<Real> sums[n];
      dot<n>(term.y, begin + first, map, term.x, strips, sums);
      for (int t = 0; t < n; ++t) add_slopes(term.y, begin + first + t, sums[t], d);
    });
  }
}

// The same for `values` of y over the same pixels, and pooled = Ay F.
template <class Real>
void dot_y_slopes(const Term<Real>& term, const Axis<Real>& values, Range p, Lines<Real> map,
                  const Real* strips, Real* pooled, Line<Real> d[2]) {
  const int64_t strip = term.x.pixel_count * kLanes<Real>;
  for (; p.begin < p.end; ++p.begin, strips += strip, pooled += strip) {
    const int64_t begin = p.begin * term.y.taps;
    for_taps<kDots>(term.y.entries[p.begin], [&](auto taps, int64_t first) ROIALIGN_LAMBDA {
      constexpr int n = decltype(taps)::value;
      const Real* weight = values.weight[0] + begin + first;
      Line<Real> sums[n];
      if (first)
        dot_and_gather<n, true>(term.y, begin + first, weight, map, term.x, strips, pooled, sums);
      else
        dot_and_gather<n, false>(term.y, begin + first, weight, map, term.x, strips, pooled, sums);
      for (int t = 0; t < n; ++t) add_slopes(term.y, begin + first + t, sums[t], d);
    });
  }
}

// d[e] += <d_out, strips Ax_e^T>, Ax_e the slopes of x.
template <class Real, class InPlaces = InOrder>
void dot_x_slopes(const Axis<Real>& x, const int32_t* y_entries, Range p, int64_t bins,
                  const Real* strips, const Real* d_out, Line<Real> d[2], InPlaces places = {}) {
  for (int64_t q = 0; q < bins; ++q, d_out += kLanes<Real>) {
    for_taps<kDots>(x.entries[q], [&](auto taps, int64_t first) ROIALIGN_LAMBDA {
      constexpr int n = decltype(taps)::value;
      Line<Real> sums[n];
      dot_bins<n>(x, q * x.taps + first, y_entries, p, strips, places, d_out, bins, sums);
      for (int t = 0; t < n; ++t) add_slopes(x, q * x.taps + first + t, sums[t], d);
    });
  }
}

}  // namespace
}  // namespace ROIALIGN_ISA
}  // namespace roialign
