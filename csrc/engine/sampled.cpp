// The second engine, for what is no product of matrices: each bin is its largest sample, "max", or
// the largest weighted pixel of its samples, "max_corner" (docs/spec.md, 9); or the box is turned,
// and each bin a sum of pixels of its own (10).
//
// A bin's candidates come in the order of the definition, and the first of the largest wins. What
// is linear in features, d_output and a tangent is then taken at the winner, for each channel its
// own. Kernels run over lines of channels, of packed pixels or of a map where it is, and there over
// vectors and single channels too.
//
// Compiled as engine.cpp is, but without fused multiply-adds: every language has the same samples.
#include "samples.hpp"
#include "tasks.hpp"

namespace roialign {
namespace ROIALIGN_ISA {
namespace {

// What bins are: largest samples, or weighted pixels of them; or sums, of boxes that are turned.
enum class Kind { largest, corner, turned };

// Two vectors are taken as one number, of a line or of two blocks: where a sample is and what it
// weighs is then found once. Where lines have four, or with sanitizers, compilers would take many
// minutes.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kPaired = false;
#else
constexpr bool kPaired = kVectors <= 2;
#endif
constexpr bool kPairedInLine = kPaired && kVectors == 2;  // of one block alone

template <class Real>
constexpr int64_t kVectorLanes = kVectorBytes / int64_t(sizeof(Real));

template <class E>
struct Wide {
  typedef E Part __attribute__((vector_size(kVectorBytes)));
  Part of[2];
};

// Where channels are: the second of two vectors is `apart` from the first.
template <class E>
struct Channels {
  E* data;
  int64_t apart;
};

// Lines of all channels: their blocks are `step` apart.
template <class Real>
struct Blocks {
  Real* data;
  int64_t step;

  int64_t channel(int64_t c) const { return c / kLanes<Real> * step + c % kLanes<Real>; }
  int64_t apart() const { return kVectors == 1 ? step : kVectorLanes<Real>; }
  Blocks from(int64_t block) const { return {data + block * step, step}; }
  Channels<Real> at(int64_t line, int64_t c) const {
    return {data + line * kLanes<Real> + channel(c), apart()};
  }
};

// The pixels of one window: packed lines,
template <class Real>
struct PackedPixels {
  using Element = Real;
  static constexpr bool packed = true;
  Blocks<Real> lines;
  const int32_t* rows;  // by the number of a pixel of y

  Real* row(int32_t y) const { return lines.data + int64_t(rows[y]) * kLanes<Real>; }
  int64_t column(int32_t x) const { return int64_t(x) * kLanes<Real>; }
  int64_t channel(int64_t c) const { return lines.channel(c); }
  int64_t apart() const { return lines.apart(); }
};
// or a map where it is.
template <class E>
struct Pixels {
  using Element = E;
  static constexpr bool packed = false;
  E* data;
  const int32_t* rows;
  int64_t row_step, step, channel_step;

  E* row(int32_t y) const { return data + rows[y] * row_step; }
  int64_t column(int32_t x) const { return x * step; }
  int64_t channel(int64_t c) const { return c * channel_step; }
  static constexpr int64_t apart() { return kVectorLanes<E>; }
};

template <class T>
constexpr bool is_wide = false;
template <class E>
constexpr bool is_wide<Wide<E>> = true;

template <class T>
ROIALIGN_INLINE T part_of(const T& value, int) {
  return value;
}
template <class E>
ROIALIGN_INLINE auto part_of(const Wide<E>& value, int v) {
  return value.of[v];
}
// run(parts of the values) for each vector.
template <class Run, class... T>
ROIALIGN_INLINE auto each(const Run& run, const T&... values) {
  Wide<decltype(+run(part_of(values, 0)...)[0])> results;
  ROIALIGN_UNROLL for (int v = 0; v < 2; ++v) results.of[v] = run(part_of(values, v)...);
  return results;
}
#define ROIALIGN_EACH_OF(op, A, B)                                                          \
  ROIALIGN_INLINE auto operator op(const A& a, const B& b) {                                \
    return each([](const auto& x, const auto& y) ROIALIGN_LAMBDA { return x op y; }, a, b); \
  }
#define ROIALIGN_EACH(op)                \
  template <class A, class B>            \
  ROIALIGN_EACH_OF(op, Wide<A>, Wide<B>) \
  template <class A, class B>            \
  ROIALIGN_EACH_OF(op, Wide<A>, B)       \
  template <class A, class B>            \
  ROIALIGN_EACH_OF(op, A, Wide<B>)
ROIALIGN_EACH(+)
ROIALIGN_EACH(-)
ROIALIGN_EACH(*)
ROIALIGN_EACH(>)
ROIALIGN_EACH(<=)
ROIALIGN_EACH(==)
ROIALIGN_EACH(!=)
ROIALIGN_EACH(&)
#undef ROIALIGN_EACH
#undef ROIALIGN_EACH_OF

// What kernels run over: two vectors, a vector or one channel.
template <class Real>
ROIALIGN_INLINE Vector<Real> vector_at(const Real* p) {
  return *reinterpret_cast<const Vector<Real>*>(p);
}
template <class V, class E>
ROIALIGN_INLINE V load_channels(Channels<E> from) {
  if constexpr (is_wide<V>)
    return {{vector_at(from.data), vector_at(from.data + from.apart)}};
  else if constexpr (sizeof(V) == kVectorBytes)
    return vector_at(from.data);
  else
    return widen(*from.data);
}
template <class Real>
ROIALIGN_INLINE void put_vector(Real* p, Vector<Real> value) {
  *reinterpret_cast<Vector<Real>*>(p) = value;
}
template <class V, class Real>
ROIALIGN_INLINE void store_channels(Channels<Real> to, V value) {
  if constexpr (is_wide<V>) {
    put_vector<Real>(to.data, value.of[0]);
    put_vector<Real>(to.data + to.apart, value.of[1]);
  } else if constexpr (sizeof(V) == kVectorBytes) {
    put_vector<Real>(to.data, value);
  } else {
    *to.data = value;
  }
}
template <class Mask, class V>
ROIALIGN_INLINE V select(const Mask& mask, const V& yes, const V& no) {
  if constexpr (is_wide<V>)
    return each([](auto m, auto y, auto n) ROIALIGN_LAMBDA { return m ? y : n; }, mask, yes, no);
  else
    return mask ? yes : no;
}
template <class E>
ROIALIGN_INLINE bool any_of(const Wide<E>& mask) {
  typename Wide<E>::Part any{};
  ROIALIGN_UNROLL for (int v = 0; v < 2; ++v) any |= mask.of[v];
  return any_of(any);
}
template <class E>
ROIALIGN_INLINE Wide<E> and_not(const Wide<E>& mask, const Wide<E>& other) {
  return each([](auto m, auto o) ROIALIGN_LAMBDA { return and_not(m, o); }, mask, other);
}
template <class V>
struct IdOf {
  using type = decltype(V{} < V{});
};
template <>
struct IdOf<float> {
  using type = int32_t;
};
template <>
struct IdOf<double> {
  using type = int64_t;
};
template <class E>
struct IdOf<Wide<E>> {
  using type = Wide<typename IdOf<E>::type>;
};
template <class V>
using Id = typename IdOf<V>::type;

// Calls body(V{}, c) for channels: pairs of vectors, vectors, and of a map where it is single ones.
template <class Real, bool paired = kPaired, class Body, class... P>
ROIALIGN_INLINE void for_channels(int64_t channels, const Body& body, const P&... pixels) {
  constexpr int64_t lanes = kVectorLanes<Real>;
  int64_t c = 0;
  if constexpr (((sizeof(typename P::Element) == sizeof(Real)) && ...)) {
    if (((P::packed || pixels.channel(1) == 1) && ...)) {
      if constexpr (paired)
        for (; c + 2 * lanes <= channels; c += 2 * lanes) body(Wide<Real>{}, c);
      for (; c + lanes <= channels; c += lanes) body(Vector<Real>{}, c);
    }
  }
  if constexpr (!(P::packed && ...))
    for (; c < channels; ++c) body(Real{}, c);
}

// Weights of the pixels (low, low), (low, high), (high, low), (high, high) in y and x. Those of 0
// are not read.
template <class Real>
struct Weights {
  Real of[4];
};

template <class Real>
ROIALIGN_INLINE Weights<Real> product(const Real y[2], const Real x[2]) {
  return {{y[0] * x[0], y[0] * x[1], y[1] * x[0], y[1] * x[1]}};
}

// One sample of a bin: its weights in each axis and, among the pixels of an array, where they are.
// Of a plain bin it is whole.
template <class E, class Real, bool plain>
struct Sample {
  int32_t i, j;
  E *low, *high;  // rows
  int64_t left, right, apart;
  const Real *y, *x;

  Channels<E> at(int k) const { return {(k < 2 ? low : high) + (k % 2 ? right : left), apart}; }
  Weights<Real> values() const { return product(y, x); }
  bool whole() const { return plain || (is_whole(y) && is_whole(x)); }
  // Its value, if it is whole.
  template <class V>
  V value() const {
    const Weights<Real> w = values();
    const auto term = [&](int k) ROIALIGN_LAMBDA { return w.of[k] * load_channels<V>(at(k)); };
    return ((term(0) + term(1)) + term(2)) + term(3);
  }
};

template <class V, class S, class Real>
ROIALIGN_INLINE V dot(const Weights<Real>& w, const S& sample) {
  V sum{};
  for (int k = 0; k < 4; ++k)
    if (w.of[k] != 0) sum = sum + w.of[k] * load_channels<V>(sample.at(k));
  return sum;
}
template <class V, class S>
ROIALIGN_INLINE V value_of(const S& sample) {
  return sample.whole() ? sample.template value<V>() : dot<V>(sample.values(), sample);
}

template <class V, class S, class Real>
ROIALIGN_INLINE void add(const Weights<Real>& w, bool whole, const V d, const S& sample) {
  const auto add_to = [&](int k) ROIALIGN_LAMBDA {
    const auto at = sample.at(k);
    store_channels(at, load_channels<V>(at) + w.of[k] * d);
  };
  if (whole) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) add_to(k);
    return;
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k)
    if (w.of[k] != 0) add_to(k);
}

// The largest candidate so far, and the number of the first that is as large: -1 for samples that
// are not inside, which are 0. Nothing is larger than a NaN, which is kept apart: so a candidate
// waits for one maximum alone.
template <class V, bool identified>
struct Largest {
  V number = V{} - INFINITY, nan{};
  Id<V> id{};

  ROIALIGN_INLINE void consider(V candidate, int32_t candidate_id) {
    if (identified) {
      const auto wins = and_not(candidate <= number, nan == nan);
      id = select(wins, Id<V>{} + candidate_id, id);
    }
    number = select(candidate > number, candidate, number);
    nan = select(candidate != candidate, candidate, nan);
  }
  V value() const { return select(nan == nan, number, nan); }
};

// The samples of a window, and one of its bins.
template <class Real>
struct Grid {
  Samples<Real> y, x;
};
struct Bin {
  int64_t p, q;
};

// Calls body(sample, number) for the samples of a bin among an array's pixels, and, if it is not
// plain, outside() before so many rows. Gives the number of samples.
template <bool plain, class Real, class P, class Body, class Outside>
ROIALIGN_INLINE int32_t for_rows(const Grid<Real>& grid, Bin bin, const P& pixels, int64_t c,
                                 const Body& body, int32_t outside_at, const Outside& outside) {
  const auto& [y, x] = grid;
  const int32_t top = y.first[bin.p], rows = y.first[bin.p + 1] - top;
  const int32_t first = x.first[bin.q], end = x.first[bin.q + 1];
  Sample<typename P::Element, Real, plain> sample;
  sample.apart = pixels.apart();
  const int64_t channel = pixels.channel(c);
  int32_t number = 0;
  for (int32_t k = 0; k < rows; ++k) {
    if constexpr (!plain)
      if (k == outside_at) outside();
    sample.i = top + k;
    const auto& in_y = y.at[sample.i];
    sample.y = in_y.weight;
    sample.low = pixels.row(in_y.low) + channel;
    sample.high = pixels.row(in_y.high) + channel;
    for (int32_t j = first; j < end; ++j) {
      const auto& in_x = x.at[j];
      sample.j = j;
      sample.x = in_x.weight;
      sample.left = pixels.column(in_x.low);
      sample.right = pixels.column(in_x.high);
      body(sample, number++);
    }
  }
  return number;
}

// The same; outside() comes where the first of the samples is that are not inside. Gives whether
// there are any.
template <class Real, class P, class Body, class Outside>
ROIALIGN_INLINE bool for_samples(const Grid<Real>& grid, Bin bin, const P& pixels, int64_t c,
                                 const Body& body, const Outside& outside) {
  const auto& [y, x] = grid;
  const auto [p, q] = bin;
  if (y.plain[p] && x.plain[q]) return for_rows<true>(grid, bin, pixels, c, body, 0, outside);
  const int32_t rows = y.first[p + 1] - y.first[p];
  int32_t outside_at = -1;
  if (y.before[p] || x.before[q])
    outside_at = 0;
  else if (x.after[q])
    outside_at = rows ? 1 : 0;
  else if (y.after[p])
    outside_at = rows;
  const int32_t number = for_rows<false>(grid, bin, pixels, c, body, outside_at, outside);
  if (outside_at == rows) outside();
  return outside_at >= 0 || number;
}

// The largest sample of a bin, or its largest weighted corner.
template <bool corner, bool identified, class V, class Real, class P>
ROIALIGN_INLINE Largest<V, identified> largest_of(const Grid<Real>& grid, Bin bin, const P& pixels,
                                                  int64_t c) {
  Largest<V, identified> largest;
  const bool any = for_samples(
      grid, bin, pixels, c,
      [&](const auto& sample, int32_t number) ROIALIGN_LAMBDA {
        if constexpr (!corner) {
          largest.consider(value_of<V>(sample), number);
        } else {
          const Weights<Real> w = sample.values();
          const bool whole = sample.whole();
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            V value{};
            if (whole || w.of[k] != 0) value = w.of[k] * load_channels<V>(sample.at(k));
            largest.consider(value, number * 4 + k);
          }
        }
      },
      [&]() ROIALIGN_LAMBDA { largest.consider(V{}, -1); });
  if (!any) largest.number = V{};
  return largest;
}

// Calls body(sample, its value's weights, whether all are read, mask of the channels that it wins)
// among `pixels`, for the winners of a bin.
template <bool corner, class V, class Real, class S, class P, class Body>
ROIALIGN_INLINE void for_winners(const Grid<Real>& grid, Bin bin, const S& selectors,
                                 const P& pixels, int64_t c, const Body& body) {
  const Id<V> winner = largest_of<corner, true, V>(grid, bin, selectors, c).id;
  for_rows<false>(
      grid, bin, pixels, c,
      [&](const auto& sample, int32_t number) ROIALIGN_LAMBDA {
        if constexpr (!corner) {
          const auto wins = winner == number;
          if (any_of(wins)) body(sample, sample.values(), sample.whole(), wins);
        } else {
          const Weights<Real> values = sample.values();
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            const auto wins = winner == number * 4 + k;
            if (!any_of(wins)) continue;
            Weights<Real> one{};
            one.of[k] = values.of[k];
            body(sample, one, false, wins);
          }
        }
      },
      -1, []() ROIALIGN_LAMBDA {});
}

// The weights of how a sample's value changes when it moves.
template <class S, class Real>
ROIALIGN_INLINE Weights<Real> slopes_of(const S& sample, Real dy, Real dx) {
  const Real my[] = {-dy, dy}, mx[] = {-dx, dx};
  Weights<Real> weights = product(my, sample.x);
  const Weights<Real> along_x = product(sample.y, mx);
  for (int k = 0; k < 4; ++k) weights.of[k] += along_x.of[k];
  return weights;
}
// Along the tangent.
template <class S, class Real>
ROIALIGN_INLINE Weights<Real> slopes_of(const S& sample, const Grid<Real>& grid) {
  return slopes_of(sample, grid.y.moves[0][sample.i], grid.x.moves[0][sample.j]);
}

// Calls body(V{}, bin, c, where that is in the bin's lines) for all bins of a window.
template <class Real, bool paired = kPaired, class Tile, class Body, class... P>
ROIALIGN_INLINE void for_bin_lines(const int64_t* bins, int64_t channels, Blocks<Tile> lines,
                                   const Body& body, const P&... pixels) {
  for (int64_t p = 0; p < bins[0]; ++p) {
    for (int64_t q = 0; q < bins[1]; ++q) {
      for_channels<Real, paired>(
          channels,
          [&](auto v, int64_t c)
              ROIALIGN_LAMBDA { body(v, Bin{p, q}, c, lines.at(p * bins[1] + q, c)); },
          pixels...);
    }
  }
}

// out = the bins of a window.
template <bool corner, class Real, class P>
ROIALIGN_NOINLINE void pool(const Grid<Real> grid, const int64_t* bins, int64_t channels,
                            const P pixels, const Blocks<Real> out) {
  for_bin_lines<Real>(
      bins, channels, out,
      [&](auto v, Bin bin, int64_t c, Channels<Real> to) ROIALIGN_LAMBDA {
        store_channels(to, largest_of<corner, false, decltype(v)>(grid, bin, pixels, c).value());
      },
      pixels);
}

// The samples of one axis of one RoI of a chunk, for the way by samples. Its pixels are numbered
// two for each sample.
template <class Real>
struct ListedSamples {
  int32_t first[kMostSamples + 1], pixels[2 * kMostSamples];
  typename Samples<Real>::At at[kMostSamples];
  bool before[kMostSamples], after[kMostSamples], plain[kMostSamples];

  ListedSamples(const SampledRois<Real>& rois, int axis, int64_t r, int64_t bins, int64_t samples,
                bool numbered) {
    int32_t count = 0;
    const int32_t* low = rois.low[axis] + r;
    const Real* fraction = rois.fraction[axis] + r;
    for (int64_t k = 0; k < bins; ++k) {
      first[k] = count;
      before[k] = after[k] = false;
      plain[k] = true;
      for (int64_t i = 0; i < samples; ++i, low += kSampledRois, fraction += kSampledRois) {
        if (*low < 0) {
          (count == first[k] ? before : after)[k] = true;
          plain[k] = false;
          continue;
        }
        const int32_t both[] = {*low, *low + (*fraction != 0)};
        for (int32_t e = 0; e < 2; ++e) pixels[2 * count + e] = both[e];
        at[count] = {numbered ? 2 * count : both[0],
                     numbered ? 2 * count + 1 : both[1],
                     {1 - *fraction, *fraction}};
        plain[k] &= is_whole(at[count].weight);
        ++count;
      }
    }
    first[bins] = count;
  }
  Samples<Real> samples() { return {first, at, {nullptr, nullptr}, before, after, plain}; }
};

// output = the bins of all RoIs, by samples.
template <bool corner, class T>
void pool_samples(Maps features, const Rois& rois, const Rule& rule, const Tensor& output,
                  int threads) {
  using Real = Accumulator<T>;
  const int64_t *bins = output.shape + 2, samples = int64_t(rule.sampling_ratio);
  const bool few = count_of(output) * samples * samples < kSerialWork / 4;
  const Range channels{0, output.shape[1]};
  const auto pool_one = [&](const SampledRois<Real>& found, int64_t first, int64_t r) {
    const auto out = plane_of<Pooled<T>>(output, first + r, channels);
    if (found.map[r] < 0) return clear(out);
    ListedSamples<Real> y(found, 0, r, bins[0], samples, true);
    ListedSamples<Real> x(found, 1, r, bins[1], samples, false);
    const Grid<Real> grid{y.samples(), x.samples()};
    const auto plane = plane_of<const T>(features[found.map[r]].array, found.image[r], channels);
    const Pixels<const T> pixels{plane.data, y.pixels, plane.row_stride, plane.pixel_stride,
                                 plane.channel_stride};
    for (int64_t p = 0; p < bins[0]; ++p) {
      for (int64_t q = 0; q < bins[1]; ++q) {
        Pooled<T>* to = out.data + p * out.row_stride + q * out.pixel_stride;
        for_channels<Real>(
            out.channels,
            [&](auto v, int64_t c) ROIALIGN_LAMBDA {
              using V = decltype(v);
              Real values[sizeof(V) / sizeof(Real)];
              store_channels(Channels<Real>{values, kVectorLanes<Real>},
                             largest_of<corner, false, V>(grid, Bin{p, q}, pixels, c).value());
              for (Real value : values) narrow(value, to[c++ * out.channel_stride]);
            },
            pixels);
      }
    }
  };
  for_sampled_rois<Real>(features, rois, rule, bins, few ? 1 : threads,
                         [&](const SampledRois<Real>& found, int64_t first, int64_t count) {
                           for (int64_t r = 0; r < count; ++r) pool_one(found, first, r);
                         });
}

// The same of the samples that `selectors` choose, or their derivative along the tangent.
template <bool corner, bool moved, class Real, class P>
ROIALIGN_NOINLINE void pool_selected(const Grid<Real> grid, const int64_t* bins, int64_t channels,
                                     const P pixels, const P selectors, const Blocks<Real> out) {
  for_bin_lines<Real>(
      bins, channels, out,
      [&](auto v, Bin bin, int64_t c, Channels<Real> to) ROIALIGN_LAMBDA {
        using V = decltype(v);
        V result{};
        for_winners<corner, V>(
            grid, bin, selectors, pixels, c,
            [&](const auto& sample, const Weights<Real>& values, bool, auto wins) ROIALIGN_LAMBDA {
              const V found = dot<V>(moved ? slopes_of(sample, grid) : values, sample);
              result = select(wins, found, result);
            });
        store_channels(to, result);
      },
      pixels, selectors);
}

// sums += d_out at the samples that `selectors` choose, or its product with their derivative along
// the tangent.
template <bool corner, bool moved, class Real, class S, class P>
ROIALIGN_NOINLINE void spread_selected(const Grid<Real> grid, const int64_t* bins, int64_t channels,
                                       const Blocks<const Real> d_out, const S selectors,
                                       const P sums) {
  for_bin_lines<Real>(
      bins, channels, d_out,
      [&](auto v, Bin bin, int64_t c, Channels<const Real> from) ROIALIGN_LAMBDA {
        using V = decltype(v);
        const V d = load_channels<V>(from);
        for_winners<corner, V>(grid, bin, selectors, sums, c,
                               [&](const auto& sample, const Weights<Real>& values, bool whole,
                                   auto wins) ROIALIGN_LAMBDA {
                                 const V won = select(wins, d, V{});
                                 if constexpr (moved)
                                   add<V>(slopes_of(sample, grid), false, won, sample);
                                 else
                                   add<V>(values, whole, won, sample);
                               });
      },
      selectors, sums);
}

// lanes[e][c] += the derivatives in the numbers of the box, x1, y1, x2, y2.
template <class Real, class P>
ROIALIGN_NOINLINE void dot_selected(const Grid<Real> grid, const int64_t* bins, int64_t channels,
                                    const Blocks<const Real> d_out, const P pixels,
                                    const P selectors, Real (*lanes)[kLanes<Real>]) {
  for_bin_lines<Real, kPairedInLine>(
      bins, channels, d_out,
      [&](auto v, Bin bin, int64_t c, Channels<const Real> from) ROIALIGN_LAMBDA {
        using V = decltype(v);
        const V d = load_channels<V>(from);
        for_winners<false, V>(
            grid, bin, selectors, pixels, c,
            [&](const auto& sample, const Weights<Real>&, bool, auto wins) ROIALIGN_LAMBDA {
              for (int axis = 0; axis < 2; ++axis) {
                const Real* const* moves = axis == 0 ? grid.y.moves : grid.x.moves;
                const int32_t k = axis == 0 ? sample.i : sample.j;
                if (moves[0][k] == 0 && moves[1][k] == 0) continue;
                const V slope =
                    d * dot<V>(slopes_of(sample, Real(axis == 0), Real(axis == 1)), sample);
                for (int e = 0; e < 2; ++e) {
                  const Channels<Real> lane{lanes[2 * e + 1 - axis] + c, kVectorLanes<Real>};
                  const V before = load_channels<V>(lane);
                  store_channels(lane, select(wins, before + moves[e][k] * slope, before));
                }
              }
            });
      },
      pixels, selectors);
}

// Calls body(V{}, c, bin, its pixels and weights from `at` to `end` on) for all bins of a window
// that is turned.
template <class Real, bool paired = kPaired, class Body, class... P>
ROIALIGN_INLINE void for_patches(const Patches<Real>& patches, int64_t bins, int64_t channels,
                                 const Body& body, const P&... pixels) {
  for (int64_t k = 0; k < bins; ++k) {
    for_channels<Real, paired>(
        channels,
        [&](auto v, int64_t c)
            ROIALIGN_LAMBDA { body(v, c, k, patches.first[k], patches.first[k + 1]); },
        pixels...);
  }
}

// Where pixel i of a patch is, in channel c.
template <class P, class Real>
ROIALIGN_INLINE Channels<typename P::Element> pixel_at(const P& pixels,
                                                       const Patches<Real>& patches, int64_t i,
                                                       int64_t c) {
  return {pixels.row(patches.pixel[i].y) + pixels.column(patches.pixel[i].x) + pixels.channel(c),
          pixels.apart()};
}

// out = the bins.
template <class Real, class P>
ROIALIGN_NOINLINE void pool_patches(const Patches<Real> patches, int64_t bins, int64_t channels,
                                    const P pixels, const Blocks<Real> out) {
  for_patches(
      patches, bins, channels,
      [&](auto v, int64_t c, int64_t k, int64_t at, int64_t end) ROIALIGN_LAMBDA {
        using V = decltype(v);
        const auto term = [&](int64_t i) ROIALIGN_LAMBDA {
          return patches.weight[i] * load_channels<V>(pixel_at(pixels, patches, i, c));
        };
        V sums[4] = {};  // four at a time: each sum waits for the one before
        for (; at + 4 <= end; at += 4) {
#pragma GCC unroll 4
          for (int64_t i = 0; i < 4; ++i) sums[i] = sums[i] + term(at + i);
        }
        for (; at < end; ++at) sums[0] = sums[0] + term(at);
        store_channels(out.at(k, c), (sums[0] + sums[1]) + (sums[2] + sums[3]));
      },
      pixels);
}

// sums += d_out.
template <class Real, class P>
ROIALIGN_NOINLINE void spread_patches(const Patches<Real> patches, int64_t bins, int64_t channels,
                                      const Blocks<const Real> d_out, const P sums) {
  for_patches(
      patches, bins, channels,
      [&](auto v, int64_t c, int64_t k, int64_t at, int64_t end) ROIALIGN_LAMBDA {
        using V = decltype(v);
        const V d = load_channels<V>(d_out.at(k, c));
        for (; at < end; ++at) {
          const auto to = pixel_at(sums, patches, at, c);
          store_channels(to, load_channels<V>(to) + patches.weight[at] * d);
        }
      },
      sums);
}

// lanes[e][c] += the derivatives in the numbers of the box.
template <class Real, class P>
ROIALIGN_NOINLINE void dot_patches(const Patches<Real> patches, int64_t bins, int64_t channels,
                                   const Blocks<const Real> d_out, const P pixels,
                                   Real (*lanes)[kLanes<Real>]) {
  constexpr int numbers = kTurnedNumbers;
  const auto sum_at = [&](int e, int64_t c) ROIALIGN_LAMBDA {
    return Channels<Real>{lanes[e] + c, kVectorLanes<Real>};
  };
  for_patches<Real, kPairedInLine>(
      patches, bins, channels,
      [&](auto v, int64_t c, int64_t k, int64_t at, int64_t end) ROIALIGN_LAMBDA {
        using V = decltype(v);
        if (at == end) return;
        const V d = load_channels<V>(d_out.at(k, c));
        V sums[numbers];
#pragma GCC unroll 5
        for (int e = 0; e < numbers; ++e) sums[e] = load_channels<V>(sum_at(e, c));
        for (; at < end; ++at) {
          const V product = d * load_channels<V>(pixel_at(pixels, patches, at, c));
#pragma GCC unroll 5
          for (int e = 0; e < numbers; ++e)
            sums[e] = sums[e] + patches.slopes[at * numbers + e] * product;
        }
#pragma GCC unroll 5
        for (int e = 0; e < numbers; ++e) store_channels(sum_at(e, c), sums[e]);
      },
      pixels);
}

// The pixels of a window: packed,
template <class Real>
PackedPixels<Real> pixels_of(const Blocks<Real>& lines, const Window<Real>& window) {
  return {lines, window.term->rows};
}
// or where the map is, from channel c on.
template <class T, class Real>
Pixels<T> pixels_of(const Plane<T>& plane, const Window<Real>& window, int64_t c = 0) {
  return {plane.data + c * plane.channel_stride, window.term->y.pixels, plane.row_stride,
          plane.pixel_stride, plane.channel_stride};
}

// The slices of a map's channels; all in one where it is pooled in place by vectors.
template <class T>
Slices slices_of_map(const Tensor& map, const Tensor* target, bool whole) {
  if (whole && map.stride[1] == 1 && sizeof(T) == sizeof(Accumulator<T>))
    return Slices::all<T>(map);
  return Slices::of(map, target, Pooled<T>{}, kPaired && kVectors == 1 ? 2 : 1);
}

// What the bins of a window are made of, if it is on a map.
template <Kind kind, class Real>
auto parts_of(const Window<Real>& window) {
  if constexpr (kind == Kind::turned)
    return window.term_count ? patches_of(window) : Patches<Real>{};
  else
    return window.term_count ? Grid<Real>{window.samples[0], window.samples[1]} : Grid<Real>{};
}

template <Kind kind, class T>
void forward(Maps features, Maps selectors, const Rois& rois, const void* tangent, const Rule& rule,
             const Tensor& output, int threads) {
  using Real = Accumulator<T>;
  const int64_t* bins = output.shape + 2;
  const bool moved = tangent;
  if constexpr (kind != Kind::turned) {
    if (!selectors.count &&
        by_samples(Operation::forward, features.first(), rois.count, rule, bins, tangent))
      return pool_samples<kind == Kind::corner, T>(features, rois, rule, output, threads);
  }
  const auto slices_of = [&](int64_t m) {
    return slices_of_map<T>(features[m].array, &output, true);
  };
  const bool streamed = count_of(output) * int64_t(sizeof(Pooled<T>)) > kStreamBytes;
  const Windows<Real> windows =
      windows_of<Real>(Operation::forward, features, rois, tangent, rule, bins, slices_of, threads);
  for_tasks(windows, features, slices_of, threads, [&](const Task<Real>& task) {
    const Visit<Real>& visit = task.visit;
    const auto plane = plane_of<const T>(task.map, visit.image, task.channels);
    const Tensor& selector = selectors.count ? selectors[task.map_number].array : task.map;
    const auto chosen = plane_of<const T>(selector, visit.image, task.channels);
    const int64_t blocks = plane.blocks();
    const bool separate = selectors.count && visit.way == Way::packed;
    const Workspace<Pooled<T>, Real> work(visit, 0, bins, blocks, 1, separate ? 2 : 1);
    const Blocks<Real> map{work.map, work.map_step}, decides = map.from(separate ? blocks : 0);
    const auto enter = [&](const Band<Real>& band) {
      pack(plane, band.first, map.data, map.step);
      if (separate) pack(chosen, band.first, decides.data, map.step);
    };
    Copy leaving;
    for_windows(visit, enter, [&](const Window<Real>& window, const Window<Real>*) {
      if (!window.term_count)
        std::memset(work.tile, 0, size_t(blocks * work.tile_step) * sizeof(Real));
      const auto fill = [&](int64_t channels, const auto& pixels, const auto& deciding) {
        const auto parts = parts_of<kind>(window);
        const Blocks<Real> out{work.tile, work.tile_step};
        if constexpr (kind == Kind::turned)
          pool_patches(parts, bins[0] * bins[1], channels, pixels, out);
        else if (moved)
          pool_selected<kind == Kind::corner, true>(parts, bins, channels, pixels, deciding, out);
        else if (selectors.count)
          pool_selected<kind == Kind::corner, false>(parts, bins, channels, pixels, deciding, out);
        else
          pool<kind == Kind::corner>(parts, bins, channels, pixels, out);
      };
      leaving.finish();
      if (window.term_count && visit.way == Way::packed)
        fill(blocks * kLanes<Real>, pixels_of(map, window), pixels_of(decides, window));
      else if (window.term_count)
        fill(plane.channels, pixels_of(plane, window), pixels_of(chosen, window));
      leaving = store_lines(plane_of<Pooled<T>>(output, window.roi, task.channels), 0,
                            bins[0] * bins[1], work.tile, work.tile_step, work.stage, streamed);
    });
    leaving.finish();
    if (streamed) stream_fence();
  });
}

template <Kind kind, class T>
void adjoint(const Tensor& d_output, Maps selectors, const Rois& rois, const void* tangent,
             const Rule& rule, Maps d_features, int threads) {
  using Real = Accumulator<T>;
  const int64_t* bins = d_output.shape + 2;
  const bool moved = tangent;
  const auto slices_of = [&](int64_t m) {
    return slices_of_map<T>(d_features[m].array, &d_features[m].array, false);
  };
  const Windows<Real> windows = windows_of<Real>(Operation::adjoint, d_features, rois, tangent,
                                                 rule, bins, slices_of, threads);
  clear_sparse<T>(windows, d_features, threads);
  for_tasks(windows, d_features, slices_of, threads, [&](const Task<Real>& task) {
    const bool streamed = count_of(task.map) * int64_t(sizeof(T)) > kStreamBytes;
    const Visit<Real>& visit = task.visit;
    const auto plane = plane_of<T>(task.map, visit.image, task.channels);
    const Tensor& selector = selectors.count ? selectors[task.map_number].array : task.map;
    const auto chosen = plane_of<const T>(selector, visit.image, task.channels);
    const int64_t blocks = plane.blocks();
    const bool packed = visit.way == Way::packed, separate = packed && selectors.count;
    const Workspace<T, Real> work(visit, 0, bins, blocks, 1, separate ? 2 : 1);
    const Blocks<Real> map{work.map, work.map_step}, decides = map.from(separate ? blocks : 0);
    const Sums<T, Real> sums{plane, work, streamed};
    const auto enter = [&](const Band<Real>& band) {
      sums.enter(band);
      if (separate) pack(chosen, band.first, decides.data, map.step);
    };
    const auto leave = [&](const Band<Real>& band) { sums.unpack(band.last, kLanes<Real>); };
    if (!packed) clear(plane);
    const auto body = [&](const Window<Real>& window, const Window<Real>*) {
      if (!window.term_count) return;
      load_tile(d_output, window, task.channels, work);
      const auto parts = parts_of<kind>(window);
      const Blocks<const Real> d_out{work.tile, work.tile_step};
      const auto spread = [&](int64_t channels, const auto& deciding, const auto& into) {
        if constexpr (kind == Kind::turned)
          spread_patches(parts, bins[0] * bins[1], channels, d_out, into);
        else if (moved)
          spread_selected<kind == Kind::corner, true>(parts, bins, channels, d_out, deciding, into);
        else
          spread_selected<kind == Kind::corner, false>(parts, bins, channels, d_out, deciding,
                                                       into);
      };
      if (packed)
        spread(blocks * kLanes<Real>, pixels_of(decides, window), pixels_of(map, window));
      else if constexpr (sizeof(T) == sizeof(Real))
        spread(plane.channels, pixels_of(chosen, window), pixels_of(plane, window));
    };
    for_windows(visit, enter, body, leave);
    if (packed && !is_sparse(visit, task.map)) sums.clear_untouched(visit);
    if (streamed) stream_fence();
  });
}

template <Kind kind, class T>
void box_gradient(const Tensor& d_output, Maps features, Maps selectors, const Rois& rois,
                  const Rule& rule, void* d_boxes, int threads) {
  using Real = Accumulator<T>;
  const int64_t* bins = d_output.shape + 2;
  const auto slices_of = [&](int64_t m) {
    return slices_of_map<T>(features[m].array, nullptr, false);
  };
  const Windows<Real> windows = windows_of<Real>(Operation::box_gradient, features, rois, nullptr,
                                                 rule, bins, slices_of, threads);
  constexpr int numbers = kind == Kind::turned ? kTurnedNumbers : 4;
  const BlockSums<Real> partial(rois.count, numbers, blocks_of<Real>(d_output.shape[1]));
  for_tasks(windows, features, slices_of, threads, [&](const Task<Real>& task) {
    const Visit<Real>& visit = task.visit;
    const auto plane = plane_of<const T>(task.map, visit.image, task.channels);
    const Tensor& selector = selectors.count ? selectors[task.map_number].array : task.map;
    const auto chosen = plane_of<const T>(selector, visit.image, task.channels);
    const int64_t blocks = plane.blocks();
    const bool packed = visit.way == Way::packed, separate = packed && selectors.count;
    const Workspace<Pooled<T>, Real> work(visit, 0, bins, blocks, 1, separate ? 2 : 1);
    const Blocks<Real> map{work.map, work.map_step}, decides = map.from(separate ? blocks : 0);
    const auto enter = [&](const Band<Real>& band) {
      pack(plane, band.first, map.data, map.step);
      if (separate) pack(chosen, band.first, decides.data, map.step);
    };
    for_windows(visit, enter, [&](const Window<Real>& window, const Window<Real>*) {
      if (window.term_count) load_tile(d_output, window, task.channels, work);
      const auto parts = parts_of<kind>(window);
      for (int64_t b = 0; b < blocks; ++b) {
        Real lanes[numbers][kLanes<Real>] = {};
        const Blocks<const Real> d_out{work.tile + b * work.tile_step, work.tile_step};
        const auto dot = [&](int64_t channels, const auto& pixels, const auto& deciding) {
          if constexpr (kind == Kind::turned)
            dot_patches(parts, bins[0] * bins[1], channels, d_out, pixels, lanes);
          else
            dot_selected(parts, bins, channels, d_out, pixels, deciding, lanes);
        };
        if (window.term_count && packed) {
          dot(kLanes<Real>, pixels_of(map.from(b), window), pixels_of(decides.from(b), window));
        } else if (window.term_count) {
          const int64_t first = b * kLanes<Real>;
          dot(least_of<int64_t>(kLanes<Real>, plane.channels - first),
              pixels_of(plane, window, first), pixels_of(chosen, window, first));
        }
        Real* d_box = partial.of(task.first_block + b, window.roi);
        for (int e = 0; e < numbers; ++e) d_box[e] = sum_of(load(lanes[e]));
      }
    });
  });
  partial.add_up(static_cast<Real*>(d_boxes));
}

// Calls run(KindOf<of the bins>).
template <Kind k>
struct KindOf {
  static constexpr Kind value = k;
};
template <class Run>
void by_kind(const Rule& rule, Run run) {
  if (rule.turn != 0) return run(KindOf<Kind::turned>{});
  rule.reduction == 2 ? run(KindOf<Kind::corner>{}) : run(KindOf<Kind::largest>{});
}

}  // namespace

extern const Sampled sampled;
const Sampled sampled{[](Maps features, Maps selectors, const Rois& rois, const void* tangent,
                         const Rule& rule, const Tensor& output, int threads) {
                        by_any_dtype(features, [&](auto t) {
                          by_kind(rule, [&](auto kind) {
                            forward<decltype(kind)::value, decltype(t)>(
                                features, selectors, rois, tangent, rule, output, threads);
                          });
                        });
                      },
                      [](const Tensor& d_output, Maps selectors, const Rois& rois,
                         const void* tangent, const Rule& rule, Maps d_features, int threads) {
                        by_dtype(d_features, [&](auto t) {
                          by_kind(rule, [&](auto kind) {
                            adjoint<decltype(kind)::value, decltype(t)>(
                                d_output, selectors, rois, tangent, rule, d_features, threads);
                          });
                        });
                      },
                      [](const Tensor& d_output, Maps features, Maps selectors, const Rois& rois,
                         const Rule& rule, void* d_boxes, int threads) {
                        by_any_dtype(features, [&](auto t) {
                          by_kind(rule, [&](auto kind) {
                            box_gradient<decltype(kind)::value, decltype(t)>(
                                d_output, features, selectors, rois, rule, d_boxes, threads);
                          });
                        });
                      }};

}  // namespace ROIALIGN_ISA
}  // namespace roialign
