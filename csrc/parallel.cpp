#include "parallel.hpp"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <exception>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <sched.h>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace roialign {
namespace {

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
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        body(context, task);
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

// CPUs that the cgroup's quota allows, or `otherwise`.
int quota_cpus(int otherwise) {
  long long quota = -1, period = -1;
  char first[32] = "";
  if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {  // version 2
    if (std::fscanf(file, "%31s %lld", first, &period) == 2 &&
        std::sscanf(first, "%lld", &quota) != 1) {
      quota = -1;
    }
    std::fclose(file);
  } else if (std::FILE* old = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) {
    if (std::fscanf(old, "%lld", &quota) != 1) quota = -1;
    std::fclose(old);
    if (std::FILE* other = std::fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r")) {
      if (std::fscanf(other, "%lld", &period) != 1) period = -1;
      std::fclose(other);
    }
  }
  return quota > 0 && period > 0 ? int(std::max(1LL, (quota + period - 1) / period)) : otherwise;
}

}  // namespace

int available_cpus() {
  int cpus = int(std::thread::hardware_concurrency());
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) cpus = CPU_COUNT(&set);
#endif
  cpus = std::max(cpus, 1);
  return std::min(cpus, quota_cpus(cpus));
}

void parallel_for(int64_t tasks, int threads, void (*body)(void*, int64_t), void* context) {
  Job job(tasks, body, context);
  const int helpers = int(std::min<int64_t>(threads, tasks)) - 1;
  if (helpers > 0 && !pool_busy.test_and_set(std::memory_order_acquire)) {
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
