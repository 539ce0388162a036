// The engine: Out = Ay F Ax^T for every RoI, by blocks of channels: a line of 64 bytes, 16 floats
// or 8 doubles, per pixel. One task is one visit (a run of RoIs on one image) for one or a few
// blocks.
//
//   forward       pack the pixels that a band of RoIs is the first to touch into lines; for every
//                 row p of bins: strip = Ay[p] F, a line per column of the window; then
//                 tile[p] = strip Ax^T. The finished tile leaves while the next one is made.
//   adjoint       load d_output's tile; for every p: strip = tile[p] Ax; add Ay[p]^T strip to the
//                 lines; unpack the pixels that the band was the last to touch.
//   box_gradient  for every p the same strips, and dot products with the slopes.
//
// There are other ways, without packing: rows.hpp, bins.hpp and samples.hpp.
//
// This file is compiled once per instruction set, into a namespace named after it. It must not
// instantiate anything with external linkage that another file instantiates too (no std::
// containers or algorithms): the linker could keep the copy with the wrong instructions.
#include "../engine.hpp"

#include "../memory.hpp"
#include "../parallel.hpp"
#include "bins.hpp"
#include "rows.hpp"
#include "samples.hpp"

namespace roialign {
namespace ROIALIGN_ISA {
namespace {

constexpr int64_t kAhead = 12;    // groups of pixels asked for ahead, while memory takes to answer
constexpr int64_t kUnpacked = 8;  // groups of pixels that leave together: 8 cache lines a channel
constexpr int64_t kStreamBytes = int64_t{2} << 20;  // larger results would drive out a second cache
constexpr int64_t kSerialWork = int64_t{1} << 17;   // fewer line operations, some 50 us: one thread

// What a task works in, cut from the thread's scratch. Every array starts on a line.
template <class T, class Real>
struct Workspace : Scratch {
  Real* map;     // [blocks] of the visit's groups: packed features, or the sums of d_features
  Real* strips;  // [kRows] for each column of a window
  Real* tile;    // [blocks][P][Q] lines
  T* stage;      // a finished tile, or pixels of the map, in the array's dtype and order

  int64_t map_step;  // from one block to the next
  int64_t tile_step;

  Workspace(const Visit<Real>& visit, int64_t max_columns, const int64_t bins[2], int64_t blocks)
      : map_step(most_of(visit.groups, kUnpacked) * kGroup * kLanes<Real>),
        tile_step(bins[0] * bins[1] * kLanes<Real>) {
    const int64_t staged = most_of(bins[0] * bins[1], kUnpacked * kGroup) * blocks * kLanes<Real>;
    take([&](Cut& cut) {
      cut(map, blocks * map_step);
      cut(strips, kRows * max_columns * kLanes<Real>);
      cut(tile, blocks * tile_step);
      cut(stage, staged);
    });
  }
  Lines<Real> map_of(int64_t block, const Term<Real>& term) const {
    return {map + block * map_step, term.rows};
  }
};

// --- The operations
// -------------------------------------------------------------------------------

// Packs the pixels that the band is the first to touch.
template <class T, class Real>
void pack(const Plane<const T>& plane, const Groups& groups,
          const Workspace<Pooled<T>, Real>& work) {
  const Run *ahead = groups.runs, *end = ahead + groups.count;
  int64_t asked = kAhead;  // of the run ahead
  for (const Run* run = groups.runs; run < end; ++run) {
    for (int64_t g = 0; g < run->count; ++g, ++asked) {
      for (; ahead < end && asked >= ahead->count; ++ahead) asked -= ahead->count;
      if (ahead < end) prefetch_pixels(plane, (ahead->index + asked) * kGroup, kGroup);
      const int64_t first = (run->index + g) * kGroup;
      load_lines(plane, first, least_of(kGroup, plane.pixels - first),
                 work.map + (run->place + g) * kGroup * kLanes<Real>, work.map_step);
    }
  }
}

// What one task works on: a slice of the channels of one visit's map.
template <class Real>
struct Task {
  const Visit<Real>& visit;
  const Tensor& map;
  Range channels;
  int64_t first_block;
};

// The windows of a call; `slices_of(map)` are the slices of a map's channels.
template <class Real, class SlicesOf>
Windows<Real> windows_of(Operation operation, Maps maps, const Rois& rois, const void* tangent,
                         const Rule& rule, const int64_t* bins, const SlicesOf& slices_of,
                         int threads) {
  const auto count = [](const void* context, int64_t map) {
    return (*static_cast<const SlicesOf*>(context))(map).count();
  };
  return build_windows(operation, maps, rois, static_cast<const Real*>(tangent), rule, bins,
                       Slicing{count, &slices_of}, threads);
}

// Runs body(task) for each slice of each visit.
template <class Real, class SlicesOf, class Body>
void for_tasks(const Windows<Real>& windows, Maps maps, const SlicesOf& slices_of, int threads,
               Body body) {
  const auto visits_of = [&](int64_t m) { return windows.ends[m] - (m ? windows.ends[m - 1] : 0); };
  int64_t tasks = 0;
  for (int64_t m = 0; m < maps.count; ++m) tasks += visits_of(m) * slices_of(m).count();
  const int64_t work = windows.work * blocks_of<Real>(maps.first().shape[1]);
  parallel_for(tasks, work < kSerialWork ? 1 : threads, [&](int64_t task) {
    int64_t m = 0, visit = 0;
    Slices slices = slices_of(m);
    for (int64_t own; task >= (own = visits_of(m) * slices.count()); slices = slices_of(++m)) {
      task -= own;
      visit = windows.ends[m];
    }
    visit += task / slices.count();
    const int64_t slice = task % slices.count();
    body(Task<Real>{windows.visits[visit], maps[m].array, slices[slice], slice * slices.blocks});
  });
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

template <class Real, class Body>
void for_windows(const Visit<Real>& visit, Body body) {
  for (int64_t b = 0; b < visit.count; ++b)
    for (int64_t i = 0; i < visit.bands[b].count; ++i) body(visit.bands[b].windows[i]);
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

template <class T, class Real>
void forward_rows(const Task<Real>& task, const Plane<const T>& map, int64_t max_columns,
                  const Tensor& output, bool streamed) {
  const int64_t bins = output.shape[3];
  const RowWorkspace<Pooled<T>, Real> work(map, max_columns, bins);
  for_windows(task.visit, [&](const Window<Real>& window) {
    for_lanes<Real>(output, map.channels, [&](const Rows& rows) {
      if (!window.term_count || !window.term[0].x.taps)
        std::memset(work.tile, 0, size_t(bins * kLineBytes));
      for (int s = 0; s < window.term_count; ++s) {
        const Axis<Real>& x = window.term[s].x;
        const Columns<Real> columns(window.term[s], map, work.places);
        pool_rows(window.term[s].y, rows, map, columns, work);
        multiply(x, bins, 1, work.lines, 0, work.tile, 0, s > 0, columns.places(), InOrder{});
      }
      const auto out = plane_of<Pooled<T>>(output, window.roi, task.channels, rows);
      store_lines(out, 0, bins, work.tile, 0, work.stage, streamed).finish();
    });
  });
  if (streamed) stream_fence();
}

// The same for the way by bins.
template <class T, class Real>
void forward_bins(const Task<Real>& task, const Plane<const T>& map, const Tensor& output,
                  bool streamed) {
  const int64_t bins[] = {output.shape[2], output.shape[3]};
  const BinWorkspace<Pooled<T>, Real> work(map.blocks(), output);
  for_windows(task.visit, [&](const Window<Real>& window) {
    const auto out = plane_of<Pooled<T>>(output, window.roi, task.channels);
    for (int64_t bin = 0; bin < bins[0] * bins[1]; ++bin) {
      pool_bin(window, bin / bins[1], bin % bins[1], map, work.lines(bin), work.step);
      work.put(out, bin, streamed);
    }
  });
  if (streamed) stream_fence();
}

// Calls body(RoI, its map, image, p, q, taps of y, taps of x) for the bins of all RoIs that are on
// a map, and of others without taps and map.
template <int taps, class Real, class Body>
void for_sampled_bins(Maps maps, const Rois& rois, const Rule& rule, const int64_t bins[2],
                      int threads, Body body) {
  struct Work : Scratch {
    SampledRois<Real>* rois;
    Work() {
      take([&](Cut& cut) { cut(rois, 1); });
    }
  };
  parallel_for((rois.count + kSampledRois - 1) / kSampledRois, threads, [&](int64_t task) {
    const Work work;
    const SampledRois<Real>& found = *work.rois;
    const int64_t first = task * kSampledRois, count = least_of(kSampledRois, rois.count - first);
    find_samples(maps, rois, rule, bins, first, count, *work.rois);
    for_bins<taps>(found, count, bins,
                   [&](int64_t r, int64_t p, int64_t q, const auto& y, const auto& x) {
                     body(first + r, found.map[r], found.image[r], p, q, y, x);
                   });
  });
}

// The same by samples.
template <int taps, class T>
void forward_samples(Maps features, const Rois& rois, const Rule& rule, const Tensor& output,
                     int threads) {
  using Real = Accumulator<T>;
  const Range channels{0, output.shape[1]};
  const bool few = count_of(output) * taps * taps < kSerialWork;
  for_sampled_bins<taps, Real>(
      features, rois, rule, output.shape + 2, few ? 1 : threads,
      [&](int64_t roi, int64_t map, int64_t image, int64_t p, int64_t q, const auto& y,
          const auto& x) {
        const auto out = plane_of<Pooled<T>>(output, roi, channels);
        Pooled<T>* to = out.data + p * out.row_stride + q * out.pixel_stride;
        if (map >= 0 && y.count && x.count) {
          const auto plane = plane_of<const T>(features[map].array, image, channels);
          add_samples(y, x, plane, to, out.channel_stride);
          return;
        }
        for (int64_t c = 0; c < out.channels; ++c) to[c * out.channel_stride] = Pooled<T>{};
      });
}

template <class T>
void forward(Maps features, const Rois& rois, const void* tangent, const Rule& rule,
             const Tensor& output, int threads) {
  using Real = Accumulator<T>;
  const int64_t* bins = output.shape + 2;
  if (by_samples(Operation::forward, features.first(), rois.count, rule, bins, tangent)) {
    return rule.sampling_ratio == 1 ? forward_samples<2, T>(features, rois, rule, output, threads)
                                    : forward_samples<4, T>(features, rois, rule, output, threads);
  }
  const auto slices_of = [&](int64_t m) {
    const Tensor& map = features[m].array;
    if (by_bins(Operation::forward, map, rois.count, bins)) return Slices::all<T>(map);
    return Slices::of(map, &output, Pooled<T>{});
  };
  const bool streamed = count_of(output) * int64_t(sizeof(Pooled<T>)) > kStreamBytes;
  const Windows<Real> windows =
      windows_of<Real>(Operation::forward, features, rois, tangent, rule, bins, slices_of, threads);
  for_tasks(windows, features, slices_of, threads, [&](const Task<Real>& task) {
    const auto plane = plane_of<const T>(task.map, task.visit.image, task.channels);
    if (task.visit.way == Way::bins) return forward_bins(task, plane, output, streamed);
    if (task.visit.way == Way::rows)
      return forward_rows(task, plane, windows.max_columns, output, streamed);
    const Workspace<Pooled<T>, Real> work(task.visit, windows.max_columns, bins, plane.blocks());
    Copy leaving;  // the tile before
    const auto enter = [&](const Band<Real>& band) { pack(plane, band.first, work); };
    for_windows(task.visit, enter, [&](const Window<Real>& window, const Window<Real>*) {
      if (!window.term_count) {
        std::memset(work.tile, 0, size_t(plane.blocks() * work.tile_step) * sizeof(Real));
      }
      const int64_t piece = leaving.run * leaving.runs / (plane.blocks() * ranges_of(bins[0]));
      for (int64_t b = 0; b < plane.blocks(); ++b) {
        for_rows(bins[0], [&](Range p) {
          Real* out = work.tile + b * work.tile_step + p.begin * bins[1] * kLanes<Real>;
          leaving.advance(piece);  // before the work: stores wait in line behind it
          for (int s = 0; s < window.term_count; ++s) {
            pool_bins(window.term[s], p, bins[1], work.map_of(b, window.term[s]), work.strips, out,
                      s > 0);
          }
        });
      }
      leaving.finish();
      leaving = store_lines(plane_of<Pooled<T>>(output, window.roi, task.channels), 0,
                            bins[0] * bins[1], work.tile, work.tile_step, work.stage, streamed);
    });
    leaving.finish();
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

template <class T, class Real>
void load_tile(const Tensor& d_output, const Window<Real>& window, Range channels,
               const Workspace<T, Real>& work) {
  const auto tile = plane_of<const T>(d_output, window.roi, channels);
  load_lines(tile, 0, tile.pixels, work.tile, work.tile_step);
}

template <class T, class Real>
void adjoint_rows(const Task<Real>& task, const Plane<T>& map, int64_t max_columns,
                  const Tensor& d_output) {
  const int64_t bins = d_output.shape[3];
  const RowWorkspace<T, Real> work(map, max_columns, bins);
  clear(map);
  for_windows(task.visit, [&](const Window<Real>& window) {
    for_lanes<Real>(d_output, map.channels, [&](const Rows& rows) {
      if (!window.term_count) return;
      const auto d_out = plane_of<const T>(d_output, window.roi, task.channels, rows);
      load_lines(d_out, 0, bins, work.tile, 0);
      for (int s = 0; s < window.term_count; ++s) {
        const Axis<Real>& y = window.term[s].y;
        const Columns<Real> columns(window.term[s], map, work.places);
        pull_rows(window.term[s].x, columns, work);
        rows.each([&](int64_t i, int64_t c, int64_t p) {
          for (int64_t t = p * y.taps; t < p * y.taps + y.entries[p]; ++t) {
            columns.add(y.weight[0][t], work.strips + i * work.step,
                        map.data + c * map.channel_stride + y.pixels[y.index[t]] * map.row_stride);
          }
        });
      }
    });
  });
}

// The same by samples.
template <int taps, class Real>
void adjoint_samples(const Tensor& d_output, const Rois& rois, const Rule& rule, Maps d_features,
                     int threads) {
  const int64_t images = d_features.first().shape[0];
  const Range channels{0, d_output.shape[1]};
  int64_t written = 0;
  for (int64_t m = 0; m < d_features.count; ++m) written += count_of(d_features[m].array);
  const bool few = written < kSerialWork * kLanes<Real>;
  parallel_for(d_features.count * images, few ? 1 : threads, [&](int64_t task) {
    clear(plane_of<Real>(d_features[task / images].array, task % images, channels));
  });
  // One RoI after another: they may meet in any pixel.
  for_sampled_bins<taps, Real>(
      d_features, rois, rule, d_output.shape + 2, 1,
      [&](int64_t roi, int64_t map, int64_t image, int64_t p, int64_t q, const auto& y,
          const auto& x) {
        if (map < 0) return;
        const auto d_out = plane_of<const Real>(d_output, roi, channels);
        spread_samples(y, x, d_out.data + p * d_out.row_stride + q * d_out.pixel_stride,
                       d_out.channel_stride,
                       plane_of<Real>(d_features[map].array, image, channels));
      });
}

template <class T>
void adjoint(const Tensor& d_output, const Rois& rois, const void* tangent, const Rule& rule,
             Maps d_features, int threads) {
  using Real = Accumulator<T>;
  constexpr int64_t line = kLanes<Real>;
  const int64_t* bins = d_output.shape + 2;
  if constexpr (sizeof(T) == sizeof(Real)) {
    if (by_samples(Operation::adjoint, d_features.first(), rois.count, rule, bins, tangent)) {
      return rule.sampling_ratio == 1
                 ? adjoint_samples<2, T>(d_output, rois, rule, d_features, threads)
                 : adjoint_samples<4, T>(d_output, rois, rule, d_features, threads);
    }
  }
  const auto slices_of = [&](int64_t m) {
    return Slices::of(d_features[m].array, &d_features[m].array, T{});
  };
  const Windows<Real> windows = windows_of<Real>(Operation::adjoint, d_features, rois, tangent,
                                                 rule, bins, slices_of, threads);
  for_tasks(windows, d_features, slices_of, threads, [&](const Task<Real>& task) {
    const bool streamed = count_of(task.map) * int64_t(sizeof(T)) > kStreamBytes;
    const auto plane = plane_of<T>(task.map, task.visit.image, task.channels);
    if constexpr (sizeof(T) == sizeof(Real)) {
      if (task.visit.way == Way::rows)
        return adjoint_rows(task, plane, windows.max_columns, d_output);
    }
    const Workspace<T, Real> work(task.visit, windows.max_columns, bins, plane.blocks());
    const auto zero = [&](int64_t place, int64_t count) {
      for (int64_t b = 0; b < plane.blocks(); ++b) {
        std::memset(work.map + b * work.map_step + place * kGroup * line, 0,
                    size_t(count * kGroup * kLineBytes));
      }
    };
    // Groups of a run leave together, where pixels do too cut between cache lines.
    // The lines of pixel i are at i * step.
    const bool runs = plane.even() && plane.pixel_stride == 1;
    const auto unpack = [&](const Groups& groups, int64_t step) {
      for (const Run* run = groups.runs; run < groups.runs + groups.count; ++run) {
        int64_t from = run->index * kGroup;
        const int64_t end = least_of(from + run->count * kGroup, plane.pixels);
        const Real* lines = work.map + run->place * kGroup * step;
        while (from < end) {
          int64_t to = least_of(from + kUnpacked * kGroup, end);
          if (runs && to < end) {
            to -= int64_t(reinterpret_cast<uintptr_t>(plane.data + to) % kLineBytes / sizeof(T));
          }
          store_lines(plane, from, to - from, lines, work.map_step, work.stage, streamed).finish();
          lines += (to - from) * step;
          from = to;
        }
      }
    };
    const auto enter = [&](const Band<Real>& band) {
      for (int64_t r = 0; r < band.first.count; ++r)
        zero(band.first.runs[r].place, band.first.runs[r].count);
    };
    const auto leave = [&](const Band<Real>& band) { unpack(band.last, line); };
    for_windows(
        task.visit, enter,
        [&](const Window<Real>& window, const Window<Real>* following) {
          Upcoming<T> upcoming(d_output, following, task.channels,
                               2 * plane.blocks() * ranges_of(bins[0]));
          if (window.term_count) load_tile(d_output, window, task.channels, work);
          for (int64_t b = 0; b < plane.blocks(); ++b) {
            for_rows(bins[0], [&](Range p) {
              const Real* d_out = work.tile + b * work.tile_step + p.begin * bins[1] * line;
              for (int s = 0; s < window.term_count; ++s) {
                const Term<Real>& term = window.term[s];
                upcoming.ask();
                pull_columns(term.x, p.count(), d_out, bins[1], work.strips);
                upcoming.ask();
                spread_columns(term, p, work.strips, work.map_of(b, term));
              }
            });
          }
        },
        leave);
    zero(0, kUnpacked);
    unpack(task.visit.untouched, 0);
    if (streamed) stream_fence();
  });
}

// d_boxes[roi * 4 ...]: sums over the channels of the task.
template <class T, class Real>
void box_gradient_rows(const Task<Real>& task, const Plane<const T>& map, int64_t max_columns,
                       const Tensor& d_output, Real* d_boxes) {
  const int64_t bins = d_output.shape[3];
  const RowWorkspace<Pooled<T>, Real> work(map, max_columns, bins);
  for_windows(task.visit, [&](const Window<Real>& window) {
    Real* d_box = d_boxes + window.roi * 4;
    for (int i = 0; i < 4; ++i) d_box[i] = 0;
    for_lanes<Real>(d_output, map.channels, [&](const Rows& rows) {
      if (!window.term_count) return;
      const Term<Real>&pulled = window.term[0], &pooled = window.term[1];
      const auto d_out = plane_of<const Pooled<T>>(d_output, window.roi, task.channels, rows);
      load_lines(d_out, 0, bins, work.tile, 0);
      Line<Real> d_x[2] = {}, d_y[2] = {};
      const Columns<Real> pulled_columns(pulled, map, work.places);
      pull_rows(pulled.x, pulled_columns, work);
      rows.each([&](int64_t i, int64_t c, int64_t p) {
        const Axis<Real>& y = pulled.y;
        for (int64_t t = p * y.taps; t < p * y.taps + y.entries[p]; ++t) {
          const T* row = map.data + c * map.channel_stride + y.pixels[y.index[t]] * map.row_stride;
          add_slopes(y, t, pulled_columns.dot(work.strips + i * work.step, row), d_y);
        }
      });
      const Columns<Real> pooled_columns(pooled, map, work.places);
      pool_rows(pooled.y, rows, map, pooled_columns, work);
      const int32_t one = 1;
      dot_x_slopes(pooled.x, &one, Range{0, 1}, bins, work.lines, work.tile, d_x,
                   pooled_columns.places());
      for (int e = 0; e < 2; ++e) {
        // Lanes are rows: there may be fewer, and one without samples has no part in it.
        Real lanes[kLanes<Real>];
        store(lanes, d_x[e]);
        rows.each([&](int64_t i, int64_t, int64_t p) {
          if (pooled.y.entries[p]) d_box[2 * e] += lanes[i];
        });
        d_box[2 * e + 1] += sum_of(d_y[e]);
      }
    });
  });
}

template <class T>
void box_gradient(const Tensor& d_output, Maps features, const Rois& rois, const Rule& rule,
                  void* d_boxes, int threads) {
  using Real = Accumulator<T>;
  const int64_t* bins = d_output.shape + 2;
  const auto slices_of = [&](int64_t m) {
    return Slices::of(features[m].array, nullptr, Pooled<T>{});
  };
  const Windows<Real> windows = windows_of<Real>(Operation::box_gradient, features, rois, nullptr,
                                                 rule, bins, slices_of, threads);
  // A row of sums per block of channels, added in order: the same bits for any threads and layout.
  const int64_t count = rois.count * 4, blocks = blocks_of<Real>(d_output.shape[1]);
  const size_t bytes = size_t(most_of<int64_t>(1, blocks * count)) * sizeof(Real);
  Real* partial = static_cast<Real*>(map_memory(bytes));
  struct Owner {
    void* memory;
    size_t bytes;
    ~Owner() { unmap_memory(memory, bytes); }
  } const owner{partial, bytes};
  for_tasks(windows, features, slices_of, threads, [&](const Task<Real>& task) {
    const auto plane = plane_of<const T>(task.map, task.visit.image, task.channels);
    if (task.visit.way == Way::rows) {
      Real* sums = partial + task.first_block * count;
      box_gradient_rows(task, plane, windows.max_columns, d_output, sums);
      for (int64_t b = 1; b < plane.blocks(); ++b) {  // the first has those of all
        for_windows(task.visit, [&](const Window<Real>& window) {
          std::memset(sums + b * count + window.roi * 4, 0, 4 * sizeof(Real));
        });
      }
      return;
    }
    const Workspace<Pooled<T>, Real> work(task.visit, windows.max_columns, bins, plane.blocks());
    const auto enter = [&](const Band<Real>& band) { pack(plane, band.first, work); };
    for_windows(task.visit, enter, [&](const Window<Real>& window, const Window<Real>* following) {
      Upcoming<Pooled<T>> upcoming(d_output, following, task.channels,
                                   4 * plane.blocks() * ranges_of(bins[0]));
      if (window.term_count) load_tile(d_output, window, task.channels, work);
      for (int64_t b = 0; b < plane.blocks(); ++b) {
        Line<Real> d_x[2] = {}, d_y[2] = {};
        if (window.term_count) {
          // d_output pulled back to the map's columns, against the slopes of y; and the features
          // pooled to the columns, against the slopes of x.
          const Term<Real>&pulled = window.term[0], &pooled = window.term[1];
          for_rows(bins[0], [&](Range p) {
            const Real* d_out = work.tile + b * work.tile_step + p.begin * bins[1] * kLanes<Real>;
            upcoming.ask();
            pull_columns(pulled.x, p.count(), d_out, bins[1], work.strips);
            upcoming.ask();
            dot_y_slopes(pulled, p, work.map_of(b, pulled), work.strips, d_y);
            upcoming.ask();
            pool_columns(pooled, p, work.map_of(b, pooled), work.strips);
            upcoming.ask();
            dot_x_slopes(pooled.x, pooled.y.entries, p, bins[1], work.strips, d_out, d_x);
          });
        }
        Real* d_box = partial + (task.first_block + b) * count + window.roi * 4;
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
    for (int64_t block = 0; block < blocks; ++block) sum += double(partial[block * count + i]);
    result[i] = Real(sum);
  }
}

// Calls run(an element) of the maps' dtype.
template <class Run>
void by_dtype(Maps maps, Run run) {
  switch (maps.first().dtype) {
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
// Of maps that are read: of bytes too.
template <class Run>
void by_any_dtype(Maps maps, Run run) {
  if (maps.first().dtype == DType::uint8) return run(uint8_t{});
  by_dtype(maps, run);
}

}  // namespace

#define ROIALIGN_STRING(x) #x
#define ROIALIGN_NAME(x) ROIALIGN_STRING(x)

extern const Engine engine;
const Engine engine{ROIALIGN_NAME(ROIALIGN_ISA),
                    [](Maps features, const Rois& rois, const void* tangent, const Rule& rule,
                       const Tensor& output, int threads) {
                      by_any_dtype(features, [&](auto t) {
                        forward<decltype(t)>(features, rois, tangent, rule, output, threads);
                      });
                    },
                    [](const Tensor& d_output, const Rois& rois, const void* tangent,
                       const Rule& rule, Maps d_features, int threads) {
                      by_dtype(d_features, [&](auto t) {
                        adjoint<decltype(t)>(d_output, rois, tangent, rule, d_features, threads);
                      });
                    },
                    [](const Tensor& d_output, Maps features, const Rois& rois, const Rule& rule,
                       void* d_boxes, int threads) {
                      by_any_dtype(features, [&](auto t) {
                        box_gradient<decltype(t)>(d_output, features, rois, rule, d_boxes, threads);
                      });
                    }};

}  // namespace ROIALIGN_ISA
}  // namespace roialign
