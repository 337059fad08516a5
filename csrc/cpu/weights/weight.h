/* A weight as it is stored, whatever its format and strides, and its products with rows of float32.
 *
 * Types stand in the level's namespace without internal linkage, since they meet at the linker:
 * gemm/multiply.cpp holds multiply() once for all kernels. */
#pragma once

#include "../base/tensor.h"
#include "formats.h"

namespace transom::TRANSOM_LEVEL {

/* A plain matrix; elements between neighbours along n, along k. */
struct PlainMatrix {
  const char *data;
  int64_t row, along;
};

/* A quantised matrix: rows of bytes, and the grids of its blocks. */
struct QuantizedMatrix {
  WeightFormat format;
  bool e8m0;
  const uint8_t *values, *scales, *zeros;
  int64_t columns, row;              /* numbers in a row, bytes between rows */
  int64_t block_rows, block_columns; /* of a block; 0 is the whole extent */
  int64_t scale_row, scale_along;    /* elements between neighbours of the grid */
  int64_t zero_row, zero_along;

  int row_shift, column_shift; /* log2 of the block's sides, -1 for no power of two */

  int64_t grid_row(int64_t n) const { return row_shift >= 0 ? n >> row_shift : n / block_rows; }
  int64_t grid_column(int64_t k) const {
    return column_shift >= 0 ? k >> column_shift : k / block_columns;
  }
  /* The scale at an element of the grid, counted by scale_row and scale_along. */
  float scale_at(int64_t index) const;
  float scale(int64_t n, int64_t k) const {
    return scale_at(grid_row(n) * scale_row + grid_column(k) * scale_along);
  }
  float zero(int64_t n, int64_t k) const {
    return zeros == nullptr ? 0.0f : zeros[grid_row(n) * zero_row + grid_column(k) * zero_along];
  }
};

/* A matrix w[n][k] of any format, read as it is or as its transpose. */
struct Weight {
  int kind; /* kind() of a plain weight, else -1 */
  PlainMatrix plain;
  QuantizedMatrix quantized;
  bool transposed;       /* a quantised one, read as [k][n]; a plain one has other strides */
  int64_t integer_block; /* see integer_block(); 0: products are taken in float32 */
  const char *panels;    /* the same in panels (weight_panels.h), of this many columns; or NULL */
  int64_t columns;
};

inline float QuantizedMatrix::scale_at(int64_t index) const {
  return e8m0 ? from_e8m0(scales[index]) : reinterpret_cast<const float *>(scales)[index];
}

namespace {

/* log2 of a block's side, of which 0 is the whole extent; -1 for no power of two. */
inline int shift_of(int64_t block) {
  if (block == 0) return 62;
  return (block & (block - 1)) == 0 ? __builtin_ctzll(static_cast<uint64_t>(block)) : -1;
}

inline bool is_quantized(const transom_value *weight) {
  return weight[3].tag == TRANSOM_VALUE_STRING;
}

/* Matrix e of the quantised weight in four arguments, [E,N,K] or, without an e, [N,K]; of a spec
 * that weight_fits() has seen. */
inline QuantizedMatrix quantized_matrix(const transom_value *weight, int64_t e) {
  const transom_tensor *values = weight[0].tensor, *scales = weight[1].tensor;
  const transom_tensor *zeros =
      weight[2].tag == TRANSOM_VALUE_TENSOR ? weight[2].tensor : nullptr;
  const int n = values->ndim - 2, k = n + 1;
  Spec spec = {};
  parse_spec(weight[3].string, &spec);
  QuantizedMatrix out = {};
  out.format = spec.format;
  out.block_rows = spec.rows, out.block_columns = spec.columns;
  out.row_shift = shift_of(spec.rows), out.column_shift = shift_of(spec.columns);
  out.e8m0 = scales->dtype_bits == 8;
  const auto matrix = [&](const transom_tensor *t) {
    return static_cast<const uint8_t *>(at(t, n > 0 ? e * t->strides[0] : 0));
  };
  out.values = matrix(values);
  out.columns = values->shape[k] * kFormats[spec.format].numbers;
  out.row = values->strides[n];
  out.scales = matrix(scales);
  out.scale_row = scales->strides[n], out.scale_along = scales->strides[k];
  if (zeros != nullptr) {
    out.zeros = matrix(zeros);
    out.zero_row = zeros->strides[n], out.zero_along = zeros->strides[k];
  }
  return out;
}

/* Matrix e of a plain tensor [E,N,K]. */
inline Weight plain_weight(const transom_tensor *w, int64_t e) {
  Weight weight = {};
  weight.kind = kind(w);
  weight.plain = {static_cast<const char *>(at(w, e * w->strides[0])), w->strides[1],
                  w->strides[2]};
  return weight;
}

/* Matrix e of a weight, which has four arguments: a plain tensor and three times nothing, or values,
 * scales, zero points and spec. */
inline Weight weight_in(const transom_value *weight, int64_t e) {
  if (!is_quantized(weight)) return plain_weight(weight[0].tensor, e);
  Weight out = {};
  out.kind = -1;
  out.quantized = quantized_matrix(weight, e);
  return out;
}

/* True if the grid of scales or zero points is what a payload of this spec needs. */
inline bool grid_fits(const transom_tensor *values, const transom_tensor *grid, const Spec &spec) {
  const int n = values->ndim - 2, k = n + 1;
  if (grid->ndim != values->ndim) return false;
  const auto blocks = [](int64_t extent, int64_t block) {
    return block == 0 ? (extent > 0) : extent / block + (extent % block > 0);
  };
  for (int i = 0; i < n; i++)
    if (grid->shape[i] != values->shape[i]) return false;
  return grid->shape[n] == blocks(values->shape[n], spec.rows) &&
         grid->shape[k] ==
             blocks(values->shape[k] * kFormats[spec.format].numbers, spec.columns);
}

/* True if a weight's parts fit each other, as the host has made sure of, and the values of a
 * quantised one lie side by side in each row; else the reason is written. */
inline bool weight_fits(const transom_call *call, int first, const char *name,
                        transom_status *status) {
  const transom_value *weight = call->args + first;
  if (!is_quantized(weight)) return true;
  const transom_tensor *values = weight[0].tensor, *scales = tensor(call, first + 1);
  const transom_tensor *zeros = tensor(call, first + 2);
  Spec spec = {};
  bool fit = parse_spec(weight[3].string, &spec) && values->ndim >= 2 && scales != nullptr;
  if (fit) {
    const FormatRow &format = kFormats[spec.format];
    fit = values->dtype_bits == 8 && grid_fits(values, scales, spec) &&
          ((format.float_scales && kind(scales) == 0) ||
           (format.e8m0_scales && is(scales, TRANSOM_UINT, 8))) &&
          (zeros != nullptr) == format.zeros &&
          (zeros == nullptr || (is(zeros, TRANSOM_UINT, 8) && grid_fits(values, zeros, spec)));
  }
  if (!fit) {
    snprintf(status->message, sizeof status->message,
             "%s has parts that do not fit its spec '%.60s'; expected scales and zero points as a "
             "QuantizedWeight has them", name, weight[3].string);
    return false;
  }
  const int last = values->ndim - 1;
  if (values->shape[last] <= 1 || values->strides[last] == 1) return true;
  snprintf(status->message, sizeof status->message,
           "%s has values with a last dim of stride %lld; supported: 1; store each row's values "
           "in one piece",
           name, static_cast<long long>(values->strides[last]));
  return false;
}

/* w[n][k] read as [k][n]. */
inline Weight transposed(Weight w) {
  w.panels = nullptr;
  const int64_t row = w.plain.row;
  w.plain.row = w.plain.along, w.plain.along = row;
  w.transposed = !w.transposed;
  return w;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
