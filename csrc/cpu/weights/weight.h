/* Rows of float32 times a weight as it is stored, whatever its format and strides.
 *
 * What a kernel sees of it: the types, and multiply(), which gemm/multiply.cpp holds once for all
 * of them. They stand in the level's namespace without internal linkage, since they meet at the
 * linker. */
#pragma once

#include "../gemm/tile.h"

namespace transom::TRANSOM_LEVEL {

/* A plain matrix; elements between neighbours along n, along k. */
struct Plain {
  const char *data;
  int64_t row, along;
};

enum StoredFormat { kInt8, kInt4, kFp8, kMxfp4 };

/* A quantised matrix: rows of bytes, and the grids of its blocks. */
struct Stored {
  StoredFormat format;
  bool e8m0;
  const uint8_t *values, *scales, *zeros;
  int64_t columns, row;              /* numbers in a row, bytes between rows */
  int64_t block_rows, block_columns; /* of a block */
  int64_t scale_row, scale_along;    /* elements between neighbours of the grid */
  int64_t zero_row, zero_along;

  int row_shift, column_shift; /* log2 of the block's sides, -1 for no power of two */

  int64_t grid_row(int64_t n) const { return row_shift >= 0 ? n >> row_shift : n / block_rows; }
  int64_t grid_column(int64_t k) const {
    return column_shift >= 0 ? k >> column_shift : k / block_columns;
  }
  float scale(int64_t n, int64_t k) const {
    const int64_t at = grid_row(n) * scale_row + grid_column(k) * scale_along;
    if (!e8m0) return reinterpret_cast<const float *>(scales)[at];
    const uint32_t byte = scales[at];
    /* 0 is the subnormal 2^-127, 255 is NaN */
    return bits_as<float>(byte == 0 ? 1u << 22 : byte == 255 ? 0x7fc00000u : byte << 23);
  }
  float zero(int64_t n, int64_t k) const {
    return zeros == nullptr ? 0.0f : zeros[grid_row(n) * zero_row + grid_column(k) * zero_along];
  }
};

/* A matrix w[n][k] of any format, its k running or, `turned`, its n. */
struct Weight {
  int number; /* kind() of a plain weight, else -1 */
  Plain plain;
  Stored stored;
  bool turned;
  int64_t fixed; /* fixed_block() where rows of x went through fix_row(), else 0 */
  const char *panels; /* the same in panels (packed.h), of this many columns; or NULL */
  int64_t columns;
};

namespace {

/* Floats between rows of x beyond their length: rows of a power of two would share cache sets. */
constexpr int64_t kPad = 16;

inline int64_t padded(int64_t k) { return up_to(k, kWidth) + kPad; }

/* log2 of a block's side, of which 0 is the whole extent; -1 for no power of two. */
inline int shift_of(int64_t block) {
  if (block == 0) return 62;
  return (block & (block - 1)) == 0 ? __builtin_ctzll(static_cast<uint64_t>(block)) : -1;
}

/* Matrix e of a quantised weight in its four places. */
inline Stored stored_at(const transom_value *places, int64_t e) {
  const transom_tensor *values = places[0].tensor, *scales = places[1].tensor;
  const transom_tensor *zeros =
      places[2].tag == TRANSOM_VALUE_TENSOR ? places[2].tensor : nullptr;
  const char *spec = places[3].string;
  Stored out = {};
  out.format = strncmp(spec, "int8", 4) == 0   ? kInt8
               : strncmp(spec, "int4", 4) == 0 ? kInt4
               : strncmp(spec, "fp8", 3) == 0  ? kFp8
                                               : kMxfp4;
  long long rows = 0, columns = 0;
  sscanf(strchr(spec, ':') + 1, "%lldx%lld", &rows, &columns);
  out.block_rows = rows, out.block_columns = columns;
  out.row_shift = shift_of(rows), out.column_shift = shift_of(columns);
  out.e8m0 = scales->dtype_bits == 8;
  out.values = static_cast<const uint8_t *>(at(values, e * values->strides[0]));
  out.columns = values->shape[2] * (out.format == kInt4 || out.format == kMxfp4 ? 2 : 1);
  out.row = values->strides[1];
  out.scales = static_cast<const uint8_t *>(at(scales, e * scales->strides[0]));
  out.scale_row = scales->strides[1], out.scale_along = scales->strides[2];
  if (zeros != nullptr) {
    out.zeros = static_cast<const uint8_t *>(at(zeros, e * zeros->strides[0]));
    out.zero_row = zeros->strides[1], out.zero_along = zeros->strides[2];
  }
  return out;
}

/* Matrix e of a plain tensor [E,N,K]. */
inline Weight plain_weight(const transom_tensor *w, int64_t e) {
  Weight weight = {};
  weight.number = kind(w);
  weight.plain = {static_cast<const char *>(at(w, e * w->strides[0])), w->strides[1],
                  w->strides[2]};
  return weight;
}

/* Matrix e of a weight, which stands in four places: one plain tensor and three times nothing, or
 * values, scales, zero points and format. */
inline Weight weight_in(const transom_value *places, int64_t e) {
  if (places[3].tag != TRANSOM_VALUE_STRING) return plain_weight(places[0].tensor, e);
  Weight weight = {};
  weight.number = -1;
  weight.stored = stored_at(places, e);
  return weight;
}

/* Numbers of a block if rows of x with K numbers of `x_kind` are multiplied in integers, else 0.
 * Rows of 16 bits lose less by it than their result's rounding; float32 rows would show it, and
 * sums of few products. */
inline int64_t fixed_block([[maybe_unused]] const Weight &w, [[maybe_unused]] int64_t K,
                           [[maybe_unused]] int x_kind) {
#if defined(__AVX2__)
  if (w.number >= 0 || w.turned || w.stored.format == kFp8 || x_kind == 0 || K < 256) return 0;
  if (K % 64 != 0) return 0;
  for (int64_t block = 128; block >= 32; block /= 2)
    if (w.stored.block_columns % block == 0 && K % block == 0) return block;
#endif
  return 0;
}

/* Floats between rows of x that fix_row() turns. */
inline int64_t fixed_stride(int64_t K, int64_t block) {
  return padded(K) + (block > 0 ? up_to(2 * (K / block) + 1, kWidth) : 0);
}

/* w[n][k] read as [k][n]. */
inline Weight transposed(Weight w) {
  w.panels = nullptr;
  const int64_t row = w.plain.row;
  w.plain.row = w.plain.along, w.plain.along = row;
  w.turned = !w.turned;
  return w;
}

}  // namespace

/* Bytes of a weight in panels: its four places, whose data may be NULL; 0 where multiply() takes it
 * as it is stored. */
uint64_t panels_bytes(const transom_value *places);

/* Writes them. */
void write_panels(const transom_value *places, void *panels);

/* Matrix e of a call's weight, with its panels if the call brings some. */
Weight weight_at(const transom_call *call, int first, int64_t e);

/* A row of x, in place, as w.fixed wants it (integers.h). */
void fix_row(const Weight &w, int64_t K, float *x);

/* multiply() with w.fixed > 0. */
void multiply_integers(int64_t rows, int64_t K, const float *x, int64_t x_stride, const Weight &w,
                       int64_t first, int64_t columns, float *c, int64_t c_stride, int64_t l2);

/* c[r][i] = sum over k of x[r][k] * w[first + i][k]. Rows of c have room for a multiple of kPanel
 * columns beyond any multiple of kWidth. l2: bytes of the second-level cache. */
void multiply(int64_t rows, int64_t K, const float *x, int64_t x_stride, const Weight &w,
              int64_t first, int64_t columns, float *c, int64_t c_stride, int64_t l2);

}  // namespace transom::TRANSOM_LEVEL
