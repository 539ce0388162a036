// Built with floating-point contraction off, as geometry.cpp is.
#include "samples.hpp"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "geometry.hpp"
#include "log.hpp"
#include "numbers.hpp"

namespace roialign {
namespace {

constexpr int64_t kFixedSamples = 2;  // of a bin in an axis: it has at most 4 taps
// Where the way by samples costs less than others, about, by the times of 20 calls (maps of 16 x 16
// to 2000 x 3000, 1 to 256 channels, 1 to 1000 boxes, 1 to 28 bins, both layouts) on one core of an
// AMD EPYC with AVX-512: the most samples of a RoI; times its channels, in the forward and the
// adjoint; and in a forward that others would pack for, of all RoIs for each pixel of the map.
constexpr double kFewSamples = 64, kFewPooled = 256, kFewSpread = 64, kSparseSamples = 1.0 / 9;

// The box's end on an axis, the scale, and the map's pixels, of each RoI.
template <class Real>
struct Ends {
  Real lo[kSampledRois], hi[kSampledRois], scale[kSampledRois];
  int32_t size[kSampledRois];
};

// Loops over RoIs, without branches: compilers make vectors of them.
template <class Real>
void find_on_axis(const Ends<Real>& ends, const Rule& rule, int64_t bins, int64_t count,
                  int32_t* low, Real* fraction) {
  constexpr Real none = std::numeric_limits<Real>::quiet_NaN();
  const Real most = std::is_same_v<Real, float> ? Real(2147483520) : Real(INT32_MAX);
  const int64_t samples = int64_t(rule.sampling_ratio);
  Real start[kSampledRois], bin[kSampledRois];
  for (int64_t r = 0; r < count; ++r) {
    const Extent<Real> extent = extent_of(ends.lo[r], ends.hi[r], rule, ends.scale[r]);
    start[r] = extent.start;
    bin[r] = extent.size - extent.size == 0 ? extent.size / Real(bins) : none;
  }
  for (int64_t k = 0; k < bins; ++k) {
    for (int64_t i = 0; i < samples; ++i, low += kSampledRois, fraction += kSampledRois) {
      for (int64_t r = 0; r < count; ++r) {
        const Real offset = offset_of(Real(i), bin[r], Real(samples));
        const Real position = start[r] + Real(k) * bin[r] + offset;
        const bool inside = (position >= -1) & (position <= Real(ends.size[r]));
        const Real p = inside & (position > 0) ? position : 0;
        const int32_t pixel = int32_t(p < most ? p : most), last = ends.size[r] - 1;
        low[r] = inside ? (pixel < last ? pixel : last) : -1;
        fraction[r] = pixel < last ? p - Real(pixel) : 0;
      }
    }
  }
}

bool samples_cost_less(Operation operation, const Tensor& map, int64_t rois, const Rule& rule,
                       const int64_t bins[2], bool tangent) {
  const int64_t samples = int64_t(rule.sampling_ratio);
  const bool narrow = size_of(map.dtype) < size_of(coordinate_type(map.dtype));
  if (tangent || operation == Operation::box_gradient || samples < 1 || samples > kFixedSamples ||
      bins[0] * samples > kMostSamples || bins[1] * samples > kMostSamples ||
      (operation == Operation::adjoint && narrow)) {  // its sums are rounded once
    return false;
  }
  const Way forced = way_forced();
  if (forced != Way::any) return forced == Way::samples;
  const double channels = double(map.shape[1]);
  const double all = double(bins[0] * bins[1] * samples * samples);
  if (operation == Operation::adjoint) return all * channels <= kFewSpread;
  const double pixels = double(map.shape[0] * map.shape[2] * map.shape[3]);
  return all <= kFewSamples && (map.stride[1] == 1 || all * channels <= kFewPooled ||
                                double(rois) * all <= kSparseSamples * pixels);
}

}  // namespace

bool by_samples(Operation operation, const Tensor& map, int64_t rois, const Rule& rule,
                const int64_t bins[2], bool tangent) {
  return trace().by_samples = samples_cost_less(operation, map, rois, rule, bins, tangent);
}

template <class Real>
void find_samples(Maps maps, const Rois& rois, const Rule& rule, const int64_t bins[2],
                  int64_t first, int64_t count, SampledRois<Real>& found) {
  Ends<Real> ends[2];  // y, x
  for (int64_t r = 0; r < count; ++r) {
    const int64_t roi = first + r;
    const Place place = place_of(rois, roi, maps);
    found.map[r] = place.map;
    found.image[r] = place.image;
    const Map& map = maps[std::max<int64_t>(place.map, 0)];
    for (int64_t axis = 0; axis < 2; ++axis) {
      ends[axis].lo[r] = coordinate<Real>(rois, roi, 1 - axis);
      ends[axis].hi[r] = coordinate<Real>(rois, roi, 3 - axis);
      ends[axis].scale[r] = Real(map.scale[axis]);
      ends[axis].size[r] = int32_t(map.array.shape[2 + axis]);
    }
  }
  for (int axis = 0; axis < 2; ++axis)
    find_on_axis(ends[axis], rule, bins[axis], count, found.low[axis], found.fraction[axis]);
}

template void find_samples(Maps, const Rois&, const Rule&, const int64_t[2], int64_t, int64_t,
                           SampledRois<float>&);
template void find_samples(Maps, const Rois&, const Rule&, const int64_t[2], int64_t, int64_t,
                           SampledRois<double>&);

}  // namespace roialign
