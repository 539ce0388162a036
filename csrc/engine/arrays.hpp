// Between arrays and lines: how channels are cut, and how pixels of any strides and dtype are
// packed into lines and leave them again.
#pragma once

#include "../memory.hpp"
#include "lines.hpp"

namespace roialign {
namespace ROIALIGN_ISA {
namespace {

constexpr int64_t kNearPixels = 16384;  // of a map of which four blocks, 4 MiB, stay in the caches

template <class Real>
int64_t blocks_of(int64_t channels) {
  return (channels + kLanes<Real> - 1) / kLanes<Real>;
}

// How the channels of a map are cut into slices, one for each task: so many blocks that what a task
// reads and writes at a time are whole cache lines, and with channels innermost longer runs.
struct Slices {
  int64_t channels, blocks, size, shift;

  // `target` gets the result. Where its channels are innermost, and every pixel lies alike in its
  // cache lines, the cuts are between those.
  template <class T>
  static Slices of(const Tensor& map, const Tensor* target, T, int64_t least = 1) {
    const bool channels_last = map.stride[1] == 1 && map.stride[3] != 1;
    const bool near = map.shape[2] * map.shape[3] <= kNearPixels;
    int64_t blocks = sizeof(T) < sizeof(Accumulator<T>) ? 2 : least;
    if (channels_last) blocks = near ? 4 : 2;
    Slices slices{map.shape[1], blocks, blocks * kLanes<Accumulator<T>>, 0};
    if (channels_last && target && target->stride[1] == 1 && slices.channels > slices.size) {
      constexpr int64_t line = kLineBytes / int64_t(sizeof(T));
      const int64_t strides = target->stride[0] | target->stride[2] | target->stride[3];
      const auto address = reinterpret_cast<uintptr_t>(target->data);
      if (strides % line == 0) slices.shift = int64_t(address % kLineBytes / sizeof(T));
    }
    return slices;
  }
  // One slice of all channels.
  template <class T>
  static Slices all(const Tensor& map) {
    const int64_t blocks = blocks_of<Accumulator<T>>(map.shape[1]);
    return {map.shape[1], blocks, most_of<int64_t>(1, map.shape[1]), 0};
  }
  int64_t count() const { return (channels + shift + size - 1) / size; }
  Range operator[](int64_t i) const {
    return {most_of<int64_t>(i * size - shift, 0), least_of((i + 1) * size - shift, channels)};
  }
};

// Cuts memory into arrays, each from a line on; without memory it only counts.
struct Cut {
  char* memory = nullptr;
  int64_t bytes = 0;

  template <class T>
  void operator()(T*& array, int64_t count) {
    array = memory ? reinterpret_cast<T*>(memory + bytes) : nullptr;
    bytes += (count * int64_t(sizeof(T)) + kLineBytes - 1) / kLineBytes * kLineBytes;
  }
};

// The thread's scratch as long as a task works in it.
struct Scratch {
  // arrays(cut) cuts all of them.
  template <class Arrays>
  void take(const Arrays& arrays) {
    Cut sizes;
    arrays(sizes);
    Cut cut{static_cast<char*>(thread_scratch(size_t(sizes.bytes)))};
    arrays(cut);
  }
  Scratch() = default;
  ~Scratch() { trim_thread_scratch(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// The channels of one task, of one image or of one RoI's d_output or output.
template <class T>
struct Plane {
  T* data;
  int64_t width, pixels;
  int64_t channel_stride, row_stride, pixel_stride;
  int64_t channels;

  int64_t blocks() const { return blocks_of<Accumulator<T>>(channels); }
  bool even() const {
    return row_stride == width * pixel_stride;
  }  // between pixels, across rows too
};

// Channels of image or RoI n.
template <class T>
Plane<T> plane_of(const Tensor& tensor, int64_t n, Range channels) {
  return {static_cast<T*>(tensor.data) + n * tensor.stride[0] + channels.begin * tensor.stride[1],
          tensor.shape[3],
          tensor.shape[2] * tensor.shape[3],
          tensor.stride[1],
          tensor.stride[2],
          tensor.stride[3],
          channels.count()};
}

// Calls body(pointer, count, done) for the runs of equally spaced pixels in [first, first + count).
template <class T, class Body>
void for_runs(const Plane<T>& plane, int64_t first, int64_t count, Body body) {
  if (plane.even()) {
    body(plane.data + first * plane.pixel_stride, count, int64_t{0});
    return;
  }
  for (int64_t done = 0; done < count;) {
    const int64_t y = (first + done) / plane.width, x = (first + done) % plane.width;
    const int64_t run = least_of(count - done, plane.width - x);
    body(plane.data + y * plane.row_stride + x * plane.pixel_stride, run, done);
    done += run;
  }
}

// Calls body(at, pixels) for the tiles of `lanes` pixels in a run; the last one reaches back so as
// to be whole, if the run is long enough.
template <int lanes, class Body>
inline void for_tiles(int64_t run, Body body) {
  for (int64_t i = 0; i < run; i += lanes) {
    const int64_t at = least_of(i, most_of<int64_t>(run - lanes, 0));
    body(at, int(least_of<int64_t>(lanes, run - at)));
  }
}

template <class T>
inline bool same(const T*, const T*) {
  return true;
}
template <class T, class Real>
inline bool same(const T*, const Real*) {
  return false;
}

// Writes zeros.
template <class T>
void clear(const Plane<T>& plane) {
  for_runs(plane, 0, plane.pixels, [&](T* p, int64_t run, int64_t) {
    if (plane.channel_stride == 1 && plane.pixel_stride == plane.channels) {
      std::memset(p, 0, size_t(run * plane.channels) * sizeof(T));
      return;
    }
    for (int64_t c = 0; c < plane.channels; ++c, p += plane.channel_stride) {
      if (plane.pixel_stride == 1)
        std::memset(p, 0, size_t(run) * sizeof(T));
      else
        for (int64_t i = 0; i < run; ++i) p[i * plane.pixel_stride] = T{};
    }
  });
}

// Pixels [first, first + count) of the plane as lines, block after block `block_step` apart; absent
// channels are 0.
template <class T, class Real>
void load_lines(const Plane<const T>& plane, int64_t first, int64_t count, Real* lines,
                int64_t block_step) {
  constexpr int lanes = kLanes<Real>;
  const int64_t c_step = plane.channel_stride, i_step = plane.pixel_stride;
  for_runs(plane, first, count, [&](const T* run_data, int64_t run, int64_t done) {
    for (int64_t b = 0; b < plane.blocks(); ++b) {
      const T* p = run_data + b * lanes * c_step;
      const int channels = int(least_of<int64_t>(lanes, plane.channels - b * lanes));
      Real* to = lines + b * block_step + done * lanes;
      if (c_step == 1) {
        for (int64_t i = 0; i < run && channels == lanes; ++i)
          widen_line(p + i * i_step, to + i * lanes);
        for (int64_t i = 0; i < run && channels < lanes; ++i)
          store(to + i * lanes, load_part(p + i * i_step, channels, Real{}));
        continue;
      }
      for_tiles<lanes>(run, [&](int64_t at, int pixels) {
        const T* from = p + at * i_step;
        const bool whole = i_step == 1 && pixels == lanes;
        if (whole && same(p, to) && channels == lanes) {
          transpose(reinterpret_cast<const Real*>(from), c_step, to + at * lanes, lanes);
          return;
        }
        if constexpr (sizeof(T) == 2) {
          if (whole && channels == lanes) return widen_square(from, c_step, to + at * lanes);
        }
        Real rows[lanes * lanes], tile[lanes * lanes];
        for (int c = 0; c < lanes; ++c) {
          Real* row = rows + c * lanes;
          if (whole && c < channels) {
            widen_line(from + c * c_step, row);
            continue;
          }
          store(row, Line<Real>{});
          for (int i = 0; i < pixels && c < channels; ++i)
            row[i] = widen(from[c * c_step + i * i_step]);
        }
        if (pixels == lanes) {
          transpose(rows, lanes, to + at * lanes, lanes);
          return;
        }
        transpose(rows, lanes, tile, lanes);
        std::memcpy(to + at * lanes, tile, size_t(pixels * kLineBytes));
      });
    }
  });
}

// A copy under way: `runs` runs of bytes, from contiguous memory to places `step` apart.
struct Copy {
  char* to = nullptr;
  const char* from = nullptr;
  int64_t run = 0, step = 0, runs = 0;
  bool streamed = false;  // past the caches
  int64_t done = 0;       // bytes of the run at `to`

  // Joins runs that touch. Asks for the lines of which a streamed run writes only a part: stores
  // wait in line for them.
  void prepare() {
    if (run == step) {
      run *= runs;
      runs = 1;
    }
    for (int64_t r = 0; streamed && r < runs; ++r) {
      char* ends[] = {to + r * step, to + r * step + run};
      for (char* end : ends) {
        if (reinterpret_cast<intptr_t>(end) % kLineBytes) prefetch_for_write(end);
      }
    }
  }

  // At least so many bytes more, as far as there are any: up to a cache line or the end of a run.
  void advance(int64_t bytes) {
    while (bytes > 0 && runs > 0) {
      int64_t end = run;
      if (bytes < run - done) {
        end = done + bytes;
        end += -(reinterpret_cast<intptr_t>(to) + end) & (kLineBytes - 1);
        end = least_of(end, run);
      }
      if (streamed)
        stream(to + done, from + done, size_t(end - done));
      else
        std::memcpy(to + done, from + done, size_t(end - done));
      bytes -= end - done;
      done = end;
      if (done < run) continue;
      done = 0;
      to += step;
      from += run;
      --runs;
    }
  }
  void finish() { advance(run * runs); }
};

// Lines to pixels [first, first + count) of the plane, through `stage`, where they are in the
// array's dtype and its order of memory. What is returned remains to be copied.
template <class T, class Real>
Copy store_lines(const Plane<T>& plane, int64_t first, int64_t count, const Real* lines,
                 int64_t block_step, T* stage, bool streamed) {
  constexpr int lanes = kLanes<Real>;
  const bool channels_last = plane.channel_stride == 1;
  Copy copy{reinterpret_cast<char*>(plane.data + first * plane.pixel_stride),
            reinterpret_cast<const char*>(stage)};
  const bool runs = plane.even() && (channels_last || plane.pixel_stride == 1);
  if (runs) {
    copy.run = (channels_last ? plane.channels : count) * int64_t(sizeof(T));
    copy.step = (channels_last ? plane.pixel_stride : plane.channel_stride) * int64_t(sizeof(T));
    copy.runs = channels_last ? count : plane.channels;
    copy.streamed = streamed;
    copy.prepare();
  }
  for (int64_t b = 0; b < plane.blocks(); ++b) {
    const int channels = int(least_of<int64_t>(lanes, plane.channels - b * lanes));
    const Real* block = lines + b * block_step;
    if (channels_last) {
      T* to = stage + b * lanes;
      for (int64_t i = 0; i < count; ++i, to += plane.channels) {
        T line[lanes];
        narrow_line(block + i * lanes, channels < lanes ? line : to);
        if (channels < lanes) std::memcpy(to, line, channels * sizeof(T));
      }
      continue;
    }
    for_tiles<lanes>(count, [&](int64_t at, int pixels) {
      T* to = stage + b * lanes * count + at;
      if (same(to, block) && channels == lanes && pixels == lanes) {
        transpose(block + at * lanes, lanes, reinterpret_cast<Real*>(to), count);
        return;
      }
      if constexpr (sizeof(T) == 2) {
        if (channels == lanes && pixels == lanes)
          return narrow_square(block + at * lanes, to, count);
      }
      Real rows[lanes * lanes], tile[lanes * lanes];
      if (pixels == lanes) {
        transpose(block + at * lanes, lanes, rows, lanes);
      } else {
        std::memcpy(tile, block + at * lanes, size_t(pixels * kLineBytes));
        transpose(tile, lanes, rows, lanes);
      }
      for (int c = 0; c < channels; ++c) {
        if (pixels == lanes)
          narrow_line(rows + c * lanes, to + c * count);
        else
          for (int i = 0; i < pixels; ++i) narrow(rows[c * lanes + i], to[c * count + i]);
      }
    });
  }
  if (!runs) {
    for_runs(plane, first, count, [&](T* p, int64_t run, int64_t done) {
      for (int64_t c = 0; c < plane.channels; ++c) {
        for (int64_t i = 0; i < run; ++i) {
          p[i * plane.pixel_stride + c * plane.channel_stride] =
              channels_last ? stage[(done + i) * plane.channels + c] : stage[c * count + done + i];
        }
      }
    });
  }
  return copy;
}

// Asks for a run of pixels that will be loaded soon.
template <class T>
void prefetch_pixels(const Plane<const T>& plane, int64_t first, int64_t count) {
  const int64_t y = first / plane.width, x = first % plane.width;
  const T* p = plane.data + y * plane.row_stride + x * plane.pixel_stride;
  if (plane.channel_stride == 1) {
    for (int64_t i = 0; i < least_of(count, plane.width - x); ++i) {
      prefetch(p + i * plane.pixel_stride, plane.channels * int64_t(sizeof(T)));
    }
  } else {
    for (int64_t c = 0; c < plane.channels; ++c) prefetch(p + c * plane.channel_stride, 1);
  }
}

// The part of d_output that comes next. It is asked for in `pieces`, while the one before is worked
// on: the memory system takes only so many requests at a time.
template <class T>
class Upcoming {
 public:
  template <class Real>
  Upcoming(const Tensor& d_output, const Window<Real>* following, Range channels, int64_t pieces)
      : tile_(plane_of<const T>(d_output, following ? following->roi : 0, channels)),
        next_(following ? 0 : tile_.pixels),
        piece_((tile_.pixels + pieces - 1) / pieces) {}

  void ask() {
    const int64_t from = next_, bytes = tile_.channels * int64_t(sizeof(T));
    next_ = least_of(from + piece_, tile_.pixels);
    if (tile_.pixel_stride == 1 && tile_.channel_stride == tile_.pixels) {
      const char* data = reinterpret_cast<const char*>(tile_.data);
      prefetch(data + from * bytes, (next_ - from) * bytes);
    } else if (tile_.channel_stride == 1 && tile_.even()) {
      for (int64_t i = from; i < next_; ++i) prefetch(tile_.data + i * tile_.pixel_stride, bytes);
    }
  }

 private:
  Plane<const T> tile_;
  int64_t next_, piece_;  // pixels
};

}  // namespace
}  // namespace ROIALIGN_ISA
}  // namespace roialign
