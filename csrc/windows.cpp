#include "windows.hpp"

#include <algorithm>
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

constexpr int64_t kChunk = 64;             // RoIs whose taps one task builds
constexpr int64_t kBandBytes = 2 << 20;    // of lines: the rows of a band, for one block of channels
constexpr int64_t kSerialRois = 256;       // fewer: one thread builds all taps
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
  Taps values[2], slopes[2];
  std::vector<int64_t> place;  // pixel - least pixel -> where it is in `pixels`, -1 if nowhere
  std::vector<int64_t> used;   // entries of each pixel
};

// The most entries of a row.
int64_t widest(const Taps& taps) {
  int64_t most = 0;
  for (size_t k = 1; k < taps.first.size(); ++k) most = std::max(most, taps.first[k] - taps.first[k - 1]);
  return most;
}

// Taps as an Axis: pixels are numbered in the order of their appearance. `transposed`: by pixels.
template <class Real>
Axis<Real> axis_of(const Taps& taps, int weights, bool transposed, Workspace& work, Arena& arena) {
  const int64_t count = taps.count(), bins = taps.bins();
  const auto ends = std::minmax_element(taps.index.begin(), taps.index.begin() + count);
  const int64_t least = count ? *ends.first : 0, extent = count ? *ends.second - least + 1 : 0;
  work.place.assign(size_t(extent), -1);
  int64_t* pixels = arena.allocate<int64_t>(std::min(count, extent));
  int64_t distinct = 0;
  work.used.clear();
  for (int64_t t = 0; t < count; ++t) {
    const int64_t pixel = taps.index[t];
    int64_t& place = work.place[size_t(pixel - least)];
    if (place < 0) {
      pixels[distinct] = pixel;
      place = distinct++;
      work.used.push_back(0);
    }
    ++work.used[size_t(place)];
  }
  int64_t singles = 0;
  if (transposed) {  // single entries first: their rows need one multiply-add, and no padding
    for (int64_t i = 0; i < distinct; ++i) {
      if (work.used[size_t(i)] != 1) continue;
      std::swap(work.place[size_t(pixels[i] - least)], work.place[size_t(pixels[singles] - least)]);
      std::swap(work.used[size_t(i)], work.used[size_t(singles)]);
      std::swap(pixels[i], pixels[singles++]);
    }
  }
  const int64_t width = !transposed ? widest(taps)
                        : distinct ? *std::max_element(work.used.begin(), work.used.end()) : 0;
  const int64_t rows = transposed ? distinct : bins;
  int64_t* index = arena.allocate<int64_t>(rows * width);
  Axis<Real> axis{pixels, distinct, width, singles, index, {nullptr, nullptr}};
  std::fill(work.used.begin(), work.used.end(), 0);
  for (int w = 0; w < weights; ++w) {
    Real* weight = arena.allocate<Real>(rows * width);
    axis.weight[w] = weight;
    std::fill(weight, weight + rows * width, Real(0));
    for (int64_t k = 0; k < bins; ++k) {
      for (int64_t t = taps.first[k]; t < taps.first[k + 1]; ++t) {
        const int64_t place = work.place[size_t(taps.index[t] - least)];
        const int64_t at = transposed ? place * width + work.used[size_t(place)]++
                                      : k * width + t - taps.first[k];
        index[at] = transposed ? k : place;
        weight[at] = Real(taps.weight[w][t]);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t entries = transposed ? work.used[size_t(i)] : taps.first[i + 1] - taps.first[i];
    std::fill(index + i * width + entries, index + (i + 1) * width,
              entries ? index[i * width + entries - 1] : -1);
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

// The order of windows.
struct Key {
  int64_t image, band, place, roi;
  bool operator<(const Key& other) const {
    return std::tie(image, band, place, roi) <
           std::tie(other.image, other.band, other.place, other.roi);
  }
};

template <class Real>
struct Storage {
  std::vector<Window<Real>> windows;
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

  Window<Real> window(int64_t k, Workspace& work, Arena& arena) const {
    Window<Real> result{k, 0, {}};
    const bool sloped = operation == Operation::box_gradient || tangent;
    const int64_t at = k * rois.boxes_stride[0];
    Real box[4];  // x1, y1, x2, y2
    bool finite = true;
    for (int i = 0; i < 4; ++i) {
      box[i] = Real(read_float(rois.boxes, rois.boxes_dtype, at + i * rois.boxes_stride[1]));
      finite = finite && std::isfinite(box[i]);
    }
    for (int axis = 0; axis < 2; ++axis) {  // y, x
      axis_taps<Real>(box[1 - axis], box[3 - axis], params.convention, bins[axis],
                      params.sampling_ratio, size(axis), Real(params.scale[axis]),
                      work.values[axis], sloped ? &work.slopes[axis] : nullptr);
    }
    if (sloped && !finite) {  // min_size can make a size of -inf finite; the gradient is still 0
      for (Taps& slopes : work.slopes) std::fill(slopes.first.begin(), slopes.first.end(), 0);
    }
    // The adjoint walks both matrices by pixels; so does the box gradient where it pulls d_output
    // back to the columns of the map (the x of its first term).
    const bool adjoint = operation == Operation::adjoint;
    const auto values = [&](int axis) {
      const bool transposed = adjoint || (operation == Operation::box_gradient && axis == 1);
      return axis_of<Real>(work.values[axis], 1, transposed, work, arena);
    };
    const auto slopes = [&](int axis) {
      if (!tangent) return axis_of<Real>(work.slopes[axis], 2, false, work, arena);
      const Real* v = tangent + 4 * k;
      contract_slopes<Real>(work.slopes[axis], double(v[1 - axis]), double(v[3 - axis]));
      return axis_of<Real>(work.slopes[axis], 1, adjoint, work, arena);
    };
    if (sloped) {
      result.term_count = 2;
      result.term[0] = {slopes(0), values(1)};
      result.term[1] = {values(0), slopes(1)};
    } else {
      result.term_count = 1;
      result.term[0] = {values(0), values(1)};
    }
    return result;
  }

  int64_t band_rows() const {
    return std::max<int64_t>(1, kBandBytes / (64 * std::max<int64_t>(1, map_shape[3])));
  }

  // Of the window's centre; empty windows are in the first band.
  int64_t band(const Window<Real>& window) const {
    const Axis<Real>* y = window.term_count ? &window.term[0].y : nullptr;
    return y && y->pixel_count ? y->pixels[y->pixel_count / 2] / band_rows() : 0;
  }

  // From left to right in even bands, back in odd ones.
  int64_t place_in_band(const Window<Real>& window) const {
    const Axis<Real>* x = window.term_count ? &window.term[0].x : nullptr;
    const int64_t centre = x && x->pixel_count ? x->pixels[x->pixel_count / 2] : 0;
    return band(window) % 2 ? -centre : centre;
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
        const int64_t row = y.pixels[j] * map_shape[3];
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

  std::vector<Window<Real>> built(static_cast<size_t>(count));
  if (int64_t(s.arenas.size()) < chunks) s.arenas.resize(size_t(chunks));
  s.keys.resize(size_t(count));
  parallel_for(chunks, count < kSerialRois ? 1 : threads, [&](int64_t chunk) {
    Arena& arena = s.arenas[size_t(chunk)];
    arena.clear();
    for (int64_t k = chunk * kChunk; k < std::min(count, (chunk + 1) * kChunk); ++k) {
      const int64_t image = image_of(rois, k, images);
      Window<Real>& window = built[size_t(k)];
      window = image < 0 ? Window<Real>{k, 0, {}} : builder.window(k, of_this_thread<Workspace>(), arena);
      s.keys[size_t(k)] = {std::max<int64_t>(image, 0), builder.band(window),
                           builder.place_in_band(window), k};
    }
  });
  std::sort(s.keys.begin(), s.keys.end());
  s.windows.clear();
  for (const Key& key : s.keys) s.windows.push_back(built[size_t(key.roi)]);

  Windows<Real> result{};
  for (const Window<Real>& window : s.windows) {
    for (int i = 0; i < window.term_count; ++i) {
      const Term<Real>& term = window.term[i];
      result.max_columns = std::max(result.max_columns, term.x.pixel_count);
      result.work += term.x.pixel_count * (term.y.pixel_count + 2 * bins[0]);
    }
  }

  // One visit per image, or more where there would be too few tasks. The adjoint sums into a map, so
  // its images stay whole, and images without RoIs are visited too.
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
    const int64_t piece = adjoint ? end - from : std::max(kMinVisit, (end - from + pieces - 1) / pieces);
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
            if (adjoint) std::fill(&last_band[size_t(first)], &last_band[size_t(last - 1)] + 1, visit.count);
          });
        }
        const size_t known = s.first.size();
        touched.append_new(seen, s.first);
        s.bands.push_back({s.windows.data() + begin, from - begin,
                           {nullptr, int64_t(s.first.size() - known)}, {nullptr, 0}});
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
          if (band < 0) s.untouched.push_back(group);
          else s.last[known + size_t(in_band[size_t(band + 1)]++)] = group;
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
