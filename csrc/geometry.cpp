// Built with floating-point contraction off: a fused multiply-add would move coordinates.
#include "geometry.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <utility>

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
Grid<Real> grid_of(const Extent<Real>& extent, const Rule& rule, int64_t bins) {
  const auto [start, size, clamped] = extent;
  if (!std::isfinite(size)) return {start, 0, 0, clamped};
  const Real bin = size / Real(bins);
  int64_t samples = int64_t(rule.sampling_ratio);
  if (samples <= 0) {
    const Real wanted = rule.adaptive != 0 ? std::fmax(Real(1), std::floor(bin)) : std::ceil(bin);
    samples = !(size > 0) || !(wanted <= Real(kMaxSamples)) ? 0 : int64_t(wanted);
  }
  return {start, bin, samples, clamped};
}

template <class Real>
Grid<Real> grid_of(Real lo, Real hi, const Rule& rule, int64_t bins, Real scale) {
  return grid_of(extent_of(lo, hi, rule, scale), rule, bins);
}

// Where bin k starts, and the one before it ends.
template <class Real>
Real edge(const Grid<Real>& grid, int64_t k) {
  return grid.start + Real(k) * grid.bin;
}

// The position of sample i of bin k.
template <class Real>
class Positions {
 public:
  Positions() = default;
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

// The values of a bin. Samples come in ascending order, so their sums are open for two pixels.
template <class Real>
class Values {
 public:
  Values(Taps& taps, double scale) : taps_(taps), scale_(scale), count_(taps.first.back()) {}

  void add(int64_t pixel, double fraction) {
    if (pixel != pixel_) {
      close(pixel_, low_);
      if (pixel != pixel_ + 1) close(pixel_ + 1, high_);
      low_ = pixel == pixel_ + 1 ? high_ : 0;
      high_ = 0;
      pixel_ = pixel;
    }
    low_ += 1 - fraction;
    high_ += fraction;
  }
  void close_bin() {
    close(pixel_, low_);
    close(pixel_ + 1, high_);
    taps_.first.push_back(count_);
  }

 private:
  // Drops what is zero in Real: a pixel without weight is not read.
  void close(int64_t pixel, double sum) {
    const double weight = Real(sum * scale_);
    if (weight == 0) return;
    taps_.index[size_t(count_)] = pixel;
    taps_.weight[0][size_t(count_++)] = weight;
  }

  Taps& taps_;
  const double scale_;
  int64_t count_, pixel_ = -1;
  double low_ = 0, high_ = 0;  // the sums of `pixel_` and of the next one
};

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

// The samples of bin k in the order of their positions, of which [from, to) are inside.
template <class Real, class Position>
struct Ascending {
  const Positions<Position>& position;
  const Grid<Real>& grid;
  int64_t k, from = 0, to = grid.samples;

  Ascending(const Positions<Position>& position, const Grid<Real>& grid, int64_t k, int64_t size)
      : position(position), grid(grid), k(k) {
    const int64_t n = grid.samples;
    if (n > 0 && !(at(0) >= -1 && at(n - 1) <= Position(size))) {
      from = least(n, [&](int64_t j) { return at(j) >= -1; });
      to = least(n, [&](int64_t j) { return !(at(j) <= Position(size)); });
    }
  }
  // The number of sample j in the order of the definition.
  int64_t number(int64_t j) const { return grid.bin < 0 ? grid.samples - 1 - j : j; }
  Position at(int64_t j) const { return position(k, number(j)); }
};

// How far sample i of bin k moves with the start and with the end of the box, without the scale.
template <class Real>
void moves_of(int64_t k, int64_t i, const Grid<Real>& grid, int64_t bins, double moves[2]) {
  const double t = (double(k) + (double(i) + 0.5) / double(grid.samples)) / double(bins);
  moves[0] = grid.clamped ? 1 : 1 - t;
  moves[1] = grid.clamped ? 0 : t;
}

// Equation (3): the taps of the samples of bin k that are inside, merged.
template <bool sloped, class Real, class Position>
void add_bin(const Positions<Position>& position, int64_t k, const Grid<Real>& grid, int64_t bins,
             int64_t size, double scale, Taps& values, Taps* slopes, bool reserved) {
  const Ascending<Real, Position> samples(position, grid, k, size);
  const int64_t n = grid.samples, from = samples.from, to = samples.to;
  if (!reserved) {
    const int64_t entries = most_entries(to - from, size);
    reserve(values, entries);
    if (sloped) reserve(*slopes, entries);
  }
  const double mean = 1 / double(n > 0 ? n : 1);
  Values<Real> value(values, mean);
  Sums slope{};
  if (sloped) slope = open_bin(*slopes);
  for (int64_t j = from; j < to; ++j) {
    const Position raw = samples.at(j), p = raw < 0 ? 0 : raw;
    const int64_t lo = int64_t(p);  // p >= 0: the integer part is the floor
    if (lo >= size - 1) {
      value.add(size - 1, 0);
      continue;
    }
    const double fraction = p - Position(lo);
    value.add(lo, fraction);
    if (sloped && raw >= 0) {
      double moves[2];
      moves_of(k, samples.number(j), grid, bins, moves);
      slope.add(lo, -moves[0], -moves[1]);
      slope.add(lo + 1, moves[0], moves[1]);
    }
  }
  value.close_bin();
  if (sloped) close_bin<Real>(*slopes, slope, mean * scale);
}

// Calls body(Positions) for the positions of a grid, in the type that they are computed in.
template <class Real, class Body>
void with_positions(const Grid<Real>& grid, Body body) {
  if (grid.samples > kWideSamples)
    body(Positions<double>(grid.start, grid.bin, grid.samples));
  else
    body(Positions<Real>(grid.start, grid.bin, grid.samples));
}

// The extremes of bin k.
template <class Real, class Position>
void add_extremes(const Positions<Position>& position, int64_t k, const Grid<Real>& grid,
                  int64_t bins, int64_t size, double scale, Extremes<Real>& extremes) {
  const Ascending<Real, Position> inside(position, grid, k, size);
  const int64_t n = grid.samples, count = inside.to - inside.from;
  const int64_t begin = grid.bin < 0 ? n - inside.to : inside.from, end = begin + count;
  std::vector<typename Extremes<Real>::Sample>& kept = extremes.samples;
  int64_t of_cell = 0;  // kept
  for (int64_t i = begin; i < end; ++i) {
    const Position raw = position(k, i), p = raw < 0 ? 0 : raw;
    const int64_t low = std::min(int64_t(p), size - 1);
    const bool between = int64_t(p) < size - 1;
    typename Extremes<Real>::Sample sample{low, between ? Real(p - Position(low)) : 0, {}};
    if (of_cell && low != kept.back().low) of_cell = 0;
    if (of_cell && sample.fraction == kept.back().fraction) continue;
    if (between && raw >= 0) {
      moves_of(k, i, grid, bins, sample.moves);
      for (double& move : sample.moves) move *= scale;
    }
    if (of_cell == 2)
      kept.pop_back();
    else
      ++of_cell;
    kept.push_back(sample);
  }
  extremes.outside.push_back({count ? begin > 0 : n > 0, count && end < n});
  extremes.first.push_back(int64_t(extremes.samples.size()));
}

// --- Turned boxes
// ----------------------------------------------------------------------------------

// Arguments [from, to).
struct Interval {
  int64_t from, to;

  // Leaves those of [0, n) at which a monotone function is in [low, high].
  template <class Real, class Function>
  void cut(int64_t n, Real low, Real high, Function f) {
    const bool falls = f(n - 1) < f(0);
    from = std::max(from, least(n, [&](int64_t i) { return falls ? f(i) <= high : f(i) >= low; }));
    to = std::min(to, least(n, [&](int64_t i) { return !(falls ? f(i) >= low : f(i) <= high); }));
  }
};

// The numbers of a box, and the pixels of one bin at a time.
template <class Real>
class Turned {
 public:
  static constexpr int kNumbers = kTurnedNumbers;

  Turned(const Real* box, const Rule& rule, const int64_t bins[2], const int64_t size[2],
         Real scale, const Real* along, bool sloped, Cells<Real>& cells)
      : bins_(bins), size_(size), scale_(scale), turn_(rule.turn), along_(along), cells_(cells) {
    const Real pixel = Real(rule.pixel_offset);
    const bool finite = std::all_of(box, box + kNumbers, [](Real b) { return std::isfinite(b); });
    sloped_ = (sloped || along) && finite;
    lists_slopes_ = sloped;
    for (int axis = 0; axis < 2; ++axis) {  // y, x
      const Real side = box[3 - axis] * scale, shortest = Real(rule.min_size);
      const bool clamped = side < shortest;
      const Real length = clamped ? shortest : side;
      centre_[axis] = box[1 - axis] * scale - pixel;
      grid_[axis] = grid_of(Extent<Real>{-length / 2, length, clamped}, rule, bins[axis]);
      reach_ += std::fabs(double(length)) + std::fabs(double(centre_[axis])) + double(size[axis]);
    }
    for (int axis = 0; axis < 2; ++axis)
      positions_[axis] = {grid_[axis].start, grid_[axis].bin, grid_[axis].samples};
    const Real theta = Real(double(box[4]) * turn_);
    cos_ = Real(std::cos(double(theta)));
    sin_ = Real(std::sin(double(theta)));
  }

  // The pixels that the bins can have, and about how many those have together.
  TurnedBounds bounds() const {
    const int64_t ny = grid_[0].samples, nx = grid_[1].samples;
    if (ny == 0 || nx == 0) return {};
    const Real v[] = {positions_[0](0, 0), positions_[0](bins_[0] - 1, ny - 1)};
    const Real u[] = {positions_[1](0, 0), positions_[1](bins_[1] - 1, nx - 1)};
    TurnedBounds bounds = around(v, u);
    const double bins = double(bins_[0]) * double(bins_[1]);
    const auto side = [&](int axis) { return std::fabs(double(grid_[axis].bin)) + 2; };
    if (bounds.pixels())
      bounds.count = std::min({4 * bins * double(ny) * double(nx), bins * side(0) * side(1),
                               bins * double(bounds.pixels()), kMostCounted});
    return bounds;
  }

  void place(int64_t most, Places& places) const {
    const int64_t ny = places.samples[0] = grid_[0].samples;
    const int64_t nx = places.samples[1] = grid_[1].samples;
    const auto add = [&](std::vector<double>* to, Real v, Real u) {
      for (int axis = 0; axis < 2; ++axis) to[axis].push_back(double(at(axis, v, u)));
    };
    for (int64_t p = 0; p <= bins_[0]; ++p)
      for (int64_t q = 0; q <= bins_[1]; ++q)
        add(places.edges, edge(grid_[0], p), edge(grid_[1], q));
    if (double(bins_[0]) * double(bins_[1]) * double(ny) * double(nx) > double(most)) return;
    for (int64_t bin = 0; bin < bins_[0] * bins_[1]; ++bin)
      for (int64_t sample = 0; sample < ny * nx; ++sample)
        add(places.positions, positions_[0](bin / bins_[1], sample / nx),
            positions_[1](bin % bins_[1], sample % nx));
  }

  void add_bin(int64_t p, int64_t q) {
    const int64_t ny = grid_[0].samples, nx = grid_[1].samples;
    const Interval rows = nx && ny ? rows_of(p, q) : Interval{0, 0};
    open_bin(p, q, rows);
    for (int64_t i = rows.from; i < rows.to; ++i) {
      const Real v = positions_[0](p, i);
      Interval columns{0, nx};
      if (nx > kFew) {
        for (int axis = 0; axis < 2; ++axis) {
          columns.cut(nx, Real(-1), Real(size_[axis]),
                      [&](int64_t j) { return at(axis, v, positions_[1](q, j)); });
        }
      }
      for (int64_t j = columns.from; j < columns.to; ++j) {
        const Real u = positions_[1](q, j), y = at(0, v, u), x = at(1, v, u);
        const bool inside = y >= -1 && y <= Real(size_[0]) && x >= -1 && x <= Real(size_[1]);
        if (inside) add_sample(p, q, i, j, v, u, y, x);
      }
    }
    close_bin(double(std::max<int64_t>(ny, 1)) * double(std::max<int64_t>(nx, 1)));
  }

 private:
  static constexpr int64_t kFew = 16;  // samples that are tried one by one
  static constexpr int64_t kFewPixels = 256;
  static constexpr double kMostCounted = 0x1p28;  // so that no sum of counts overflows

  // Where the sample (v, u) from the middle of the box is on the map, in y or x.
  Real at(int axis, Real v, Real u) const {
    const Real part = axis == 0 ? v * cos_ - u * sin_ : v * sin_ + u * cos_;
    return part + centre_[axis];
  }

  // The pixels that samples from v[0] to v[1] and from u[0] to u[1] can have.
  TurnedBounds around(const Real* v, const Real* u) const {
    TurnedBounds bounds;
    for (int axis = 0; axis < 2; ++axis) {
      const Real last = Real(size_[axis] - 1);
      Real low = last + 1, high = -1;
      bool known = true;
      for (int corner = 0; corner < 4; ++corner) {
        const Real a = at(axis, v[corner / 2], u[corner % 2]);
        known &= a == a;
        low = std::min(low, a);
        high = std::max(high, a);
      }
      if (known && (high < -1 || low > last + 1)) return {};
      bounds.first[axis] = known && low > 0 ? int64_t(std::min(low, last)) : 0;
      const int64_t end = known && high < last ? int64_t(std::max(high, Real(0))) + 2 : size_[axis];
      bounds.sides[axis] = std::min(end, size_[axis]) - bounds.first[axis];
    }
    return bounds;
  }

  // The rows of samples of a bin that can meet the map: by the ends of the rows on each axis, and
  // by the corners of the map along the box, with room for rounding.
  Interval rows_of(int64_t p, int64_t q) const {
    const int64_t n = grid_[0].samples;
    Interval rows{0, n};
    if (n <= kFew) return rows;
    const Real most = std::numeric_limits<Real>::infinity();
    const Real ends[] = {positions_[1](q, 0), positions_[1](q, grid_[1].samples - 1)};
    double low = INFINITY, high = -INFINITY;
    for (int axis = 0; axis < 2; ++axis) {
      const auto end = [&](int64_t i, bool last) {
        const Real v = positions_[0](p, i), a = at(axis, v, ends[0]), b = at(axis, v, ends[1]);
        return last ? std::max(a, b) : std::min(a, b);
      };
      rows.cut(n, Real(-1), most, [&](int64_t i) { return end(i, true); });
      rows.cut(n, -most, Real(size_[axis]), [&](int64_t i) { return end(i, false); });
    }
    for (int corner = 0; corner < 4; ++corner) {
      const double y = corner % 2 ? double(size_[0]) : -1, x = corner / 2 ? double(size_[1]) : -1;
      const double v =
          (y - double(centre_[0])) * double(cos_) + (x - double(centre_[1])) * double(sin_);
      low = std::min(low, v);
      high = std::max(high, v);
    }
    const double room = 1 + 16 * double(std::numeric_limits<Real>::epsilon()) * reach_;
    rows.cut(n, low - room, high + room, [&](int64_t i) { return double(positions_[0](p, i)); });
    return rows;
  }

  void add_sample(int64_t p, int64_t q, int64_t i, int64_t j, Real v, Real u, Real y, Real x) {
    const Real raw[] = {y, x};
    int32_t low[2];
    double w[2][2];  // of both pixels
    bool moves[2], second[2];
    for (int axis = 0; axis < 2; ++axis) {
      const Real at = raw[axis] < 0 ? 0 : raw[axis];
      const int64_t floor = std::min(int64_t(at), size_[axis] - 1);
      const bool between = floor < size_[axis] - 1;
      const double fraction = between ? double(at - Real(floor)) : 0;
      low[axis] = int32_t(floor);
      w[axis][0] = 1 - fraction;
      w[axis][1] = fraction;
      moves[axis] = sloped_ && between && raw[axis] >= 0;
      second[axis] = fraction != 0 || moves[axis];
    }
    for (int a = 0; a <= second[0]; ++a) {
      int64_t k = slot_of(low[0] + a, low[1]);
      weights_[size_t(k)] += w[0][a] * w[1][0];
      if (!second[1]) continue;
      k = hashed_ ? slot_of(low[0] + a, low[1] + 1) : k + 1;
      weights_[size_t(k)] += w[0][a] * w[1][1];
    }
    if (moves[0] || moves[1]) add_slopes(p, q, i, j, v, u, low, w, moves, second);
  }

  void add_slopes(int64_t p, int64_t q, int64_t i, int64_t j, Real v, Real u, const int32_t low[2],
                  const double w[2][2], const bool moves[2], const bool second[2]) {
    const auto part = [&](int axis, int64_t k, int64_t sample) {
      const double t =
          (double(k) + (double(sample) + 0.5) / double(grid_[axis].samples)) / double(bins_[axis]);
      return grid_[axis].clamped ? 0 : (t - 0.5) * double(scale_);
    };
    const double c = double(cos_), s = double(sin_), h = part(0, p, i), b = part(1, q, j);
    // of y and x in the numbers of the box
    const double in_y[] = {0, double(scale_), -b * s, h * c,
                           -(double(v) * s + double(u) * c) * turn_};
    const double in_x[] = {double(scale_), 0, b * c, h * s,
                           (double(v) * c - double(u) * s) * turn_};
    for (int a = 0; a <= second[0]; ++a) {
      for (int b = 0; b <= second[1]; ++b) {
        double* sums = &slopes_[size_t(slot_of(low[0] + a, low[1] + b)) * kNumbers];
        const double by_y = moves[0] ? (a ? w[1][b] : -w[1][b]) : 0;
        const double by_x = moves[1] ? (b ? w[0][a] : -w[0][a]) : 0;
        for (int e = 0; e < kNumbers; ++e) sums[e] += by_y * in_y[e] + by_x * in_x[e];
      }
    }
  }

  // A bin's sums are kept for all pixels around it; in a hash table, where they were too many for
  // its samples.
  void open_bin(int64_t p, int64_t q, const Interval& rows) {
    around_ = {};
    hashed_ = false;
    pixels_.clear();
    weights_.clear();
    slopes_.clear();
    if (rows.from >= rows.to) return;
    const int64_t nx = grid_[1].samples;
    const Real v[] = {positions_[0](p, rows.from), positions_[0](p, rows.to - 1)};
    const Real u[] = {positions_[1](q, 0), positions_[1](q, nx - 1)};
    around_ = around(v, u);
    hashed_ = around_.pixels() > kFewPixels && around_.pixels() / 4 > (rows.to - rows.from) * nx;
    if (hashed_) return rehash();
    weights_.resize(size_t(around_.pixels()));
    if (sloped_) slopes_.resize(size_t(around_.pixels()) * kNumbers);
  }
  int64_t slot_of(int32_t y, int32_t x) {
    if (!hashed_) return (y - around_.first[0]) * around_.sides[1] + (x - around_.first[1]);
    int64_t& slot = hashed_slot_of(y, x);
    if (slot >= 0) return slot;
    const int64_t added = slot = int64_t(pixels_.size());
    pixels_.push_back({y, x});
    weights_.push_back(0);
    if (sloped_) slopes_.resize(slopes_.size() + kNumbers);
    if (2 * pixels_.size() > table_.size()) rehash();
    return added;
  }
  int64_t& hashed_slot_of(int32_t y, int32_t x) {
    const uint64_t mask = table_.size() - 1;
    uint64_t at =
        (uint64_t(uint32_t(y)) * 0x9e3779b97f4a7c15 + uint64_t(uint32_t(x)) * 0xff51afd7ed558ccd) >>
        20;
    for (;; ++at) {
      int64_t& slot = table_[size_t(at & mask)];
      if (slot < 0) return slot;
      const Pixel pixel = pixels_[size_t(slot)];
      if (pixel.y == y && pixel.x == x) return slot;
    }
  }
  void rehash() {
    size_t size = 64;
    while (size < 4 * pixels_.size()) size *= 2;
    table_.assign(size, -1);
    for (size_t i = 0; i < pixels_.size(); ++i)
      hashed_slot_of(pixels_[i].y, pixels_[i].x) = int64_t(i);
  }
  Pixel pixel_of(int64_t slot) const {
    if (hashed_) return pixels_[size_t(slot)];
    return {int32_t(around_.first[0] + slot / around_.sides[1]),
            int32_t(around_.first[1] + slot % around_.sides[1])};
  }

  // Lists the sums of the bin that are not zero.
  void close_bin(double samples) {
    for (size_t k = 0; k < weights_.size(); ++k) {
      double sum = along_ ? 0 : weights_[k];
      Real slopes[kNumbers] = {};
      bool any = false;
      if (sloped_) {
        const double* sums = &slopes_[k * kNumbers];
        if (along_) sum = std::inner_product(sums, sums + kNumbers, along_, 0.0);
        for (int e = 0; e < kNumbers; ++e) any |= (slopes[e] = Real(sums[e] / samples)) != 0;
      }
      const Real weight = sum == 0 ? 0 : Real(sum / samples);
      if (weight == 0 && !(lists_slopes_ && any)) continue;
      cells_.pixel.push_back(pixel_of(int64_t(k)));
      cells_.weight.push_back(weight);
      if (lists_slopes_) cells_.slopes.insert(cells_.slopes.end(), slopes, slopes + kNumbers);
    }
    cells_.first.push_back(int64_t(cells_.pixel.size()));
  }

  const int64_t *const bins_, *const size_;
  const Real scale_;
  const double turn_;
  const Real* const along_;
  Cells<Real>& cells_;
  bool sloped_, lists_slopes_;
  Grid<Real> grid_[2];
  Positions<Real> positions_[2];  // from the middle of the box
  Real centre_[2], cos_, sin_;
  double reach_ = 0;  // of positions
  TurnedBounds around_;
  bool hashed_ = false;
  std::vector<Pixel> pixels_;  // hashed
  std::vector<double> weights_, slopes_;
  std::vector<int64_t> table_;
};

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
  with_positions(grid, [&](const auto& position) {
    slopes ? add_all(position, std::true_type{}) : add_all(position, std::false_type{});
  });
}

template <class Real>
void axis_extremes(Real lo, Real hi, const Rule& rule, int64_t bins, int64_t size, Real scale,
                   Extremes<Real>& extremes) {
  const Grid<Real> grid = grid_of(lo, hi, rule, bins, scale);
  extremes.samples.clear();
  extremes.outside.clear();
  extremes.first.assign(1, 0);
  with_positions(grid, [&](const auto& position) {
    for (int64_t k = 0; k < bins; ++k)
      add_extremes(position, k, grid, bins, size, double(scale), extremes);
  });
}

template <class Real>
void turned_cells(const Real* box, const Rule& rule, const int64_t bins[2], const int64_t size[2],
                  Real scale, const Real* along, bool sloped, Cells<Real>& cells) {
  cells.first.assign(1, 0);
  cells.pixel.clear();
  cells.weight.clear();
  cells.slopes.clear();
  Turned<Real> turned(box, rule, bins, size, scale, along, sloped, cells);
  for (int64_t p = 0; p < bins[0]; ++p)
    for (int64_t q = 0; q < bins[1]; ++q) turned.add_bin(p, q);
}

template <class Real>
TurnedBounds turned_bounds(const Real* box, const Rule& rule, const int64_t bins[2],
                           const int64_t size[2], Real scale) {
  Cells<Real> none;
  return Turned<Real>(box, rule, bins, size, scale, nullptr, false, none).bounds();
}

template <class Real>
Places places_of(const Real* box, const Rule& rule, const int64_t bins[2], const int64_t size[2],
                 const Real scale[2], int64_t most) {
  Places places;
  if (rule.turn != 0) {
    Cells<Real> none;
    Turned<Real>(box, rule, bins, size, scale[0], nullptr, false, none).place(most, places);
    return places;
  }
  for (int axis = 0; axis < 2; ++axis) {
    const Grid<Real> grid = grid_of(box[1 - axis], box[3 - axis], rule, bins[axis], scale[axis]);
    places.samples[axis] = grid.samples;
    for (int64_t k = 0; k <= bins[axis]; ++k) places.edges[axis].push_back(double(edge(grid, k)));
    if (grid.samples > most / bins[axis]) continue;
    const Positions<Real> position(grid.start, grid.bin, grid.samples);
    for (int64_t k = 0; k < bins[axis]; ++k)
      for (int64_t i = 0; i < grid.samples; ++i)
        places.positions[axis].push_back(double(position(k, i)));
  }
  return places;
}

template void axis_taps(float, float, const Rule&, int64_t, int64_t, float, Taps&, Taps*);
template void axis_taps(double, double, const Rule&, int64_t, int64_t, double, Taps&, Taps*);
template void axis_extremes(float, float, const Rule&, int64_t, int64_t, float, Extremes<float>&);
template void axis_extremes(double, double, const Rule&, int64_t, int64_t, double,
                            Extremes<double>&);
template TurnedBounds turned_bounds(const float*, const Rule&, const int64_t[2], const int64_t[2],
                                    float);
template TurnedBounds turned_bounds(const double*, const Rule&, const int64_t[2], const int64_t[2],
                                    double);
template void turned_cells(const float*, const Rule&, const int64_t[2], const int64_t[2], float,
                           const float*, bool, Cells<float>&);
template void turned_cells(const double*, const Rule&, const int64_t[2], const int64_t[2], double,
                           const double*, bool, Cells<double>&);
template Places places_of(const float*, const Rule&, const int64_t[2], const int64_t[2],
                          const float[2], int64_t);
template Places places_of(const double*, const Rule&, const int64_t[2], const int64_t[2],
                          const double[2], int64_t);

}  // namespace roialign
