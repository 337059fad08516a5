/* Quantised weights as they are stored, in blocks of which each has a scale (and int4 a zero point).
 *
 * 16 bytes of each of kWidth rows are turned in registers as 32-bit words; then every word holds
 * four or eight neighbours along k of one row, which come out one by one, of all rows at once. A
 * number is decoded as its meaning says, (q - zero) * scale rounded to float32 once, so that
 * products are those of the dequantised weight. Internal linkage, as in vector.h. */
#pragma once

#include "../gemm/e4m3.h"
#include "weight.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Bytes side by side in the elements of a vu. */
typedef int8_t vb __attribute__((vector_size(4 * kWidth)));

typedef uint32_t vu4 __attribute__((vector_size(16)));

#if defined(__AVX2__)
/* The same 16 bytes in each quarter. */
inline vu in_quarters(vu4 v) {
#if defined(__AVX512F__)
  return bits_as<vu>(_mm512_maskz_broadcast_i32x4(0xffff, bits_as<__m128i>(v)));
#else
  return bits_as<vu>(_mm256_broadcastsi128_si256(bits_as<__m128i>(v)));
#endif
}

/* In each quarter: the bytes of `from` that `which` numbers, zero where its highest bit is set. */
inline vu bytes_of(vu from, vu which) {
#if defined(__AVX512F__)
  return bits_as<vu>(_mm512_maskz_shuffle_epi8(~uint64_t{0}, bits_as<__m512i>(from),
                                               bits_as<__m512i>(which)));
#else
  return bits_as<vu>(_mm256_shuffle_epi8(bits_as<__m256i>(from), bits_as<__m256i>(which)));
#endif
}
#endif

/* Byte j of each element as its highest one, zeros below: the signed byte times 2^24. */
inline vi highest(vu word, int j) {
#if defined(__AVX2__)
  const vu4 from = ((vu4{0, 4, 8, 12} + static_cast<uint32_t>(j)) << 24) | 0x00808080u;
  return bits_as<vi>(bytes_of(word, in_quarters(from)));
#else
  return bits_as<vi>((word << (24 - 8 * j)) & 0xff000000u);
#endif
}

/* Twice the E2M1 in each byte, whose high four bits are zero. */
inline vb doubled_e2m1(vu codes) {
#if defined(__AVX2__)
  const vu4 values = {0x03020100, 0x0c080604, 0xfdfeff00, 0xf4f8fafc};
  return bits_as<vb>(bytes_of(in_quarters(values), codes));
#else
  const vb code = bits_as<vb>(codes), sign = code > 7, n = code & 7;
  const vb out = n + ((n > 4) & 1) + ((n > 5) & 1) + ((n > 6) & 3);
  return (out ^ sign) - sign;
#endif
}

/* How a format is read: kCodes numbers of a word, which decode() gives in order, each times a power
 * of two that kFactor undoes. `exact`: of scales too small or too large for that, it gives the
 * numbers themselves. one() gives any number by itself. */
template <class Bytes>
struct Integers {
  static constexpr int kCodes = 4 * Bytes::kParts;
  static constexpr bool kZeros = Bytes::kZeros, kNan = false;
  static constexpr float kFactor = Bytes::kUnit * 0x1p-24f;

  static vi fits(vf scale) {
    return (scale == 0.0f) | (scale > 0x1p-100f) | (scale < -0x1p-100f);
  }

  template <bool exact, class Use>
  static inline __attribute__((always_inline)) void decode(vu word, vu zero, Use use) {
    vb parts[Bytes::kParts];
    Bytes::split(word, zero, parts);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 2
      for (int i = 0; i < Bytes::kParts; i++) {
        const vi high = highest(bits_as<vu>(parts[i]), j);
        if constexpr (exact)
          use(j * Bytes::kParts + i, __builtin_convertvector(high >> 24, vf) * Bytes::kUnit);
        else
          use(j * Bytes::kParts + i, __builtin_convertvector(high, vf));
      }
  }

  static float one(const uint8_t *row, int64_t k, float zero) {
    return Bytes::one(row, k, zero) * Bytes::kUnit;
  }
};

struct Int8Bytes {
  static constexpr int kParts = 1;
  static constexpr bool kZeros = false;
  static constexpr float kUnit = 1.0f;
  static void split(vu word, vu, vb parts[kParts]) { parts[0] = bits_as<vb>(word); }
  static float one(const uint8_t *row, int64_t k, float) { return static_cast<int8_t>(row[k]); }
};

inline int nibble(const uint8_t *row, int64_t k) { return (row[k / 2] >> k % 2 * 4) & 15; }

struct Int4Bytes {
  static constexpr int kParts = 2;
  static constexpr bool kZeros = true;
  static constexpr float kUnit = 1.0f;
  static void split(vu word, vu zero, vb parts[kParts]) {
    parts[0] = bits_as<vb>(word & 0x0f0f0f0fu) - bits_as<vb>(zero);
    parts[1] = bits_as<vb>((word >> 4) & 0x0f0f0f0fu) - bits_as<vb>(zero);
  }
  static float one(const uint8_t *row, int64_t k, float zero) {
    return static_cast<float>(nibble(row, k)) - zero;
  }
};

struct Mxfp4Bytes {
  static constexpr int kParts = 2;
  static constexpr bool kZeros = false;
  static constexpr float kUnit = 0.5f;
  static void split(vu word, vu, vb parts[kParts]) {
    parts[0] = doubled_e2m1(word & 0x0f0f0f0fu);
    parts[1] = doubled_e2m1((word >> 4) & 0x0f0f0f0fu);
  }
  static float one(const uint8_t *row, int64_t k, float) {
    const int code = nibble(row, k), e = code >> 1 & 3, m = code & 1;
    const int doubled = e == 0 ? m : (2 + m) << (e - 1);
    return static_cast<float>((code & 8) != 0 ? -doubled : doubled);
  }
};

typedef Integers<Int8Bytes> Int8;
typedef Integers<Int4Bytes> Int4;
typedef Integers<Mxfp4Bytes> Mxfp4;

/* E4M3: its bits make a float16 of 2^-8 the value, which converts without the penalty that
 * subnormal numbers of float32 have. */
struct Fp8 {
  static constexpr int kCodes = 4;
  static constexpr bool kZeros = false, kNan = true;
  static constexpr float kFactor = 256.0f;

  static vi fits(vf scale) { return (scale < 0x1p100f) & (scale > -0x1p100f); }

  template <bool exact, class Use>
  static inline __attribute__((always_inline)) void decode(vu word, vu, Use use) {
    typedef int16_t Halves __attribute__((vector_size(4 * kWidth)));
    const Halves pairs = bits_as<Halves>(word);
    const int16_t kept = static_cast<int16_t>(0xbf80);
    vf out[kCodes];
    widen_pairs<f16>(bits_as<vf>(((pairs << 8) >> 1) & kept), out, out + 2);
    widen_pairs<f16>(bits_as<vf>((pairs >> 1) & kept), out + 1, out + 3);
#pragma GCC unroll 4
    for (int j = 0; j < kCodes; j++) use(j, exact ? out[j] * kFactor : out[j]);
  }

  static float one(const uint8_t *row, int64_t k, float) {
    const uint32_t code = row[k], magnitude = code & 0x7f;
    if (magnitude == 0x7f) return bits_as<float>(0x7fc00000u);
    const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f
                                      : bits_as<float>((magnitude << 20) + (120u << 23));
    return (code & 0x80) != 0 ? -value : value;
  }
};

/* True if a byte of the words is a NaN of E4M3, 0x7f or 0xff. */
inline bool any_nan_e4m3(const vf words[4]) {
  vb found = {};
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) found |= (bits_as<vb>(words[i]) | int8_t{-128}) == -1;
  return any(bits_as<vi>(found) != 0);
}

/* The scales of a column of the grid in the rows that begin at `rows`. */
template <int64_t kLanes>
inline void read_scales(const Stored &w, const int64_t rows[kLanes], int64_t column, float *to) {
  const int64_t at = column * w.scale_along;
  if (!w.e8m0) {
    const float *scales = reinterpret_cast<const float *>(w.scales) + at;
    for (int64_t l = 0; l < kLanes; l++) to[l] = scales[rows[l]];
    return;
  }
  alignas(64) uint32_t bytes[kLanes];
  for (int64_t l = 0; l < kLanes; l++) bytes[l] = w.scales[at + rows[l]];
  for (int64_t l = 0; l < kLanes; l += kWidth) {
    vu some, bits;
    memcpy(&some, bytes + l, sizeof some);
    /* 0 is the subnormal 2^-127, 255 is NaN */
    bits = (some << 23) | (bits_as<vu>(some == 0u) & (1u << 22)) |
           (bits_as<vu>(some == 255u) & 0x7fc00000u);
    store(to + l, bits_as<vf>(bits));
  }
}

/* Number k of rows n, n + gap, ..., scaled; zeros after the first `rows` of them. */
template <class Format>
__attribute__((noinline)) vf one_by_one(const Stored &w, int64_t n, int64_t gap, int64_t rows,
                                        int64_t k) {
  float some[kWidth] = {};
  for (int64_t l = 0; l < min_of(kWidth, rows); l++) {
    const int64_t row = n + l * gap;
    some[l] = Format::one(w.values + row * w.row, k, w.zero(row, k)) * w.scale(row, k);
  }
  return load(some);
}

/* Numbers of G * kWidth rows n, n + gap, ... (those below `rows` of them), scaled: use(g, k,
 * vector) for each of G vectors of rows in rising order of k. Reads no further than k..k+K. */
template <class Format, int G, class Use>
inline __attribute__((always_inline)) void each_column(const Stored &w, int64_t n, int64_t gap,
                                                       int64_t rows, int64_t k, int64_t K,
                                                       Use use) {
  constexpr int64_t kRun = 4 * Format::kCodes, kLanes = G * kWidth;
  /* A block holds whole runs: its scales are read once. */
  const bool runs = rows == kLanes && w.block_columns % kRun == 0;
  int64_t scale_rows[kLanes], zero_rows[kLanes];
  for (int64_t l = 0; l < kLanes && runs; l++) {
    const int64_t row = w.grid_row(n + l * gap);
    scale_rows[l] = row * w.scale_row;
    if constexpr (Format::kZeros) zero_rows[l] = row * w.zero_row;
  }
  int64_t block = -1;
  bool fits = true;
  alignas(64) float scales[kLanes];
  alignas(64) uint32_t zeros[kLanes] = {};
  /* Of a line of each row at once: rows a multiple of 4 KiB apart share the sets of L1. */
  constexpr int64_t kRuns = 4;
  alignas(64) vf words[G][kRuns][4];
  int64_t i = 0, held = 0; /* runs from i on that are in `words` */
  int64_t at = 0;          /* the first of them there */
  /* Word by word, and for each of them vector by vector: as many sums grow at a time as G. */
  const auto run = [&]<bool exact>() __attribute__((always_inline)) {
    for (int q = 0; q < 4; q++)
#pragma GCC unroll 4
      for (int g = 0; g < G; g++) {
        vu zero;
        memcpy(&zero, zeros + g * kWidth, sizeof zero);
        const vf scale = load(scales + g * kWidth);
        Format::template decode<exact>(
            bits_as<vu>(words[g][at][q]), zero, [&](int j, vf v) __attribute__((always_inline)) {
              use(g, i + q * Format::kCodes + j, v * scale);
            });
      }
  };
  while (i < K) {
    const int64_t left = K - i;
    bool whole = runs && left >= kRun;
    if (whole) {
      if (const int64_t column = w.grid_column(k + i); column != block) {
        block = column;
        read_scales<kLanes>(w, scale_rows, block, scales);
        vi misfit = {};
        for (int64_t l = 0; l < kLanes; l += kWidth) misfit |= ~Format::fits(load(scales + l));
        fits = !any(misfit);
        for (int64_t l = 0; l < kLanes && fits; l += kWidth)
          store(scales + l, load(scales + l) * Format::kFactor);
        if constexpr (Format::kZeros)
          for (int64_t l = 0; l < kLanes; l++)
            zeros[l] = w.zeros[zero_rows[l] + block * w.zero_along] * 0x01010101u;
      }
      if (held == 0) {
        const uint8_t *from = w.values + n * w.row + (k + i) * 4 / Format::kCodes;
        held = min_of(kRuns, left / kRun), at = 0;
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
          for (int64_t r = 0; r < held; r++)
            turn_words(reinterpret_cast<const char *>(from + g * kWidth * gap * w.row + 16 * r),
                       gap * w.row, words[g][r]);
      }
      if constexpr (Format::kNan)
        for (int g = 0; g < G; g++) whole = whole && !any_nan_e4m3(words[g][at]);
    }
    if (whole) {
      if (fits)
        run.template operator()<false>();
      else
        run.template operator()<true>();
      i += kRun;
      at++, held--;
      continue;
    }
    if (held > 0) at++, held--;
    for (int64_t stop = i + min_of(left, kRun); i < stop; i++)
#pragma GCC unroll 4 /* sums stay in registers only if `g` is a constant everywhere */
      for (int g = 0; g < G; g++)
        use(g, i, one_by_one<Format>(w, n + g * kWidth * gap, gap, rows - g * kWidth, k + i));
  }
}

/* The format's rows as columns of the product. */
template <class Format>
struct Blocks {
  static constexpr int64_t kNarrow = 1;
  /* More rows of E4M3 side by side would leave L1 before they are used up. */
  static constexpr int kGroups = Format::kNan && kWidth == 8 ? 2 : 4;

  const Stored &w;

  int64_t row_bytes() const { return w.row; }
  static constexpr int64_t bytes(int64_t k) { return k * 4 / Format::kCodes; }

  void pack(int64_t n, int64_t columns, int64_t k, int64_t K, float *panel) const {
    for (int64_t i = 0; i < kPanel; i += kWidth)
      each_column<Format, 1>(w, n + i, 1, clamp(columns - i, 0, kWidth), k, K,
                             [&](int, int64_t at, vf v) { store(panel + at * kPanel + i, v); });
  }

  Ahead ahead(int64_t n, int64_t k) const {
    return {reinterpret_cast<const char *>(w.values + n * w.row + bytes(k)), kPanel, w.row, 64,
            16 * Format::kCodes};
  }

  template <int G>
  void narrow(int64_t, int64_t n, int64_t gap, int64_t following, int64_t k, int64_t piece,
              int64_t K, const float *a, int64_t, float *c, int64_t, bool add) const {
#if defined(__AVX2__) && !defined(__AVX512F__)
    if constexpr (Format::kNan && G > 1) {
      vf sums[G];
      if (narrow_e4m3<G>(w, n, gap, following, k, piece, K, a, sums)) {
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
          float *to = c + g * kWidth;
          store(to, add ? load(to) + sums[g] : sums[g]);
        }
        return;
      }
    }
#endif
    /* What is read soon: this far along the rows, or at the beginning of those that follow. */
    constexpr int64_t kSoon = 1024;
    const int64_t row = bytes(K), soon = min_of(kSoon, row);
    for (int64_t line = up_to(bytes(k), 64); line < bytes(k + piece); line += 64) {
      const uint8_t *next = line + soon < row ? w.values + n * w.row + line + soon
                                              : w.values + following * w.row + line + soon - row;
      for (int64_t l = 0; l < G * kWidth; l++) __builtin_prefetch(next + l * gap * w.row, 0, 3);
    }
    vf sums[G] = {};
    each_column<Format, G>(w, n, gap, G * kWidth, k, piece,
                           [&](int g, int64_t at, vf v) __attribute__((always_inline)) {
                             sums[g] += all(a[at]) * v;
                           });
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
      float *to = c + g * kWidth;
      store(to, add ? load(to) + sums[g] : sums[g]);
    }
  }
};

/* The same matrix with its rows along k: what a gradient in x multiplies with. */
template <class Format>
struct Turned {
  const Stored &w;

  void pack(int64_t n, int64_t columns, int64_t k, int64_t K, float *panel) const {
    /* kWidth rows of the matrix at a time, decoded as columns, in whole runs, and turned back. */
    constexpr int64_t kRun = 4 * Format::kCodes;
    const int64_t start = n / kRun * kRun;
    const int64_t span = min_of(up_to(n + columns, kRun), w.columns) - start;
    alignas(64) float some[(kPanel + 2 * kRun) * kWidth];
    if (columns < kPanel) memset(some, 0, sizeof some);
    for (int64_t i = 0; i < K; i += kWidth) {
      const int64_t rows = min_of(kWidth, K - i);
      each_column<Format, 1>(w, k + i, 1, rows, start, span,
                             [&](int, int64_t at, vf v) { store(some + at * kWidth, v); });
      const float *first = some + (n - start) * kWidth;
      for (int64_t v = 0; v < kPanel; v += kWidth)
        for (int64_t r = 0; r < rows; r += 4) {
          vf turned[4];
          turn(first + v * kWidth + r, kWidth, turned);
          for (int64_t j = 0; j < min_of(4, rows - r); j++)
            store(panel + (i + r + j) * kPanel + v, turned[j]);
        }
    }
  }

  Ahead ahead(int64_t n, int64_t k) const {
    constexpr int64_t kRows = 16;
    return {reinterpret_cast<const char *>(w.values + k * w.row + n * 4 / Format::kCodes), kRows,
            w.row, kRows * w.row, kRows};
  }
};

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
