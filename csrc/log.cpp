#include "log.hpp"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>

namespace roialign {

bool logging() {
  static const bool asked = [] {
    const char* text = std::getenv("ROIALIGN_LOG");
    const std::string value = text ? text : "";
    if (!value.empty() && value != "0" && value != "1")
      throw std::runtime_error("ROIALIGN_LOG must be 0 or 1, got '" + value + "'");
    return value == "1";
  }();
  return asked;
}

void log_line(const std::string& line) {
  if (!logging()) return;
  const std::string whole = "roialign: " + line + "\n";
  std::fwrite(whole.data(), 1, whole.size(), stderr);
}

Trace& trace() {
  static thread_local Trace current{};
  return current;
}

}  // namespace roialign
