// What the engines share: tasks, the scratch that they work in, packed pixels, and partial sums.
#pragma once

#include "../engine.hpp"
#include "../memory.hpp"
#include "../parallel.hpp"
#include "arrays.hpp"

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
  Real* map;     // [maps][blocks] of the visit's groups: packed features, sums of d_features
  Real* strips;  // [sets][kRows] for each column of a window
  Real* tile;    // [blocks][P][Q] lines
  T* stage;      // a finished tile, or pixels of the map, in the array's dtype and order

  int64_t map_step;  // from one block to the next
  int64_t tile_step;
  int64_t strips_step;  // from one set to the next

  Workspace(const Visit<Real>& visit, int64_t max_columns, const int64_t bins[2], int64_t blocks,
            int64_t sets = 1, int64_t maps = 1)
      : map_step(most_of(visit.groups, kUnpacked) * kGroup * kLanes<Real>),
        tile_step(bins[0] * bins[1] * kLanes<Real>),
        strips_step(kRows * max_columns * kLanes<Real>) {
    const int64_t staged = most_of(bins[0] * bins[1], kUnpacked * kGroup) * blocks * kLanes<Real>;
    take([&](Cut& cut) {
      cut(map, maps * blocks * map_step);
      cut(strips, sets * strips_step);
      cut(tile, blocks * tile_step);
      cut(stage, staged);
    });
  }
  Lines<Real> map_of(int64_t block, const Term<Real>& term) const {
    return {map + block * map_step, term.rows};
  }
};

int64_t count_of(const Tensor& t) {
  return t.shape[0] * t.shape[1] * t.shape[2] * t.shape[3];
}

// Packs the pixels that a band is the first to touch: lines of blocks that are `step` apart.
template <class T, class Real>
void pack(const Plane<const T>& plane, const Groups& groups, Real* lines, int64_t step) {
  const Run *ahead = groups.runs, *end = ahead + groups.count;
  int64_t asked = kAhead;  // of the run ahead
  for (const Run* run = groups.runs; run < end; ++run) {
    for (int64_t g = 0; g < run->count; ++g, ++asked) {
      for (; ahead < end && asked >= ahead->count; ++ahead) asked -= ahead->count;
      if (ahead < end) prefetch_pixels(plane, (ahead->index + asked) * kGroup, kGroup);
      const int64_t first = (run->index + g) * kGroup;
      load_lines(plane, first, least_of(kGroup, plane.pixels - first),
                 lines + (run->place + g) * kGroup * kLanes<Real>, step);
    }
  }
}

// What one task works on: a slice of the channels of one visit's map.
template <class Real>
struct Task {
  const Visit<Real>& visit;
  int64_t map_number;
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
    body(Task<Real>{windows.visits[visit], m, maps[m].array, slices[slice], slice * slices.blocks});
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

// The sums of a map that an adjoint packs.
template <class T, class Real>
struct Sums {
  const Plane<T>& plane;
  const Workspace<T, Real>& work;
  const bool streamed;

  void zero(int64_t place, int64_t count) const {
    for (int64_t b = 0; b < plane.blocks(); ++b) {
      std::memset(work.map + b * work.map_step + place * kGroup * kLanes<Real>, 0,
                  size_t(count * kGroup * kLineBytes));
    }
  }
  // Zeroes those that a band is the first to touch.
  void enter(const Band<Real>& band) const {
    for (int64_t r = 0; r < band.first.count; ++r)
      zero(band.first.runs[r].place, band.first.runs[r].count);
  }
  // Writes pixels. Groups of a run leave together, where pixels do too cut between cache lines. The
  // lines of pixel i are at i * step.
  void unpack(const Groups& groups, int64_t step) const {
    const bool runs = plane.even() && plane.pixel_stride == 1;
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
  }
  void clear_untouched(const Visit<Real>& visit) const {
    zero(0, kUnpacked);
    unpack(visit.untouched, 0);
  }
};

// Whether few of an image's pixels are touched, and a slice of the others' channels would be many
// short pieces of memory.
template <class Real>
bool is_sparse(const Visit<Real>& visit, const Tensor& map) {
  return visit.way == Way::packed && map.stride[1] == 1 && map.stride[3] != 1 &&
         visit.groups * kGroup * kSparsePixels < map.shape[2] * map.shape[3];
}

// Writes zeros to such images as a whole.
template <class T, class Real>
void clear_sparse(const Windows<Real>& windows, Maps maps, int threads) {
  const int64_t images = maps.first().shape[0];  // a visit for each image of each map
  const auto sparse = [&](int64_t visit) {
    return is_sparse(windows.visits[visit], maps[visit / images].array);
  };
  const int64_t visits = maps.count * images;
  int64_t first = 0;
  while (first < visits && !sparse(first)) ++first;
  if (first == visits) return;  // no thread is woken for nothing
  const bool few = windows.work * maps.first().shape[1] < kSerialWork * kLanes<Real>;
  parallel_for(visits - first, few ? 1 : threads, [&](int64_t task) {
    const int64_t visit = first + task;
    const Tensor& map = maps[visit / images].array;
    if (sparse(visit)) clear(plane_of<T>(map, visit % images, Range{0, map.shape[1]}));
  });
}

// Gradients of boxes: a row of sums for each block of channels, added in order. So the bits are the
// same for any threads and layout.
template <class Real>
class BlockSums {
 public:
  BlockSums(int64_t rois, int64_t numbers, int64_t blocks)
      : numbers_(numbers),
        count_(rois * numbers),
        blocks_(blocks),
        bytes_(size_t(most_of<int64_t>(1, blocks * count_)) * sizeof(Real)),
        sums_(static_cast<Real*>(map_memory(bytes_))) {}
  ~BlockSums() { unmap_memory(sums_, bytes_); }
  BlockSums(const BlockSums&) = delete;
  BlockSums& operator=(const BlockSums&) = delete;

  Real* of(int64_t block, int64_t roi) const { return sums_ + block * count_ + roi * numbers_; }

  void add_up(Real* result) const {
    for (int64_t i = 0; i < count_; ++i) {
      double sum = 0;
      for (int64_t block = 0; block < blocks_; ++block) sum += double(sums_[block * count_ + i]);
      result[i] = Real(sum);
    }
  }

 private:
  const int64_t numbers_, count_, blocks_;
  const size_t bytes_;
  Real* const sums_;
};

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
}  // namespace ROIALIGN_ISA
}  // namespace roialign
