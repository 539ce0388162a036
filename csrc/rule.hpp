// The numbers of the rule of coordinates: docs/spec.md, equations (1) to (3).
//
// This list is the only one. The fields, their order, their names in every language and their
// defaults follow from it. A new number comes last: a vector of an earlier version is shorter, and
// has the defaults for the rest.
#pragma once

#include <cmath>
#include <cstdint>

#define ROIALIGN_RULE(NUMBER)                                                 \
  NUMBER(sampling_ratio, 0) /* samples per bin and axis; 0: adaptive */       \
  NUMBER(pixel_offset, 0)                                                     \
  NUMBER(input_offset, 0)                                                     \
  NUMBER(end_offset, 0)                                                       \
  NUMBER(min_size, -INFINITY) /* -inf: none */                                \
  NUMBER(adaptive, 0)         /* rounds a bin's length up (0), or down (1) */ \
  NUMBER(reduction, 0)        /* 0: mean, 1: max, 2: max_corner */            \
  NUMBER(turn, 0)             /* radians in a unit of a box's angle; 0: boxes have none */

namespace roialign {

struct Rule {
#define ROIALIGN_FIELD(name, otherwise) double name = otherwise;
  ROIALIGN_RULE(ROIALIGN_FIELD)
#undef ROIALIGN_FIELD
};

#define ROIALIGN_NAME_OF(name, otherwise) #name,
constexpr const char* kRuleNames[] = {ROIALIGN_RULE(ROIALIGN_NAME_OF)};
#undef ROIALIGN_NAME_OF
#define ROIALIGN_DEFAULT_OF(name, otherwise) otherwise,
constexpr double kRuleDefaults[] = {ROIALIGN_RULE(ROIALIGN_DEFAULT_OF)};
#undef ROIALIGN_DEFAULT_OF
constexpr int64_t kRuleNumbers = int64_t(sizeof kRuleNames / sizeof *kRuleNames);

constexpr int kTurnedNumbers = 5;  // of a box, where it has an angle

// A pixel of a map.
struct Pixel {
  int32_t y, x;
};

}  // namespace roialign
