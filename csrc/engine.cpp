// The engine: Out = Ay F Ax^T for every RoI, by blocks of channels: a line of 64 bytes, 16 floats
// or 8 doubles, per pixel. One task is one visit (a run of RoIs on one image) for one or a few
// blocks.
//
//   forward       pack the pixels that a band of RoIs is the first to touch into lines [H * W];
//                 for every row p of bins: strip = Ay[p] F, a line per column of the window; then
//                 tile[p] = strip Ax^T. The finished tile leaves while the next one is made.
//   adjoint       load d_output's tile; for every p: strip = tile[p] Ax; add Ay[p]^T strip to the
//                 lines; unpack the pixels that the band was the last to touch.
//   box_gradient  for every p the same strips, and dot products with the slopes.
//
// This file is compiled once per instruction set, into a namespace named after it. It must not
// instantiate anything with external linkage that another file instantiates too (no std::
// containers or algorithms): the linker could keep the copy with the wrong instructions.
#include "engine.hpp"

#include "memory.hpp"
#include "parallel.hpp"
#include "simd.hpp"
#include "windows.hpp"

namespace roialign {
namespace ROIALIGN_ISA {
namespace {

#define ROIALIGN_INLINE inline __attribute__((always_inline))
#define ROIALIGN_LAMBDA __attribute__((always_inline))
#define ROIALIGN_NOINLINE __attribute__((noinline))
constexpr int kTaps = 8;                // rows read or added to at a time
constexpr int kDots = 4;                // dot products held in registers
constexpr int64_t kAhead = 12;          // groups of pixels asked for ahead
constexpr int64_t kRows = 7;            // bins of y whose strips are made at a time
constexpr int64_t kUnpacked = 8;        // groups of pixels that leave together
constexpr int64_t kNearPixels = 16384;  // of a map of which four blocks stay in the caches
constexpr int64_t kStreamBytes = int64_t{2} << 20;  // larger results bypass the caches
constexpr int64_t kSerialWork = int64_t{1} << 17;   // fewer line operations: one thread

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

template <class T>
constexpr T least_of(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T most_of(T a, T b) {
  return a < b ? b : a;
}

// --- Kernels over lines
// --------------------------------------------------------------------------- A strip holds a line
// for each column of a window, a run of strips is for a run of bins of y. How many taps a kernel
// adds at a time is a constant of its instantiation: all entries of a row from `first` on.

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
struct Map {
  Real* lines;
  int64_t row_step;
  Real* row(const Axis<Real>& y, int64_t entry) const {
    return lines + y.pixels[y.index[entry]] * row_step;
  }
};

// strips[p][j] (+)= sum over t of y[p][t] * map[row t][column j], for bins p of y.
template <int taps, bool accumulate, class Real>
ROIALIGN_NOINLINE void gather(const Axis<Real>& y, Range p, int64_t first, Map<Real> map,
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
ROIALIGN_NOINLINE void scatter(const Axis<Real>& y, Range p, int64_t first, Map<Real> map,
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

// out[k][i] (+)= sum over t of x[i][t] * in[k][index[i][t]], for rows i of x and `count` lines k,
// which are `in_step` and `out_step` apart.
template <int taps, bool accumulate, class Real>
ROIALIGN_NOINLINE void combine(const Axis<Real>& x, Range i, int64_t first, int64_t count,
                               const Real* in, int64_t in_step, Real* out, int64_t out_step) {
  for (; i.begin < i.end; ++i.begin) {
    const int64_t at = i.begin * x.taps + first;
    Vector<Real> w[taps];
    const Real* from[taps];
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) {
      w[t] = broadcast(x.weight[0][at + t]);
      from[t] = in + int64_t(x.index[at + t]) * kLanes<Real>;
    }
    Real* to = out + i.begin * kLanes<Real>;
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
ROIALIGN_NOINLINE void pool(const Axis<Real>& y, Range p, Map<Real> map, const Axis<Real>& x,
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
ROIALIGN_NOINLINE void dot(const Axis<Real>& y, int64_t at, Map<Real> map, const Axis<Real>& x,
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

// sums[t] = sum over p of d_out[p] * strips[p][index[t]]: of one bin of x, entries from `at` on. A
// bin of y without entries has no samples: its d_out is not read.
template <int taps, class Real>
ROIALIGN_NOINLINE void dot_bins(const Axis<Real>& x, int64_t at, const int32_t* y_entries, Range p,
                                const Real* strips, const Real* d_out, int64_t bins,
                                Line<Real>* sums) {
  Line<Real> sum[taps] = {};
  const Real* in[taps];
  for (int t = 0; t < taps; ++t) in[t] = strips + int64_t(x.index[at + t]) * kLanes<Real>;
  const int64_t strip = x.pixel_count * kLanes<Real>;
  for (int64_t k = p.begin, step = 0; k < p.end; ++k, step += strip, d_out += bins * kLanes<Real>) {
    if (!y_entries[k]) continue;
    const Line<Real> line = load(d_out);
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) multiply_add(sum[t], line, load(in[t] + step));
  }
  for (int t = 0; t < taps; ++t) sums[t] = sum[t];
}

// --- Products of them
// -----------------------------------------------------------------------------

// strips = Ay F.
template <class Real>
void pool_columns(const Term<Real>& term, Range p, Map<Real> map, Real* strips) {
  for_taps(term.y.taps, [&](auto taps, int64_t first) ROIALIGN_LAMBDA {
    constexpr int n = decltype(taps)::value;
    if (first)
      gather<n, true>(term.y, p, first, map, term.x, strips);
    else
      gather<n, false>(term.y, p, first, map, term.x, strips);
  });
}

// out (+)= in x^T for `count` lines, x with `rows` rows.
template <class Real>
void multiply(const Axis<Real>& x, int64_t rows, int64_t count, const Real* in, int64_t in_step,
              Real* out, int64_t out_step, bool accumulate) {
  if (x.singles) {
    const Range all{0, x.singles};
    if (accumulate)
      combine<1, true>(x, all, 0, count, in, in_step, out, out_step);
    else
      combine<1, false>(x, all, 0, count, in, in_step, out, out_step);
  }
  if (x.singles == rows) return;
  for_taps(x.taps, [&](auto taps, int64_t first) ROIALIGN_LAMBDA {
    constexpr int n = decltype(taps)::value;
    const Range rest{x.singles, rows};
    if (accumulate || first)
      combine<n, true>(x, rest, first, count, in, in_step, out, out_step);
    else
      combine<n, false>(x, rest, first, count, in, in_step, out, out_step);
  });
}

// out (+)= Ay F Ax^T, for bins p of y and all `bins` of x.
template <class Real>
void pool_bins(const Term<Real>& term, Range p, int64_t bins, Map<Real> map, Real* strips,
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
void spread_columns(const Term<Real>& term, Range p, const Real* strips, Map<Real> map) {
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
void dot_y_slopes(const Term<Real>& term, Range p, Map<Real> map, const Real* strips,
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

// d[e] += <d_out, strips Ax_e^T>, Ax_e the slopes of x.
template <class Real>
void dot_x_slopes(const Term<Real>& term, Range p, int64_t bins, const Real* strips,
                  const Real* d_out, Line<Real> d[2]) {
  const Axis<Real>& x = term.x;
  for (int64_t q = 0; q < bins; ++q, d_out += kLanes<Real>) {
    for_taps<kDots>(x.entries[q], [&](auto taps, int64_t first) ROIALIGN_LAMBDA {
      constexpr int n = decltype(taps)::value;
      Line<Real> sums[n];
      dot_bins<n>(x, q * x.taps + first, term.y.entries, p, strips, d_out, bins, sums);
      for (int t = 0; t < n; ++t) add_slopes(x, q * x.taps + first + t, sums[t], d);
    });
  }
}

// --- Between arrays and lines
// ---------------------------------------------------------------------

// How the channels of a map are cut into parts, one for each task: so many blocks that what a task
// reads and writes at a time are whole cache lines, and with channels innermost longer runs.
struct Parts {
  int64_t channels, blocks, size, shift;

  // `target` gets the result. Where its channels are innermost, and every pixel lies alike in its
  // cache lines, the cuts are between those.
  template <class T>
  static Parts of(const Tensor& map, const Tensor* target, T) {
    const bool channels_last = map.stride[1] == 1 && map.stride[3] != 1;
    const bool near = map.shape[2] * map.shape[3] <= kNearPixels;
    const int64_t blocks = channels_last                        ? (near ? 4 : 2)
                           : sizeof(T) < sizeof(Accumulator<T>) ? 2
                                                                : 1;
    Parts parts{map.shape[1], blocks, blocks * kLanes<Accumulator<T>>, 0};
    if (channels_last && target && target->stride[1] == 1 && parts.channels > parts.size) {
      constexpr int64_t line = kLineBytes / int64_t(sizeof(T));
      const int64_t strides = target->stride[0] | target->stride[2] | target->stride[3];
      const auto address = reinterpret_cast<uintptr_t>(target->data);
      if (strides % line == 0) parts.shift = int64_t(address % kLineBytes / sizeof(T));
    }
    return parts;
  }
  int64_t count() const { return (channels + shift + size - 1) / size; }
  Range operator[](int64_t part) const {
    return {most_of<int64_t>(part * size - shift, 0),
            least_of((part + 1) * size - shift, channels)};
  }
};

// The channels of one task, of one image or of one RoI's d_output or output.
template <class T>
struct Plane {
  T* data;
  int64_t width, pixels;
  int64_t channel_stride, row_stride, pixel_stride;
  int64_t channels;

  int64_t blocks() const {
    return (channels + kLanes<Accumulator<T>> - 1) / kLanes<Accumulator<T>>;
  }
  bool even() const {
    return row_stride == width * pixel_stride;
  }  // between pixels, across rows too
};

// Channels of image or RoI n.
template <class T>
Plane<T> plane_of(const Tensor& tensor, int64_t n, Range channels) {
  return {static_cast<T*>(tensor.data) + n * tensor.stride[0] + channels.begin * tensor.stride[1],
          tensor.shape[3],
          tensor.shape[2] * tensor.shape[3],
          tensor.stride[1],
          tensor.stride[2],
          tensor.stride[3],
          channels.count()};
}

// Calls body(pointer, count, done) for the runs of equally spaced pixels in [first, first + count).
template <class T, class Body>
void for_runs(const Plane<T>& plane, int64_t first, int64_t count, Body body) {
  if (plane.even()) {
    body(plane.data + first * plane.pixel_stride, count, int64_t{0});
    return;
  }
  for (int64_t done = 0; done < count;) {
    const int64_t y = (first + done) / plane.width, x = (first + done) % plane.width;
    const int64_t run = least_of(count - done, plane.width - x);
    body(plane.data + y * plane.row_stride + x * plane.pixel_stride, run, done);
    done += run;
  }
}

// Calls body(at, pixels) for the tiles of `lanes` pixels in a run; the last one reaches back so as
// to be whole, if the run is long enough.
template <int lanes, class Body>
inline void for_tiles(int64_t run, Body body) {
  for (int64_t i = 0; i < run; i += lanes) {
    const int64_t at = least_of(i, most_of<int64_t>(run - lanes, 0));
    body(at, int(least_of<int64_t>(lanes, run - at)));
  }
}

template <class T>
inline bool same(const T*, const T*) {
  return true;
}
template <class T, class Real>
inline bool same(const T*, const Real*) {
  return false;
}

// Pixels [first, first + count) of the plane as lines, block after block `block_step` apart; absent
// channels are 0.
template <class T, class Real>
void load_lines(const Plane<const T>& plane, int64_t first, int64_t count, Real* lines,
                int64_t block_step) {
  constexpr int lanes = kLanes<Real>;
  const int64_t c_step = plane.channel_stride, i_step = plane.pixel_stride;
  for_runs(plane, first, count, [&](const T* run_data, int64_t run, int64_t done) {
    for (int64_t b = 0; b < plane.blocks(); ++b) {
      const T* p = run_data + b * lanes * c_step;
      const int channels = int(least_of<int64_t>(lanes, plane.channels - b * lanes));
      Real* to = lines + b * block_step + done * lanes;
      if (c_step == 1) {
        for (int64_t i = 0; i < run; ++i) {
          T line[lanes] = {};
          const T* from = p + i * i_step;
          if (channels < lanes)
            from = static_cast<T*>(std::memcpy(line, from, channels * sizeof(T)));
          widen_line(from, to + i * lanes);
        }
        continue;
      }
      for_tiles<lanes>(run, [&](int64_t at, int pixels) {
        const T* from = p + at * i_step;
        const bool whole = i_step == 1 && pixels == lanes;
        if (whole && same(p, to) && channels == lanes) {
          transpose(reinterpret_cast<const Real*>(from), c_step, to + at * lanes, lanes);
          return;
        }
        Real rows[lanes * lanes], tile[lanes * lanes];
        for (int c = 0; c < lanes; ++c) {
          if (whole && c < channels) {
            widen_line(from + c * c_step, rows + c * lanes);
            continue;
          }
          for (int i = 0; i < lanes; ++i) {
            rows[c * lanes + i] =
                c < channels && i < pixels ? widen(from[c * c_step + i * i_step]) : 0;
          }
        }
        if (pixels == lanes) {
          transpose(rows, lanes, to + at * lanes, lanes);
          return;
        }
        transpose(rows, lanes, tile, lanes);
        std::memcpy(to + at * lanes, tile, size_t(pixels * kLineBytes));
      });
    }
  });
}

// A copy under way: `runs` runs of bytes, from contiguous memory to places `step` apart.
struct Copy {
  char* to = nullptr;
  const char* from = nullptr;
  int64_t run = 0, step = 0, runs = 0;
  bool streamed = false;  // past the caches
  int64_t done = 0;       // bytes of the run at `to`

  // Joins runs that touch. Asks for the lines of which a streamed run writes only a part: stores
  // wait in line for them.
  void prepare() {
    if (run == step) {
      run *= runs;
      runs = 1;
    }
    for (int64_t r = 0; streamed && r < runs; ++r) {
      char* ends[] = {to + r * step, to + r * step + run};
      for (char* end : ends) {
        if (reinterpret_cast<intptr_t>(end) % kLineBytes) prefetch_for_write(end);
      }
    }
  }

  // At least so many bytes more, as far as there are any: up to a cache line or the end of a run.
  void advance(int64_t bytes) {
    while (bytes > 0 && runs > 0) {
      int64_t end = run;
      if (bytes < run - done) {
        end = done + bytes;
        end += -(reinterpret_cast<intptr_t>(to) + end) & (kLineBytes - 1);
        end = least_of(end, run);
      }
      if (streamed)
        stream(to + done, from + done, size_t(end - done));
      else
        std::memcpy(to + done, from + done, size_t(end - done));
      bytes -= end - done;
      done = end;
      if (done < run) continue;
      done = 0;
      to += step;
      from += run;
      --runs;
    }
  }
  void finish() { advance(run * runs); }
};

// Lines to pixels [first, first + count) of the plane, through `stage`, where they are in the
// array's dtype and its order of memory. What is returned remains to be copied.
template <class T, class Real>
Copy store_lines(const Plane<T>& plane, int64_t first, int64_t count, const Real* lines,
                 int64_t block_step, T* stage, bool streamed) {
  constexpr int lanes = kLanes<Real>;
  const bool channels_last = plane.channel_stride == 1;
  Copy copy{reinterpret_cast<char*>(plane.data + first * plane.pixel_stride),
            reinterpret_cast<const char*>(stage)};
  const bool runs = plane.even() && (channels_last || plane.pixel_stride == 1);
  if (runs) {
    copy.run = (channels_last ? plane.channels : count) * int64_t(sizeof(T));
    copy.step = (channels_last ? plane.pixel_stride : plane.channel_stride) * int64_t(sizeof(T));
    copy.runs = channels_last ? count : plane.channels;
    copy.streamed = streamed;
    copy.prepare();
  }
  for (int64_t b = 0; b < plane.blocks(); ++b) {
    const int channels = int(least_of<int64_t>(lanes, plane.channels - b * lanes));
    const Real* block = lines + b * block_step;
    if (channels_last) {
      T* to = stage + b * lanes;
      for (int64_t i = 0; i < count; ++i, to += plane.channels) {
        T line[lanes];
        narrow_line(block + i * lanes, channels < lanes ? line : to);
        if (channels < lanes) std::memcpy(to, line, channels * sizeof(T));
      }
      continue;
    }
    for_tiles<lanes>(count, [&](int64_t at, int pixels) {
      T* to = stage + b * lanes * count + at;
      if (same(to, block) && channels == lanes && pixels == lanes) {
        transpose(block + at * lanes, lanes, reinterpret_cast<Real*>(to), count);
        return;
      }
      Real rows[lanes * lanes], tile[lanes * lanes];
      if (pixels == lanes) {
        transpose(block + at * lanes, lanes, rows, lanes);
      } else {
        std::memcpy(tile, block + at * lanes, size_t(pixels * kLineBytes));
        transpose(tile, lanes, rows, lanes);
      }
      for (int c = 0; c < channels; ++c) {
        if (pixels == lanes)
          narrow_line(rows + c * lanes, to + c * count);
        else
          for (int i = 0; i < pixels; ++i) narrow(rows[c * lanes + i], to[c * count + i]);
      }
    });
  }
  if (!runs) {
    for_runs(plane, first, count, [&](T* p, int64_t run, int64_t done) {
      for (int64_t c = 0; c < plane.channels; ++c) {
        for (int64_t i = 0; i < run; ++i) {
          p[i * plane.pixel_stride + c * plane.channel_stride] =
              channels_last ? stage[(done + i) * plane.channels + c] : stage[c * count + done + i];
        }
      }
    });
  }
  return copy;
}

// --- Scratch
// --------------------------------------------------------------------------------------

// What a task works in, cut from the thread's scratch. Every part starts on a line.
template <class T, class Real>
struct Workspace {
  Real* map;     // [blocks][H * W] lines: packed features, or the sums of d_features
  Real* strips;  // [kRows] for each column of a window
  Real* tile;    // [blocks][P][Q] lines
  T* stage;      // a finished tile, or pixels of the map, in the array's dtype and order

  int64_t map_step;  // from one block to the next
  int64_t tile_step;
  int64_t row_step;  // from one row of the map to the next

  Workspace(const Tensor& features, int64_t max_columns, const int64_t bins[2], int64_t blocks)
      : map_step((features.shape[2] * features.shape[3] + kGroup) * kLanes<Real>),
        tile_step(bins[0] * bins[1] * kLanes<Real>),
        row_step(features.shape[3] * kLanes<Real>) {
    const int64_t staged = most_of(bins[0] * bins[1], kUnpacked * kGroup) * blocks * kLanes<Real>;
    const int64_t sizes[] = {
        blocks * map_step * int64_t(sizeof(Real)), kRows * max_columns * kLineBytes,
        blocks * tile_step * int64_t(sizeof(Real)), staged * int64_t(sizeof(T))};
    int64_t at[5] = {0};
    for (int i = 0; i < 4; ++i)
      at[i + 1] = at[i] + (sizes[i] + kLineBytes - 1) / kLineBytes * kLineBytes;
    char* base = static_cast<char*>(thread_scratch(size_t(at[4])));
    map = reinterpret_cast<Real*>(base);
    strips = reinterpret_cast<Real*>(base + at[1]);
    tile = reinterpret_cast<Real*>(base + at[2]);
    stage = reinterpret_cast<T*>(base + at[3]);
  }
  ~Workspace() { trim_thread_scratch(); }
  Map<Real> map_of(int64_t block) const { return {map + block * map_step, row_step}; }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
};

// --- The operations
// -------------------------------------------------------------------------------

// Asks for a run of pixels that will be loaded soon.
template <class T>
void prefetch_pixels(const Plane<const T>& plane, int64_t first, int64_t count) {
  const int64_t y = first / plane.width, x = first % plane.width;
  const T* p = plane.data + y * plane.row_stride + x * plane.pixel_stride;
  if (plane.channel_stride == 1) {
    for (int64_t i = 0; i < least_of(count, plane.width - x); ++i) {
      prefetch(p + i * plane.pixel_stride, plane.channels * int64_t(sizeof(T)));
    }
  } else {
    for (int64_t c = 0; c < plane.channels; ++c) prefetch(p + c * plane.channel_stride, 1);
  }
}

// Packs the pixels that the band is the first to touch.
template <class T, class Real>
void pack(const Plane<const T>& plane, const Groups& groups, const Workspace<T, Real>& work) {
  for (int64_t g = 0; g < groups.count; ++g) {
    if (g + kAhead < groups.count) prefetch_pixels(plane, groups.at[g + kAhead] * kGroup, kGroup);
    const int64_t first = groups.at[g] * kGroup;
    load_lines(plane, first, least_of(kGroup, plane.pixels - first),
               work.map + first * kLanes<Real>, work.map_step);
  }
}

// Runs body(visit, part) for all tasks; a part is the channels of one task.
template <class Real, class Body>
void for_tasks(const Windows<Real>& windows, const Parts& parts, int threads, Body body) {
  const int64_t count = parts.count(), work = windows.work * count * parts.blocks;
  parallel_for(windows.visit_count * count, work < kSerialWork ? 1 : threads,
               [&](int64_t task) { body(windows.visits[task / count], task % count); });
}

// Calls enter(band), body(window, the next one or null) for its windows, and leave(band).
template <class Real, class Enter, class Body, class Leave>
void for_windows(const Visit<Real>& visit, Enter enter, Body body, Leave leave) {
  for (int64_t b = 0; b < visit.count; ++b) {
    const Band<Real>& band = visit.bands[b];
    enter(band);
    for (int64_t i = 0; i < band.count; ++i) {  // the windows of a visit lie one after another
      const bool last = b + 1 == visit.count && i + 1 == band.count;
      body(band.windows[i], last ? nullptr : band.windows + i + 1);
    }
    leave(band);
  }
}
template <class Real, class Enter, class Body>
void for_windows(const Visit<Real>& visit, Enter enter, Body body) {
  for_windows(visit, enter, body, [](const Band<Real>&) {});
}

// Calls body(range) for runs of at most kRows bins of y, ranges_of(bins) times.
inline int64_t ranges_of(int64_t bins) {
  return (bins + kRows - 1) / kRows;
}
template <class Body>
inline void for_rows(int64_t bins, Body body) {
  for (int64_t p = 0; p < bins; p += kRows) body(Range{p, least_of(p + kRows, bins)});
}

int64_t count_of(const Tensor& t) {
  return t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3];
}

template <class T>
void forward(const Tensor& features, const Rois& rois, const void* tangent, const Params& params,
             const Tensor& output, int threads) {
  using Real = Accumulator<T>;
  const int64_t* bins = output.shape + 2;
  const Parts parts = Parts::of(features, &output, T{});
  const bool streamed = count_of(output) * int64_t(sizeof(T)) > kStreamBytes;
  const Windows<Real> windows =
      build_windows(Operation::forward, rois, static_cast<const Real*>(tangent), params,
                    features.shape, bins, parts.count(), threads);
  for_tasks(windows, parts, threads, [&](const Visit<Real>& visit, int64_t part) {
    const auto plane = plane_of<const T>(features, visit.image, parts[part]);
    const Workspace<T, Real> work(features, windows.max_columns, bins, plane.blocks());
    Copy leaving;  // the tile before
    const auto enter = [&](const Band<Real>& band) { pack(plane, band.first, work); };
    for_windows(visit, enter, [&](const Window<Real>& window, const Window<Real>*) {
      if (!window.term_count) {
        std::memset(work.tile, 0, size_t(plane.blocks() * work.tile_step) * sizeof(Real));
      }
      const int64_t piece = leaving.run * leaving.runs / (plane.blocks() * ranges_of(bins[0]));
      for (int64_t b = 0; b < plane.blocks(); ++b) {
        for_rows(bins[0], [&](Range p) {
          Real* out = work.tile + b * work.tile_step + p.begin * bins[1] * kLanes<Real>;
          leaving.advance(piece);  // before the work: stores wait in line behind it
          for (int s = 0; s < window.term_count; ++s) {
            pool_bins(window.term[s], p, bins[1], work.map_of(b), work.strips, out, s > 0);
          }
        });
      }
      leaving.finish();
      leaving = store_lines(plane_of<T>(output, window.roi, parts[part]), 0, bins[0] * bins[1],
                            work.tile, work.tile_step, work.stage, streamed);
    });
    leaving.finish();
    if (streamed) stream_fence();
  });
}

// The part of d_output that comes next. It is asked for in `pieces`, while the one before is worked
// on: the memory system takes only so many requests at a time.
template <class T>
class Upcoming {
 public:
  template <class Real>
  Upcoming(const Tensor& d_output, const Window<Real>* following, Range channels, int64_t pieces)
      : tile_(plane_of<const T>(d_output, following ? following->roi : 0, channels)),
        next_(following ? 0 : tile_.pixels),
        piece_((tile_.pixels + pieces - 1) / pieces) {}

  void ask() {
    const int64_t from = next_, bytes = tile_.channels * int64_t(sizeof(T));
    next_ = least_of(from + piece_, tile_.pixels);
    if (tile_.pixel_stride == 1 && tile_.channel_stride == tile_.pixels) {
      const char* data = reinterpret_cast<const char*>(tile_.data);
      prefetch(data + from * bytes, (next_ - from) * bytes);
    } else if (tile_.channel_stride == 1 && tile_.even()) {
      for (int64_t i = from; i < next_; ++i) prefetch(tile_.data + i * tile_.pixel_stride, bytes);
    }
  }

 private:
  Plane<const T> tile_;
  int64_t next_, piece_;  // pixels
};

template <class T, class Real>
void load_tile(const Tensor& d_output, const Window<Real>& window, Range channels,
               const Workspace<T, Real>& work) {
  const auto tile = plane_of<const T>(d_output, window.roi, channels);
  load_lines(tile, 0, tile.pixels, work.tile, work.tile_step);
}

template <class T>
void adjoint(const Tensor& d_output, const Rois& rois, const void* tangent, const Params& params,
             const Tensor& d_features, int threads) {
  using Real = Accumulator<T>;
  constexpr int64_t line = kLanes<Real>;
  const int64_t* bins = d_output.shape + 2;
  const Parts parts = Parts::of(d_features, &d_features, T{});
  const bool streamed = count_of(d_features) * int64_t(sizeof(T)) > kStreamBytes;
  const Windows<Real> windows =
      build_windows(Operation::adjoint, rois, static_cast<const Real*>(tangent), params,
                    d_features.shape, bins, parts.count(), threads);
  for_tasks(windows, parts, threads, [&](const Visit<Real>& visit, int64_t part) {
    const auto plane = plane_of<T>(d_features, visit.image, parts[part]);
    const Workspace<T, Real> work(d_features, windows.max_columns, bins, plane.blocks());
    const auto zero = [&](int64_t group, int64_t count) {
      for (int64_t b = 0; b < plane.blocks(); ++b) {
        std::memset(work.map + b * work.map_step + group * kGroup * line, 0,
                    size_t(count * kGroup * kLineBytes));
      }
    };
    // Groups that follow each other leave together, where pixels do too cut between cache lines.
    // The lines of pixel i are at i * step.
    const bool runs = plane.even() && plane.pixel_stride == 1;
    const auto unpack = [&](const Groups& groups, int64_t step) {
      for (int64_t g = 0; g < groups.count;) {
        int64_t from = groups.at[g] * kGroup, end = from + kGroup;
        while (++g < groups.count && groups.at[g] * kGroup == end) end += kGroup;
        for (end = least_of(end, plane.pixels); from < end;) {
          int64_t to = least_of(from + kUnpacked * kGroup, end);
          if (runs && to < end) {
            to -= int64_t(reinterpret_cast<uintptr_t>(plane.data + to) % kLineBytes / sizeof(T));
          }
          store_lines(plane, from, to - from, work.map + from * step, work.map_step, work.stage,
                      streamed)
              .finish();
          from = to;
        }
      }
    };
    const auto enter = [&](const Band<Real>& band) {
      for (int64_t g = 0; g < band.first.count; ++g) zero(band.first.at[g], 1);
    };
    const auto leave = [&](const Band<Real>& band) { unpack(band.last, line); };
    for_windows(
        visit, enter,
        [&](const Window<Real>& window, const Window<Real>* following) {
          Upcoming<T> upcoming(d_output, following, parts[part],
                               2 * plane.blocks() * ranges_of(bins[0]));
          if (window.term_count) load_tile(d_output, window, parts[part], work);
          for (int64_t b = 0; b < plane.blocks(); ++b) {
            for_rows(bins[0], [&](Range p) {
              const Real* d_out = work.tile + b * work.tile_step + p.begin * bins[1] * line;
              for (int s = 0; s < window.term_count; ++s) {
                const Term<Real>& term = window.term[s];
                upcoming.ask();
                pull_columns(term.x, p.count(), d_out, bins[1], work.strips);
                upcoming.ask();
                spread_columns(term, p, work.strips, work.map_of(b));
              }
            });
          }
        },
        leave);
    zero(0, least_of(kUnpacked, (plane.pixels + kGroup - 1) / kGroup));
    unpack(visit.untouched, 0);
    if (streamed) stream_fence();
  });
}

template <class Real>
Real sum_of(const Line<Real>& line) {
  Real lanes[kLanes<Real>], sum = 0;
  store(lanes, line);
  for (int c = 0; c < kLanes<Real>; ++c) sum += lanes[c];
  return sum;
}

template <class T>
void box_gradient(const Tensor& d_output, const Tensor& features, const Rois& rois,
                  const Params& params, void* d_boxes, int threads) {
  using Real = Accumulator<T>;
  const int64_t* bins = d_output.shape + 2;
  const Parts parts = Parts::of(features, nullptr, T{});
  const Windows<Real> windows = build_windows<Real>(Operation::box_gradient, rois, nullptr, params,
                                                    features.shape, bins, parts.count(), threads);
  // A row of sums per block of channels, added in order: the same bits for any threads and layout.
  const int64_t count = rois.count * 4, sums = parts.count() * parts.blocks;
  const size_t bytes = size_t(most_of<int64_t>(1, sums * count)) * sizeof(Real);
  Real* partial = static_cast<Real*>(map_memory(bytes));
  struct Owner {
    void* memory;
    size_t bytes;
    ~Owner() { unmap_memory(memory, bytes); }
  } const owner{partial, bytes};
  for_tasks(windows, parts, threads, [&](const Visit<Real>& visit, int64_t part) {
    const auto plane = plane_of<const T>(features, visit.image, parts[part]);
    const Workspace<T, Real> work(features, windows.max_columns, bins, plane.blocks());
    const auto enter = [&](const Band<Real>& band) { pack(plane, band.first, work); };
    for_windows(visit, enter, [&](const Window<Real>& window, const Window<Real>* following) {
      Upcoming<T> upcoming(d_output, following, parts[part],
                           4 * plane.blocks() * ranges_of(bins[0]));
      if (window.term_count) load_tile(d_output, window, parts[part], work);
      for (int64_t b = 0; b < parts.blocks; ++b) {
        Line<Real> d_x[2] = {}, d_y[2] = {};
        if (window.term_count && b < plane.blocks()) {
          // d_output pulled back to the map's columns, against the slopes of y; and the features
          // pooled to the columns, against the slopes of x.
          const Term<Real>&pulled = window.term[0], &pooled = window.term[1];
          for_rows(bins[0], [&](Range p) {
            const Real* d_out = work.tile + b * work.tile_step + p.begin * bins[1] * kLanes<Real>;
            upcoming.ask();
            pull_columns(pulled.x, p.count(), d_out, bins[1], work.strips);
            upcoming.ask();
            dot_y_slopes(pulled, p, work.map_of(b), work.strips, d_y);
            upcoming.ask();
            pool_columns(pooled, p, work.map_of(b), work.strips);
            upcoming.ask();
            dot_x_slopes(pooled, p, bins[1], work.strips, d_out, d_x);
          });
        }
        Real* d_box = partial + (part * parts.blocks + b) * count + window.roi * 4;
        d_box[0] = sum_of(d_x[0]);
        d_box[1] = sum_of(d_y[0]);
        d_box[2] = sum_of(d_x[1]);
        d_box[3] = sum_of(d_y[1]);
      }
    });
  });
  Real* result = static_cast<Real*>(d_boxes);
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t block = 0; block < sums; ++block) sum += double(partial[block * count + i]);
    result[i] = Real(sum);
  }
}

template <class Run>
void by_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::float16:
      return run(half{});
    case DType::bfloat16:
      return run(bfloat16{});
    case DType::float32:
      return run(float{});
    default:
      return run(double{});
  }
}

void forward_any(const Tensor& features, const Rois& rois, const void* tangent,
                 const Params& params, const Tensor& output, int threads) {
  by_dtype(features.dtype,
           [&](auto t) { forward<decltype(t)>(features, rois, tangent, params, output, threads); });
}

void adjoint_any(const Tensor& d_output, const Rois& rois, const void* tangent,
                 const Params& params, const Tensor& d_features, int threads) {
  by_dtype(d_output.dtype, [&](auto t) {
    adjoint<decltype(t)>(d_output, rois, tangent, params, d_features, threads);
  });
}

void box_gradient_any(const Tensor& d_output, const Tensor& features, const Rois& rois,
                      const Params& params, void* d_boxes, int threads) {
  by_dtype(features.dtype, [&](auto t) {
    box_gradient<decltype(t)>(d_output, features, rois, params, d_boxes, threads);
  });
}

}  // namespace

#define ROIALIGN_STRING(x) #x
#define ROIALIGN_NAME(x) ROIALIGN_STRING(x)

extern const Engine engine;
const Engine engine{ROIALIGN_NAME(ROIALIGN_ISA), forward_any, adjoint_any, box_gradient_any};

}  // namespace ROIALIGN_ISA
}  // namespace roialign
