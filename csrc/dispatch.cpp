#include "dispatch.hpp"

#include <cstdlib>
#include <stdexcept>

namespace roialign {

#define ROIALIGN_DECLARE(isa) \
  namespace isa {             \
  extern const Engine engine; \
  }
#if defined(ROIALIGN_HAVE_v2)
ROIALIGN_DECLARE(v2)
#endif
#if defined(ROIALIGN_HAVE_v3)
ROIALIGN_DECLARE(v3)
#endif
#if defined(ROIALIGN_HAVE_v4)
ROIALIGN_DECLARE(v4)
#endif
#if defined(ROIALIGN_HAVE_neon)
ROIALIGN_DECLARE(neon)
#endif

namespace {

struct Candidate {
  const Engine* engine;
  bool usable;
};

// From the plainest to the best.
std::vector<Candidate> candidates() {
  std::vector<Candidate> result;
#if defined(ROIALIGN_HAVE_v2)
  result.push_back(
      {&v2::engine, __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt")});
#endif
#if defined(ROIALIGN_HAVE_v3)
  result.push_back({&v3::engine, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                     __builtin_cpu_supports("f16c") &&
                                     __builtin_cpu_supports("bmi") &&
                                     __builtin_cpu_supports("bmi2")});
#endif
#if defined(ROIALIGN_HAVE_v4)
  result.push_back(
      {&v4::engine, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl")});
#endif
#if defined(ROIALIGN_HAVE_neon)
  result.push_back({&neon::engine, true});
#endif
  return result;
}

std::string joined(const std::vector<std::string>& names) {
  std::string result;
  for (const std::string& name : names) result += (result.empty() ? "" : ", ") + name;
  return result;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) names.push_back(c.engine->name);
  return names;
}

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Candidate& c : candidates()) {
    if (c.usable) names.push_back(c.engine->name);
  }
  return names;
}

namespace {

const Engine& choose() {
  const char* text = std::getenv("ROIALIGN_ISA");
  const std::string wanted = text ? text : "";
  const Engine* best = nullptr;
  for (const Candidate& c : candidates()) {
    if (c.usable && (wanted.empty() || wanted == c.engine->name)) best = c.engine;
  }
  if (best) return *best;
  if (wanted.empty()) {
    throw std::runtime_error("roialign needs a CPU with one of the instruction sets " +
                             joined(compiled_isas()));
  }
  throw std::runtime_error("ROIALIGN_ISA must be one of " + joined(usable_isas()) + ", got '" +
                           wanted + "'");
}

}  // namespace

const Engine& engine() {
  static const Engine& chosen = choose();
  return chosen;
}

}  // namespace roialign
