#include "windows.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "geometry.hpp"
#include "parallel.hpp"

namespace roialign {
namespace {

constexpr int64_t kChunk = 64;             // RoIs whose taps one task builds
constexpr int64_t kBandBytes = 256 << 10;  // of scratch: windows are visited band of rows by band
constexpr int64_t kMinTasks = 16;          // cut visits until there are as many tasks ...
constexpr int64_t kMinVisit = 64;          // ... but not below this many RoIs

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

float half_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16;
  const int exponent = (bits >> 10) & 0x1f, mantissa = bits & 0x3ff;
  float value;
  if (exponent == 31) value = mantissa ? NAN : INFINITY;
  else if (exponent == 0) value = std::ldexp(float(mantissa), -24);
  else value = std::ldexp(float(mantissa + 1024), exponent - 25);
  return sign ? -value : value;
}

template <class T>
T element(const void* data, int64_t i) {
  T value;
  std::memcpy(&value, static_cast<const char*>(data) + i * int64_t(sizeof(T)), sizeof(T));
  return value;
}

double read_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::float16: return half_to_float(element<uint16_t>(data, i));
    case DType::bfloat16: {
      const uint32_t bits = uint32_t(element<uint16_t>(data, i)) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    case DType::float32: return element<float>(data, i);
    default: return element<double>(data, i);
  }
}

// The image of RoI k, or -1 if it is no integer in [0, images).
int64_t image_of(const Rois& rois, int64_t k, int64_t images) {
  const int64_t i = k * rois.index_stride;
  if (rois.index_dtype == DType::int64) {
    const int64_t image = element<int64_t>(rois.image_index, i);
    return image >= 0 && image < images ? image : -1;
  }
  const double image = read_float(rois.image_index, rois.index_dtype, i);
  return image >= 0 && image < double(images) && image == std::floor(image) ? int64_t(image) : -1;
}

// What a thread reuses while it builds taps.
struct Workspace {
  Taps values[2], slopes[2], tangent;
  std::vector<int64_t> number;  // pixel -> its place in `pixels`, -1 if it has none
};

// Taps as an Axis: `number` renames pixels to their place in the order of appearance.
template <class Real>
Axis<Real> compact(const Taps& taps, int weights, int64_t size, std::vector<int64_t>& number,
                   Arena& arena) {
  const int64_t count = int64_t(taps.index.size()), bins = int64_t(taps.first.size()) - 1;
  if (int64_t(number.size()) < size) number.resize(size, -1);
  int64_t* pixels = arena.allocate<int64_t>(std::min(count, size));
  int64_t* index = arena.allocate<int64_t>(count);
  int64_t* first = arena.allocate<int64_t>(bins + 1);
  int64_t distinct = 0;
  for (int64_t t = 0; t < count; ++t) {
    int64_t& place = number[taps.index[t]];
    if (place < 0) {
      pixels[distinct] = taps.index[t];
      place = distinct++;
    }
    index[t] = place;
  }
  for (int64_t i = 0; i < distinct; ++i) number[pixels[i]] = -1;
  std::copy(taps.first.begin(), taps.first.end(), first);
  Axis<Real> axis{pixels, distinct, first, index, {nullptr, nullptr}};
  for (int w = 0; w < weights; ++w) {
    Real* weight = arena.allocate<Real>(count);
    for (int64_t t = 0; t < count; ++t) weight[t] = Real(taps.weight[w][t]);
    axis.weight[w] = weight;
  }
  return axis;
}

// The same matrix by pixels: entries of a pixel in ascending order of bins.
template <class Real>
Axis<Real> transpose(const Axis<Real>& axis, int64_t bins, Arena& arena) {
  const int64_t count = axis.first[bins], pixels = axis.pixel_count;
  int64_t* first = arena.allocate<int64_t>(pixels + 1);
  int64_t* index = arena.allocate<int64_t>(count);
  Real* weight = arena.allocate<Real>(count);
  std::fill(first, first + pixels + 1, 0);
  for (int64_t t = 0; t < count; ++t) ++first[axis.index[t] + 1];
  for (int64_t i = 0; i < pixels; ++i) first[i + 1] += first[i];
  for (int64_t k = 0; k < bins; ++k) {
    for (int64_t t = axis.first[k]; t < axis.first[k + 1]; ++t) {
      const int64_t place = first[axis.index[t]]++;
      index[place] = k;
      weight[place] = axis.weight[0][t];
    }
  }
  for (int64_t i = pixels; i > 0; --i) first[i] = first[i - 1];
  first[0] = 0;
  return {axis.pixels, pixels, first, index, {weight, nullptr}};
}

// slope_lo * v_lo + slope_hi * v_hi, without the entries that vanish.
template <class Real>
void along(const Taps& slopes, double v_lo, double v_hi, Taps& result) {
  result.first.assign(1, 0);
  result.index.clear();
  result.weight[0].clear();
  for (size_t k = 0; k + 1 < slopes.first.size(); ++k) {
    for (int64_t t = slopes.first[k]; t < slopes.first[k + 1]; ++t) {
      const double weight = Real(slopes.weight[0][t] * v_lo + slopes.weight[1][t] * v_hi);
      if (weight == 0) continue;
      result.index.push_back(slopes.index[t]);
      result.weight[0].push_back(weight);
    }
    result.first.push_back(int64_t(result.index.size()));
  }
}

template <class Real>
struct Storage {
  std::vector<Window<Real>> windows;
  std::vector<Visit<Real>> visits;
  std::vector<Arena> arenas;
  std::vector<int64_t> image, order, groups, begin, last_groups, last_begin, untouched;
  std::vector<std::pair<uint64_t, int64_t>> keys;
};

template <class Real>
struct Builder {
  Operation operation;
  const Rois& rois;
  const Real* tangent;
  const Params& params;
  const int64_t* map_shape;
  const int64_t* bins;

  int64_t size(int axis) const { return map_shape[2 + axis]; }

  Window<Real> window(int64_t k, Workspace& work, Arena& arena) const {
    Window<Real> result{k, 0, {}};
    const bool sloped = operation == Operation::box_gradient || tangent;
    for (int axis = 0; axis < 2; ++axis) {  // y, x; a box is x1, y1, x2, y2
      const int64_t at = k * rois.boxes_stride[0], step = rois.boxes_stride[1];
      axis_taps<Real>(Real(read_float(rois.boxes, rois.boxes_dtype, at + (1 - axis) * step)),
                      Real(read_float(rois.boxes, rois.boxes_dtype, at + (3 - axis) * step)),
                      params.convention, bins[axis], params.sampling_ratio, size(axis),
                      Real(params.scale[axis]), work.values[axis],
                      sloped ? &work.slopes[axis] : nullptr);
    }
    const auto values = [&](int axis) {
      const Axis<Real> by_bin = compact<Real>(work.values[axis], 1, size(axis), work.number, arena);
      // The adjoint walks both matrices by pixels; so does the box gradient where it pulls d_output
      // back to the rows of the map (the y of its first term).
      const bool by_pixel = operation == Operation::adjoint ||
                            (operation == Operation::box_gradient && axis == 0);
      return by_pixel ? transpose(by_bin, bins[axis], arena) : by_bin;
    };
    const auto slopes = [&](int axis) {
      if (operation == Operation::box_gradient) {
        return compact<Real>(work.slopes[axis], 2, size(axis), work.number, arena);
      }
      const Real* v = tangent + 4 * k;
      along<Real>(work.slopes[axis], double(v[1 - axis]), double(v[3 - axis]), work.tangent);
      const Axis<Real> by_bin = compact<Real>(work.tangent, 1, size(axis), work.number, arena);
      return operation == Operation::adjoint ? transpose(by_bin, bins[axis], arena) : by_bin;
    };
    if (sloped) {
      result.term_count = 2;
      result.term[0] = {values(0), slopes(1)};
      result.term[1] = {slopes(0), values(1)};
    } else {
      result.term_count = 1;
      result.term[0] = {values(0), values(1)};
    }
    return result;
  }

  // Calls touch(group) for the groups of pixels that the window reads or writes.
  template <class Touch>
  void for_groups(const Window<Real>& window, Touch touch) const {
    for (int i = 0; i < window.term_count; ++i) {
      const Axis<Real>& y = window.term[i].y;
      const Axis<Real>& x = window.term[i].x;
      if (!x.pixel_count) continue;
      const auto ends = std::minmax_element(x.pixels, x.pixels + x.pixel_count);
      for (int64_t j = 0; j < y.pixel_count; ++j) {
        const int64_t row = y.pixels[j] * map_shape[3];
        const int64_t last = (row + *ends.second) / kGroup;
        for (int64_t group = (row + *ends.first) / kGroup; group <= last; ++group) touch(group);
      }
    }
  }

  // Bands of rows from top to bottom, and in each band from left to right and back in turn.
  uint64_t visiting_key(const Window<Real>& window) const {
    const Term<Real>& term = window.term[0];
    if (!window.term_count || !term.y.pixel_count || !term.x.pixel_count) return 0;
    const uint64_t line = uint64_t(64 * map_shape[3]);
    const uint64_t rows = std::max<uint64_t>(1, uint64_t(kBandBytes) / line);
    const uint64_t band = uint64_t(term.y.pixels[term.y.pixel_count / 2]) / rows;
    const uint64_t x = uint64_t(term.x.pixels[term.x.pixel_count / 2]) & 0xffffffff;
    return (band << 32) | (band & 1 ? 0xffffffff - x : x);
  }
};

// A set of groups.
class GroupSet {
 public:
  explicit GroupSet(int64_t size) : words_(size_t(size / 64 + 1), 0) {}
  bool insert(int64_t i) {  // true if it was not there
    uint64_t& word = words_[size_t(i / 64)];
    const uint64_t bit = uint64_t{1} << (i % 64);
    if (word & bit) return false;
    word |= bit;
    return true;
  }
  void clear() { std::fill(words_.begin(), words_.end(), 0); }

 private:
  std::vector<uint64_t> words_;
};

}  // namespace

int64_t bad_image_index(const Rois& rois, int64_t images) {
  for (int64_t k = 0; k < rois.count; ++k) {
    if (image_of(rois, k, images) < 0) return k;
  }
  return -1;
}

template <class Real>
Windows<Real> build_windows(Operation operation, const Rois& rois, const Real* tangent,
                            const Params& params, const int64_t map_shape[4], const int64_t bins[2],
                            int64_t tasks_per_visit, int threads) {
  static thread_local Storage<Real> kept;
  static thread_local Workspace workspace;
  Storage<Real>& s = kept;
  const Builder<Real> builder{operation, rois, tangent, params, map_shape, bins};
  const int64_t count = rois.count, images = map_shape[0];
  const int64_t chunks = (count + kChunk - 1) / kChunk;

  std::vector<Window<Real>> built(static_cast<size_t>(count));
  if (int64_t(s.arenas.size()) < chunks) s.arenas.resize(size_t(chunks));
  s.image.resize(size_t(count));
  s.keys.resize(size_t(count));
  parallel_for(chunks, threads, [&](int64_t chunk) {
    Arena& arena = s.arenas[size_t(chunk)];
    arena.clear();
    for (int64_t k = chunk * kChunk; k < std::min(count, (chunk + 1) * kChunk); ++k) {
      const int64_t image = image_of(rois, k, images);
      built[size_t(k)] = image < 0 ? Window<Real>{k, 0, {}} : builder.window(k, workspace, arena);
      s.image[size_t(k)] = std::max<int64_t>(image, 0);
      s.keys[size_t(k)] = {builder.visiting_key(built[size_t(k)]), k};
    }
  });

  std::sort(s.keys.begin(), s.keys.end(), [&](const auto& a, const auto& b) {
    const int64_t image_a = s.image[size_t(a.second)], image_b = s.image[size_t(b.second)];
    return image_a != image_b ? image_a < image_b : a < b;
  });
  s.windows.clear();
  for (const auto& key : s.keys) s.windows.push_back(built[size_t(key.second)]);

  Windows<Real> result{};
  for (const Window<Real>& window : s.windows) {
    for (int i = 0; i < window.term_count; ++i) {
      const Term<Real>& term = window.term[i];
      result.max_rows = std::max(result.max_rows, term.y.pixel_count);
      result.area += term.y.pixel_count * term.x.pixel_count;
      result.work += term.y.pixel_count * (term.x.pixel_count + 2 * bins[1]);
    }
  }

  // Cut into visits: one per image, or more where there would be too few tasks. The adjoint sums into
  // a map, so its images stay whole.
  const bool by_image = operation == Operation::adjoint;
  const int64_t tasks = std::max<int64_t>(1, images * tasks_per_visit);
  const int64_t pieces = by_image ? 1 : (kMinTasks + tasks - 1) / tasks;
  const int64_t groups = (map_shape[2] * map_shape[3] + kGroup - 1) / kGroup;
  GroupSet seen(groups);
  std::vector<int64_t> last_window;  // adjoint: of each group, -1 if none
  s.visits.clear();
  s.groups.clear();
  s.begin.clear();
  s.last_groups.clear();
  s.last_begin.clear();
  s.untouched.clear();
  struct Offsets { int64_t windows, begin, untouched; };
  std::vector<Offsets> offsets;  // of each visit, in the vectors that still grow
  int64_t from = 0;
  for (int64_t image = 0; image < images; ++image) {
    int64_t to = from;
    while (to < count && s.image[size_t(s.windows[size_t(to)].roi)] == image) ++to;
    if (from == to && !by_image) continue;
    const int64_t in_image = to - from;
    const int64_t piece = std::max(kMinVisit, (in_image + pieces - 1) / pieces);
    do {
      const int64_t end = by_image ? to : std::min(to, from + piece);
      offsets.push_back({from, int64_t(s.begin.size()), int64_t(s.untouched.size())});
      s.visits.push_back({image, nullptr, end - from, nullptr, nullptr, nullptr, nullptr, nullptr, 0});
      seen.clear();
      if (by_image) last_window.assign(size_t(groups), -1);
      for (int64_t i = from; i < end; ++i) {
        s.begin.push_back(int64_t(s.groups.size()));
        builder.for_groups(s.windows[size_t(i)], [&](int64_t group) {
          if (seen.insert(group)) s.groups.push_back(group);
          if (by_image) last_window[size_t(group)] = i - from;
        });
      }
      s.begin.push_back(int64_t(s.groups.size()));
      if (by_image) {
        // Groups in the order of their last window: a counting sort.
        const size_t first = s.last_begin.size(), base = s.last_groups.size();
        s.last_begin.resize(first + size_t(end - from) + 1, 0);
        int64_t* begin = s.last_begin.data() + first;
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t i = last_window[size_t(group)];
          if (i < 0) s.untouched.push_back(group);
          else ++begin[i + 1];
        }
        begin[0] = int64_t(base);
        for (int64_t i = 0; i < end - from; ++i) begin[i + 1] += begin[i];
        s.last_groups.resize(size_t(begin[end - from]));
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t i = last_window[size_t(group)];
          if (i >= 0) s.last_groups[size_t(begin[i]++)] = group;
        }
        for (int64_t i = end - from; i > 0; --i) begin[i] = begin[i - 1];
        begin[0] = int64_t(base);
        s.visits.back().untouched_count = int64_t(s.untouched.size()) - offsets.back().untouched;
      }
      from = end;
    } while (from < to);
  }
  for (size_t v = 0; v < s.visits.size(); ++v) {
    Visit<Real>& visit = s.visits[v];
    visit.windows = s.windows.data() + offsets[v].windows;
    visit.begin = s.begin.data() + offsets[v].begin;
    visit.groups = s.groups.data();
    if (by_image) {
      visit.last_begin = s.last_begin.data() + offsets[v].begin;
      visit.last_groups = s.last_groups.data();
      visit.untouched = s.untouched.data() + offsets[v].untouched;
    }
  }
  result.visits = s.visits.data();
  result.visit_count = int64_t(s.visits.size());
  return result;
}

template Windows<float> build_windows(Operation, const Rois&, const float*, const Params&,
                                      const int64_t[4], const int64_t[2], int64_t, int);
template Windows<double> build_windows(Operation, const Rois&, const double*, const Params&,
                                       const int64_t[4], const int64_t[2], int64_t, int);

}  // namespace roialign
