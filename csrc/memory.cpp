#include "memory.hpp"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>

#if defined(_WIN32)
#include <malloc.h>
#else
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace roialign {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kKeptScratch = std::size_t{64} << 20;
// More than a training step of a Mask R-CNN with one image frees.
constexpr std::size_t kKeptBuffers = std::size_t{256} << 20;

std::size_t round_up(std::size_t bytes, std::size_t unit) {
  if (bytes > SIZE_MAX - unit) throw std::bad_alloc();
  return (bytes + unit - 1) / unit * unit;
}

// Freed buffers, oldest first. A spin lock guards it: the critical sections are a few instructions,
// and a forked child starts with an empty cache because the lock may have been held.
struct Buffer {
  void* memory;
  std::size_t bytes;
};
constexpr int kBuffers = 16;

struct Cache {
  Buffer buffers[kBuffers] = {};
  int count = 0;
  std::size_t bytes = 0;
};

Cache cache;
std::atomic_flag cache_lock = ATOMIC_FLAG_INIT;

void lock_cache() {
  while (cache_lock.test_and_set(std::memory_order_acquire)) {
  }
}
void unlock_cache() {
  cache_lock.clear(std::memory_order_release);
}

#if !defined(_WIN32)
const int forget_in_child = pthread_atfork(nullptr, nullptr, [] {
  cache = Cache{};
  unlock_cache();
});
#endif

Buffer remove_buffer(int i) {
  const Buffer buffer = cache.buffers[i];
  for (int j = i + 1; j < cache.count; ++j) cache.buffers[j - 1] = cache.buffers[j];
  --cache.count;
  cache.bytes -= buffer.bytes;
  return buffer;
}

}  // namespace

std::size_t cache_limit() {
  static const std::size_t limit = [] {
    const char* text = std::getenv("ROIALIGN_CACHE_MB");
    if (!text || !*text) return kKeptBuffers;
    std::size_t megabytes = 0;
    for (const char* c = text; *c; ++c) {
      if (*c < '0' || *c > '9') {
        throw std::runtime_error(
            "ROIALIGN_CACHE_MB must be a number of MiB in decimal digits, got '" +
            std::string(text) + "'");
      }
      megabytes = std::min(megabytes * 10 + std::size_t(*c - '0'), SIZE_MAX >> 20);
    }
    return megabytes << 20;
  }();
  return limit;
}

void* map_memory(std::size_t bytes, [[maybe_unused]] bool sparse) {
#if defined(_WIN32)
  void* memory = _aligned_malloc(bytes ? bytes : 1, kAlignment);
  if (!memory) throw std::bad_alloc();
  return memory;
#else
  if (bytes < kHugePage) {
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, bytes ? bytes : 1)) throw std::bad_alloc();
    return memory;
  }
  // Over-reserve, then cut both ends so that the mapping starts on a huge page.
  const std::size_t size = round_up(bytes, kHugePage), whole = size + kHugePage;
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
  if (sparse) flags |= MAP_NORESERVE;
#endif
  void* memory = mmap(nullptr, whole, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(memory);
  char* aligned =
      reinterpret_cast<char*>(round_up(reinterpret_cast<std::size_t>(begin), kHugePage));
  if (aligned != begin) munmap(begin, std::size_t(aligned - begin));
  const std::size_t tail = std::size_t(begin + whole - (aligned + size));
  if (tail) munmap(aligned + size, tail);
#if defined(MADV_HUGEPAGE)
  madvise(aligned, size, MADV_HUGEPAGE);
#endif
  return aligned;
#endif
}

void unmap_memory(void* memory, std::size_t bytes) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  if (bytes < kHugePage)
    std::free(memory);
  else
    munmap(memory, round_up(bytes, kHugePage));
#endif
}

void* take_buffer(std::size_t bytes) {
  const std::size_t size = round_up(bytes, kHugePage);
  lock_cache();
  int best = -1;
  for (int i = 0; i < cache.count; ++i) {
    const std::size_t have = cache.buffers[i].bytes;
    if (have == size) best = i;
  }
  void* memory = best < 0 ? nullptr : remove_buffer(best).memory;
  unlock_cache();
  return memory ? memory : map_memory(size);
}

void give_buffer(void* memory, std::size_t bytes) {
  const std::size_t size = round_up(bytes, kHugePage);
  Buffer evicted[kBuffers + 1];
  int evictions = 0;
  if (size > cache_limit()) {
    evicted[evictions++] = {memory, size};
  } else {
    lock_cache();
    while (cache.count == kBuffers || (cache.count && cache.bytes + size > cache_limit())) {
      evicted[evictions++] = remove_buffer(0);
    }
    cache.buffers[cache.count++] = {memory, size};
    cache.bytes += size;
    unlock_cache();
  }
  for (int i = 0; i < evictions; ++i) unmap_memory(evicted[i].memory, evicted[i].bytes);
}

namespace {

struct Scratch {
  void* memory = nullptr;
  std::size_t bytes = 0;
  void release() {
    if (memory) unmap_memory(memory, bytes);
    memory = nullptr;
    bytes = 0;
  }
  ~Scratch() { release(); }
};
thread_local Scratch scratch;

}  // namespace

void* thread_scratch(std::size_t bytes) {
  if (bytes > scratch.bytes) {
    scratch.release();
    scratch.memory = map_memory(bytes, true);
    scratch.bytes = bytes;
  }
  return scratch.memory;
}

void trim_thread_scratch() {
  if (scratch.bytes > kKeptScratch) scratch.release();
}

}  // namespace roialign
