#include "operations.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>

#include "dispatch.hpp"
#include "log.hpp"
#include "windows.hpp"

namespace roialign {
namespace {

constexpr int64_t kMostElements = INT64_MAX / 32;  // of an array: 32 bytes are a box of float64
constexpr double kMostSamples = 4096;  // if fixed, per bin and axis: it bounds a call's time

// How many elements an array has. What comes as a shape may be anything: whatever is counted in
// this library, of elements and of bytes, shall fit in 64 bits.
int64_t size_of(const Tensor& tensor) {
  int64_t size = 1, without_empty = 1;
  for (const int64_t side : tensor.shape) {
    require(side >= 0, "roialign: a dimension is negative");
    require(side <= kMostElements / without_empty, "roialign: an array is too large");
    size *= side;
    if (side > 0) without_empty *= side;
  }
  return size;
}

// Maps that RoIs can sample, and their bins: the engine counts the pixels of an axis and the bins
// of a RoI in 32 bits.
void require_pixels(Maps maps, const Tensor& pooled) {
  for (const int axis : {2, 3}) {
    for (int64_t m = 0; m < maps.count; ++m) {
      const int64_t side = maps[m].array.shape[axis];
      require(side > 0 && side <= INT32_MAX, "roialign: no map to be sampled");
    }
    require(pooled.shape[axis] > 0 && pooled.shape[axis] <= INT32_MAX, "roialign: too many bins");
  }
  require(pooled.shape[2] * pooled.shape[3] <= INT32_MAX, "roialign: too many bins");
}

// Gives the elements of all maps together.
int64_t require_fit(Maps maps, const Rois& rois, const Rule& rule, const Tensor& pooled) {
  require(maps.count > 0, "roialign: there is no map");
  require(maps.count == 1 || rois.level.data || rois.count == 0,
          "roialign: several maps need a level for each RoI");
  const DType dtype = maps.first().dtype;
  require(rois.numbers == (rule.turn != 0 ? kTurnedNumbers : 4),
          "roialign: boxes do not fit the rule");
  require(is_float(pooled.dtype) && is_float(rois.boxes_dtype),
          "roialign: maps and boxes must be of a float type");
  int64_t size = 0;
  for (int64_t m = 0; m < maps.count; ++m) {
    const Tensor& map = maps[m].array;
    size = size_of(map) ? 1 : size;
    require(map.dtype == dtype && pooled_type(dtype) == pooled.dtype &&
                map.shape[0] == maps.first().shape[0] && map.shape[1] == pooled.shape[1] &&
                pooled.shape[0] == rois.count,
            "roialign: the maps, the boxes and the pooled array do not fit");
  }
  size_of(pooled);
  return size;
}

// Whether bins are means over a grid along the axes: products of matrices.
bool is_product(const Rule& rule) {
  return rule.reduction == 0 && rule.turn == 0;
}

// Selectors that a call reads.
void require_like(Maps selectors, Maps maps, const Rule& rule, bool needed) {
  if (rule.reduction == 0) return;
  require(selectors.count == maps.count || (selectors.count == 0 && !needed),
          "roialign: the largest samples need the features");
  for (int64_t m = 0; m < selectors.count; ++m) {
    const Tensor &selector = selectors[m].array, &map = maps[m].array;
    require(
        selector.dtype == map.dtype && std::equal(selector.shape, selector.shape + 4, map.shape),
        "roialign: the features that select samples do not fit");
  }
}

// Those that are other arrays than the features.
Maps without(Maps features, Maps selectors) {
  for (int64_t m = 0; m < selectors.count; ++m) {
    const Tensor &selector = selectors[m].array, &map = features[m].array;
    if (selector.data != map.data || !std::equal(selector.stride, selector.stride + 4, map.stride))
      return selectors;
  }
  return {};
}

std::string counted(int64_t count, const std::string& what) {
  return std::to_string(count) + " " + what + (count == 1 ? "" : "s");
}

// What an operation took, and how it went.
void log_call(const char* operation, Maps maps, const Tensor& pooled, double milliseconds) {
  std::string line = operation;
  for (int64_t m = 0; m < maps.count; ++m) {
    const Tensor& map = maps[m].array;
    line += std::string(m ? ", " : ": ") + kDTypeNames[int(map.dtype)];
    for (int i = 0; i < 4; ++i) line += (i ? ", " : " (") + std::to_string(map.shape[i]);
    line += ")";
  }
  const Trace& done = trace();
  const auto images = [&](Way way) { return done.images[int(way)]; };
  line += ", " + counted(pooled.shape[0], "RoI") + " of " + std::to_string(pooled.shape[2]) +
          " x " + std::to_string(pooled.shape[3]) + " bins; ";
  line += done.by_samples ? "all by samples"
                          : counted(images(Way::packed), "image") + " packed, " +
                                std::to_string(images(Way::rows)) + " by rows, " +
                                std::to_string(images(Way::bins)) + " by bins";
  line += std::string("; ") + engine().name + ", " + counted(done.threads, "thread") +
          (done.busy ? " as the others are busy" : "");
  char time[32];
  std::snprintf(time, sizeof time, ", %.3f ms", milliseconds);
  log_line(line + time);
}

// Runs an operation of the engine, and logs it.
template <class Run>
void logged(const char* operation, Maps maps, const Tensor& pooled, Run run) {
  if (!logging()) return run();
  using Clock = std::chrono::steady_clock;
  trace() = {};
  const Clock::time_point start = Clock::now();
  run();
  const std::chrono::duration<double, std::milli> time = Clock::now() - start;
  log_call(operation, maps, pooled, time.count());
}

}  // namespace

Rule rule_of(const double* numbers, int64_t count) {
  require(count <= kRuleNumbers, "roialign: the rule has more numbers than this version knows");
  Rule rule;
  int64_t i = 0;
#define ROIALIGN_TAKE(name, otherwise) \
  if (i < count) rule.name = numbers[i++];
  ROIALIGN_RULE(ROIALIGN_TAKE)
#undef ROIALIGN_TAKE
  // PyTorch's compiler cannot write an infinite number into a list.
  if (rule.min_size == std::numeric_limits<double>::lowest()) rule.min_size = -INFINITY;
  require(rule.sampling_ratio >= 0 && rule.sampling_ratio <= kMostSamples,
          "roialign: sampling_ratio must be at most 4096; 0 adapts to the box");
  require(rule.reduction == 0 || rule.reduction == 1 || rule.reduction == 2,
          "roialign: reduction must be 0, 1 or 2");
  require(std::isfinite(rule.turn) && (rule.turn == 0 || rule.reduction == 0),
          "roialign: bins of boxes that are turned are means");
  return rule;
}

Tensor contiguous(void* data, DType dtype, const int64_t* shape) {
  Tensor tensor{data, dtype, {shape[0], shape[1], shape[2], shape[3]}, {}};
  size_of(tensor);
  int64_t stride = 1;
  for (int i = 3; i >= 0; stride *= shape[i--]) tensor.stride[i] = stride;
  return tensor;
}

void forward(Maps features, const Rois& rois, const void* tangent, const Rule& rule,
             const Tensor& output, int threads, Maps selectors) {
  require_fit(features, rois, rule, output);
  require_like(selectors, features, rule, false);
  if (size_of(output) == 0) return;
  require_pixels(features, output);
  logged("forward", features, output, [&] {
    if (is_product(rule)) return engine().forward(features, rois, tangent, rule, output, threads);
    engine().sampled.forward(features, without(features, selectors), rois, tangent, rule, output,
                             threads);
  });
}

void adjoint(const Tensor& d_output, const Rois& rois, const void* tangent, const Rule& rule,
             Maps d_features, int threads, Maps selectors) {
  const int64_t size = require_fit(d_features, rois, rule, d_output);
  require_like(selectors, d_features, rule, true);
  require(is_float(d_features.first().dtype), "roialign: bytes have no gradient");
  require(d_output.shape[2] > 0 && d_output.shape[3] > 0, "roialign: d_output has no bins");
  if (size == 0) return;
  if (rois.count) require_pixels(d_features, d_output);
  logged("adjoint", d_features, d_output, [&] {
    if (is_product(rule))
      return engine().adjoint(d_output, rois, tangent, rule, d_features, threads);
    engine().sampled.adjoint(d_output, selectors, rois, tangent, rule, d_features, threads);
  });
}

void box_gradient(const Tensor& d_output, Maps features, const Rois& rois, const Rule& rule,
                  void* d_boxes, int threads, Maps selectors) {
  require_fit(features, rois, rule, d_output);
  require_like(selectors, features, rule, false);
  require(rule.reduction != 2, "roialign: max_corner has no gradient in the boxes");
  require(d_output.shape[2] > 0 && d_output.shape[3] > 0, "roialign: d_output has no bins");
  if (rois.count == 0) return;
  if (d_output.shape[1] == 0) {  // no channel: nothing depends on the boxes
    std::memset(d_boxes, 0,
                size_t(rois.count) * size_t(rois.numbers) *
                    size_t(size_of(coordinate_type(d_output.dtype))));
    return;
  }
  require_pixels(features, d_output);
  logged("box_gradient", features, d_output, [&] {
    if (is_product(rule))
      return engine().box_gradient(d_output, features, rois, rule, d_boxes, threads);
    engine().sampled.box_gradient(d_output, features, without(features, selectors), rois, rule,
                                  d_boxes, threads);
  });
}

}  // namespace roialign
