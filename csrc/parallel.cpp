#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <ctime>
#include <exception>
#include <mutex>
#include <thread>

#include "log.hpp"

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace roialign {
namespace {

constexpr int64_t kPause = 50;  // milliseconds between two polls

thread_local void (*poll_of_this_thread)() = nullptr;

// Milliseconds; the clock that costs least.
int64_t now() {
#if defined(CLOCK_MONOTONIC_COARSE)
  timespec time;
  clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
  return int64_t(time.tv_sec) * 1000 + time.tv_nsec / 1000000;
#else
  const auto time = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::milliseconds>(time).count();
#endif
}

struct Job {
  Job(int64_t tasks, void (*body)(void*, int64_t), void* context)
      : tasks(tasks), body(body), context(context) {}

  const int64_t tasks;
  void (*const body)(void*, int64_t);
  void* const context;
  std::atomic<int64_t> next{0};
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;

  void work() {
    const auto poll = tasks > 1 ? poll_of_this_thread : nullptr;
    try {
      int64_t asked = poll ? now() : 0;
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        body(context, task);
        if (!poll || now() - asked < kPause) continue;
        poll();
        asked = now();
      }
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  // Only the thread that holds `pool_busy` calls this.
  void run(Job& job, int helpers) {
    for (; threads_ < helpers; ++threads_) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::exception&) {
        break;  // no more threads to be had: fewer do the work
      }
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      wanted_ = helpers;
    }
    start_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // a helper that has not woken up by now is not needed
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++running_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable start_, done_;
  Job* job_ = nullptr;
  int threads_ = 0, wanted_ = 0, running_ = 0;
};

// Never destroyed: its threads may outlive main. A forked child, which has none of them, forgets
// it.
Pool* pool = nullptr;
std::atomic_flag pool_busy = ATOMIC_FLAG_INIT;

#if !defined(_WIN32)
const int forget_in_child = pthread_atfork(nullptr, nullptr, [] {
  pool = nullptr;
  pool_busy.clear();
});
#endif

// The CPUs that the quota of a cgroup allows, or `cpus` if there is none: version 2 or 1.
int quota_cpus(const std::string& cgroup, int cpus) {
  double quota = -1, period = -1;
  const auto read = [&](const char* name, double& first, double& second) {
    std::FILE* file = std::fopen((cgroup + name).c_str(), "r");
    if (!file) return false;
    // What is no number, as "max", leaves -1.
    [[maybe_unused]] const int count = std::fscanf(file, "%lf %lf", &first, &second);
    std::fclose(file);
    return true;
  };
  if (!read("/cpu.max", quota, period)) {
    read("/cpu/cpu.cfs_quota_us", quota, period);
    read("/cpu/cpu.cfs_period_us", period, quota);
  }
  if (!(quota > 0 && period > 0)) return cpus;
  return int(std::max(1.0, std::min(double(cpus), std::ceil(quota / period))));
}

}  // namespace

int available_cpus(const char* cgroup) {
  int cpus = int(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = CPU_COUNT(&set);
#endif
  return quota_cpus(cgroup, std::max(cpus, 1));
}

Polling::Polling(void (*poll)()) {
  poll_of_this_thread = poll;
}
Polling::~Polling() {
  poll_of_this_thread = nullptr;
}

void parallel_for(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
  Job job(tasks, body, context);
  const int helpers = int(std::min<int64_t>(threads, tasks)) - 1;
  const bool shared = helpers > 0 && !pool_busy.test_and_set(std::memory_order_acquire);
  Trace& done = trace();
  done.threads = shared ? helpers + 1 : 1;
  done.busy = helpers > 0 && !shared;
  if (shared) {
    try {
      if (!pool) pool = new Pool;
      pool->run(job, helpers);
    } catch (...) {
      pool_busy.clear(std::memory_order_release);
      throw;
    }
    pool_busy.clear(std::memory_order_release);
  } else {
    job.work();
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace roialign
