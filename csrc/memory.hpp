// Large buffers on huge pages, and a small cache of freed ones: fresh pages cost more than the
// kernel.
#pragma once

#include <cstddef>
#include <cstdint>

namespace roialign {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

// Memory aligned to 64 bytes; from kHugePage on, its own huge-page-advised mapping. With `sparse`
// the system does not count it before it is touched: for scratch of which little may be used.
// Throws std::bad_alloc.
void* map_memory(std::size_t bytes, bool sparse = false);
void unmap_memory(void* memory, std::size_t bytes);

// The most that the cache of freed buffers holds: ROIALIGN_CACHE_MB, default 256, 0 turns it off.
// Throws std::runtime_error if that is no number.
std::size_t cache_limit();

// The same as above through the cache.
void* take_buffer(std::size_t bytes);
void give_buffer(void* memory, std::size_t bytes);

// Scratch of the calling thread, kept between calls: at least `bytes`, contents undefined. A later
// call on the same thread may move it.
void* thread_scratch(std::size_t bytes);
// Gives back the calling thread's scratch if it is too large to keep.
void trim_thread_scratch();

#if defined(ROIALIGN_FAIL_ALLOCATIONS)
// In builds for tests: of the core's allocations from now on the n-th fails, by any thread; n = 0:
// none. Gives how many there were since the last call.
int64_t fail_allocation(int64_t n);
#endif

}  // namespace roialign
