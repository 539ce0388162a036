#include "windows.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "geometry.hpp"
#include "log.hpp"
#include "numbers.hpp"
#include "parallel.hpp"

namespace roialign {
namespace {

constexpr int64_t kChunk = 64;        // RoIs whose taps one task builds: about 40 us of work
constexpr int64_t kSerialRois = 256;  // fewer: less than 150 us of work, for one thread
// Of lines: the rows of a band, for one block of channels, which are to stay in the second cache
// while the windows of the band are visited. Other heights were no faster on W1 to W5.
constexpr int64_t kBandBytes = 2 << 20;
// Visits are cut until there are as many tasks, for 8 threads, but not below so many RoIs: each
// visit packs its own pixels.
constexpr int64_t kMinTasks = 16;
constexpr int64_t kMinVisit = 64;
constexpr int64_t kMinUnpacked = 4;  // where none are packed

// What a way through the engine costs, in nanoseconds: about what least squares gave for the times
// of 150 random calls (maps of 16 x 16 to 2000 x 3000, 1 to 256 channels, 1 to 1000 boxes, 1 to 28
// bins, both layouts), packed and by rows, on one core of an AMD EPYC with AVX-512; for far taps,
// of 450 calls that might be chosen wrongly; for bins, of 12. Only the ratios matter.
struct Costs {
  // Packed, per block of channels:
  double group = 30, far_group = 100;  // packed: in the caches, or beyond them
  double tap = 1.1, far_tap = 5;       // of y, per column
  double combined = 0.9;               // tap of x
  double row = 8;                      // of bins
  double unpacked = 25;                // group of the map that an adjoint writes
  // By rows, per channel:
  double line = 1.8;                 // tap of y, per line of columns
  double interleaved = 0.6;          // of that, with channels that are read together
  double single = 1.3, strided = 4;  // tap of y, per column; from pixels that share no cache line
  double tile = 7;                   // transposed: a line of columns of as many rows
  double row_combined = 1.1;         // tap of x, of as many rows
  double own_row = 5.5;
  double zero = 0.6, strided_zero = 10;  // line of the map that an adjoint writes
  // By bins, where channels are innermost:
  double bin = 8;             // more than packed
  double least_channels = 8;  // with fewer, lanes stay empty
  double most_blocks = 8;     // with as many, this way always costs less
  // Largest samples: packed or in place for each block of channels, or in place for each channel
  double sample_line = 5, sample_apart = 25, sample_single = 5;
};
constexpr Costs kCosts;

// Of packed pixels: 16 MiB for each block of channels. A visit with so many ends after its band.
constexpr int64_t kMostGroups = 16384;

// Pixels of windows that are turned and kept: 12 bytes each, with slopes 32. Those of further
// windows are made again by each task.
constexpr int64_t kMostKept = int64_t{8} << 20;

std::atomic<Way> forced_way{Way::any};

// Hands out memory that lives until `clear`; keeps it for the next call.
class Arena {
 public:
  template <class T>
  T* allocate(int64_t count) {
    const std::size_t bytes = (std::size_t(count) * sizeof(T) + 15) & ~std::size_t{15};
    while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].bytes) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      const std::size_t size = std::max(bytes, std::size_t{64} << 10);
      blocks_.push_back({std::unique_ptr<char[]>(new char[size]), size});
      used_ = 0;
    }
    char* result = blocks_[block_].memory.get() + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(result);
  }
  void clear() { block_ = used_ = 0; }

 private:
  struct Block {
    std::unique_ptr<char[]> memory;
    std::size_t bytes;
  };
  std::vector<Block> blocks_;
  std::size_t block_ = 0, used_ = 0;
};

// What a thread reuses while it builds taps.
struct Workspace {
  Taps values[2], slopes[2];
  Taps listed;                    // of the pixels of samples: no weights
  std::vector<int32_t> place;     // of pixels, by where they are in the map
  std::vector<int32_t> of_entry;  // which pixel it is
};

// The distinct pixels of taps, in the order of their appearance; `of_entry` says for each entry
// which one it is.
struct Pixels {
  int32_t* pixel;
  int32_t count;
  int32_t* of_entry;
};

Pixels number_pixels(const Taps& taps, Workspace& work, Arena& arena) {
  const int64_t count = taps.count();
  if (int64_t(work.of_entry.size()) < count) work.of_entry.resize(size_t(count + count / 2));
  int32_t *of_entry = work.of_entry.data(), *pixels = arena.allocate<int32_t>(count), distinct = 0;
  int64_t t = 0;
  for (; t < count; ++t) {  // they mostly ascend: a known one is among the last
    const int64_t pixel = taps.index[size_t(t)];
    int32_t i = distinct;
    while (i > 0 && pixels[i - 1] > pixel) --i;
    const bool known = i > 0 && pixels[i - 1] == pixel;
    if (!known && i < distinct) break;
    if (!known) pixels[distinct++] = int32_t(pixel);
    of_entry[t] = known ? i - 1 : i;
  }
  if (t == count) return {pixels, distinct, of_entry};
  const auto ends = std::minmax_element(taps.index.begin(), taps.index.begin() + count);
  const int64_t least = *ends.first, extent = *ends.second - least + 1;
  work.place.assign(size_t(extent), -1);
  distinct = 0;
  for (t = 0; t < count; ++t) {
    const int64_t pixel = taps.index[size_t(t)];
    int32_t& at = work.place[size_t(pixel - least)];
    if (at < 0) {
      pixels[distinct] = int32_t(pixel);
      at = distinct++;
    }
    of_entry[t] = at;
  }
  return {pixels, distinct, of_entry};
}

// Taps as an Axis. `transposed`: by pixels, in another order of these.
template <class Real>
Axis<Real> axis_of(const Taps& taps, Pixels pixels, int weights, bool transposed, Workspace& work,
                   Arena& arena) {
  const int64_t bins = taps.bins(), count = taps.count();
  const int64_t rows = transposed ? pixels.count : bins;
  int32_t* entries = arena.allocate<int32_t>(rows);
  int32_t singles = 0, *of_entry = pixels.of_entry;
  if (transposed) {  // single entries first: their rows need one multiply-add, and no padding
    std::fill(entries, entries + rows, 0);
    for (int64_t t = 0; t < count; ++t) ++entries[of_entry[t]];
    work.place.resize(size_t(2 * rows));
    int32_t *at = work.place.data(), *from = at + rows;
    std::iota(from, from + rows, 0);
    for (int32_t i = 0; i < rows; ++i) {
      if (entries[i] != 1) continue;
      std::swap(from[i], from[singles]);
      std::swap(entries[i], entries[singles]);
      std::swap(pixels.pixel[i], pixels.pixel[singles++]);
    }
    for (int32_t i = 0; i < rows; ++i) at[from[i]] = i;
    for (int64_t t = 0; t < count; ++t) of_entry[t] = at[of_entry[t]];
  } else {
    for (size_t k = 0; k < size_t(bins); ++k)
      entries[k] = int32_t(taps.first[k + 1] - taps.first[k]);
  }
  const int32_t width = rows ? *std::max_element(entries, entries + rows) : 0;
  const bool separate = width <= kSeparateTaps && 4 * bins * width <= 5 * pixels.count;
  int32_t* index = arena.allocate<int32_t>(rows * width);
  Real* weight[2] = {};
  for (int w = 0; w < weights; ++w) weight[w] = arena.allocate<Real>(rows * width);
  if (transposed) std::fill(entries, entries + rows, 0);
  for (int64_t k = 0, t = 0; k < bins; ++k) {
    for (const int64_t begin = t; t < taps.first[size_t(k) + 1]; ++t) {
      const int32_t i = of_entry[t];
      const int64_t at = transposed ? int64_t(i) * width + entries[i]++ : k * width + t - begin;
      index[at] = transposed ? int32_t(k) : i;
      for (int w = 0; w < weights; ++w) weight[w][at] = Real(taps.weight[w][size_t(t)]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t begin = i * width + entries[i], end = (i + 1) * width;
    std::fill(index + begin, index + end, entries[i] ? index[begin - 1] : 0);
    for (int w = 0; w < weights; ++w) std::fill(weight[w] + begin, weight[w] + end, Real(0));
  }
  return {pixels.pixel, pixels.count, width, singles,
          separate,     entries,      index, {weight[0], weight[1]}};
}

// Values as a flat Axis.
template <class Real>
Axis<Real> flat_axis(const Taps& taps, Arena& arena) {
  const int64_t bins = taps.bins();
  int32_t* entries = arena.allocate<int32_t>(bins);
  for (size_t k = 0; k < size_t(bins); ++k) entries[k] = int32_t(taps.first[k + 1] - taps.first[k]);
  const int32_t width = *std::max_element(entries, entries + bins);
  int32_t* index = arena.allocate<int32_t>(bins * width);
  Real* weight = arena.allocate<Real>(bins * width);
  for (int64_t k = 0, t = 0; k < bins; ++k) {
    for (int64_t at = k * width; t < taps.first[size_t(k) + 1]; ++t, ++at) {
      index[at] = int32_t(taps.index[size_t(t)]);
      weight[at] = Real(taps.weight[0][size_t(t)]);
    }
  }
  return {nullptr, 0, width, 0, false, entries, index, {weight, nullptr}};
}

// slope_lo * v_lo + slope_hi * v_hi in place, without the entries that vanish.
template <class Real>
void contract_slopes(Taps& slopes, double v_lo, double v_hi) {
  int64_t kept = 0;
  for (int64_t k = 0, t = 0; k < slopes.bins(); ++k) {
    for (const int64_t end = slopes.first[k + 1]; t < end; ++t) {
      const double weight = Real(slopes.weight[0][t] * v_lo + slopes.weight[1][t] * v_hi);
      if (weight == 0) continue;
      slopes.index[kept] = slopes.index[t];
      slopes.weight[0][kept++] = weight;
    }
    slopes.first[k + 1] = kept;
  }
}

// Whether they have the same pixels in the same bins.
bool same_entries(const Taps& a, const Taps& b) {
  return a.first == b.first &&
         std::equal(a.index.begin(), a.index.begin() + a.count(), b.index.begin());
}

// The order of windows: image after image of each map; in an image bands from top to bottom, even
// ones from left to right and odd ones back.
struct Key {
  int64_t map, image, band, place, roi;
  bool placed;  // on a map and an image

  bool operator<(const Key& other) const {
    return std::tie(map, image, band, place, roi) <
           std::tie(other.map, other.image, other.band, other.place, other.roi);
  }
};

// What a thread keeps from call to call.
template <class T>
T& of_this_thread() {
  static thread_local T kept;
  return kept;
}

// A set of groups, as bits.
class GroupSet {
 public:
  void reset(int64_t size) { words_.assign(size_t(size / 64 + 1), 0); }
  void insert(int64_t from, int64_t to) {
    for (int64_t i = from; i < to;) {
      const int64_t end = std::min(to, (i / 64 + 1) * 64);
      words_[size_t(i / 64)] |= (~uint64_t{0} >> (64 - (end - i))) << (i % 64);
      i = end;
    }
  }
  void clear() { std::fill(words_.begin(), words_.end(), 0); }
  // Appends what is here and not in `seen`, and adds it there; gives how many groups those are.
  int64_t append_new(GroupSet& seen, std::vector<Run>& runs) const {
    int64_t added = 0, end = -1;  // of the last run
    for (size_t w = 0; w < words_.size(); ++w) {
      uint64_t bits = words_[w] & ~seen.words_[w];
      seen.words_[w] |= bits;
      for (; bits; bits &= bits - 1, ++added) {
        const int64_t i = int64_t(w) * 64 + __builtin_ctzll(bits);
        if (i != end) runs.push_back({i, 0, 0});
        ++runs.back().count;
        end = i + 1;
      }
    }
    return added;
  }
  // From now on `place` gives how many come before one.
  void number() {
    int64_t sum = 0;
    before_.clear();
    for (const uint64_t word : words_) {
      before_.push_back(sum);
      sum += __builtin_popcountll(word);
    }
  }
  int64_t place(int64_t i) const {
    const uint64_t below = words_[size_t(i / 64)] & ((uint64_t{1} << (i % 64)) - 1);
    return before_[size_t(i / 64)] + __builtin_popcountll(below);
  }

 private:
  std::vector<uint64_t> words_;
  std::vector<int64_t> before_;  // of each word
};

// What the windows of a call live in, and what is needed to make them.
template <class Real>
struct Storage {
  std::vector<Key> keys;
  std::vector<Window<Real>> windows;  // in the order of `keys`
  std::vector<Arena> arenas;          // one for each chunk of them
  std::vector<Visit<Real>> visits;
  std::vector<int64_t> ends;
  std::vector<Band<Real>> bands;
  std::vector<Run> first, last, untouched;

  GroupSet touched, seen;
  std::vector<int32_t> last_band;  // of each group, -1 for none
  std::vector<int64_t> in_band;
};

// The bins of a window that is turned, on this thread.
template <class Real>
Cells<Real>& made_cells(const Turn<Real>& turn) {
  Cells<Real>& cells = of_this_thread<Cells<Real>>();
  turned_cells(turn.box, *turn.rule, turn.bins, turn.size, turn.scale,
               turn.tangent ? turn.along : nullptr, turn.sloped, cells);
  return cells;
}

// The phases of a call, in the order of the functions.
template <class Real>
class Builder {
 public:
  Builder(Operation operation, Maps maps, const Rois& rois, const Real* tangent, const Rule& rule,
          const int64_t bins[2])
      : operation_(operation),
        adjoint_(operation == Operation::adjoint),
        maps_(maps),
        rois_(rois),
        tangent_(tangent),
        rule_(rule),
        bins_(bins),
        s_(of_this_thread<Storage<Real>>()) {}

  void order_rois() {
    s_.keys.clear();
    for (int64_t k = 0; k < rois_.count; ++k) s_.keys.push_back(key(k));
    std::sort(s_.keys.begin(), s_.keys.end());
  }

  void build_taps(int threads) {
    const int64_t count = rois_.count, chunks = (count + kChunk - 1) / kChunk;
    s_.windows.resize(size_t(count));
    if (int64_t(s_.arenas.size()) < chunks) s_.arenas.resize(size_t(chunks));
    parallel_for(chunks, count < kSerialRois ? 1 : threads, [&](int64_t chunk) {
      Arena& arena = s_.arenas[size_t(chunk)];
      arena.clear();
      for (int64_t i = chunk * kChunk; i < std::min(count, (chunk + 1) * kChunk); ++i) {
        const Key& key = s_.keys[size_t(i)];
        Workspace& work = of_this_thread<Workspace>();
        s_.windows[size_t(i)] = !key.placed
                                    ? Window<Real>{key.roi, nullptr, 0, false, nullptr, nullptr}
                                : rule_.turn != 0      ? turned_window(key, arena)
                                : rule_.reduction != 0 ? sampled_window(key, work, arena)
                                                       : window(key, work, arena);
      }
    });
  }

  // One visit per image of each map, or more where there would be too few tasks. The adjoint sums
  // into a map, so its images stay whole, and images without RoIs are visited too.
  void cut_visits(Slicing slicing) {
    s_.visits.clear();
    s_.ends.clear();
    s_.bands.clear();
    s_.first.clear();
    s_.last.clear();
    s_.untouched.clear();
    int64_t from = 0;
    for (int64_t map = 0; map < maps_.count; ++map) {
      const int64_t* shape = maps_[map].array.shape;
      const int64_t images = shape[0], tasks = images * slicing.count(slicing.context, map);
      const int64_t pieces = (kMinTasks + tasks - 1) / std::max<int64_t>(1, tasks);
      groups_ = (shape[2] * shape[3] + kGroup - 1) / kGroup;
      s_.touched.reset(groups_);
      s_.seen.reset(groups_);
      for (int64_t image = 0; image < images; ++image) {
        int64_t end = from;
        while (end < rois_.count && s_.keys[size_t(end)].map == map &&
               s_.keys[size_t(end)].image == image) {
          ++end;
        }
        way_ = rule_.reduction != 0 || rule_.turn != 0 ? sampled_way(maps_[map].array, from, end)
                                                       : way(maps_[map].array, from, end);
        if (from < end) ++trace().images[int(way_)];
        if (adjoint_) {
          visit(image, from, end);
          continue;
        }
        const int64_t least = way_ == Way::packed ? kMinVisit : kMinUnpacked;
        const int64_t piece = std::max(least, (end - from + pieces - 1) / pieces);
        while (from < end) visit(image, from, std::min(end, from + piece));
      }
      s_.ends.push_back(int64_t(s_.visits.size()));
    }
  }

  // The vectors have stopped growing: points into them.
  Windows<Real> result() {
    const Band<Real>* bands = s_.bands.data();
    const Run *first = s_.first.data(), *last = s_.last.data(), *untouched = s_.untouched.data();
    for (Band<Real>& band : s_.bands) {
      band.first.runs = std::exchange(first, first + band.first.count);
      band.last.runs = std::exchange(last, last + band.last.count);
    }
    for (Visit<Real>& visit : s_.visits) {
      visit.bands = std::exchange(bands, bands + visit.count);
      visit.untouched.runs = std::exchange(untouched, untouched + visit.untouched.count);
    }
    Windows<Real> result{s_.visits.data(), s_.ends.data(), 0, 0};
    for (int64_t map = 0; adjoint_ && map < maps_.count; ++map) {  // it writes all pixels
      const int64_t* shape = maps_[map].array.shape;
      result.work += shape[0] * shape[2] * shape[3];
    }
    for (const Window<Real>& window : s_.windows) {
      if (window.samples || window.turn) {
        result.work += samples_of(window);
        continue;
      }
      for (int i = 0; i < window.term_count; ++i) {
        const Axis<Real>&y = window.term[i].y, &x = window.term[i].x;
        result.max_columns = std::max<int64_t>(result.max_columns, x.pixel_count);
        result.work += x.pixels ? int64_t(x.pixel_count) * (y.pixel_count + 2 * bins_[0])
                                : bins_[0] * bins_[1] * y.taps * x.taps;
      }
    }
    return result;
  }

 private:
  bool by_bins(const Tensor& map) const {
    return roialign::by_bins(operation_, map, rois_.count, bins_);
  }

  // How the windows [from, end) of an image are pooled: the way that costs least.
  Way way(const Tensor& map, int64_t from, int64_t end) const {
    if (by_bins(map)) return Way::bins;
    const bool narrow = size_of(map.dtype) < int64_t(sizeof(Real));
    if (from == end || (adjoint_ && narrow)) return Way::packed;  // its sums are rounded once
    const Way forced = way_forced();
    if (forced == Way::packed || forced == Way::rows) return forced;
    constexpr double lanes = kLineBytes / sizeof(Real);
    const bool runs = map.stride[3] == 1;
    const bool few = double(map.shape[1]) < lanes;  // channels: those of a pixel share a cache line
    const bool dense = runs || (few && map.stride[1] == 1 && map.stride[3] == map.shape[1]);
    const bool interleaved = !adjoint_ && !runs && dense && map.shape[1] <= kInterleaved;
    // Lines of a run for each of its own: those of other channels stay in the first cache.
    const double each = interleaved ? kCosts.interleaved * double(map.shape[1]) : 1;
    const double pixels = double(map.shape[2] * map.shape[3]);
    double groups = 0, taps = 0, combined = 0, lines = 0, singles = 0, tiles = 0, terms = 0;
    for (int64_t i = from; i < end; ++i) {
      const Window<Real>& window = s_.windows[size_t(i)];
      for (int k = 0; k < window.term_count; ++k) {
        const Term<Real>& term = window.term[k];
        const Axis<Real>&y = term.y, &x = term.x;
        if (!x.pixel_count || !y.pixel_count) continue;
        const double entries = double(std::accumulate(y.entries, y.entries + bins_[0], int64_t{0}));
        const double spanned = double(term.extent) / lanes + 1;
        const bool run = (runs || interleaved) && term.extent <= kSparse * x.pixel_count;
        if (k == 0)
          groups += double(y.pixel_count) * (double(term.extent) / kGroup + 1);  // of both
        taps += entries * x.pixel_count;
        combined += double(x.singles ? x.pixel_count : bins_[1]) * x.taps;
        (run ? lines : singles) += entries * (run ? each * spanned : x.pixel_count);
        tiles += run ? spanned : double(x.pixel_count) / lanes + 1;
        terms += 1;
      }
    }
    const double channels = double(map.shape[1]), blocks = std::ceil(channels / lanes);
    const double rows = double(bins_[0]), touched = std::min(groups, pixels / kGroup);
    const Costs& c = kCosts;
    const bool far = touched > kMostGroups;
    const double packed =
        blocks * ((far ? c.far_group : c.group) * touched + (far ? c.far_tap : c.tap) * taps +
                  rows * (c.combined * combined + c.row * terms) +
                  (adjoint_ ? c.unpacked * pixels / kGroup : 0));
    const double by_rows =
        channels *
        (c.line * lines + (runs || few ? c.single : c.strided) * singles +
         rows * (c.tile * tiles + c.row_combined * combined) / lanes + rows * c.own_row * terms +
         (adjoint_ ? (dense ? c.zero : c.strided_zero) * pixels / lanes : 0));
    return by_rows < packed ? Way::rows : Way::packed;
  }

  // The same where bins take their largest sample.
  Way sampled_way(const Tensor& map, int64_t from, int64_t end) const {
    const bool narrow = size_of(map.dtype) < int64_t(sizeof(Real));
    if (from == end || (adjoint_ && narrow)) return Way::packed;
    const Way forced = way_forced();
    if (forced != Way::any) return forced == Way::packed ? Way::packed : Way::bins;
    constexpr double lanes = kLineBytes / sizeof(Real);
    const double channels = double(map.shape[1]), blocks = std::ceil(channels / lanes);
    const bool in_lines = !narrow && map.stride[1] == 1 && channels >= lanes;
    if (in_lines && operation_ == Operation::forward) return Way::bins;
    double groups = 0, samples = 0;
    for (int64_t i = from; i < end; ++i) {
      const Window<Real>& window = s_.windows[size_t(i)];
      if (!window.term_count) continue;
      const Term<Real>& term = *window.term;
      samples += double(samples_of(window));
      groups += double(term.y.pixel_count) * (double(term.extent) / kGroup + 1);
    }
    const double all = double(map.shape[2] * map.shape[3]) / kGroup;
    const double touched = std::min(groups, all);
    const Costs& c = kCosts;
    const double group = touched > kMostGroups ? c.far_group : c.group;
    const double cleared = adjoint_ ? channels * c.zero * all * kGroup / lanes : 0;
    const bool sparse = in_lines && touched * kSparsePixels < all;  // cleared as in place
    const double packed = blocks * (group * touched + c.sample_line * samples) +
                          (sparse || !adjoint_ ? cleared : blocks * c.unpacked * all);
    const double in_place =
        (in_lines ? blocks * c.sample_apart : channels * c.sample_single) * samples + cleared;
    return in_place < packed ? Way::bins : Way::packed;
  }

  // x1, y1, x2, y2
  std::array<Real, 4> box(int64_t k) const {
    std::array<Real, 4> result;
    for (int64_t i = 0; i < 4; ++i) result[size_t(i)] = coordinate<Real>(rois_, k, i);
    return result;
  }

  // Where a RoI is, with its box's centre, about: only the order of windows depends on that.
  Key key(int64_t k) const {
    const Place at = place_of(rois_, k, maps_);
    if (at.map < 0) return {0, 0, 0, 0, k, false};
    const Map& map = maps_[at.map];
    const std::array<Real, 4> box = this->box(k);
    int64_t centre[2];
    for (int axis = 0; axis < 2; ++axis) {
      const double start = double(box[size_t(1 - axis)]), end = double(box[size_t(3 - axis)]);
      const double c =
          rule_.turn != 0 ? start * map.scale[axis] : (start + end) * map.scale[axis] / 2;
      centre[axis] = c > 0 ? int64_t(std::min(c, double(map.array.shape[2 + axis]))) : 0;
    }
    const int64_t row_bytes = kLineBytes * std::max<int64_t>(1, map.array.shape[3]);
    const int64_t band = centre[0] / std::max<int64_t>(1, kBandBytes / row_bytes);
    return {at.map, at.image, band, band % 2 ? -centre[1] : centre[1], k, true};
  }

  Window<Real> window(const Key& key, Workspace& work, Arena& arena) const {
    const bool sloped = operation_ == Operation::box_gradient || tangent_;
    const Map& map = maps_[key.map];
    const std::array<Real, 4> box = this->box(key.roi);
    for (int axis = 0; axis < 2; ++axis) {  // y, x
      axis_taps<Real>(box[size_t(1 - axis)], box[size_t(3 - axis)], rule_, bins_[axis],
                      map.array.shape[2 + axis], Real(map.scale[axis]), work.values[axis],
                      sloped ? &work.slopes[axis] : nullptr);
    }
    if (sloped && !std::all_of(box.begin(), box.end(), [](Real c) { return std::isfinite(c); })) {
      // min_size can make a size of -inf finite; the gradient is still 0
      for (Taps& slopes : work.slopes) std::fill(slopes.first.begin(), slopes.first.end(), 0);
    }
    // What pulls d_output back to the columns of the map walks them: the x of the adjoint, and of
    // the box gradient's first term.
    const bool flat = by_bins(map.array);
    if (tangent_) {
      const Real* v = tangent_ + 4 * key.roi;
      for (int axis = 0; axis < 2; ++axis)
        contract_slopes<Real>(work.slopes[axis], double(v[1 - axis]), double(v[3 - axis]));
    }
    const bool gradient = operation_ == Operation::box_gradient;
    const auto numbered = [&](int axis, bool slope, Pixels pixels) {
      const bool transposed = axis == 1 && (adjoint_ || (gradient && !slope));
      return axis_of<Real>(slope ? work.slopes[axis] : work.values[axis], pixels,
                           slope && gradient ? 2 : 1, transposed, work, arena);
    };
    const auto axis_of_box = [&](int axis, bool slope) {
      const Taps& taps = slope ? work.slopes[axis] : work.values[axis];
      if (flat) return flat_axis<Real>(taps, arena);
      return numbered(axis, slope, number_pixels(taps, work, arena));
    };
    const bool alike = gradient && same_entries(work.values[0], work.slopes[0]) &&
                       same_entries(work.values[1], work.slopes[1]);
    const int count = sloped ? 2 : 1;
    Term<Real>* term = arena.allocate<Term<Real>>(count);
    term[0] = {axis_of_box(0, sloped), {}, nullptr, 0, 0};
    if (sloped) term[1] = {axis_of_box(0, false), {}, nullptr, 0, 0};
    if (alike) {
      const Pixels pixels = number_pixels(work.values[1], work, arena);
      term[0].x = numbered(1, false, pixels);
      term[1].x = numbered(1, true, pixels);
    } else {
      term[0].x = axis_of_box(1, false);
      if (sloped) term[1].x = axis_of_box(1, true);
    }
    for (int i = 0; i < count && !flat; ++i) {
      const Axis<Real>& x = term[i].x;
      const auto ends = std::minmax_element(x.pixels, x.pixels + x.pixel_count);
      if (x.pixel_count) term[i].least = *ends.first;
      if (x.pixel_count) term[i].extent = *ends.second - *ends.first + 1;
      term[i].rows = arena.allocate<int32_t>(term[i].y.pixel_count);
    }
    return {key.roi, term, count, alike, nullptr, nullptr};
  }

  // Samples, or pixels of a window that is turned: about what its bins cost.
  int64_t samples_of(const Window<Real>& window) const {
    if (window.turn) return window.turn->count;
    return int64_t(window.samples[0].first[bins_[0]]) * window.samples[1].first[bins_[1]];
  }

  // The same where the box is turned.
  Window<Real> turned_window(const Key& key, Arena& arena) const {
    const Map& map = maps_[key.map];
    Turn<Real>* turn = arena.allocate<Turn<Real>>(1);
    *turn = {};
    for (int64_t i = 0; i < kTurnedNumbers; ++i) {
      turn->box[i] = coordinate<Real>(rois_, key.roi, i);
      if (tangent_) turn->along[i] = tangent_[kTurnedNumbers * key.roi + i];
    }
    turn->scale = Real(map.scale[0]);
    turn->sloped = operation_ == Operation::box_gradient;
    turn->tangent = tangent_;
    turn->rule = &rule_;
    for (int axis = 0; axis < 2; ++axis) {
      turn->bins[axis] = bins_[axis];
      turn->size[axis] = map.array.shape[2 + axis];
    }
    const TurnedBounds bounds =
        turned_bounds(turn->box, rule_, turn->bins, turn->size, turn->scale);
    turn->count = int64_t(bounds.count);
    turn->top = int32_t(bounds.first[0]);
    Term<Real>* term = arena.allocate<Term<Real>>(1);
    *term = {};
    if (bounds.pixels()) {
      term->y.pixel_count = int32_t(bounds.sides[0]);
      int32_t* pixels = arena.allocate<int32_t>(bounds.sides[0]);
      std::iota(pixels, pixels + bounds.sides[0], turn->top);
      term->y.pixels = pixels;
      term->least = int32_t(bounds.first[1]);
      term->x.pixel_count = term->extent = int32_t(bounds.sides[1]);
      term->rows = arena.allocate<int32_t>(bounds.sides[0]);
    }
    if (kept_.fetch_add(turn->count) + turn->count <= kMostKept)
      turn->kept = kept(made_cells(*turn), turn->top, arena);
    return {key.roi, term, 1, false, nullptr, turn};
  }

  static Patches<Real> kept(const Cells<Real>& cells, int32_t top, Arena& arena) {
    const auto copied = [&](const auto& values) {
      using Value = std::decay_t<decltype(values[0])>;
      Value* copy = arena.allocate<Value>(int64_t(values.size()));
      std::copy(values.begin(), values.end(), copy);
      return copy;
    };
    Pixel* pixel = copied(cells.pixel);
    for (size_t i = 0; i < cells.pixel.size(); ++i) pixel[i].y -= top;
    return {copied(cells.first), pixel, copied(cells.weight), copied(cells.slopes)};
  }

  // The same where bins take their largest sample.
  Window<Real> sampled_window(const Key& key, Workspace& work, Arena& arena) const {
    const bool sloped = operation_ == Operation::box_gradient || tangent_;
    const Map& map = maps_[key.map];
    const std::array<Real, 4> box = this->box(key.roi);
    const bool moves =
        sloped && std::all_of(box.begin(), box.end(), [](Real c) { return std::isfinite(c); });
    Extremes<Real>& extremes = of_this_thread<Extremes<Real>>();
    Term<Real>* term = arena.allocate<Term<Real>>(1);
    Samples<Real>* samples = arena.allocate<Samples<Real>>(2);
    *term = {};
    for (int axis = 0; axis < 2; ++axis) {  // y, x
      axis_extremes<Real>(box[size_t(1 - axis)], box[size_t(3 - axis)], rule_, bins_[axis],
                          map.array.shape[2 + axis], Real(map.scale[axis]), extremes);
      const Real* v = tangent_ ? tangent_ + 4 * key.roi : nullptr;
      const double along[] = {v ? double(v[1 - axis]) : 0, v ? double(v[3 - axis]) : 0};
      samples[axis] = samples_of(extremes, moves, v ? along : nullptr, arena);
      (axis ? term->x : term->y) = pixels_of(samples[axis], bins_[axis], axis == 0, work, arena);
    }
    const Axis<Real>& x = term->x;
    const auto ends = std::minmax_element(x.pixels, x.pixels + x.pixel_count);
    if (x.pixel_count) term->least = *ends.first;
    if (x.pixel_count) term->extent = *ends.second - *ends.first + 1;
    term->rows = arena.allocate<int32_t>(term->y.pixel_count);
    return {key.roi, term, 1, false, samples, nullptr};
  }

  // Extremes in the arena. `along`: the tangent of the box's start and end, or null.
  static Samples<Real> samples_of(const Extremes<Real>& extremes, bool moves, const double* along,
                                  Arena& arena) {
    const int64_t bins = int64_t(extremes.outside.size()), count = extremes.first.back();
    using At = typename Samples<Real>::At;
    int32_t* first = arena.allocate<int32_t>(bins + 1);
    At* at = arena.allocate<At>(count);
    Real *numbers = arena.allocate<Real>(2 * count), *move[] = {numbers, numbers + count};
    bool *before = arena.allocate<bool>(3 * bins), *after = before + bins, *plain = after + bins;
    std::copy(extremes.first.begin(), extremes.first.end(), first);
    for (int64_t i = 0; i < count; ++i) {
      const typename Extremes<Real>::Sample& sample = extremes.samples[size_t(i)];
      const double in[] = {sample.moves[0], sample.moves[1]};
      const bool moving = moves && (in[0] != 0 || in[1] != 0);
      const int64_t high = sample.low + (sample.fraction != 0 || moving);
      at[i] = {int32_t(sample.low), int32_t(high), {1 - sample.fraction, sample.fraction}};
      move[0][i] = !moving ? 0 : Real(along ? in[0] * along[0] + in[1] * along[1] : in[0]);
      move[1][i] = moving ? Real(in[1]) : 0;
    }
    for (int64_t k = 0; k < bins; ++k) {
      before[k] = extremes.outside[size_t(k)].before;
      after[k] = extremes.outside[size_t(k)].after;
      plain[k] = !before[k] && !after[k] &&
                 std::all_of(at + first[k], at + first[k + 1],
                             [](const At& sample) { return is_whole(sample.weight); });
    }
    return {first, at, {move[0], move[1]}, before, after, plain};
  }

  // The distinct pixels of samples. `numbered`: from now on those count along these.
  static Axis<Real> pixels_of(Samples<Real>& samples, int64_t bins, bool numbered, Workspace& work,
                              Arena& arena) {
    const int64_t count = samples.first[bins];
    work.listed.first.assign({0, 2 * count});
    work.listed.index.clear();
    for (int64_t i = 0; i < count; ++i) {
      work.listed.index.push_back(samples.at[i].low);
      work.listed.index.push_back(samples.at[i].high);
    }
    const Pixels pixels = number_pixels(work.listed, work, arena);
    for (int64_t i = 0; numbered && i < count; ++i) {
      samples.at[i].low = pixels.of_entry[2 * i];
      samples.at[i].high = pixels.of_entry[2 * i + 1];
    }
    Axis<Real> axis{};
    axis.pixels = pixels.pixel;
    axis.pixel_count = pixels.count;
    return axis;
  }

  // A visit of the windows [from, end) of an image, in bands; moves `from` to where it ends.
  void visit(int64_t image, int64_t& from, int64_t end) {
    Visit<Real> visit{image, way_, 0, nullptr, 0, {nullptr, 0}};
    if (way_ != Way::packed) {
      s_.bands.push_back({s_.windows.data() + from, end - from, {nullptr, 0}, {nullptr, 0}});
      from = end;
      visit.count = 1;
      s_.visits.push_back(visit);
      return;
    }
    s_.seen.clear();
    s_.last_band.assign(adjoint_ ? size_t(groups_) : 0, -1);
    const int64_t whole = from;
    const size_t listed = s_.first.size();
    const auto has_room = [&] {  // the adjoint cannot leave off: its sums are in the scratch
      return adjoint_ || visit.groups < kMostGroups;
    };
    for (; from < end && has_room(); ++visit.count) {
      const int64_t begin = from, band = s_.keys[size_t(from)].band;
      s_.touched.clear();
      for (; from < end && s_.keys[size_t(from)].band == band; ++from) {
        touch(s_.windows[size_t(from)], maps_[s_.keys[size_t(from)].map], visit.count);
      }
      const size_t known = s_.first.size();
      visit.groups += s_.touched.append_new(s_.seen, s_.first);
      s_.bands.push_back({s_.windows.data() + begin,
                          from - begin,
                          {nullptr, int64_t(s_.first.size() - known)},
                          {nullptr, 0}});
    }
    if (visit.groups > INT32_MAX / kGroup) throw std::bad_alloc();  // 128 GiB for each block
    s_.seen.number();
    for (size_t i = listed; i < s_.first.size(); ++i)
      s_.first[i].place = s_.seen.place(s_.first[i].index);
    for (int64_t i = whole; i < from; ++i)
      place(s_.windows[size_t(i)], maps_[s_.keys[size_t(i)].map]);
    if (adjoint_) list_last_groups(visit);
    s_.visits.push_back(visit);
  }

  // Adds the groups of pixels that a window reads or writes.
  void touch(const Window<Real>& window, const Map& map, int64_t band) {
    for (int i = 0; i < window.term_count; ++i) {
      const Term<Real>& term = window.term[i];
      const Axis<Real>&y = term.y, &x = term.x;
      if (!x.pixel_count) continue;
      for (int64_t j = 0; j < y.pixel_count; ++j) {
        const int64_t first = int64_t(y.pixels[j]) * map.array.shape[3] + term.least;
        const int64_t from = first / kGroup, to = (first + term.extent - 1) / kGroup + 1;
        s_.touched.insert(from, to);
        if (adjoint_)
          std::fill(&s_.last_band[size_t(from)], &s_.last_band[size_t(to - 1)] + 1, int32_t(band));
      }
    }
  }

  // Says where the rows of a window are among the packed pixels.
  void place(const Window<Real>& window, const Map& map) {
    for (int i = 0; i < window.term_count; ++i) {
      const Term<Real>& term = window.term[i];
      const Axis<Real>&y = term.y, &x = term.x;
      for (int64_t j = 0; x.pixel_count && j < y.pixel_count; ++j) {
        const int64_t first = int64_t(y.pixels[j]) * map.array.shape[3] + term.least;
        term.rows[j] =
            int32_t(s_.seen.place(first / kGroup) * kGroup + first % kGroup - term.least);
      }
    }
  }

  // The groups by the band that touches them last, in runs: a counting sort.
  void list_last_groups(Visit<Real>& visit) {
    const auto for_runs = [&](auto body) {  // body(band, first, end)
      for (int64_t first = 0, end = 0; first < groups_; first = end) {
        const int32_t band = s_.last_band[size_t(first)];
        while (end < groups_ && s_.last_band[size_t(end)] == band) ++end;
        body(band, first, end);
      }
    };
    s_.in_band.assign(size_t(visit.count) + 1, 0);
    for_runs([&](int32_t band, int64_t, int64_t) { ++s_.in_band[size_t(band + 1)]; });
    visit.untouched.count = s_.in_band[0];
    for (int64_t b = 0; b < visit.count; ++b) {
      s_.bands[s_.bands.size() - size_t(visit.count - b)].last.count = s_.in_band[size_t(b + 1)];
    }
    const size_t known = s_.last.size();
    int64_t sum = -s_.in_band[0];
    for (int64_t& n : s_.in_band) sum += std::exchange(n, sum);
    s_.last.resize(known + size_t(sum));
    for_runs([&](int32_t band, int64_t first, int64_t end) {
      if (band < 0)
        s_.untouched.push_back({first, 0, end - first});
      else
        s_.last[known + size_t(s_.in_band[size_t(band + 1)]++)] = {first, s_.seen.place(first),
                                                                   end - first};
    });
  }

  const Operation operation_;
  const bool adjoint_;
  const Maps maps_;
  const Rois& rois_;
  const Real* const tangent_;
  const Rule& rule_;
  const int64_t* const bins_;
  Storage<Real>& s_;
  mutable std::atomic<int64_t> kept_{0};  // pixels of windows that are turned
  int64_t groups_ = 0;                    // of the map at hand
  Way way_ = Way::packed;                 // of the image at hand
};

}  // namespace

template <class Real>
Patches<Real> patches_of(const Window<Real>& window) {
  const Turn<Real>& turn = *window.turn;
  if (turn.kept.first) return turn.kept;
  Cells<Real>& cells = made_cells(turn);
  for (Pixel& pixel : cells.pixel) pixel.y -= turn.top;
  return {cells.first.data(), cells.pixel.data(), cells.weight.data(), cells.slopes.data()};
}
template Patches<float> patches_of(const Window<float>&);
template Patches<double> patches_of(const Window<double>&);

void force_way(Way forced) {
  forced_way = forced;
}

Way way_forced() {
  return forced_way.load(std::memory_order_relaxed);
}

bool by_bins(Operation operation, const Tensor& map, int64_t rois, const int64_t bins[2]) {
  if (operation != Operation::forward || map.stride[1] != 1) return false;
  const Way forced = way_forced();
  if (forced != Way::any) return forced == Way::bins;
  const double lanes = kLineBytes / double(size_of(coordinate_type(map.dtype)));
  const double channels = double(map.shape[1]), blocks = channels / lanes;
  if (channels < kCosts.least_channels) return false;
  const double groups = double(map.shape[2] * map.shape[3]) / kGroup;
  const double all = double(rois * bins[0] * bins[1]) / double(map.shape[0]);
  return blocks >= kCosts.most_blocks || blocks * kCosts.group * groups >= kCosts.bin * all;
}

template <class Real>
Windows<Real> build_windows(Operation operation, Maps maps, const Rois& rois, const Real* tangent,
                            const Rule& rule, const int64_t bins[2], Slicing slicing, int threads) {
  Builder<Real> builder(operation, maps, rois, tangent, rule, bins);
  builder.order_rois();
  builder.build_taps(threads);
  builder.cut_visits(slicing);
  return builder.result();
}

template Windows<float> build_windows(Operation, Maps, const Rois&, const float*, const Rule&,
                                      const int64_t[2], Slicing, int);
template Windows<double> build_windows(Operation, Maps, const Rois&, const double*, const Rule&,
                                       const int64_t[2], Slicing, int);

}  // namespace roialign
