// The C entries that mindspore.ops.Custom finds in this library by name. Each gets the addresses,
// shapes and dtypes of its inputs and then of its results, all contiguous, and returns 0 or a code
// with which MindSpore raises. A RoI whose image index or level is bad pools to 0 and has gradient
// 0.
//
// The first input is a vector of float64: (threads, number of maps, which is negative where
// channels are last, the scales y and x of each map, the numbers of the rule). Then come the arrays
// of a Call (calls.hpp).
#include <algorithm>
#include <cmath>
#include <exception>
#include <iterator>
#include <stdexcept>
#include <string_view>

#include "calls.hpp"

#if defined(_WIN32)
#define ROIALIGN_ENTRY extern "C" __declspec(dllexport) int
#else
#define ROIALIGN_ENTRY extern "C" __attribute__((visibility("default"))) int
#endif

namespace roialign::mindspore {
namespace {

enum Code { done, refused, failed, no_derivative };

DType dtype_of(std::string_view name) {
  if (name == "bool") return DType::uint8;
  const auto found = std::find(std::begin(kDTypeNames), std::end(kDTypeNames), name);
  require(found != std::end(kDTypeNames), "roialign: a dtype is unknown");
  return DType(found - std::begin(kDTypeNames));
}

void read_numbers(const Array& array, Call& call) {
  require(array.ndim == 1 && array.dtype == DType::float64, "roialign: there are no numbers");
  const auto* numbers = static_cast<const double*>(array.data);
  const int64_t count = array.shape[0];
  require(count >= 2 && std::abs(numbers[1]) >= 1 && std::abs(numbers[1]) <= double(count - 2) / 2,
          "roialign: scales are missing");
  call.threads = numbers[0] > 1 ? int(std::min(numbers[0], 0x1p15)) : 1;
  call.channels_last = numbers[1] < 0;
  const int64_t maps = int64_t(std::abs(numbers[1])), rule_at = 2 + 2 * maps;
  for (int64_t m = 1; m <= maps; ++m)
    call.maps.push_back({{}, {numbers[2 * m], numbers[2 * m + 1]}});
  call.rule = rule_of(numbers + rule_at, count - rule_at);
}

// No exception may reach a caller in C.
int code_of(void run(Call&), int count, void** data, const int* ndims, int64_t** shapes,
            const char** dtypes) {
  try {
    require(count > 0, "roialign: there are no numbers");
    Call call;
    for (int i = 0; i < count; ++i) {
      call.arrays.push_back({data[i], dtype_of(dtypes[i]), ndims[i], shapes[i]});
    }
    read_numbers(call.arrays[0], call);
    call.arrays.erase(call.arrays.begin());
    run(call);
    return done;
  } catch (const std::invalid_argument&) {
    return refused;
  } catch (const std::exception&) {
    return failed;
  }
}

}  // namespace

#define ROIALIGN_OPERATION(name)                                                       \
  ROIALIGN_ENTRY roialign_##name(int count, void** data, int* ndims, int64_t** shapes, \
                                 const char** dtypes, void*, void*) {                  \
    return code_of(run_##name, count, data, ndims, shapes, dtypes);                    \
  }
ROIALIGN_OPERATION(forward)
ROIALIGN_OPERATION(adjoint)
ROIALIGN_OPERATION(box_gradient)
#undef ROIALIGN_OPERATION

// What a graph runs where a derivative in the boxes is used that is not there: MindSpore's error
// names it.
#define ROIALIGN_MISSING(name)                                                               \
  ROIALIGN_ENTRY roialign_##name(int, void**, int*, int64_t**, const char**, void*, void*) { \
    return no_derivative;                                                                    \
  }
ROIALIGN_MISSING(has_no_second_derivative_in_the_boxes)
ROIALIGN_MISSING(max_corner_has_no_gradient_in_the_boxes)
#undef ROIALIGN_MISSING

}  // namespace roialign::mindspore
