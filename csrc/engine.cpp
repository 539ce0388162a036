// The engine: Out = Ay F Ax^T for every RoI, by blocks of channels: a line of 64 bytes, 16 floats or 8
// doubles, per pixel. One task is one visit (a run of RoIs on one image) for one or a few blocks.
//
//   forward       pack the pixels that a window is the first to touch into lines [H * W][line];
//                 x pass: rows_x_bins = F Ax^T; y pass: tile = Ay rows_x_bins; unpack the tile.
//   adjoint       load d_output's tile; y pass: rows_x_bins = Ay^T tile; x pass: add
//                 rows_x_bins Ax to the lines; unpack the pixels that it was the last to touch.
//   box_gradient  the same passes, with the last one replaced by a dot product.
//
// This file is compiled once per instruction set, into a namespace named after it. It must not
// instantiate anything with external linkage that another file instantiates too (no std:: containers
// or algorithms): the linker could keep the copy with the wrong instructions.
#include "engine.hpp"

#include "memory.hpp"
#include "parallel.hpp"
#include "simd.hpp"
#include "windows.hpp"

namespace roialign {
namespace ROIALIGN_ISA {
namespace {

constexpr int kTaps = 8;                              // taps of one pass over the lines
constexpr int64_t kStreamBytes = int64_t{2} << 20;    // larger results bypass the caches
constexpr int64_t kSerialWork = int64_t{1} << 17;     // fewer line operations: one thread

template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> struct AccumulatorOf<const T> : AccumulatorOf<T> {};
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

template <class T> inline T least_of(T a, T b) { return b < a ? b : a; }
template <class T> inline T most_of(T a, T b) { return a < b ? b : a; }

// --- Passes over lines ----------------------------------------------------------------------------

// A pass: for every row i of the matrix and every line j,
//   out[out_place[i] * out_step + out_at[j]] (+)= sum over t of weight[t] * in[at(t) + in_at[j]],
//   at(t) = in_place[index[t]] * in_step.
// A null place is the identity. `taps` of a row's entries, from `first` on, are added at a time.
template <class Real>
struct Pass {
  Axis<Real> matrix;
  int64_t rows;
  const Real* in;
  const int64_t* in_place;
  int64_t in_step;
  const int64_t* in_at;
  Real* out;
  const int64_t* out_place;
  int64_t out_step;
  const int64_t* out_at;
  int64_t count;  // of lines
};

inline int64_t placed(const int64_t* place, int64_t i) { return place ? place[i] : i; }

template <class Real, int taps, bool accumulate>
void add_taps(const Pass<Real>& pass, int64_t first) {
  const Pass<Real> p = pass;  // a copy: stores to lines might alias what a reference names
  const int64_t width = p.matrix.taps;
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t* index = p.matrix.index + i * width + first;
    const Real* weight = p.matrix.weight[0] + i * width + first;
    Real* out = p.out + placed(p.out_place, i) * p.out_step;
    if (*index < 0) {
      for (int64_t j = 0; !accumulate && j < p.count; ++j) store(out + p.out_at[j], Line<Real>{});
      continue;
    }
    Vector<Real> w[taps];
    const Real* in[taps];
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) {
      w[t] = broadcast(weight[t]);
      in[t] = p.in + placed(p.in_place, index[t]) * p.in_step;
    }
    for (int64_t j = 0; j < p.count; ++j) {
      const int64_t from = p.in_at[j], to = p.out_at[j];
      Line<Real> sum = accumulate ? load(out + to) : Line<Real>{};
#pragma GCC unroll 8
      for (int t = 0; t < taps; ++t) multiply_add(sum, w[t], load(in[t] + from));
      store(out + to, sum);
    }
  }
}

template <class Real>
using AddTaps = void (*)(const Pass<Real>&, int64_t);

template <class Real, bool accumulate>
constexpr AddTaps<Real> kAddTaps[kTaps + 1] = {
    nullptr, add_taps<Real, 1, accumulate>, add_taps<Real, 2, accumulate>,
    add_taps<Real, 3, accumulate>, add_taps<Real, 4, accumulate>, add_taps<Real, 5, accumulate>,
    add_taps<Real, 6, accumulate>, add_taps<Real, 7, accumulate>, add_taps<Real, 8, accumulate>};

template <class Real>
void run(const Pass<Real>& pass, bool accumulate) {
  if (pass.matrix.taps == 0 && !accumulate) {
    for (int64_t i = 0; i < pass.rows; ++i) {
      Real* out = pass.out + placed(pass.out_place, i) * pass.out_step;
      for (int64_t j = 0; j < pass.count; ++j) store(out + pass.out_at[j], Line<Real>{});
    }
  }
  for (int64_t first = 0; first < pass.matrix.taps; first += kTaps) {
    const int64_t taps = least_of<int64_t>(pass.matrix.taps - first, kTaps);
    (accumulate || first ? kAddTaps<Real, true> : kAddTaps<Real, false>)[taps](pass, first);
  }
}

// sum[t] = sum over j of g[g_at[j]] * in[in_at[j] + at[t]].
template <class Real, int taps>
void dot_taps(const Real* g, const int64_t* g_at, const Real* in, const int64_t* in_at,
              const int64_t* at, int64_t count, Line<Real>* result) {
  Line<Real> sum[taps] = {};
  const Real* source[taps];
  for (int t = 0; t < taps; ++t) source[t] = in + at[t];
  for (int64_t j = 0; j < count; ++j) {
    const Line<Real> d = load(g + g_at[j]);
#pragma GCC unroll 8
    for (int t = 0; t < taps; ++t) multiply_add(sum[t], d, load(source[t] + in_at[j]));
  }
  for (int t = 0; t < taps; ++t) result[t] = sum[t];
}

template <class Real>
using Dot = void (*)(const Real*, const int64_t*, const Real*, const int64_t*, const int64_t*,
                     int64_t, Line<Real>*);

constexpr int kDots = 4;  // sums held in registers
template <class Real>
constexpr Dot<Real> kDot[kDots + 1] = {nullptr, dot_taps<Real, 1>, dot_taps<Real, 2>,
                                       dot_taps<Real, 3>, dot_taps<Real, 4>};

// result[e] += sum over rows i and entries t of slope_e * <g[i * g_step], in[place[index] * in_step]>,
// for the box's start and end e. A slope of zero multiplies nothing.
template <class Real>
void dot_slopes(const Axis<Real>& slopes, int64_t rows, const Real* g, int64_t g_step,
                const int64_t* g_at, const Real* in, const int64_t* place, int64_t in_step,
                const int64_t* in_at, int64_t count, Line<Real> result[2]) {
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t begin = i * slopes.taps, end = begin + slopes.taps;
    if (begin == end || slopes.index[begin] < 0) continue;
    for (int64_t t = begin; t < end; t += kDots) {
      const int taps = int(least_of<int64_t>(end - t, kDots));
      int64_t at[kDots];
      for (int s = 0; s < taps; ++s) at[s] = placed(place, slopes.index[t + s]) * in_step;
      Line<Real> sum[kDots];
      kDot<Real>[taps](g + i * g_step, g_at, in, in_at, at, count, sum);
      for (int s = 0; s < taps; ++s) {
        for (int e = 0; e < 2; ++e) {
          const Real slope = slopes.weight[e][t + s];
          if (slope != 0) multiply_add(result[e], broadcast(slope), sum[s]);
        }
      }
    }
  }
}

// --- Between arrays and lines ---------------------------------------------------------------------

// How many blocks of channels a task takes: so many that what it reads and writes at a time are whole
// cache lines, and with channels innermost longer runs.
template <class T>
int64_t blocks_per_task(const Tensor& map) {
  const bool channels_last = map.stride[1] == 1 && map.stride[3] != 1;
  return channels_last ? 4 : sizeof(T) < sizeof(Accumulator<T>) ? 2 : 1;
}

// The channels of one task, of one image or of one RoI's d_output or output.
template <class T>
struct Plane {
  T* data;
  int64_t width, pixels;
  int64_t channel_stride, row_stride, pixel_stride;
  int64_t channels;

  int64_t blocks() const { return (channels + kLanes<Accumulator<T>> - 1) / kLanes<Accumulator<T>>; }
};

// Channels [first, first + count) of image or RoI n, as far as there are any.
template <class T>
Plane<T> plane_of(const Tensor& tensor, int64_t n, int64_t first, int64_t count) {
  return {static_cast<T*>(tensor.data) + n * tensor.stride[0] + first * tensor.stride[1],
          tensor.shape[3],
          tensor.shape[2] * tensor.shape[3],
          tensor.stride[1],
          tensor.stride[2],
          tensor.stride[3],
          least_of(count, tensor.shape[1] - first)};
}

// Calls body(pointer, count, done) for the runs of equally spaced pixels in [first, first + count).
template <class T, class Body>
void for_runs(const Plane<T>& plane, int64_t first, int64_t count, Body body) {
  if (plane.row_stride == plane.width * plane.pixel_stride) {
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

inline void transpose_rows(const float* rows, int64_t stride, int64_t count, float* lines) {
  int64_t i = 0;
#if defined(__AVX512F__)
  // Rows a multiple of 4 KiB apart share a cache set, and would be lost between quarters of a line.
  if (stride % 1024 == 0) {
    for (; i + 16 <= count; i += 16) wide_rows_to_lines(rows + i, stride, lines + i * 16);
  }
#endif
  for (; i + 4 <= count; i += 4) rows_to_lines(rows + i, stride, lines + i * 16);
  for (; i < count; ++i) {
    for (int c = 0; c < 16; ++c) lines[i * 16 + c] = rows[c * stride + i];
  }
}
inline void transpose_rows(const double* rows, int64_t stride, int64_t count, double* lines) {
  for (int64_t i = 0; i < count; ++i) {
    for (int c = 0; c < 8; ++c) lines[i * 8 + c] = rows[c * stride + i];
  }
}
inline void transpose_lines(const float* lines, int64_t count, float* rows, int64_t stride) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) lines_to_rows(lines + i * 16, rows + i, stride);
  for (; i < count; ++i) {
    for (int c = 0; c < 16; ++c) rows[c * stride + i] = lines[i * 16 + c];
  }
}
inline void transpose_lines(const double* lines, int64_t count, double* rows, int64_t stride) {
  for (int c = 0; c < 8; ++c) {
    for (int64_t i = 0; i < count; ++i) rows[c * stride + i] = lines[i * 8 + c];
  }
}

template <class T> inline bool same(const T*, const T*) { return true; }
template <class T, class Real> inline bool same(const T*, const Real*) { return false; }

// Pixels [first, first + count) of the plane as lines, block after block `block_step` apart; absent
// channels are 0. `rows` is scratch for the lines of one block.
template <class T, class Real>
void load_lines(const Plane<const T>& plane, int64_t first, int64_t count, Real* lines,
                int64_t block_step, Real* rows) {
  constexpr int lanes = kLanes<Real>;
  for_runs(plane, first, count, [&](const T* run_data, int64_t run, int64_t done) {
    for (int64_t b = 0; b < plane.blocks(); ++b) {
      const T* p = run_data + b * lanes * plane.channel_stride;
      const int channels = int(least_of<int64_t>(lanes, plane.channels - b * lanes));
      Real* to = lines + b * block_step + done * lanes;
      if (channels == lanes && plane.channel_stride == 1) {
        for (int64_t i = 0; i < run; ++i) widen_line(p + i * plane.pixel_stride, to + i * lanes);
      } else if (plane.pixel_stride == 1) {
        const Real* from = rows;
        int64_t stride = run;
        if (same(p, from) && channels == lanes) {
          from = reinterpret_cast<const Real*>(p);
          stride = plane.channel_stride;
        } else {
          for (int c = 0; c < channels; ++c) {
            widen_run(p + c * plane.channel_stride, run, rows + c * run);
          }
          for (int64_t i = channels * run; i < lanes * run; ++i) rows[i] = 0;
        }
        transpose_rows(from, stride, run, to);
      } else {
        for (int64_t i = 0; i < run; ++i) {
          for (int c = 0; c < lanes; ++c) {
            to[i * lanes + c] =
                c < channels ? widen(p[i * plane.pixel_stride + c * plane.channel_stride]) : 0;
          }
        }
      }
    }
  });
}

inline void copy_out(void* to, const void* from, int64_t bytes, bool streamed) {
  if (streamed) stream(to, from, size_t(bytes));
  else std::memcpy(to, from, size_t(bytes));
}

// The inverse. `rows` and `narrowed` are scratch for the lines of all blocks.
template <class T, class Real>
void store_lines(const Plane<T>& plane, int64_t first, int64_t count, const Real* lines,
                 int64_t block_step, Real* rows, T* narrowed, bool streamed) {
  constexpr int lanes = kLanes<Real>;
  const int64_t blocks = plane.blocks();
  for_runs(plane, first, count, [&](T* p, int64_t run, int64_t done) {
    const Real* from = lines + done * lanes;
    if (plane.channel_stride == 1 && plane.channels == blocks * lanes) {
      for (int64_t i = 0; i < run; ++i) {
        for (int64_t b = 0; b < blocks; ++b) {
          narrow_line(from + b * block_step + i * lanes, narrowed + b * lanes);
        }
        copy_out(p + i * plane.pixel_stride, narrowed, plane.channels * int64_t(sizeof(T)), streamed);
      }
    } else if (plane.pixel_stride == 1) {
      if (same(p, rows) && plane.channels == blocks * lanes && !streamed) {
        for (int64_t b = 0; b < blocks; ++b) {
          transpose_lines(from + b * block_step, run,
                          reinterpret_cast<Real*>(p + b * lanes * plane.channel_stride),
                          plane.channel_stride);
        }
        return;
      }
      for (int64_t b = 0; b < blocks; ++b) {
        transpose_lines(from + b * block_step, run, rows + b * lanes * run, run);
      }
      T* out = narrowed;
      if (same(p, rows)) out = reinterpret_cast<T*>(rows);
      else narrow_run(rows, plane.channels * run, narrowed);
      if (plane.channel_stride == run) {  // channels follow each other: one piece
        copy_out(p, out, plane.channels * run * int64_t(sizeof(T)), streamed);
      } else {
        for (int64_t c = 0; c < plane.channels; ++c) {
          copy_out(p + c * plane.channel_stride, out + c * run, run * int64_t(sizeof(T)), streamed);
        }
      }
    } else {
      for (int64_t i = 0; i < run; ++i) {
        for (int64_t c = 0; c < plane.channels; ++c) {
          narrow(from[c / lanes * block_step + i * lanes + c % lanes],
                 p[i * plane.pixel_stride + c * plane.channel_stride]);
        }
      }
    }
  });
}

// --- Scratch --------------------------------------------------------------------------------------

// What a task works in, cut from the thread's scratch. Every part starts on a line.
template <class T, class Real>
struct Workspace {
  Real* map;            // [blocks][H * W] lines: packed features, or the sums of d_features
  Real* rows_x_bins;    // [rows of a window][Q] lines: between the two passes
  Real* tile;           // [blocks][P][Q] lines
  Real* rows;           // channel rows of a tile or a group
  T* narrowed;          // the same in the array's dtype, if that is another; or a pixel's channels
  int64_t* row_at;      // map rows of the window
  int64_t* bins_at;     // rows of rows_x_bins
  int64_t* q_at;        // lines of a row of bins

  int64_t map_step;     // from one block to the next
  int64_t tile_step;

  Workspace(int64_t pixels, int64_t max_rows, const int64_t bins[2], int64_t blocks)
      : map_step((pixels + kGroup) * kLanes<Real>), tile_step(bins[0] * bins[1] * kLanes<Real>) {
    const int64_t stage = blocks * most_of(bins[0] * bins[1], kGroup);
    const int64_t sizes[] = {blocks * map_step * int64_t(sizeof(Real)),
                             max_rows * bins[1] * kLineBytes,
                             blocks * tile_step * int64_t(sizeof(Real)),
                             stage * kLineBytes,
                             sizeof(T) == sizeof(Real) ? blocks * kLineBytes
                                                       : stage * kLanes<Real> * int64_t(sizeof(T)),
                             max_rows * int64_t(sizeof(int64_t)),
                             max_rows * int64_t(sizeof(int64_t)),
                             bins[1] * int64_t(sizeof(int64_t))};
    int64_t at[9] = {0};
    for (int i = 0; i < 8; ++i) at[i + 1] = at[i] + (sizes[i] + kLineBytes - 1) / kLineBytes * kLineBytes;
    char* base = static_cast<char*>(thread_scratch(size_t(at[8])));
    map = reinterpret_cast<Real*>(base + at[0]);
    rows_x_bins = reinterpret_cast<Real*>(base + at[1]);
    tile = reinterpret_cast<Real*>(base + at[2]);
    rows = reinterpret_cast<Real*>(base + at[3]);
    narrowed = reinterpret_cast<T*>(base + at[4]);
    row_at = reinterpret_cast<int64_t*>(base + at[5]);
    bins_at = reinterpret_cast<int64_t*>(base + at[6]);
    q_at = reinterpret_cast<int64_t*>(base + at[7]);
    for (int64_t r = 0; r < max_rows; ++r) bins_at[r] = r * bins[1] * kLanes<Real>;
    for (int64_t q = 0; q < bins[1]; ++q) q_at[q] = q * kLanes<Real>;
  }
  ~Workspace() { trim_thread_scratch(); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
};

template <class Real>
void place_rows(const Axis<Real>& y, int64_t row_step, int64_t* row_at) {
  for (int64_t r = 0; r < y.pixel_count; ++r) row_at[r] = y.pixels[r] * row_step;
}

// --- The operations -------------------------------------------------------------------------------

// Packs the pixels that the band is the first to touch.
template <class T, class Real>
void pack(const Plane<const T>& plane, const Groups& groups, const Workspace<T, Real>& work) {
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t first = groups.at[g] * kGroup;
    load_lines(plane, first, least_of(kGroup, plane.pixels - first), work.map + first * kLanes<Real>,
               work.map_step, work.rows);
  }
}

// Runs body(visit, part) for all tasks; a part is the channels of one task.
template <class Real, class Body>
void for_tasks(const Windows<Real>& windows, int64_t parts, int64_t blocks, int threads, Body body) {
  const int64_t work = windows.work * parts * blocks;
  parallel_for(windows.visit_count * parts, work < kSerialWork ? 1 : threads, [&](int64_t task) {
    body(windows.visits[task / parts], task % parts);
  });
}

// Calls enter(band), body(window, the next one or null) for its windows, and leave(band).
template <class Real, class Enter, class Body, class Leave>
void for_windows(const Visit<Real>& visit, Enter enter, Body body, Leave leave) {
  for (int64_t b = 0; b < visit.count; ++b) {
    const Band<Real>& band = visit.bands[b];
    enter(band);
    for (int64_t i = 0; i < band.count; ++i) {
      body(band.windows[i], i + 1 < band.count ? &band.windows[i + 1] : nullptr);
    }
    leave(band);
  }
}
template <class Real, class Enter, class Body>
void for_windows(const Visit<Real>& visit, Enter enter, Body body) {
  for_windows(visit, enter, body, [](const Band<Real>&) {});
}

int64_t count_of(const Tensor& t) { return t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3]; }

template <class T>
void forward(const Tensor& features, const Rois& rois, const void* tangent, const Params& params,
             const Tensor& output, int threads) {
  using Real = Accumulator<T>;
  constexpr int64_t line = kLanes<Real>;
  const int64_t* bins = output.shape + 2;
  const int64_t blocks = blocks_per_task<T>(features), channels = blocks * line;
  const int64_t parts = (features.shape[1] + channels - 1) / channels;
  const bool streamed = count_of(output) * int64_t(sizeof(T)) > kStreamBytes;
  const Windows<Real> windows =
      build_windows(Operation::forward, rois, static_cast<const Real*>(tangent), params,
                    features.shape, bins, parts, threads);
  for_tasks(windows, parts, blocks, threads, [&](const Visit<Real>& visit, int64_t part) {
    const auto plane = plane_of<const T>(features, visit.image, part * channels, channels);
    Workspace<T, Real> work(plane.pixels, windows.max_rows, bins, plane.blocks());
    const auto enter = [&](const Band<Real>& band) { pack(plane, band.first, work); };
    for_windows(visit, enter, [&](const Window<Real>& window, const Window<Real>*) {
      if (!window.term_count) {
        std::memset(work.tile, 0, size_t(plane.blocks() * work.tile_step) * sizeof(Real));
      }
      for (int s = 0; s < window.term_count; ++s) {
        const Axis<Real>& y = window.term[s].y;
        const Axis<Real>& x = window.term[s].x;
        place_rows(y, plane.width * line, work.row_at);
        for (int64_t b = 0; b < plane.blocks(); ++b) {
          run<Real>({x, bins[1], work.map + b * work.map_step, x.pixels, line, work.row_at,
                     work.rows_x_bins, nullptr, line, work.bins_at, y.pixel_count}, false);
          run<Real>({y, bins[0], work.rows_x_bins, nullptr, bins[1] * line, work.q_at,
                     work.tile + b * work.tile_step, nullptr, bins[1] * line, work.q_at, bins[1]},
                    s > 0);
        }
      }
      store_lines(plane_of<T>(output, window.roi, part * channels, channels), 0, bins[0] * bins[1],
                  work.tile, work.tile_step, work.rows, work.narrowed, streamed);
    });
    if (streamed) stream_fence();
  });
}

// Loads the window's part of d_output and asks for the next one's.
template <class T, class Real>
void load_tile(const Tensor& d_output, const Window<Real>& window, const Window<Real>* following,
               int64_t first, int64_t channels, Workspace<T, Real>& work) {
  if (following) {
    const auto next = plane_of<const T>(d_output, following->roi, first, channels);
    const int64_t bytes = next.channels * int64_t(sizeof(T));
    if (next.pixel_stride == 1 && next.channel_stride == next.pixels) {
      prefetch(next.data, next.pixels * bytes);
    } else if (next.channel_stride == 1 && next.row_stride == next.width * next.pixel_stride) {
      for (int64_t i = 0; i < next.pixels; ++i) prefetch(next.data + i * next.pixel_stride, bytes);
    }
  }
  const auto tile = plane_of<const T>(d_output, window.roi, first, channels);
  load_lines(tile, 0, tile.pixels, work.tile, work.tile_step, work.rows);
}

template <class T>
void adjoint(const Tensor& d_output, const Rois& rois, const void* tangent, const Params& params,
             const Tensor& d_features, int threads) {
  using Real = Accumulator<T>;
  constexpr int64_t line = kLanes<Real>;
  const int64_t* bins = d_output.shape + 2;
  const int64_t blocks = blocks_per_task<T>(d_features), channels = blocks * line;
  const int64_t parts = (d_features.shape[1] + channels - 1) / channels;
  const bool streamed = count_of(d_features) * int64_t(sizeof(T)) > kStreamBytes;
  const Windows<Real> windows =
      build_windows(Operation::adjoint, rois, static_cast<const Real*>(tangent), params,
                    d_features.shape, bins, parts, threads);
  for_tasks(windows, parts, blocks, threads, [&](const Visit<Real>& visit, int64_t part) {
    const auto plane = plane_of<T>(d_features, visit.image, part * channels, channels);
    Workspace<T, Real> work(plane.pixels, windows.max_rows, bins, plane.blocks());
    const auto zero = [&](int64_t group) {
      for (int64_t b = 0; b < plane.blocks(); ++b) {
        std::memset(work.map + b * work.map_step + group * kGroup * line, 0, kGroup * kLineBytes);
      }
    };
    const auto unpack = [&](int64_t group, const Real* lines) {
      const int64_t first = group * kGroup;
      store_lines(plane, first, least_of(kGroup, plane.pixels - first), lines, work.map_step,
                  work.rows, work.narrowed, streamed);
    };
    const auto enter = [&](const Band<Real>& band) {
      for (int64_t g = 0; g < band.first.count; ++g) zero(band.first.at[g]);
    };
    const auto leave = [&](const Band<Real>& band) {
      for (int64_t g = 0; g < band.last.count; ++g) {
        unpack(band.last.at[g], work.map + band.last.at[g] * kGroup * line);
      }
    };
    for_windows(visit, enter, [&](const Window<Real>& window, const Window<Real>* following) {
      if (window.term_count) load_tile(d_output, window, following, part * channels, channels, work);
      for (int s = 0; s < window.term_count; ++s) {
        const Axis<Real>& y = window.term[s].y;
        const Axis<Real>& x = window.term[s].x;
        place_rows(y, plane.width * line, work.row_at);
        for (int64_t b = 0; b < plane.blocks(); ++b) {
          run<Real>({y, y.pixel_count, work.tile + b * work.tile_step, nullptr, bins[1] * line,
                     work.q_at, work.rows_x_bins, nullptr, bins[1] * line, work.q_at, bins[1]},
                    false);
          run<Real>({x, x.pixel_count, work.rows_x_bins, nullptr, line, work.bins_at,
                     work.map + b * work.map_step, x.pixels, line, work.row_at, y.pixel_count},
                    true);
        }
      }
    }, leave);
    zero(0);
    for (int64_t g = 0; g < visit.untouched.count; ++g) unpack(visit.untouched.at[g], work.map);
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
  constexpr int64_t line = kLanes<Real>;
  const int64_t* bins = d_output.shape + 2;
  const int64_t blocks = blocks_per_task<T>(features), channels = blocks * line;
  const int64_t parts = (features.shape[1] + channels - 1) / channels;
  const Windows<Real> windows =
      build_windows<Real>(Operation::box_gradient, rois, nullptr, params, features.shape, bins,
                          parts, threads);
  // A row of sums per part of the channels, added in order: the same bits for any threads.
  const int64_t count = rois.count * 4;
  const size_t bytes = size_t(most_of<int64_t>(1, parts * count)) * sizeof(Real);
  Real* partial = static_cast<Real*>(map_memory(bytes));
  struct Owner {
    void* memory;
    size_t bytes;
    ~Owner() { unmap_memory(memory, bytes); }
  } const owner{partial, bytes};
  for_tasks(windows, parts, blocks, threads, [&](const Visit<Real>& visit, int64_t part) {
    const auto plane = plane_of<const T>(features, visit.image, part * channels, channels);
    Workspace<T, Real> work(plane.pixels, windows.max_rows, bins, plane.blocks());
    const auto enter = [&](const Band<Real>& band) { pack(plane, band.first, work); };
    for_windows(visit, enter, [&](const Window<Real>& window, const Window<Real>* following) {
      Line<Real> d_x[2] = {}, d_y[2] = {};
      if (window.term_count) {
        load_tile(d_output, window, following, part * channels, channels, work);
        // d_output pulled back to the map's rows, against the slopes of x.
        const Axis<Real>& y = window.term[0].y;
        const Axis<Real>& x_slopes = window.term[0].x;
        place_rows(y, plane.width * line, work.row_at);
        for (int64_t b = 0; b < plane.blocks(); ++b) {
          run<Real>({y, y.pixel_count, work.tile + b * work.tile_step, nullptr, bins[1] * line,
                     work.q_at, work.rows_x_bins, nullptr, bins[1] * line, work.q_at, bins[1]},
                    false);
          dot_slopes(x_slopes, bins[1], work.rows_x_bins, line, work.bins_at,
                     work.map + b * work.map_step, x_slopes.pixels, line, work.row_at,
                     y.pixel_count, d_x);
        }
        // The features' rows by bins of x, against the slopes of y.
        const Axis<Real>& y_slopes = window.term[1].y;
        const Axis<Real>& x = window.term[1].x;
        place_rows(y_slopes, plane.width * line, work.row_at);
        for (int64_t b = 0; b < plane.blocks(); ++b) {
          Real* tile = work.tile + b * work.tile_step;
          run<Real>({x, bins[1], work.map + b * work.map_step, x.pixels, line, work.row_at,
                     work.rows_x_bins, nullptr, line, work.bins_at, y_slopes.pixel_count}, false);
          for (int64_t q = 0; q < bins[1]; ++q) {  // a bin without samples does not read d_output
            if (x.taps && x.index[q * x.taps] >= 0) continue;
            for (int64_t p = 0; p < bins[0]; ++p) {
              std::memset(tile + (p * bins[1] + q) * line, 0, kLineBytes);
            }
          }
          dot_slopes(y_slopes, bins[0], tile, bins[1] * line, work.q_at, work.rows_x_bins, nullptr,
                     bins[1] * line, work.q_at, bins[1], d_y);
        }
      }
      Real* d_box = partial + part * count + window.roi * 4;
      d_box[0] = sum_of(d_x[0]);
      d_box[1] = sum_of(d_y[0]);
      d_box[2] = sum_of(d_x[1]);
      d_box[3] = sum_of(d_y[1]);
    });
  });
  Real* result = static_cast<Real*>(d_boxes);
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += double(partial[part * count + i]);
    result[i] = Real(sum);
  }
}

template <class Run>
void by_dtype(DType dtype, Run run) {
  switch (dtype) {
    case DType::float16: return run(half{});
    case DType::bfloat16: return run(bfloat16{});
    case DType::float32: return run(float{});
    default: return run(double{});
  }
}

void forward_any(const Tensor& features, const Rois& rois, const void* tangent, const Params& params,
                 const Tensor& output, int threads) {
  by_dtype(features.dtype, [&](auto t) {
    forward<decltype(t)>(features, rois, tangent, params, output, threads);
  });
}

void adjoint_any(const Tensor& d_output, const Rois& rois, const void* tangent, const Params& params,
                 const Tensor& d_features, int threads) {
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
