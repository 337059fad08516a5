/* Vectors of float at the width of the instruction set that this file is compiled for.
 *
 * Everything here has internal linkage and stands in a namespace named after the level: a function
 * compiled for AVX-512 can never be linked into the baseline (llama.cpp#11780 is what happens
 * otherwise). For the same reason the sources of kernels use no templates of the standard library.
 *
 * TRANSOM_LEVEL   baseline, avx2, avx512 or neon: set on the command line, with its flags. */
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace transom::TRANSOM_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kWidth)));
typedef int32_t vi __attribute__((vector_size(4 * kWidth)));
typedef uint32_t vu __attribute__((vector_size(4 * kWidth)));
typedef uint16_t vs __attribute__((vector_size(2 * kWidth)));
typedef int16_t vh __attribute__((vector_size(2 * kWidth)));
typedef int8_t vb __attribute__((vector_size(kWidth)));
typedef float v4 __attribute__((vector_size(16)));

/* Numbers of 16 bits as memory holds them. */
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline vf all(float x) { return x - vf{}; }

inline vf load(const float *p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float *p, vf v) { memcpy(p, &v, sizeof v); }

/* Numbers of 16 bits, held in a vector, as float32. */
template <class Number>
inline vf widen(vs s);

template <>
inline vf widen<bf16>(vs s) {
  /* One shuffle, or none from memory: gcc 12 widens a __builtin_convertvector by halves. */
#if defined(__AVX512F__)
  return bits_as<vf>(bits_as<vu>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_as<__m256i>(s))) << 16);
#elif defined(__AVX2__)
  return bits_as<vf>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits_as<__m128i>(s)), 16));
#else
  return bits_as<vf>(__builtin_convertvector(s, vu) << 16);
#endif
}

template <>
inline vf widen<f16>(vs s) {
#if defined(__AVX512F__)
  /* The masked form: gcc 12 warns of its own undefined operand in the plain one. */
  return bits_as<vf>(_mm512_maskz_cvtph_ps(0xffff, bits_as<__m256i>(s)));
#elif defined(__AVX2__)
  return bits_as<vf>(_mm256_cvtph_ps(bits_as<__m128i>(s)));
#elif defined(__aarch64__)
  return bits_as<vf>(vcvt_f32_f16(bits_as<float16x4_t>(s)));
#else
  const vu u = __builtin_convertvector(s, vu);
  /* The exponent moves to float32's place and 2^112 corrects its bias, subnormals included. */
  vu magnitude = bits_as<vu>(bits_as<vf>((u & 0x7fffu) << 13) * 0x1p112f);
  const vu infinite = bits_as<vu>((u & 0x7c00u) == 0x7c00u);
  magnitude = (infinite & (((u & 0x3ffu) << 13) | 0x7f800000u)) | (~infinite & magnitude);
  return bits_as<vf>(magnitude | ((u & 0x8000u) << 16));
#endif
}

inline vb load_bytes(const uint8_t *p) {
  vb bytes;
  memcpy(&bytes, p, sizeof bytes);
  return bytes;
}

/* Bytes with their signs in more bits: gcc 12 widens by halves what one instruction does. */
inline vh widen_bytes(vb bytes) {
#if defined(__AVX512F__)
  return bits_as<vh>(_mm256_cvtepi8_epi16(bits_as<__m128i>(bytes)));
#elif defined(__AVX2__)
  return bits_as<vh>(_mm_cvtepi8_epi16(_mm_cvtsi64_si128(bits_as<long long>(bytes))));
#else
  return __builtin_convertvector(bytes, vh);
#endif
}

inline vi widen_to_32(vb bytes) {
#if defined(__AVX512F__)
  return bits_as<vi>(_mm512_maskz_cvtepi8_epi32(0xffff, bits_as<__m128i>(bytes)));
#elif defined(__AVX2__)
  return bits_as<vi>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits_as<long long>(bytes))));
#else
  return __builtin_convertvector(bytes, vi);
#endif
}

template <class Number>
inline vf load(const Number *p) {
  vs s;
  memcpy(&s, p, sizeof s);
  return widen<Number>(s);
}

/* The first `count` elements, zeros after them; reads no further. */
template <class Number>
inline vf load_some(const Number *p, int64_t count) {
  Number some[kWidth] = {};
  memcpy(some, p, static_cast<size_t>(count) * sizeof(Number));
  return load(some);
}

/* {e0, o0, e1, o1, ...} over both vectors -> *even {e0, e1, ...}, *odd {o0, o1, ...}. */
inline void separate(vf *even, vf *odd) {
  const vf a = *even, b = *odd;
#if defined(__AVX512F__)
  *even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  *odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  *even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  *odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
  *even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
  *odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

/* Whether a comparison holds for any element. */
inline bool any(vi holds) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(bits_as<__m512i>(holds), bits_as<__m512i>(holds)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(bits_as<__m256>(holds)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(bits_as<__m128>(holds)) != 0;
#else
  uint64_t parts[kWidth / 2], found = 0;
  memcpy(parts, &holds, sizeof parts);
  for (uint64_t part : parts) found |= part;
  return found != 0;
#endif
}

inline v4 folded(vf v) {
  v4 part[kWidth / 4];
  memcpy(part, &v, sizeof v);
  if constexpr (kWidth == 8) return part[0] + part[1];
  if constexpr (kWidth == 16) return (part[0] + part[2]) + (part[1] + part[3]);
  return part[0];
}

/* The sum of the elements, in one order whatever the surrounding loop. */
inline float sum(vf v) {
  const v4 s = folded(v);
  return (s[0] + s[2]) + (s[1] + s[3]);
}

/* {sum(a), sum(b), sum(c), sum(d)}, to the bit. */
inline v4 sum(vf a, vf b, vf c, vf d) {
  const v4 p = folded(a), q = folded(b), r = folded(c), s = folded(d);
  const v4 pq = __builtin_shufflevector(p, q, 0, 4, 1, 5) +
                __builtin_shufflevector(p, q, 2, 6, 3, 7);
  const v4 rs = __builtin_shufflevector(r, s, 0, 4, 1, 5) +
                __builtin_shufflevector(r, s, 2, 6, 3, 7);
  return __builtin_shufflevector(pq, rs, 0, 1, 4, 5) + __builtin_shufflevector(pq, rs, 2, 3, 6, 7);
}

inline uint16_t to_bf16(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x != x ? (u >> 16) | 0x40u : rounded);
}

inline uint16_t to_f16(float x) {
  const uint32_t u = bits_as<uint32_t>(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  uint32_t h;
  if (magnitude > 0x7f800000u) {
    h = 0x7e00u | ((u >> 13) & 0x1ffu);
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65536 or more
    h = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: the addition rounds at the last place
    h = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    h = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | h);
}

/* The low 16 bits. */
inline vs low_bits(vu x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  /* Every element is below 2^16 here; the compiler, which cannot know, would mask them first. */
  const __m256i both = bits_as<__m256i>(x);
  return bits_as<vs>(
      _mm_packus_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1)));
#else
  return __builtin_convertvector(x, vs);
#endif
}

/* Rounded to nearest even, as to_bf16() and to_f16() of one number do, to the bit: NaN stays NaN,
 * its sign and the first bits of its payload too. */
inline vs to_bf16(vf x) {
  const vu u = bits_as<vu>(x), number = bits_as<vu>(x == x);
  const vu half = (0x7fffu + ((u >> 16) & 1u)) & number;
  return low_bits(((u + half) | (~number & 0x400000u)) >> 16);
}

inline vs to_f16(vf x) {
#if defined(__AVX512F__)
  return bits_as<vs>(_mm512_maskz_cvtps_ph(0xffff, bits_as<__m512>(x),
                                           _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return bits_as<vs>(
      _mm256_cvtps_ph(bits_as<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  return bits_as<vs>(vcvt_f16_f32(bits_as<float32x4_t>(x)));
#else
  const vu u = bits_as<vu>(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  /* Signed comparisons, the only ones that SSE2 has: a magnitude is never negative. */
  const vi size = bits_as<vi>(magnitude);
  const vu normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const vu tiny = bits_as<vu>(bits_as<vf>(magnitude) + 0.5f) - 0x3f000000u;
  vu h = size < 0x38800000 ? tiny : normal;
  h = size >= 0x477ff000 ? vu{} + 0x7c00u : h;
  h = size > 0x7f800000 ? 0x7e00u | ((u >> 13) & 0x1ffu) : h;
  return low_bits(sign | h);
#endif
}

inline void store(bf16 *p, vf v) {
  const vs s = to_bf16(v);
  memcpy(p, &s, sizeof s);
}

inline void store(f16 *p, vf v) {
  const vs s = to_f16(v);
  memcpy(p, &s, sizeof s);
}

inline void store_one(float *p, float x) { *p = x; }
inline void store_one(bf16 *p, float x) { p->bits = to_bf16(x); }
inline void store_one(f16 *p, float x) { p->bits = to_f16(x); }

/* The first `count` elements; writes no further. */
template <class Number>
inline void store_some(Number *p, vf v, int64_t count) {
  Number some[kWidth];
  store(some, v);
  memcpy(p, some, static_cast<size_t>(count) * sizeof(Number));
}

/* Bytes of a cache line. */
constexpr int64_t kLine = 64;

/* A cache line, past the caches where there is a way: memory that is written whole is then not read
 * first, and what the caches hold stays. Both ends are aligned; fence() comes last. */
inline void store_line(void *to, const void *from) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i *>(to), _mm512_load_si512(from));
#elif defined(__AVX2__)
  for (int i = 0; i < 2; i++)
    _mm256_stream_si256(static_cast<__m256i *>(to) + i,
                        _mm256_load_si256(static_cast<const __m256i *>(from) + i));
#elif defined(__SSE2__)
  for (int i = 0; i < 4; i++)
    _mm_stream_si128(static_cast<__m128i *>(to) + i,
                     _mm_load_si128(static_cast<const __m128i *>(from) + i));
#else
  memcpy(to, from, kLine);
#endif
}

/* After the last store_line() of a thread, before another one may read. */
inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class Number>
inline void write_numbers(Number *to, const float *x, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(to + i, load(x + i));
  for (; i < n; i++) store_one(to + i, x[i]);
}

/* out[0..n) = x, rounded to nearest even. */
inline void write_row(void *out, int bits16, const float *x, int64_t n) {
  if (bits16 == 0)
    memcpy(out, x, static_cast<size_t>(n) * sizeof(float));
  else if (bits16 == 1)
    write_numbers(static_cast<bf16 *>(out), x, n);
  else
    write_numbers(static_cast<f16 *>(out), x, n);
}

/* e^x to 2 units in the last place; 0 below -87.3, infinite above 88.7, NaN for NaN. */
inline vf exp(vf x) {
  /* Cephes expf: n = round(x / ln 2), a polynomial on the rest, times 2^n in two factors. */
  x = x > 89.0f ? all(89.0f) : x;
  x = x < -88.0f ? all(-88.0f) : x;
  const vf n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  vf y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const vf whole = n == n ? n : vf{};
  const vi power = __builtin_convertvector(whole, vi), half = power >> 1;
  return y * bits_as<vf>((half + 127) << 23) * bits_as<vf>((power - half + 127) << 23);
}

/* exp() of x <= 0, with the subnormal results too. */
inline vf exp_below(vf x) {
  const vf root = exp(x * 0.5f);
  return x < -87.0f ? root * root : exp(x);
}

inline vf square_root(vf x) {
#if defined(__AVX512F__)
  return bits_as<vf>(_mm512_maskz_sqrt_ps(0xffff, bits_as<__m512>(x)));
#elif defined(__AVX2__)
  return bits_as<vf>(_mm256_sqrt_ps(bits_as<__m256>(x)));
#elif defined(__SSE2__)
  return bits_as<vf>(_mm_sqrt_ps(bits_as<__m128>(x)));
#elif defined(__aarch64__)
  return bits_as<vf>(vsqrtq_f32(bits_as<float32x4_t>(x)));
#else
  for (int i = 0; i < kWidth; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
