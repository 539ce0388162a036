// A pool of threads of our own: no OpenMP runtime is linked.
#pragma once

#include <cstdint>

namespace roialign {

// CPUs that this process may use: its affinity and the quota of its cgroup, a directory.
int available_cpus(const char* cgroup);

// Runs body(context, task) for every task in [0, tasks) on at most `threads` threads, the caller
// among them. If the pool is busy the caller works alone: it never waits for another call.
void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task),
                  void* context);

// What the calling thread asks between the tasks that it runs itself, at most every 50 ms, as long
// as this lives: by throwing it ends a call. Null: nothing.
class Polling {
 public:
  explicit Polling(void (*poll)());
  ~Polling();
  Polling(const Polling&) = delete;
  Polling& operator=(const Polling&) = delete;
};

template <class Body>
void parallel_for(int64_t tasks, int threads, Body&& body) {
  parallel_for(
      tasks, threads, [](void* context, int64_t task) { (*static_cast<Body*>(context))(task); },
      static_cast<void*>(&body));
}

}  // namespace roialign
