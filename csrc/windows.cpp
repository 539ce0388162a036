#include "windows.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "geometry.hpp"
#include "parallel.hpp"

namespace roialign {
namespace {

constexpr int64_t kChunk = 64;           // RoIs whose taps one task builds
constexpr int64_t kBandBytes = 2 << 20;  // of lines: the rows of a band, for one block of channels
constexpr int64_t kSerialRois = 256;     // fewer: one thread builds all taps
constexpr int64_t kMinTasks = 16;        // cut visits until there are as many tasks ...
constexpr int64_t kMinVisit = 64;        // ... but not below this many RoIs

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
  if (exponent == 31)
    value = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    value = std::ldexp(float(mantissa), -24);
  else
    value = std::ldexp(float(mantissa + 1024), exponent - 25);
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
    case DType::float16:
      return half_to_float(element<uint16_t>(data, i));
    case DType::bfloat16: {
      const uint32_t bits = uint32_t(element<uint16_t>(data, i)) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof value);
      return value;
    }
    case DType::float32:
      return element<float>(data, i);
    default:
      return element<double>(data, i);
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
  Taps values[2], slopes[2];
  std::vector<int32_t> place;  // pixel - least pixel -> where it is in `pixels`, -1 if nowhere
  std::vector<int32_t> used;   // entries of each pixel
};

// Taps as an Axis: pixels are numbered in the order of their appearance. `transposed`: by pixels.
template <class Real>
Axis<Real> axis_of(const Taps& taps, int weights, bool transposed, Workspace& work, Arena& arena) {
  const int64_t count = taps.count(), bins = taps.bins();
  const auto ends = std::minmax_element(taps.index.begin(), taps.index.begin() + count);
  const int64_t least = count ? *ends.first : 0, extent = count ? *ends.second - least + 1 : 0;
  work.place.assign(size_t(extent), -1);
  work.used.assign(size_t(extent), 0);
  int32_t *place = work.place.data(), *used = work.used.data();
  int32_t* pixels = arena.allocate<int32_t>(std::min(count, extent));
  int32_t distinct = 0, singles = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t pixel = taps.index[t];
    int32_t& at = place[pixel - least];
    if (at < 0) {
      pixels[distinct] = int32_t(pixel);
      at = distinct++;
    }
    ++used[at];
  }
  if (transposed) {  // single entries first: their rows need one multiply-add, and no padding
    for (int32_t i = 0; i < distinct; ++i) {
      if (used[i] != 1) continue;
      std::swap(place[pixels[i] - least], place[pixels[singles] - least]);
      std::swap(used[i], used[singles]);
      std::swap(pixels[i], pixels[singles++]);
    }
  }
  const int64_t rows = transposed ? distinct : bins;
  int32_t* entries = arena.allocate<int32_t>(rows);
  int32_t width = 0;
  for (int64_t i = 0; i < rows; ++i) {
    entries[i] = transposed ? used[i] : int32_t(taps.first[size_t(i) + 1] - taps.first[size_t(i)]);
    width = std::max(width, entries[i]);
  }
  int32_t* index = arena.allocate<int32_t>(rows * width);
  const bool separate = width <= kSeparateTaps && 4 * bins * width <= 5 * distinct;
  Axis<Real> axis{pixels, distinct, width, singles, separate, entries, index, {nullptr, nullptr}};
  for (int w = 0; w < weights; ++w) {
    Real* weight = arena.allocate<Real>(rows * width);
    axis.weight[w] = weight;
    std::fill(weight, weight + rows * width, Real(0));
    std::fill(used, used + distinct, 0);
    for (int64_t k = 0, t = 0; k < bins; ++k) {
      for (const int64_t begin = t; t < taps.first[size_t(k) + 1]; ++t) {
        const int32_t i = place[taps.index[size_t(t)] - least];
        const int64_t at = transposed ? int64_t(i) * width + used[i]++ : k * width + t - begin;
        index[at] = transposed ? int32_t(k) : i;
        weight[at] = Real(taps.weight[w][size_t(t)]);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    std::fill(index + i * width + entries[i], index + (i + 1) * width,
              entries[i] ? index[i * width + entries[i] - 1] : 0);
  }
  return axis;
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

// The order of windows: bands from top to bottom, even ones from left to right and odd ones back.
struct Key {
  int64_t index;  // of the image, or -1
  int64_t image, band, place, roi;
  bool operator<(const Key& other) const {
    return std::tie(image, band, place, roi) <
           std::tie(other.image, other.band, other.place, other.roi);
  }
};

template <class Real>
struct Storage {
  std::vector<Window<Real>> windows;  // in the order of `keys`
  std::vector<Visit<Real>> visits;
  std::vector<Band<Real>> bands;
  std::vector<Arena> arenas;
  std::vector<Key> keys;
  std::vector<int64_t> first, last, untouched;  // groups
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

  // x1, y1, x2, y2
  std::array<Real, 4> box(int64_t k) const {
    std::array<Real, 4> result;
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t at = k * rois.boxes_stride[0] + i * rois.boxes_stride[1];
      result[size_t(i)] = Real(read_float(rois.boxes, rois.boxes_dtype, at));
    }
    return result;
  }

  Window<Real> window(int64_t k, Workspace& work, Arena& arena) const {
    const bool sloped = operation == Operation::box_gradient || tangent;
    const std::array<Real, 4> box = this->box(k);
    for (int axis = 0; axis < 2; ++axis) {  // y, x
      axis_taps<Real>(box[size_t(1 - axis)], box[size_t(3 - axis)], params.convention, bins[axis],
                      params.sampling_ratio, size(axis), Real(params.scale[axis]),
                      work.values[axis], sloped ? &work.slopes[axis] : nullptr);
    }
    if (sloped && !std::all_of(box.begin(), box.end(), [](Real c) { return std::isfinite(c); })) {
      // min_size can make a size of -inf finite; the gradient is still 0
      for (Taps& slopes : work.slopes) std::fill(slopes.first.begin(), slopes.first.end(), 0);
    }
    // What pulls d_output back to the columns of the map walks them: the x of the adjoint, and of
    // the box gradient's first term.
    const auto values = [&](int axis) {
      const bool transposed = axis == 1 && operation != Operation::forward;
      return axis_of<Real>(work.values[axis], 1, transposed, work, arena);
    };
    const auto slopes = [&](int axis) {
      if (!tangent) return axis_of<Real>(work.slopes[axis], 2, false, work, arena);
      const Real* v = tangent + 4 * k;
      contract_slopes<Real>(work.slopes[axis], double(v[1 - axis]), double(v[3 - axis]));
      const bool transposed = axis == 1 && operation == Operation::adjoint;
      return axis_of<Real>(work.slopes[axis], 1, transposed, work, arena);
    };
    const int count = sloped ? 2 : 1;
    Term<Real>* term = arena.allocate<Term<Real>>(count);
    if (sloped) {
      term[0] = {slopes(0), values(1)};
      term[1] = {values(0), slopes(1)};
    } else {
      term[0] = {values(0), values(1)};
    }
    return {k, term, count};
  }

  // Where the box's centre is, about: only the order of windows depends on it.
  Key key(int64_t k) const {
    const int64_t image = image_of(rois, k, map_shape[0]);
    const std::array<Real, 4> box = this->box(k);
    int64_t centre[2];
    for (int axis = 0; axis < 2; ++axis) {
      const double c =
          (double(box[size_t(1 - axis)]) + double(box[size_t(3 - axis)])) * params.scale[axis] / 2;
      centre[axis] = c > 0 ? int64_t(std::min(c, double(size(axis)))) : 0;
    }
    const int64_t rows = std::max<int64_t>(1, kBandBytes / (64 * std::max<int64_t>(1, size(1))));
    const int64_t band = centre[0] / rows;
    return {image, std::max<int64_t>(image, 0), band, band % 2 ? -centre[1] : centre[1], k};
  }

  // Calls touch(from, to) for runs of groups of pixels that the window reads or writes.
  template <class Touch>
  void for_groups(const Window<Real>& window, Touch touch) const {
    for (int i = 0; i < window.term_count; ++i) {
      const Axis<Real>& y = window.term[i].y;
      const Axis<Real>& x = window.term[i].x;
      if (!x.pixel_count) continue;
      const auto ends = std::minmax_element(x.pixels, x.pixels + x.pixel_count);
      for (int64_t j = 0; j < y.pixel_count; ++j) {
        const int64_t row = int64_t(y.pixels[j]) * map_shape[3];
        touch((row + *ends.first) / kGroup, (row + *ends.second) / kGroup + 1);
      }
    }
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
  explicit GroupSet(int64_t size) : words_(size_t(size / 64 + 1), 0) {}
  void insert(int64_t from, int64_t to) {
    for (int64_t i = from; i < to;) {
      const int64_t end = std::min(to, (i / 64 + 1) * 64);
      words_[size_t(i / 64)] |= (~uint64_t{0} >> (64 - (end - i))) << (i % 64);
      i = end;
    }
  }
  void clear() { std::fill(words_.begin(), words_.end(), 0); }
  // Appends what is here and not in `seen`, and adds it there.
  void append_new(GroupSet& seen, std::vector<int64_t>& groups) const {
    for (size_t w = 0; w < words_.size(); ++w) {
      uint64_t bits = words_[w] & ~seen.words_[w];
      seen.words_[w] |= bits;
      for (int64_t i = int64_t(w) * 64; bits; ++i, bits >>= 1) {
        if (bits & 1) groups.push_back(i);
      }
    }
  }

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
  Storage<Real>& s = of_this_thread<Storage<Real>>();
  const Builder<Real> builder{operation, rois, tangent, params, map_shape, bins};
  const int64_t count = rois.count, images = map_shape[0];
  const int64_t chunks = (count + kChunk - 1) / kChunk;

  s.keys.clear();
  for (int64_t k = 0; k < count; ++k) s.keys.push_back(builder.key(k));
  std::sort(s.keys.begin(), s.keys.end());
  s.windows.resize(size_t(count));
  if (int64_t(s.arenas.size()) < chunks) s.arenas.resize(size_t(chunks));
  parallel_for(chunks, count < kSerialRois ? 1 : threads, [&](int64_t chunk) {
    Arena& arena = s.arenas[size_t(chunk)];
    arena.clear();
    for (int64_t i = chunk * kChunk; i < std::min(count, (chunk + 1) * kChunk); ++i) {
      const Key& key = s.keys[size_t(i)];
      s.windows[size_t(i)] = key.index < 0
                                 ? Window<Real>{key.roi, nullptr, 0}
                                 : builder.window(key.roi, of_this_thread<Workspace>(), arena);
    }
  });

  Windows<Real> result{};
  // The adjoint writes the pixels that no RoI touches too.
  if (operation == Operation::adjoint) result.work = images * map_shape[2] * map_shape[3];
  for (const Window<Real>& window : s.windows) {
    for (int i = 0; i < window.term_count; ++i) {
      const Term<Real>& term = window.term[i];
      result.max_columns = std::max<int64_t>(result.max_columns, term.x.pixel_count);
      result.work += int64_t(term.x.pixel_count) * (term.y.pixel_count + 2 * bins[0]);
    }
  }

  // One visit per image, or more where there would be too few tasks. The adjoint sums into a map,
  // so its images stay whole, and images without RoIs are visited too.
  const bool adjoint = operation == Operation::adjoint;
  const int64_t tasks = std::max<int64_t>(1, images * tasks_per_visit);
  const int64_t pieces = adjoint ? 1 : (kMinTasks + tasks - 1) / tasks;
  const int64_t groups = (map_shape[2] * map_shape[3] + kGroup - 1) / kGroup;
  GroupSet touched(groups), seen(groups);
  std::vector<int64_t> last_band(adjoint ? size_t(groups) : 0), in_band;
  s.visits.clear();
  s.bands.clear();
  s.first.clear();
  s.last.clear();
  s.untouched.clear();
  for (int64_t image = 0, from = 0; image < images; ++image) {
    int64_t end = from;
    while (end < count && s.keys[size_t(end)].image == image) ++end;
    const int64_t piece =
        adjoint ? end - from : std::max(kMinVisit, (end - from + pieces - 1) / pieces);
    for (bool once = adjoint; from < end || once; once = false) {
      const int64_t visit_end = std::min(end, from + piece);
      Visit<Real> visit{image, nullptr, 0, {nullptr, 0}};
      seen.clear();
      std::fill(last_band.begin(), last_band.end(), -1);
      while (from < visit_end) {
        const int64_t begin = from, band = s.keys[size_t(from)].band;
        touched.clear();
        for (; from < visit_end && s.keys[size_t(from)].band == band; ++from) {
          builder.for_groups(s.windows[size_t(from)], [&](int64_t first, int64_t last) {
            touched.insert(first, last);
            if (adjoint)
              std::fill(&last_band[size_t(first)], &last_band[size_t(last - 1)] + 1, visit.count);
          });
        }
        const size_t known = s.first.size();
        touched.append_new(seen, s.first);
        s.bands.push_back({s.windows.data() + begin,
                           from - begin,
                           {nullptr, int64_t(s.first.size() - known)},
                           {nullptr, 0}});
        ++visit.count;
      }
      if (adjoint) {  // groups by their last band: a counting sort
        in_band.assign(size_t(visit.count) + 1, 0);
        for (const int64_t band : last_band) ++in_band[size_t(band + 1)];
        visit.untouched.count = in_band[0];
        for (int64_t b = 0; b < visit.count; ++b) {
          s.bands[s.bands.size() - size_t(visit.count - b)].last.count = in_band[size_t(b + 1)];
        }
        const size_t known = s.last.size();
        int64_t sum = -in_band[0];
        for (int64_t& n : in_band) sum += std::exchange(n, sum);
        s.last.resize(known + size_t(sum));
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t band = last_band[size_t(group)];
          if (band < 0)
            s.untouched.push_back(group);
          else
            s.last[known + size_t(in_band[size_t(band + 1)]++)] = group;
        }
      }
      s.visits.push_back(visit);
    }
  }

  // The vectors have stopped growing: point into them.
  const Band<Real>* bands = s.bands.data();
  const int64_t *first = s.first.data(), *last = s.last.data(), *untouched = s.untouched.data();
  for (Band<Real>& band : s.bands) {
    band.first.at = std::exchange(first, first + band.first.count);
    band.last.at = std::exchange(last, last + band.last.count);
  }
  for (Visit<Real>& visit : s.visits) {
    visit.bands = std::exchange(bands, bands + visit.count);
    visit.untouched.at = std::exchange(untouched, untouched + visit.untouched.count);
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
