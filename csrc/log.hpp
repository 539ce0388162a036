// What ROIALIGN_LOG=1 asks for: a line to stderr for each call, that says how it was done, and one
// for what was done to its arrays before.
#pragma once

#include <cstdint>
#include <string>

namespace roialign {

// Whether it is asked for, at the first call. Throws std::runtime_error if the variable is
// neither 0 nor 1.
bool logging();

// One line, if it is asked for.
void log_line(const std::string& line);

// What is to be said of the call under way in the calling thread.
struct Trace {
  int64_t images[4];  // with RoIs, that were pooled in each Way
  bool by_samples;    // all of them, instead
  int threads;        // of the tasks of the engine
  bool busy;          // there would have been more, but for another call
};
Trace& trace();

}  // namespace roialign
