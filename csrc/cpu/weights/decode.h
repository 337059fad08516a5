/* Rows of quantised weights read as columns, many rows at a time.
 *
 * 16 bytes of each of kWidth rows are transposed in registers as 32-bit words; then every word holds
 * four or eight neighbours along k of one row, which come out one by one, of all rows at once. A
 * number is decoded as its meaning says, (q - zero) * scale rounded to float32 once, so that
 * products are those of the dequantised weight. */
#pragma once

#include "../base/transpose.h"
#include "weight.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* A whole vector of bytes, four in each element of a vu. */
typedef int8_t Bytes __attribute__((vector_size(4 * kWidth)));

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
inline Bytes doubled_e2m1(vu codes) {
#if defined(__AVX2__)
  static constexpr DoubledE2m1<0> table;
  vu4 values;
  memcpy(&values, table.values, sizeof values);
  return bits_as<Bytes>(bytes_of(in_quarters(values), codes));
#else
  /* Without a shuffle of bytes: what the table holds, 0 1 2 3 4 6 8 12, by arithmetic. */
  const Bytes code = bits_as<Bytes>(codes), sign = code > 7, n = code & 7;
  const Bytes out = n + ((n > 4) & 1) + ((n > 5) & 1) + ((n > 6) & 3);
  return (out ^ sign) - sign;
#endif
}

/* How a format is read: a word has kCodes numbers, which decode() gives in order, each times a power
 * of two that kFactor undoes; with `exact`, for scales too small or too large for that, the numbers
 * themselves. one() gives any number by itself. */
template <class Codes>
struct Integers {
  static constexpr int kCodes = 4 * Codes::kParts;
  static constexpr bool kZeros = Codes::kZeros, kNan = false;
  static constexpr float kFactor = Codes::kUnit * 0x1p-24f;

  static vi fits(vf scale) {
    return (scale == 0.0f) | (scale > 0x1p-100f) | (scale < -0x1p-100f);
  }

  template <bool exact, class Use>
  static inline __attribute__((always_inline)) void decode(vu word, vu zero, Use use) {
    Bytes parts[Codes::kParts];
    Codes::split(word, zero, parts);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
#pragma GCC unroll 2
      for (int i = 0; i < Codes::kParts; i++) {
        const vi high = highest(bits_as<vu>(parts[i]), j);
        if constexpr (exact)
          use(j * Codes::kParts + i, __builtin_convertvector(high >> 24, vf) * Codes::kUnit);
        else
          use(j * Codes::kParts + i, __builtin_convertvector(high, vf));
      }
  }

  static float one(const uint8_t *row, int64_t k, float zero) {
    return Codes::one(row, k, zero) * Codes::kUnit;
  }
};

struct Int8Codes {
  static constexpr int kParts = 1;
  static constexpr bool kZeros = false;
  static constexpr float kUnit = 1.0f;
  static void split(vu word, vu, Bytes parts[kParts]) { parts[0] = bits_as<Bytes>(word); }
  static float one(const uint8_t *row, int64_t k, float) { return static_cast<int8_t>(row[k]); }
};

struct Int4Codes {
  static constexpr int kParts = 2;
  static constexpr bool kZeros = true;
  static constexpr float kUnit = 1.0f;
  static void split(vu word, vu zero, Bytes parts[kParts]) {
    parts[0] = bits_as<Bytes>(word & 0x0f0f0f0fu) - bits_as<Bytes>(zero);
    parts[1] = bits_as<Bytes>((word >> 4) & 0x0f0f0f0fu) - bits_as<Bytes>(zero);
  }
  static float one(const uint8_t *row, int64_t k, float zero) {
    return static_cast<float>(nibble(row, k)) - zero;
  }
};

struct Mxfp4Codes {
  static constexpr int kParts = 2;
  static constexpr bool kZeros = false;
  static constexpr float kUnit = 0.5f;
  static void split(vu word, vu, Bytes parts[kParts]) {
    parts[0] = doubled_e2m1(word & 0x0f0f0f0fu);
    parts[1] = doubled_e2m1((word >> 4) & 0x0f0f0f0fu);
  }
  static float one(const uint8_t *row, int64_t k, float) {
    return static_cast<float>(doubled_e2m1(nibble(row, k)));
  }
};

typedef Integers<Int8Codes> Int8;
typedef Integers<Int4Codes> Int4;
typedef Integers<Mxfp4Codes> Mxfp4;

struct Fp8 {
  static constexpr int kCodes = 4;
  static constexpr bool kZeros = false, kNan = true;
  static constexpr float kFactor = kOfE4m3AsF16;

  static vi fits(vf scale) { return (scale < 0x1p100f) & (scale > -0x1p100f); }

  template <bool exact, class Use>
  static inline __attribute__((always_inline)) void decode(vu word, vu, Use use) {
    typedef int16_t Halves __attribute__((vector_size(4 * kWidth)));
    const Halves pairs = bits_as<Halves>(word);
    vf out[kCodes];
    const Halves low = (pairs << 8) >> 1, high = pairs >> 1;
    widen_pairs<f16>(bits_as<vf>(e4m3_as_f16(low)), out, out + 2);
    widen_pairs<f16>(bits_as<vf>(e4m3_as_f16(high)), out + 1, out + 3);
#pragma GCC unroll 4
    for (int j = 0; j < kCodes; j++) use(j, exact ? out[j] * kFactor : out[j]);
  }

  static float one(const uint8_t *row, int64_t k, float) { return from_e4m3(row[k]); }
};

/* True if a byte of the words is a NaN of E4M3, 0x7f or 0xff. */
inline bool any_nan_e4m3(const vf words[4]) {
  Bytes found = {};
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) found |= (bits_as<Bytes>(words[i]) | int8_t{-128}) == -1;
  return any(bits_as<vi>(found) != 0);
}

/* The scales of a column of the grid in the rows that begin at `rows`. */
template <int64_t kLanes>
inline void read_scales(const QuantizedMatrix &w, const int64_t rows[kLanes], int64_t column, float *to) {
  const int64_t at = column * w.scale_along;
  if (!w.e8m0) {
    const float *scales = reinterpret_cast<const float *>(w.scales) + at;
    for (int64_t l = 0; l < kLanes; l++) to[l] = scales[rows[l]];
    return;
  }
  alignas(64) uint32_t bytes[kLanes];
  for (int64_t l = 0; l < kLanes; l++) bytes[l] = w.scales[at + rows[l]];
  for (int64_t l = 0; l < kLanes; l += kWidth) {
    vi some;
    memcpy(&some, bytes + l, sizeof some);
    store(to + l, bits_as<vf>(e8m0_bits(some)));
  }
}

/* Number k of rows n, n + gap, ..., scaled; zeros after the first `rows` of them. */
template <class Format>
__attribute__((noinline)) vf one_by_one(const QuantizedMatrix &w, int64_t n, int64_t gap, int64_t rows,
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
inline __attribute__((always_inline)) void each_column(const QuantizedMatrix &w, int64_t n, int64_t gap,
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
  int64_t i = 0, loaded = 0; /* runs from i on that are in `words` */
  int64_t at = 0;            /* the first of them there */
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
      if (loaded == 0) {
        const uint8_t *from = w.values + n * w.row + (k + i) * 4 / Format::kCodes;
        loaded = min_of(kRuns, left / kRun), at = 0;
#pragma GCC unroll 4
        for (int g = 0; g < G; g++)
          for (int64_t r = 0; r < loaded; r++)
            transpose_words(reinterpret_cast<const char *>(from + g * kWidth * gap * w.row + 16 * r),
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
      at++, loaded--;
      continue;
    }
    if (loaded > 0) at++, loaded--;
    for (int64_t stop = i + min_of(left, kRun); i < stop; i++)
#pragma GCC unroll 4 /* sums stay in registers only if `g` is a constant everywhere */
      for (int g = 0; g < G; g++)
        use(g, i, one_by_one<Format>(w, n + g * kWidth * gap, gap, rows - g * kWidth, k + i));
  }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
