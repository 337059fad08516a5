/* multiply() with rows quantised to 16 bits (integers.h) and a weight of 4 or 8 bits.
 *
 * With up to three rows memory is the limit. Eight columns at a time are read as stored; products of
 * bytes are added in 16 bits, a block at a time in 32, and the sums of eight columns are brought
 * into one vector. With more rows a chunk of the weight becomes a panel of pairs of 16-bit numbers
 * in L1, and pairs of x are multiplied with it. */
#include "integers.h"

namespace transom::TRANSOM_LEVEL {

#if defined(__AVX2__)

namespace {

/* Columns side by side in a vector, and in a panel. */
constexpr int kEight = 8, kSixteen = 16;
/* Blocks whose scales are read at a time, and numbers along k of a panel. */
constexpr int64_t kBlocks = 64, kChunk = 256;

typedef int32_t Eight __attribute__((vector_size(32)));

/* Scales of eight columns for eight blocks, E8M0 each: to[b * stride + i] from column i. */
inline void eight_e8m0(const uint8_t *const columns[kEight], int64_t at, float *to,
                       int64_t stride) {
  __m128i v[kEight];
#pragma GCC unroll 8
  for (int i = 0; i < kEight; i++)
    v[i] = _mm_loadu_si64(columns[i] + at);
  const __m128i a = _mm_unpacklo_epi8(v[0], v[1]), b = _mm_unpacklo_epi8(v[2], v[3]);
  const __m128i c = _mm_unpacklo_epi8(v[4], v[5]), d = _mm_unpacklo_epi8(v[6], v[7]);
  const __m128i ab = _mm_unpacklo_epi16(a, b), cd = _mm_unpacklo_epi16(c, d);
  const __m128i a2 = _mm_unpackhi_epi16(a, b), c2 = _mm_unpackhi_epi16(c, d);
  const __m128i pairs[4] = {_mm_unpacklo_epi32(ab, cd), _mm_unpackhi_epi32(ab, cd),
                            _mm_unpacklo_epi32(a2, c2), _mm_unpackhi_epi32(a2, c2)};
#pragma GCC unroll 8
  for (int i = 0; i < kEight; i++) {
    const __m128i both = pairs[i / 2];
    const __m256i byte = _mm256_cvtepu8_epi32(i % 2 == 0 ? both : _mm_srli_si128(both, 8));
    store_256(to + i * stride, bits_as<__m256i>(e8m0_bits(bits_as<Eight>(byte))));
  }
}

/* Scales and zero points of N columns, block after block. */
template <int N>
struct Grids {
  alignas(32) float scales[kBlocks * N];
  alignas(32) int32_t zeros[kBlocks * N];

  void read(const QuantizedMatrix &w, const int64_t *columns, int64_t k, int64_t blocks, int64_t block) {
    if (w.format == kInt4 && w.zeros == nullptr) memset(zeros, 0, sizeof zeros);
    int64_t done = 0;
    if (w.e8m0 && w.scale_along == 1 && w.block_columns == block) {
      const uint8_t *from[N];
      for (int i = 0; i < N; i++)
        from[i] = w.scales + w.grid_row(columns[i]) * w.scale_row + k / block;
      for (; done + 8 <= blocks; done += 8)
        for (int i = 0; i < N; i += kEight) eight_e8m0(from + i, done, scales + done * N + i, N);
    }
    if (!w.e8m0 && w.block_columns == block) {
      for (int i = 0; i < N; i++) {
        const int64_t row = w.grid_row(columns[i]), at = k / block;
        const void *start = w.scales;
        const float *from = static_cast<const float *>(start) + row * w.scale_row;
        for (int64_t b = 0; b < blocks; b++)
          scales[b * N + i] = from[(at + b) * w.scale_along];
        if (w.zeros == nullptr) continue;
        const uint8_t *zero = w.zeros + row * w.zero_row;
        for (int64_t b = 0; b < blocks; b++) zeros[b * N + i] = zero[(at + b) * w.zero_along];
      }
      return;
    }
    for (int i = 0; i < N; i++)
      for (int64_t b = done; b < blocks; b++)
        scales[b * N + i] = w.scale(columns[i], k + b * block);
    if (w.zeros == nullptr) return;
    for (int i = 0; i < N; i++)
      for (int64_t b = 0; b < blocks; b++)
        zeros[b * N + i] = static_cast<int32_t>(w.zero(columns[i], k + b * block));
  }
};

/* Twice the number plus kOffset, by code, in both halves. */
inline __m256i mxfp4_table() {
  static constexpr DoubledE2m1<kOffset> table;
  return _mm256_broadcastsi128_si256(load_128(table.values));
}

/* *sum += more, where it stands in the source: else gcc first loads and multiplies
 * for all sums, and has no registers left for them. */
inline void add_to(__m256i *sum, __m256i more) {
  asm volatile("vpaddd %1, %0, %0" : "+x"(*sum) : "x"(more));
}

/* Sums of the four 32-bit numbers in each half of eight vectors: first halves, second halves. */
inline void sum_halves(const __m256i v[kEight], __m256i *first, __m256i *second) {
  const __m256i a = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
  const __m256i b = _mm256_hadd_epi32(_mm256_hadd_epi32(v[4], v[5]), _mm256_hadd_epi32(v[6], v[7]));
  *first = _mm256_permute2x128_si256(a, b, 0x20);
  *second = _mm256_permute2x128_si256(a, b, 0x31);
}

/* Adds what one block gives, of which `sum` are the products' sums, to eight columns. */
template <WeightFormat format>
inline __m256 add_block(__m256 out, __m256i sum, const QuantizedRow &x, int64_t at,
                        const Grids<kEight> &grids, int64_t block) {
  if constexpr (format != kInt8) {
    __m256i beside = _mm256_set1_epi32(x.sums[at]);
    if constexpr (format == kInt4)
      beside = _mm256_mullo_epi32(beside, load_256(grids.zeros + block * kEight));
    sum = _mm256_sub_epi32(sum, beside);
  }
  const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(x.scales[at]));
  return _mm256_fmadd_ps(scaled, _mm256_load_ps(grids.scales + block * kEight), out);
}

/* 64 products along k of a row with a column, in 16 bits: by the high bytes, by the low ones. */
template <WeightFormat format>
inline void products(const uint8_t *codes, const int8_t *x, __m256i *high, __m256i *low) {
  const __m256i both = load_256(codes), mask = _mm256_set1_epi8(15);
  __m256i even = _mm256_and_si256(both, mask);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  if constexpr (format == kMxfp4) {
    even = _mm256_shuffle_epi8(mxfp4_table(), even);
    odd = _mm256_shuffle_epi8(mxfp4_table(), odd);
  }
  *high = _mm256_add_epi16(_mm256_maddubs_epi16(even, load_256(x)),
                           _mm256_maddubs_epi16(odd, load_256(x + 64)));
  *low = _mm256_add_epi16(_mm256_maddubs_epi16(even, load_256(x + 32)),
                          _mm256_maddubs_epi16(odd, load_256(x + 96)));
}

/* One row times eight columns, `blocks` blocks from `first` on. */
template <WeightFormat format, int block>
inline __m256 few_row_blocks(__m256 out, const QuantizedRow &x, const uint8_t *const columns[kEight],
                            int64_t row, int64_t first, int64_t blocks,
                            const Grids<kEight> &grids) {
  constexpr int kStep = block < 64 && format != kInt8 ? 64 : block; /* of k */
  constexpr int kBytes = format == kInt8 ? kStep : kStep / 2;
  const __m256i by_256 = _mm256_set1_epi16(256), by_1 = _mm256_set1_epi16(1);
  for (int64_t b = 0; b < blocks; b += kStep / block) {
    const int64_t k = (first + b) * block;
    const int64_t at = format == kInt8 ? k : k / 2;
    __m256i sums[kEight];
#pragma GCC unroll 8
    for (int i = 0; i < kEight; i++) {
      const uint8_t *from = columns[i] + at;
      /* The same place of the next columns: they follow at once, more than the prefetchers see. */
      if (kBytes >= 64 || (at & 32) == 0) {
        __builtin_prefetch(from + kEight * row, 0, 3);
        if constexpr (kBytes > 64) __builtin_prefetch(from + kEight * row + 64, 0, 3);
      }
      if constexpr (format == kInt8) {
        __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int j = 0; j < kStep; j += 16)
          sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepi8_epi16(load_128(from + j)),
                                                        load_256(x.numbers + k + j)));
        sums[i] = sum;
      } else {
        __m256i high, low;
        products<format>(from, x.bytes + 2 * k, &high, &low);
        if constexpr (kStep == 128) {
          __m256i more_high, more_low;
          products<format>(from + 32, x.bytes + 2 * k + 128, &more_high, &more_low);
          high = _mm256_add_epi16(high, more_high), low = _mm256_add_epi16(low, more_low);
        }
        sums[i] = _mm256_madd_epi16(high, by_256);
        add_to(&sums[i], _mm256_madd_epi16(low, by_1));
      }
    }
    __m256i one, two;
    sum_halves(sums, &one, &two);
    if constexpr (block == 32 && format != kInt8) {
      out = add_block<format>(out, one, x, first + b, grids, b);
      out = add_block<format>(out, two, x, first + b + 1, grids, b + 1);
    } else {
      out = add_block<format>(out, _mm256_add_epi32(one, two), x, first + b, grids, b);
    }
  }
  return out;
}

template <WeightFormat format, int block>
void few_rows(int64_t rows, int64_t K, const float *x, int64_t x_stride, const QuantizedMatrix &w,
            int64_t first, int64_t columns, float *c, int64_t c_stride) {
  Grids<kEight> grids;
  for (int64_t n = 0; n < columns; n += kEight) {
    int64_t number[kEight];
    const uint8_t *from[kEight];
    for (int i = 0; i < kEight; i++) {
      number[i] = first + min_of(n + i, columns - 1);
      from[i] = w.values + number[i] * w.row;
    }
    for (int64_t b = 0; b < K / block; b += kBlocks) {
      const int64_t blocks = min_of(kBlocks, K / block - b);
      grids.read(w, number, b * block, blocks, block);
      for (int64_t r = 0; r < rows; r++) {
        float *to = c + r * c_stride + n;
        const __m256 out = b > 0 ? _mm256_loadu_ps(to) : _mm256_setzero_ps();
        _mm256_storeu_ps(to, few_row_blocks<format, block>(
                                 out, quantized_row(x + r * x_stride, K, block), from, w.row, b,
                                 blocks, grids));
      }
    }
  }
}

/* words[j]: the j-th 32 bits of each of eight columns. */
inline void transpose_words(const uint8_t *const columns[kEight], int64_t at, __m256i words[4]) {
  __m256i v[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    v[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(load_128(columns[i] + at)),
                                   load_128(columns[i + 4] + at), 1);
  const __m256i a = _mm256_unpacklo_epi32(v[0], v[1]), b = _mm256_unpacklo_epi32(v[2], v[3]);
  const __m256i c = _mm256_unpackhi_epi32(v[0], v[1]), d = _mm256_unpackhi_epi32(v[2], v[3]);
  words[0] = _mm256_unpacklo_epi64(a, b), words[1] = _mm256_unpackhi_epi64(a, b);
  words[2] = _mm256_unpacklo_epi64(c, d), words[3] = _mm256_unpackhi_epi64(c, d);
}

/* Pairs of numbers along k, from one word of each column to `to`, one after the other. */
template <WeightFormat format>
inline void unpack_word(__m256i word, __m256i zeros, int16_t *to) {
  constexpr int kStride = 2 * kSixteen;
  if constexpr (format == kInt8) {
    const __m256i lane = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        -128, 0, -128, 1, -128, 4, -128, 5, -128, 8, -128, 9, -128, 12, -128, 13));
    const __m256i next = _mm256_broadcastsi128_si256(_mm_setr_epi8(
        -128, 2, -128, 3, -128, 6, -128, 7, -128, 10, -128, 11, -128, 14, -128, 15));
    store_256(to, _mm256_srai_epi16(_mm256_shuffle_epi8(word, lane), 8));
    store_256(to + kStride, _mm256_srai_epi16(_mm256_shuffle_epi8(word, next), 8));
  } else {
    const __m256i mask = _mm256_set1_epi32(0x000f000f);
    /* Codes 2 m and 2 m + 1 of a word stand at bits 8 m and 8 m + 4. */
    const __m256i pairs[4] = {
        _mm256_blend_epi16(word, _mm256_slli_epi32(word, 12), 0xaa),
        _mm256_blend_epi16(_mm256_srli_epi32(word, 8), _mm256_slli_epi32(word, 4), 0xaa),
        _mm256_blend_epi16(_mm256_srli_epi32(word, 16), _mm256_srli_epi32(word, 4), 0xaa),
        _mm256_blend_epi16(_mm256_srli_epi32(word, 24), _mm256_srli_epi32(word, 12), 0xaa)};
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      __m256i codes = _mm256_and_si256(pairs[j], mask);
      if constexpr (format == kMxfp4)
        codes = _mm256_shuffle_epi8(
            mxfp4_table(), _mm256_or_si256(codes, _mm256_set1_epi16(static_cast<int16_t>(0x8000))));
      store_256(to + j * kStride, _mm256_sub_epi16(codes, zeros));
    }
  }
}

/* panel[k / 2][i]: the pair of numbers at k of column i. */
template <WeightFormat format>
inline void write_panel(const uint8_t *const columns[kSixteen], const uint8_t *const next[kSixteen],
                 int64_t k, int64_t K, int64_t block, const Grids<kSixteen> &grids,
                 int16_t *panel) {
  constexpr int kStep = format == kInt8 ? 16 : 32; /* of k in 16 bytes */
  for (int64_t done = 0; done < K; done += kStep) {
    const int64_t at = format == kInt8 ? k + done : (k + done) / 2;
    for (int half = 0; half < 2; half++) {
      __m256i words[4], zeros = _mm256_set1_epi16(kOffset);
      if constexpr (format == kInt4) {
        zeros = load_256(grids.zeros + done / block * kSixteen + half * kEight);
        zeros = _mm256_or_si256(zeros, _mm256_slli_epi32(zeros, 16));
      }
      transpose_words(columns + half * kEight, at, words);
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++)
        unpack_word<format>(words[j], zeros,
                            panel + (done + j * kStep / 4) * kSixteen + half * 2 * kEight);
    }
    if (done % (4 * kStep) == 0)
      for (int i = 0; i < kSixteen; i++)
        __builtin_prefetch(next[i] + (format == kInt8 ? done : done / 2), 0, 3);
  }
}

/* The sums of a tile: of R rows with the sixteen columns of a panel. */
#if defined(__AVX512F__)

constexpr int kTallest = 12;

/* Whether the processor multiplies pairs and adds them at once. */
inline bool has_pairs() { return __builtin_cpu_supports("avx512vnni") != 0; }

template <int R>
struct Sums {
  __m512i of[R];

  void clear() {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) of[r] = _mm512_setzero_si512();
  }
  /* Pairs of x at k times the panel's; the instruction is beyond this level's flags. */
  template <bool pairs>
  void add(const int32_t *const x[R], int64_t k, const int16_t *panel) {
    const __m512i right = _mm512_loadu_si512(panel);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      const __m512i pair = _mm512_set1_epi32(x[r][k]);
      if constexpr (pairs)
        asm volatile("vpdpwssd %1, %2, %0" : "+v"(of[r]) : "v"(pair), "v"(right));
      else
        of[r] = _mm512_add_epi32(of[r], _mm512_madd_epi16(pair, right));
    }
  }
  /* c += sums * x_scale * scales */
  void scale(int r, float x_scale, const float *scales, float *c, bool add) const {
    const __m512 sum = _mm512_maskz_cvtepi32_ps(0xffff, of[r]);
    const __m512 scaled = _mm512_mul_ps(sum, _mm512_set1_ps(x_scale));
    const __m512 before = add ? _mm512_loadu_ps(c) : _mm512_setzero_ps();
    _mm512_storeu_ps(c, _mm512_fmadd_ps(scaled, _mm512_loadu_ps(scales), before));
  }
};

#else

constexpr int kTallest = 6;

inline bool has_pairs() { return false; }

template <int R>
struct Sums {
  __m256i of[R][2];

  void clear() {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) of[r][0] = of[r][1] = _mm256_setzero_si256();
  }
  /* Pairs of x at k times the panel's. */
  template <bool>
  void add(const int32_t *const x[R], int64_t k, const int16_t *panel) {
    const __m256i left = load_256(panel), right = load_256(panel + kSixteen);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m256i pair = _mm256_set1_epi32(x[r][k]);
      add_to(&of[r][0], _mm256_madd_epi16(pair, left));
      add_to(&of[r][1], _mm256_madd_epi16(pair, right));
    }
  }
  /* c += sums * x_scale * scales */
  void scale(int r, float x_scale, const float *scales, float *c, bool add) const {
#pragma GCC unroll 2
    for (int v = 0; v < 2; v++, c += kEight, scales += kEight) {
      const __m256 sum = _mm256_cvtepi32_ps(of[r][v]);
      const __m256 scaled = _mm256_mul_ps(sum, _mm256_set1_ps(x_scale));
      const __m256 before = add ? _mm256_loadu_ps(c) : _mm256_setzero_ps();
      _mm256_storeu_ps(c, _mm256_fmadd_ps(scaled, _mm256_load_ps(scales), before));
    }
  }
};

#endif

/* R rows times a panel of `blocks` blocks, from block `first` of the rows on. */
template <int R, bool pairs>
void tile(int64_t blocks, int64_t block, const float *x, int64_t x_stride, int64_t K,
          int64_t first, const int16_t *panel, const float *scales, float *c, int64_t c_stride,
          bool add) {
  const int32_t *from[R];
  for (int r = 0; r < R; r++) {
    const void *row = x + r * x_stride;
    from[r] = static_cast<const int32_t *>(row) + first * block / 2;
  }
  const float *by = x + padded(K) + first;
  for (int64_t b = 0; b < blocks; b++) {
    Sums<R> sums;
    sums.clear();
    for (int64_t k = b * block / 2; k < (b + 1) * block / 2; k++)
      sums.template add<pairs>(from, k, panel + k * 2 * kSixteen);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
      sums.scale(r, by[r * x_stride + b], scales + b * kSixteen, c + r * c_stride, add || b > 0);
  }
}

template <WeightFormat format>
void many_rows(int64_t rows, int64_t K, int64_t block, const float *x, int64_t x_stride,
          const QuantizedMatrix &w, int64_t first, int64_t columns, float *c, int64_t c_stride) {
  alignas(64) int16_t panel[kChunk * kSixteen];
  const bool pairs = has_pairs();
  Grids<kSixteen> grids;
  for (int64_t n = 0; n < columns; n += kSixteen) {
    int64_t number[kSixteen];
    const uint8_t *from[kSixteen], *next[kSixteen];
    for (int i = 0; i < kSixteen; i++) {
      number[i] = first + min_of(n + i, columns - 1);
      from[i] = w.values + number[i] * w.row;
    }
    for (int64_t k = 0; k < K; k += kChunk) {
      const int64_t length = min_of(kChunk, K - k), blocks = length / block;
      const int64_t following = k + kChunk;
      for (int i = 0; i < kSixteen; i++)
        next[i] = following < K ? from[i] + (format == kInt8 ? following : following / 2)
                                : from[i] + kSixteen * w.row;
      grids.read(w, number, k, blocks, block);
      write_panel<format>(from, next, k, length, block, grids, panel);
      int64_t left = (rows + kTallest - 1) / kTallest;
      for (int64_t r = 0; left > 0; left--) {
        const int64_t here = (rows - r + left - 1) / left;
        const auto rows_by = [&]<int R>() {
          (pairs ? tile<R, true> : tile<R, false>)(blocks, block, x + r * x_stride, x_stride, K,
                                                   k / block, panel, grids.scales,
                                                   c + r * c_stride + n, c_stride, k > 0);
        };
#define TRANSOM_TILE(R) \
  case R: rows_by.template operator()<R>(); break;
        switch (here) {
          TRANSOM_TILE(1) TRANSOM_TILE(2) TRANSOM_TILE(3) TRANSOM_TILE(4) TRANSOM_TILE(5)
          TRANSOM_TILE(6)
#if defined(__AVX512F__)
          TRANSOM_TILE(7) TRANSOM_TILE(8) TRANSOM_TILE(9) TRANSOM_TILE(10) TRANSOM_TILE(11)
          TRANSOM_TILE(12)
#endif
        }
#undef TRANSOM_TILE
        r += here;
      }
    }
  }
}

template <WeightFormat format>
void by_format(int64_t rows, int64_t K, int64_t block, const float *x, int64_t x_stride,
               const QuantizedMatrix &w, int64_t first, int64_t columns, float *c, int64_t c_stride) {
  if (rows > 3)
    many_rows<format>(rows, K, block, x, x_stride, w, first, columns, c, c_stride);
  else if (block == 32)
    few_rows<format, 32>(rows, K, x, x_stride, w, first, columns, c, c_stride);
  else if (block == 64)
    few_rows<format, 64>(rows, K, x, x_stride, w, first, columns, c, c_stride);
  else
    few_rows<format, 128>(rows, K, x, x_stride, w, first, columns, c, c_stride);
}

}  // namespace

void quantize_row(const Weight &w, int64_t K, float *x) {
  if (w.integer_block > 0) quantize_row(w.quantized.format, w.integer_block, K, x);
}

void multiply_integers(int64_t rows, int64_t K, const float *x, int64_t x_stride, const Weight &w,
                       int64_t first, int64_t columns, float *c, int64_t c_stride, int64_t l2) {
  Weight exact = w;
  exact.integer_block = 0;
  for (int64_t r = 0, end; r < rows; r = end) {
    const bool quantized = quantized_row(x + r * x_stride, K, w.integer_block).quantized;
    for (end = r + 1; end < rows; end++)
      if (quantized_row(x + end * x_stride, K, w.integer_block).quantized != quantized) break;
    const float *from = x + r * x_stride;
    float *to = c + r * c_stride;
#define TRANSOM_INTEGERS(format) \
  by_format<format>(end - r, K, w.integer_block, from, x_stride, w.quantized, first, columns, to, c_stride)
    if (!quantized)
      multiply(end - r, K, from, x_stride, exact, first, columns, to, c_stride, l2);
    else if (w.quantized.format == kInt8)
      TRANSOM_INTEGERS(kInt8);
    else if (w.quantized.format == kInt4)
      TRANSOM_INTEGERS(kInt4);
    else
      TRANSOM_INTEGERS(kMxfp4);
#undef TRANSOM_INTEGERS
  }
}

#else

/* integer_block() is 0 here. */
void quantize_row(const Weight &, int64_t, float *) {}

void multiply_integers(int64_t, int64_t, const float *, int64_t, const Weight &, int64_t, int64_t,
                       float *, int64_t, int64_t) {}

#endif

}  // namespace transom::TRANSOM_LEVEL
