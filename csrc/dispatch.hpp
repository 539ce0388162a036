// Which instruction sets are in this build, which of them this CPU runs, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "engine.hpp"

namespace roialign {

std::vector<std::string> compiled_isas();
std::vector<std::string> usable_isas();

// The engine named by ROIALIGN_ISA at the first call, or else the best that this CPU runs.
// Throws std::runtime_error if the named one is not usable.
const Engine& engine();

}  // namespace roialign
