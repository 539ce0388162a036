// The vector register of the instruction set that this file is compiled for, and what of it has no
// portable spelling. Included by engine.cpp only, once per instruction set: no external names.
#pragma once

#include <cstdint>
#include <cstring>

#include "../windows.hpp"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace roialign {
namespace ROIALIGN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kVectors = kLineBytes / kVectorBytes;  // vectors of a line

#define ROIALIGN_UNROLL _Pragma("GCC unroll 4")
#define ROIALIGN_INLINE inline __attribute__((always_inline))

template <class Real>
struct VectorOf {
  typedef Real type __attribute__((vector_size(kVectorBytes), aligned(sizeof(Real)), may_alias));
};
template <class Real>
using Vector = typename VectorOf<Real>::type;

// A line: 64 bytes of channels, 16 floats or 8 doubles, of one pixel.
template <class Real>
constexpr int kLanes = kLineBytes / int(sizeof(Real));

template <class Real>
struct Line {
  Vector<Real> vector[kVectors];
};

template <class Real>
inline Line<Real> load(const Real* p) {
  Line<Real> line;
  ROIALIGN_UNROLL for (int v = 0; v < kVectors; ++v) {
    line.vector[v] = *reinterpret_cast<const Vector<Real>*>(p + v * (kLanes<Real> / kVectors));
  }
  return line;
}

template <class Real>
inline void store(Real* p, const Line<Real>& line) {
  ROIALIGN_UNROLL for (int v = 0; v < kVectors; ++v) {
    *reinterpret_cast<Vector<Real>*>(p + v * (kLanes<Real> / kVectors)) = line.vector[v];
  }
}

template <class Real>
inline Vector<Real> broadcast(Real value) {
  return value - Vector<Real>{};
}

// acc += weight * line; contraction makes it one instruction where there is one.
template <class Real>
inline void multiply_add(Line<Real>& acc, Vector<Real> weight, const Line<Real>& line) {
  ROIALIGN_UNROLL for (int v = 0; v < kVectors; ++v) acc.vector[v] += weight * line.vector[v];
}

template <class Real>
inline void multiply_add(Line<Real>& acc, const Line<Real>& a, const Line<Real>& b) {
  ROIALIGN_UNROLL for (int v = 0; v < kVectors; ++v) acc.vector[v] += a.vector[v] * b.vector[v];
}

// Whether any lane of a comparison holds.
template <class Mask>
inline bool any_of(Mask mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(__m256i(mask), __m256i(mask));
#elif defined(__SSE4_1__)
  return !_mm_testz_si128(__m128i(mask), __m128i(mask));
#else
  int64_t halves[2];
  std::memcpy(halves, &mask, sizeof halves);
  return (halves[0] | halves[1]) != 0;
#endif
}
inline bool any_of(bool holds) {
  return holds;
}

// Where a comparison does not hold, and another one does.
template <class Mask>
ROIALIGN_INLINE Mask and_not(Mask mask, Mask other) {
  return ~mask & other;
}
ROIALIGN_INLINE bool and_not(bool holds, bool other) {
  return !holds & other;
}

// --- Transposition
// --------------------------------------------------------------------------------

// Lanes<0, ..., n - 1>, as the base of LanesOf<n>.
template <int... lane>
struct Lanes {};
template <int n, int... lane>
struct LanesOf : LanesOf<n - 1, n - 1, lane...> {};
template <int... lane>
struct LanesOf<0, lane...> : Lanes<lane...> {};

// Lanes whose number has bit s change places between a and b.
template <int s, class V, int... lane>
inline void exchange(V& a, V& b, Lanes<lane...>) {
  constexpr int n = sizeof...(lane);
#if defined(__clang__)
  const V low = __builtin_shufflevector(a, b, (lane & s ? n + lane - s : lane)...);
  b = __builtin_shufflevector(a, b, (lane & s ? n + lane : lane + s)...);
#else
  using Mask = decltype(a < b);
  const V low = __builtin_shuffle(a, b, Mask{(lane & s ? n + lane - s : lane)...});
  b = __builtin_shuffle(a, b, Mask{(lane & s ? n + lane : lane + s)...});
#endif
  a = low;
}

template <int s, class V, int n>
inline void transpose_vectors(V (&v)[n]) {
  if constexpr (s < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (!(i & s)) exchange<s>(v[i], v[i + s], LanesOf<n>());
    }
    transpose_vectors<2 * s>(v);
  }
}

// `rows` times `columns` elements, both rounded up to whole vectors, from rows `in_step` bytes
// apart to columns `out_step` bytes apart. Vectors of at most 32 bytes: those are faster here than
// longer ones.
template <class Real>
ROIALIGN_INLINE void transpose_bytes(const void* in, int64_t in_step, int rows, int columns,
                                     void* out, int64_t out_step) {
  constexpr int bytes = kVectorBytes < 32 ? kVectorBytes : 32, n = bytes / int(sizeof(Real));
  typedef Real Square __attribute__((vector_size(bytes)));
  typedef Real Anywhere __attribute__((vector_size(bytes), aligned(1), may_alias));
  for (int y = 0; y < rows; y += n) {
    for (int x = 0; x < columns; x += n) {
      const char* from = static_cast<const char*>(in) + y * in_step + x * int(sizeof(Real));
      char* to = static_cast<char*>(out) + x * out_step + y * int(sizeof(Real));
      Square v[n];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) v[i] = *reinterpret_cast<const Anywhere*>(from + i * in_step);
      transpose_vectors<1>(v);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) *reinterpret_cast<Anywhere*>(to + i * out_step) = v[i];
    }
  }
}

// A square of as many elements as a line has; its first `rows` rows, or some more.
template <class Real>
ROIALIGN_INLINE void transpose_rows(const Real* in, int64_t in_step, Real* out, int64_t out_step,
                                    int rows) {
  constexpr int64_t size = sizeof(Real);
  transpose_bytes<Real>(in, in_step * size, rows, kLanes<Real>, out, out_step * size);
}
template <class Real>
inline void transpose(const Real* in, int64_t in_step, Real* out, int64_t out_step) {
  transpose_rows(in, in_step, out, out_step, kLanes<Real>);
}

// --- 16-bit floats
// --------------------------------------------------------------------------------

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(bfloat16 x) {
  return float_of(uint32_t(x.bits) << 16);
}
inline float widen(uint8_t x) {
  return float(x);
}
inline float widen(float x) {
  return x;
}
inline double widen(double x) {
  return x;
}

inline void narrow(float x, bfloat16& result) {  // to nearest even; a NaN stays one
  const uint32_t bits = bits_of(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  result.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
}
inline void narrow(float x, float& result) {
  result = x;
}
inline void narrow(double x, double& result) {
  result = x;
}

#if defined(__F16C__)
inline float widen(half x) {
  return _cvtsh_ss(x.bits);
}
inline void narrow(float x, half& result) {
  result.bits = uint16_t(_cvtss_sh(x, 0));
}
#else
inline float widen(half x) {
  // Scaling by 2^112 moves the exponent's bias, and makes subnormals normal.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  const float scaled = float_of(magnitude) * float_of(0x77800000);
  const uint32_t special = magnitude >= 0x0f800000 ? 0x7f800000 | magnitude : bits_of(scaled);
  return float_of(special | uint32_t(x.bits & 0x8000) << 16);
}
inline void narrow(float x, half& result) {
  const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff;
  // Below 2^-14 adding 1/2 leaves the rounded subnormal in the low bits.
  const uint32_t small = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  uint32_t half_bits = magnitude < 0x38800000 ? small : normal;
  if (magnitude >= 0x477ff000) half_bits = 0x7c00;
  if (magnitude > 0x7f800000) half_bits = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  result.bits = uint16_t(half_bits | ((bits >> 16) & 0x8000));
}
#endif

// One line between an array's dtype and the accumulator's.
template <class From, class Real>
inline void widen_line(const From* from, Real* to) {
  for (int c = 0; c < kLanes<Real>; ++c) to[c] = widen(from[c]);
}
template <class To, class Real>
inline void narrow_line(const Real* from, To* to) {
  for (int c = 0; c < kLanes<Real>; ++c) narrow(from[c], to[c]);
}
inline void widen_line(const float* from, float* to) {
  store(to, load(from));
}
inline void narrow_line(const float* from, float* to) {
  store(to, load(from));
}
#if defined(__AVX512F__)
inline void widen_line(const uint8_t* from, float* to) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm512_storeu_ps(to, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
}
inline void widen_line(const half* from, float* to) {
  _mm512_storeu_ps(to, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
inline void narrow_line(const float* from, half* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(_mm512_loadu_ps(from), 0));
}
inline void widen_line(const bfloat16* from, float* to) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  _mm512_storeu_si512(to, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void narrow_line(const float* from, bfloat16* to) {
  const __m512 x = _mm512_loadu_ps(from);
  const __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
  const __m512i odd = _mm512_and_epi32(high, _mm512_set1_epi32(1));
  const __m512i half_way = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half_way), 16);
  const __m512i result = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), high,
                                              _mm512_set1_epi32(0x40));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(result));
}
#elif defined(__F16C__)
inline void widen_line(const uint8_t* from, float* to) {
  for (int i = 0; i < 16; i += 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
  }
}
inline void widen_line(const half* from, float* to) {
  for (int i = 0; i < 16; i += 8) {
    _mm256_storeu_ps(to + i,
                     _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
}
inline void narrow_line(const float* from, half* to) {
  for (int i = 0; i < 16; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  }
}
#endif

// A square of 16-bit elements: their transposition moves pairs, half as many as there are elements.
template <class T>
inline void widen_square(const T* in, int64_t in_step, float* out) {
  constexpr int lanes = kLanes<float>;
  float pairs[lanes / 2 * lanes];
  transpose_bytes<float>(in, in_step * int64_t(sizeof(T)), lanes, lanes / 2, pairs, kLineBytes);
  for (int i = 0; i < lanes; i += 2) {
    T even[lanes], odd[lanes];
    for (int c = 0; c < lanes; ++c) {
      const uint32_t pair = bits_of(pairs[i / 2 * lanes + c]);
      even[c].bits = uint16_t(pair);
      odd[c].bits = uint16_t(pair >> 16);
    }
    widen_line(even, out + i * lanes);
    widen_line(odd, out + (i + 1) * lanes);
  }
}
template <class T>
inline void narrow_square(const float* in, T* out, int64_t out_step) {
  constexpr int lanes = kLanes<float>;
  float pairs[lanes / 2 * lanes];
  for (int i = 0; i < lanes; i += 2) {
    T even[lanes], odd[lanes];
    narrow_line(in + i * lanes, even);
    narrow_line(in + (i + 1) * lanes, odd);
    for (int c = 0; c < lanes; ++c)
      pairs[i / 2 * lanes + c] = float_of(even[c].bits | uint32_t(odd[c].bits) << 16);
  }
  transpose_bytes<float>(pairs, kLineBytes, lanes / 2, lanes, out, out_step * int64_t(sizeof(T)));
}

// --- Parts of a line
// -------------------------------------------------------------------------------

// The first `count` elements of a line, 1 or more; none beyond them is read, and those are 0.
template <class T, class Real>
inline Line<Real> load_part(const T* p, int64_t count, Real) {
  T part[kLanes<Real>] = {};
  Real line[kLanes<Real>];
  std::memcpy(part, p, size_t(count) * sizeof(T));
  widen_line(part, line);
  return load(line);
}
template <class Real>
inline void store_part(Real* p, int64_t count, const Line<Real>& line) {
  Real part[kLanes<Real>];
  store(part, line);
  std::memcpy(p, part, size_t(count) * sizeof(Real));
}
#if defined(__AVX512F__)
inline Line<float> load_part(const float* p, int64_t count, float) {
  return {Vector<float>(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p))};
}
inline Line<double> load_part(const double* p, int64_t count, double) {
  return {Vector<double>(_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p))};
}
inline void store_part(float* p, int64_t count, const Line<float>& line) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), __m512(line.vector[0]));
}
inline void store_part(double* p, int64_t count, const Line<double>& line) {
  _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), __m512d(line.vector[0]));
}
#endif

// A whole line of an array's dtype.
template <class T, class Real>
inline Line<Real> load_wide(const T* p, Real) {
  Real line[kLanes<Real>];
  widen_line(p, line);
  return load(line);
}
template <class Real>
inline Line<Real> load_wide(const Real* p, Real) {
  return load(p);
}

// --- Memory
// ---------------------------------------------------------------------------------------

// Into the second cache. The empty statement has effects, as a prefetch has not: compilers drop
// calls of functions that do nothing else.
inline void prefetch(const void* p, int64_t bytes) {
  const char* end = static_cast<const char*>(p) + bytes;
  const char* line = static_cast<const char*>(p) - reinterpret_cast<uintptr_t>(p) % kLineBytes;
  for (; line < end; line += kLineBytes) {
    __builtin_prefetch(line, 0, 1);
    __asm__ volatile("");
  }
}

inline void prefetch_for_write(void* p) {
  __builtin_prefetch(p, 1, 3);
  __asm__ volatile("");
}

// Copies past the caches: whole 64-byte lines by non-temporal stores, the ragged ends plainly.
inline void stream(void* to, const void* from, size_t bytes) {
#if defined(__SSE2__)
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  size_t head = size_t(-reinterpret_cast<intptr_t>(out) & (kLineBytes - 1));
  if (head > bytes) head = bytes;
  if (head) std::memcpy(out, in, head);
  for (out += head, in += head, bytes -= head; bytes >= kLineBytes;
       out += kLineBytes, in += kLineBytes, bytes -= kLineBytes) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#elif defined(__AVX2__)
    for (int v = 0; v < 2; ++v) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out) + v,
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in) + v));
    }
#else
    for (int v = 0; v < 4; ++v) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(out) + v,
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(in) + v));
    }
#endif
  }
  if (bytes) std::memcpy(out, in, bytes);
#else
  std::memcpy(to, from, bytes);
#endif
}

// Orders streamed stores before whatever tells another thread that they are done.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace ROIALIGN_ISA
}  // namespace roialign
