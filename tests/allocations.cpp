// In builds for tests: allocations of the core that fail (ROIALIGN_FAIL_ALLOCATIONS). The linker
// lets the core's calls of NAME come to __wrap_NAME, and __real_NAME is what they meant.
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <new>

#include "../csrc/memory.hpp"

namespace roialign {
namespace {

std::atomic<int64_t> allocations{0}, failing{0};

bool fails() {
  return ++allocations == failing;
}

}  // namespace

int64_t fail_allocation(int64_t n) {
  failing = n;
  return allocations.exchange(0);
}

}  // namespace roialign

extern "C" {

void* __real__Znwm(std::size_t bytes);
void* __real__Znam(std::size_t bytes);
int __real_posix_memalign(void** memory, std::size_t alignment, std::size_t bytes);
void* __real_mmap(void* at, std::size_t bytes, int protection, int flags, int file, off_t offset);

void* __wrap__Znwm(std::size_t bytes) {
  if (roialign::fails()) throw std::bad_alloc();
  return __real__Znwm(bytes);
}

void* __wrap__Znam(std::size_t bytes) {
  if (roialign::fails()) throw std::bad_alloc();
  return __real__Znam(bytes);
}

int __wrap_posix_memalign(void** memory, std::size_t alignment, std::size_t bytes) {
  return roialign::fails() ? ENOMEM : __real_posix_memalign(memory, alignment, bytes);
}

void* __wrap_mmap(void* at, std::size_t bytes, int protection, int flags, int file, off_t offset) {
  return roialign::fails() ? MAP_FAILED : __real_mmap(at, bytes, protection, flags, file, offset);
}
}
