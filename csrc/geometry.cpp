// Built with floating-point contraction off: a fused multiply-add would move coordinates.
#include "geometry.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace roialign {
namespace {

constexpr int64_t kWideSamples = int64_t{1} << 22;  // more: positions in double
constexpr int64_t kMaxSamples = int64_t{1} << 31;   // more: the mean vanishes
constexpr int64_t kReservedEntries = 4096;          // 96 KiB: more are reserved bin by bin

// Where the box starts, how long a bin is, how many samples it has.
template <class Real>
struct Grid {
  Real start;
  Real bin;
  int64_t samples;
  bool clamped;
};

template <class Real>
Grid<Real> grid_of(Real lo, Real hi, const Rule& rule, int64_t bins, Real scale) {
  const auto [start, size, clamped] = extent_of(lo, hi, rule, scale);
  if (!std::isfinite(size)) return {start, 0, 0, clamped};
  const Real bin = size / Real(bins);
  int64_t samples = int64_t(rule.sampling_ratio);
  if (samples <= 0) {
    const Real wanted = rule.adaptive != 0 ? std::fmax(Real(1), std::floor(bin)) : std::ceil(bin);
    samples = !(size > 0) || !(wanted <= Real(kMaxSamples)) ? 0 : int64_t(wanted);
  }
  return {start, bin, samples, clamped};
}

// The position of sample i of bin k.
template <class Real>
class Positions {
 public:
  Positions(Real start, Real bin, int64_t samples)
      : start_(start), bin_(bin), samples_(Real(samples)) {
    for (; known_ < kKnown && known_ < samples; ++known_)
      offsets_[known_] = offset_of(Real(known_), bin_, samples_);
  }
  Real operator()(int64_t k, int64_t i) const {
    return start_ + Real(k) * bin_ +
           (i < known_ ? offsets_[i] : offset_of(Real(i), bin_, samples_));
  }

 private:
  static constexpr int64_t kKnown = 16;
  Real start_, bin_, samples_;
  Real offsets_[kKnown];  // of the first samples, the same in every bin: divisions are slow
  int64_t known_ = 0;
};

// The least j in [0, n) at which the monotone `reached` holds, or n.
template <class Predicate>
int64_t least(int64_t n, Predicate reached) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (reached(middle))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// Adds to the entry of `index` in the bin that starts at `begin`. Samples come in ascending order,
// so the entry is one of the last two or a new one.
struct Sums {
  int64_t* index;
  double* weight[2];
  int64_t begin, count;

  void add(int64_t pixel, double weight0, double weight1) {
    for (int64_t t = count - 1; t >= begin && t >= count - 2; --t) {
      if (index[t] == pixel) {
        weight[0][t] += weight0;
        weight[1][t] += weight1;
        return;
      }
    }
    index[count] = pixel;
    weight[0][count] = weight0;
    weight[1][count++] = weight1;
  }
};

// Room for `entries` more from the last one on.
void reserve(Taps& taps, int64_t entries) {
  const int64_t room = taps.first.back() + entries;
  if (int64_t(taps.index.size()) >= room) return;
  const size_t size = size_t(room + room / 2);
  for (auto& weight : taps.weight) weight.resize(size);
  taps.index.resize(size);  // last: its size says how much room there is, if one of these throws
}

// The next bin, for which there is room.
Sums open_bin(Taps& taps) {
  const int64_t begin = taps.first.back();
  return {taps.index.data(), {taps.weight[0].data(), taps.weight[1].data()}, begin, begin};
}

// Scales the bin's sums and drops entries that are zero in Real: a pixel without weight is not
// read.
template <class Real>
void close_bin(Taps& taps, const Sums& sums, double scale) {
  int64_t kept = sums.begin;
  for (int64_t t = sums.begin; t < sums.count; ++t) {
    const double weight0 = Real(sums.weight[0][t] * scale);
    const double weight1 = Real(sums.weight[1][t] * scale);
    if (weight0 == 0 && weight1 == 0) continue;
    sums.index[kept] = sums.index[t];
    sums.weight[0][kept] = weight0;
    sums.weight[1][kept] = weight1;
    ++kept;
  }
  taps.first.push_back(kept);
}

// Of a bin: positions ascend, so no pixel comes twice.
int64_t most_entries(int64_t samples, int64_t size) {
  return std::min(2 * samples, size);
}

// Equation (3): the taps of the samples of bin k that are inside, merged.
template <bool sloped, class Real, class Position>
void add_bin(const Positions<Position>& position, int64_t k, const Grid<Real>& grid, int64_t bins,
             int64_t size, double scale, Taps& values, Taps* slopes, bool reserved) {
  const int64_t n = grid.samples;
  const auto ascending = [&](int64_t j) { return grid.bin < 0 ? n - 1 - j : j; };
  const auto at = [&](int64_t j) { return position(k, ascending(j)); };
  int64_t from = 0, to = n;
  if (n > 0 && !(at(0) >= -1 && at(n - 1) <= Position(size))) {
    from = least(n, [&](int64_t j) { return at(j) >= -1; });
    to = least(n, [&](int64_t j) { return !(at(j) <= Position(size)); });
  }
  if (!reserved) {
    const int64_t entries = most_entries(to - from, size);
    reserve(values, entries);
    if (sloped) reserve(*slopes, entries);
  }
  Sums value = open_bin(values), slope{};
  if (sloped) slope = open_bin(*slopes);
  for (int64_t j = from; j < to; ++j) {
    const Position raw = at(j), p = raw < 0 ? 0 : raw;
    const int64_t lo = int64_t(p);  // p >= 0: the integer part is the floor
    if (lo >= size - 1) {
      value.add(size - 1, 1, 0);
      continue;
    }
    const double fraction = p - Position(lo);
    value.add(lo, 1 - fraction, 0);
    if (fraction != 0) value.add(lo + 1, fraction, 0);
    if (sloped && raw >= 0) {
      const double t = (double(k) + (double(ascending(j)) + 0.5) / double(n)) / double(bins);
      const double in_lo = grid.clamped ? 1 : 1 - t, in_hi = grid.clamped ? 0 : t;
      slope.add(lo, -in_lo, -in_hi);
      slope.add(lo + 1, in_lo, in_hi);
    }
  }
  const double mean = 1 / double(n > 0 ? n : 1);
  close_bin<Real>(values, value, mean);
  if (sloped) close_bin<Real>(*slopes, slope, mean * scale);
}

}  // namespace

template <class Real>
void axis_taps(Real lo, Real hi, const Rule& rule, int64_t bins, int64_t size, Real scale,
               Taps& values, Taps* slopes) {
  const Grid<Real> grid = grid_of(lo, hi, rule, bins, scale);
  values.first.assign(1, 0);
  if (slopes) slopes->first.assign(1, 0);
  const int64_t entries = most_entries(grid.samples, size);
  const bool reserved = entries <= kReservedEntries / bins;  // for all bins at once
  if (reserved) {
    reserve(values, entries * bins);
    if (slopes) reserve(*slopes, entries * bins);
  }
  const auto add_all = [&](const auto& position, auto sloped) {
    for (int64_t k = 0; k < bins; ++k) {
      add_bin<decltype(sloped)::value>(position, k, grid, bins, size, double(scale), values, slopes,
                                       reserved);
    }
  };
  const auto add_bins = [&](const auto& position) {
    slopes ? add_all(position, std::true_type{}) : add_all(position, std::false_type{});
  };
  if (grid.samples > kWideSamples)
    add_bins(Positions<double>(grid.start, grid.bin, grid.samples));
  else
    add_bins(Positions<Real>(grid.start, grid.bin, grid.samples));
}

template void axis_taps(float, float, const Rule&, int64_t, int64_t, float, Taps&, Taps*);
template void axis_taps(double, double, const Rule&, int64_t, int64_t, double, Taps&, Taps*);

}  // namespace roialign
