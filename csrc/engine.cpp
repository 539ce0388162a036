// The engine: Out = Ay F Ax^T for every RoI, by blocks of channels: a line of 64 bytes, 16 floats or 8
// doubles, per pixel. One task is one visit (a run of RoIs on one image) for one or a few blocks.
//
//   forward       pack the pixels that a band of RoIs is the first to touch into lines [H * W][line];
//                 y pass: strips = Ay F, along the map's rows; x pass: tile = strips Ax^T; unpack it.
//   adjoint       load d_output's tile; x pass: strips = tile Ax; y pass: add Ay^T strips to the
//                 lines; unpack the pixels that the band was the last to touch.
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
constexpr int64_t kAhead = 12;                        // groups of pixels asked for ahead
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
// A null place is the identity. `taps` entries of rows [row, end), from `first` on, are added at a time.
template <class Real>
struct Pass {
  Axis<Real> matrix;
  int64_t rows;           // of the matrix
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
void add_taps(const Pass<Real>& pass, int64_t row, int64_t end, int64_t first) {
  const Pass<Real> p = pass;  // a copy: stores to lines might alias what a reference names
  const int64_t width = p.matrix.taps;
  for (int64_t i = row; i < end; ++i) {
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
using AddTaps = void (*)(const Pass<Real>&, int64_t, int64_t, int64_t);

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
  const int64_t singles = pass.matrix.singles;
  if (singles) (accumulate ? kAddTaps<Real, true> : kAddTaps<Real, false>)[1](pass, 0, singles, 0);
  for (int64_t first = 0; first < pass.matrix.taps; first += kTaps) {
    const int64_t taps = least_of<int64_t>(pass.matrix.taps - first, kTaps);
    (accumulate || first ? kAddTaps<Real, true> : kAddTaps<Real, false>)[taps](pass, singles, pass.rows,
                                                                              first);
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
  Real* strips;         // [P][columns of a window] lines: between the two passes
  Real* tile;           // [blocks][P][Q] lines
  Real* rows;           // channel rows of a tile or a group
  T* narrowed;          // the same in the array's dtype, if that is another; or a pixel's channels
  int64_t* column_at;   // the window's columns in a row of the map
  int64_t* strip_at;    // the same columns in a strip
  int64_t* strips_at;   // strips
  int64_t* tile_at;     // rows of the tile

  int64_t map_step;     // from one block to the next
  int64_t tile_step;

  Workspace(int64_t pixels, int64_t max_columns, const int64_t bins[2], int64_t blocks)
      : map_step((pixels + kGroup) * kLanes<Real>), tile_step(bins[0] * bins[1] * kLanes<Real>) {
    const int64_t stage = blocks * most_of(bins[0] * bins[1], kGroup);
    const int64_t sizes[] = {blocks * map_step * int64_t(sizeof(Real)),
                             bins[0] * max_columns * kLineBytes,
                             blocks * tile_step * int64_t(sizeof(Real)),
                             stage * kLineBytes,
                             sizeof(T) == sizeof(Real) ? blocks * kLineBytes
                                                       : stage * kLanes<Real> * int64_t(sizeof(T)),
                             max_columns * int64_t(sizeof(int64_t)),
                             max_columns * int64_t(sizeof(int64_t)),
                             bins[0] * int64_t(sizeof(int64_t)),
                             bins[0] * int64_t(sizeof(int64_t))};
    int64_t at[10] = {0};
    for (int i = 0; i < 9; ++i) at[i + 1] = at[i] + (sizes[i] + kLineBytes - 1) / kLineBytes * kLineBytes;
    char* base = static_cast<char*>(thread_scratch(size_t(at[9])));
    map = reinterpret_cast<Real*>(base + at[0]);
    strips = reinterpret_cast<Real*>(base + at[1]);
    tile = reinterpret_cast<Real*>(base + at[2]);
    rows = reinterpret_cast<Real*>(base + at[3]);
    narrowed = reinterpret_cast<T*>(base + at[4]);
    column_at = reinterpret_cast<int64_t*>(base + at[5]);
    strip_at = reinterpret_cast<int64_t*>(base + at[6]);
    strips_at = reinterpret_cast<int64_t*>(base + at[7]);
    tile_at = reinterpret_cast<int64_t*>(base + at[8]);
    for (int64_t j = 0; j < max_columns; ++j) strip_at[j] = j * kLanes<Real>;
    for (int64_t p = 0; p < bins[0]; ++p) tile_at[p] = p * bins[1] * kLanes<Real>;
  }
  ~Workspace() { trim_thread_scratch(); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
};

// Where the columns of a window are; returns the length of a strip.
template <class T, class Real>
int64_t place_columns(const Axis<Real>& x, int64_t bins, const Workspace<T, Real>& work) {
  const int64_t step = x.pixel_count * kLanes<Real>;
  for (int64_t j = 0; j < x.pixel_count; ++j) work.column_at[j] = x.pixels[j] * kLanes<Real>;
  for (int64_t p = 0; p < bins; ++p) work.strips_at[p] = p * step;
  return step;
}

// strips = Ay F, for one block's map; y is by bins.
template <class T, class Real>
Pass<Real> pool_rows(const Term<Real>& term, int64_t bins, int64_t row_step, const Real* map,
                     int64_t strip, const Workspace<T, Real>& work) {
  return {term.y, bins, map, term.y.pixels, row_step, work.column_at,
          work.strips, nullptr, strip, work.strip_at, term.x.pixel_count};
}

// strips = tile Ax, for one block's tile; x is by pixels.
template <class T, class Real>
Pass<Real> spread_columns(const Term<Real>& term, const int64_t bins[2], const Real* tile,
                          const Workspace<T, Real>& work) {
  return {term.x, term.x.pixel_count, tile, nullptr, kLanes<Real>, work.tile_at,
          work.strips, nullptr, kLanes<Real>, work.strips_at, bins[0]};
}

// --- The operations -------------------------------------------------------------------------------

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
    Workspace<T, Real> work(plane.pixels, windows.max_columns, bins, plane.blocks());
    const auto enter = [&](const Band<Real>& band) { pack(plane, band.first, work); };
    for_windows(visit, enter, [&](const Window<Real>& window, const Window<Real>*) {
      if (!window.term_count) {
        std::memset(work.tile, 0, size_t(plane.blocks() * work.tile_step) * sizeof(Real));
      }
      for (int s = 0; s < window.term_count; ++s) {
        const Term<Real>& term = window.term[s];
        const int64_t strip = place_columns(term.x, bins[0], work);
        for (int64_t b = 0; b < plane.blocks(); ++b) {
          run(pool_rows(term, bins[0], plane.width * line, work.map + b * work.map_step, strip, work),
              false);
          run<Real>({term.x, bins[1], work.strips, nullptr, line, work.strips_at,
                     work.tile + b * work.tile_step, nullptr, line, work.tile_at, bins[0]},
                    s > 0);
        }
      }
      store_lines(plane_of<T>(output, window.roi, part * channels, channels), 0, bins[0] * bins[1],
                  work.tile, work.tile_step, work.rows, work.narrowed, streamed);
    });
    if (streamed) stream_fence();
  });
}

// The part of d_output that comes next. It is asked for in quarters, between the passes: the memory
// system takes only so many requests at a time.
template <class T>
class Upcoming {
 public:
  template <class Real>
  Upcoming(const Tensor& d_output, const Window<Real>* following, int64_t first, int64_t channels)
      : tile_(plane_of<const T>(d_output, following ? following->roi : 0, first, channels)),
        known_(following) {}

  void ask(int64_t quarter) const {
    if (!known_) return;
    const int64_t bytes = tile_.channels * int64_t(sizeof(T));
    if (tile_.pixel_stride == 1 && tile_.channel_stride == tile_.pixels) {
      const int64_t part = (tile_.pixels * bytes + 3) / 4;
      prefetch(reinterpret_cast<const char*>(tile_.data) + quarter * part, part);
    } else if (tile_.channel_stride == 1 && tile_.row_stride == tile_.width * tile_.pixel_stride) {
      const int64_t end = tile_.pixels * (quarter + 1) / 4;
      for (int64_t i = tile_.pixels * quarter / 4; i < end; ++i) {
        prefetch(tile_.data + i * tile_.pixel_stride, bytes);
      }
    }
  }

 private:
  Plane<const T> tile_;
  bool known_;
};

template <class T, class Real>
void load_tile(const Tensor& d_output, const Window<Real>& window, int64_t first, int64_t channels,
               const Workspace<T, Real>& work) {
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
    Workspace<T, Real> work(plane.pixels, windows.max_columns, bins, plane.blocks());
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
      const Upcoming<T> upcoming(d_output, following, part * channels, channels);
      upcoming.ask(0);
      if (window.term_count) load_tile(d_output, window, part * channels, channels, work);
      upcoming.ask(1);
      for (int s = 0; s < window.term_count; ++s) {
        const Term<Real>& term = window.term[s];
        const int64_t strip = place_columns(term.x, bins[0], work);
        for (int64_t b = 0; b < plane.blocks(); ++b) {
          run(spread_columns(term, bins, work.tile + b * work.tile_step, work), false);
          if (s == 0 && b == 0) upcoming.ask(2);
          run<Real>({term.y, term.y.pixel_count, work.strips, nullptr, strip, work.strip_at,
                     work.map + b * work.map_step, term.y.pixels, plane.width * line, work.column_at,
                     term.x.pixel_count}, true);
        }
      }
      upcoming.ask(3);
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
    Workspace<T, Real> work(plane.pixels, windows.max_columns, bins, plane.blocks());
    const auto enter = [&](const Band<Real>& band) { pack(plane, band.first, work); };
    for_windows(visit, enter, [&](const Window<Real>& window, const Window<Real>* following) {
      Line<Real> d_x[2] = {}, d_y[2] = {};
      const Upcoming<T> upcoming(d_output, following, part * channels, channels);
      upcoming.ask(0);
      if (window.term_count) {
        load_tile(d_output, window, part * channels, channels, work);
        upcoming.ask(1);
        // d_output pulled back to the map's columns, against the slopes of y; after it the features
        // pooled to bins of y, against the slopes of x.
        const Term<Real>&pulled = window.term[0], &pooled = window.term[1];
        int64_t strip = place_columns(pulled.x, bins[0], work);
        for (int64_t b = 0; b < plane.blocks(); ++b) {
          run(spread_columns(pulled, bins, work.tile + b * work.tile_step, work), false);
          dot_slopes(pulled.y, bins[0], work.strips, strip, work.strip_at,
                     work.map + b * work.map_step, pulled.y.pixels, plane.width * line,
                     work.column_at, pulled.x.pixel_count, d_y);
        }
        upcoming.ask(2);
        strip = place_columns(pooled.x, bins[0], work);
        for (int64_t b = 0; b < plane.blocks(); ++b) {
          Real* tile = work.tile + b * work.tile_step;
          run(pool_rows(pooled, bins[0], plane.width * line, work.map + b * work.map_step, strip, work),
              false);
          for (int64_t p = 0; p < bins[0]; ++p) {  // a bin without samples does not read d_output
            if (pooled.y.taps && pooled.y.index[p * pooled.y.taps] >= 0) continue;
            std::memset(tile + p * bins[1] * line, 0, size_t(bins[1] * kLineBytes));
          }
          dot_slopes(pooled.x, bins[1], tile, line, work.tile_at, work.strips, nullptr, line,
                     work.strips_at, bins[0], d_x);
        }
      }
      upcoming.ask(3);
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
