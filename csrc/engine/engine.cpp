// The engine: Out = Ay F Ax^T for every RoI, by blocks of channels: a line of 64 bytes, 16 floats
// or 8 doubles, per pixel. One task is one visit (a run of RoIs on one image) for one or a few
// blocks.
//
//   forward       pack the pixels that a band of RoIs is the first to touch into lines; for every
//                 row p of bins: strip = Ay[p] F, a line per column of the window; then
//                 tile[p] = strip Ax^T. The finished tile leaves while the next one is made.
//   adjoint       load d_output's tile; for every p: strip = tile[p] Ax; add Ay[p]^T strip to the
//                 lines; unpack the pixels that the band was the last to touch.
//   box_gradient  for every p the strips of both, and dot products with the slopes; the lines are
//                 read once, unless slopes and values have other pixels.
//
// There are other ways, without packing: rows.hpp, bins.hpp and samples.hpp.
//
// This file is compiled once per instruction set, into a namespace named after it. It must not
// instantiate anything with external linkage that another file instantiates too (no std::
// containers or algorithms): the linker could keep the copy with the wrong instructions.
#include "bins.hpp"
#include "rows.hpp"
#include "samples.hpp"
#include "tasks.hpp"

namespace roialign {
namespace ROIALIGN_ISA {
namespace {

// Calls body(range) for runs of at most kRows bins of y, ranges_of(bins) times.
inline int64_t ranges_of(int64_t bins) {
  return (bins + kRows - 1) / kRows;
}
template <class Body>
inline void for_rows(int64_t bins, Body body) {
  for (int64_t p = 0; p < bins; p += kRows) body(Range{p, least_of(p + kRows, bins)});
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
  for_sampled_rois<Real>(maps, rois, rule, bins, threads,
                         [&](const SampledRois<Real>& found, int64_t first, int64_t count) {
                           for_bins<taps>(
                               found, count, bins,
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
    const auto enter = [&](const Band<Real>& band) {
      pack(plane, band.first, work.map, work.map_step);
    };
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
        if (map < 0 || !y.count || !x.count) return;
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
  clear_sparse<T>(windows, d_features, threads);
  for_tasks(windows, d_features, slices_of, threads, [&](const Task<Real>& task) {
    const bool streamed = count_of(task.map) * int64_t(sizeof(T)) > kStreamBytes;
    const auto plane = plane_of<T>(task.map, task.visit.image, task.channels);
    if constexpr (sizeof(T) == sizeof(Real)) {
      if (task.visit.way == Way::rows)
        return adjoint_rows(task, plane, windows.max_columns, d_output);
    }
    const Workspace<T, Real> work(task.visit, windows.max_columns, bins, plane.blocks());
    const Sums<T, Real> sums{plane, work, streamed};
    const auto enter = [&](const Band<Real>& band) { sums.enter(band); };
    const auto leave = [&](const Band<Real>& band) { sums.unpack(band.last, line); };
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
    if (!is_sparse(task.visit, task.map)) sums.clear_untouched(task.visit);
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
  const BlockSums<Real> partial(rois.count, 4, blocks_of<Real>(d_output.shape[1]));
  for_tasks(windows, features, slices_of, threads, [&](const Task<Real>& task) {
    const auto plane = plane_of<const T>(task.map, task.visit.image, task.channels);
    if (task.visit.way == Way::rows) {
      box_gradient_rows(task, plane, windows.max_columns, d_output,
                        partial.of(task.first_block, 0));
      for (int64_t b = 1; b < plane.blocks(); ++b) {  // the first has those of all
        for_windows(task.visit, [&](const Window<Real>& window) {
          std::memset(partial.of(task.first_block + b, window.roi), 0, 4 * sizeof(Real));
        });
      }
      return;
    }
    const Workspace<Pooled<T>, Real> work(task.visit, windows.max_columns, bins, plane.blocks(), 2);
    const auto enter = [&](const Band<Real>& band) {
      pack(plane, band.first, work.map, work.map_step);
    };
    for_windows(task.visit, enter, [&](const Window<Real>& window, const Window<Real>* following) {
      Upcoming<Pooled<T>> upcoming(d_output, following, task.channels,
                                   3 * plane.blocks() * ranges_of(bins[0]));
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
            Real* strips = work.strips + work.strips_step;
            if (window.alike) {
              dot_y_slopes(pulled, pooled.y, p, work.map_of(b, pulled), work.strips, strips, d_y);
            } else {
              dot_y_slopes(pulled, p, work.map_of(b, pulled), work.strips, d_y);
              pool_columns(pooled, p, work.map_of(b, pooled), strips);
            }
            upcoming.ask();
            dot_x_slopes(pooled.x, pooled.y.entries, p, bins[1], strips, d_out, d_x);
          });
        }
        Real* d_box = partial.of(task.first_block + b, window.roi);
        d_box[0] = sum_of(d_x[0]);
        d_box[1] = sum_of(d_y[0]);
        d_box[2] = sum_of(d_x[1]);
        d_box[3] = sum_of(d_y[1]);
      }
    });
  });
  partial.add_up(static_cast<Real*>(d_boxes));
}

}  // namespace

#define ROIALIGN_STRING(x) #x
#define ROIALIGN_NAME(x) ROIALIGN_STRING(x)

extern const Sampled sampled;

extern const Engine engine;
const Engine engine{ROIALIGN_NAME(ROIALIGN_ISA), sampled,
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
