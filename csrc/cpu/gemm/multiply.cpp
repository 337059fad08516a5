/* multiply() of multiply.h.
 *
 * With few rows of x memory is the limit, and each number of the weight is used where it is read.
 * With more rows a chunk of the weight is transposed into a panel in L1, and while that is multiplied
 * the next chunk is fetched. A weight in panels (weight_panels.h) has been transposed beforehand. An
 * element of the product has the same bits either way. */
#include "multiply.h"

#include "weight_panels.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Rows of a weight lie at least so many bytes apart where they are read side by side. Only then has
 * each a page of its own, and the processor's prefetchers follow them all: 14.3 instead of 9 GB/s
 * for rows of 1.5 KB, of 15 that one core can read. */
constexpr int64_t kApart = 4096, kMostGap = 8;

/* G vectors of columns `gap` apart, and the gap - 1 columns that follow each, kDepth of k at a
 * time, while whole blocks of them are left. Returns the columns done. */
template <int G, class Source>
inline int64_t multiply_groups(const Source &w, int64_t rows, int64_t K, const float *x,
                               int64_t x_stride, int64_t first, int64_t gap, int64_t columns,
                               float *c, int64_t c_stride) {
  constexpr int64_t kLanes = G * kWidth, kStride = kLanes * kMostGap;
  alignas(64) float sums[Source::kFewRows * kStride];
  int64_t n = 0;
  for (; n + kLanes * gap <= columns; n += kLanes * gap) {
    for (int64_t i = 0; i < gap; i++) {
      const int64_t here = first + n + i;
      const int64_t following = i + 1 < gap ? here + 1 : first + n + kLanes * gap;
      float *to = gap == 1 ? c + n : sums + i * kLanes;
      const int64_t to_stride = gap == 1 ? c_stride : kStride;
      int64_t k = 0;
      do {
        w.template few_rows<G>(rows, here, gap, following, k, min_of(kDepth, K - k), K, x + k,
                               x_stride, to, to_stride, k > 0);
        k += kDepth;
      } while (k < K);
    }
    for (int64_t r = 0; r < rows && gap > 1; r++)
      for (int64_t i = 0; i < gap; i++)
        for (int64_t l = 0; l < kLanes; l++)
          c[r * c_stride + n + l * gap + i] = sums[r * kStride + i * kLanes + l];
  }
  return n;
}

/* Few rows of x with every column that fills a vector; returns how many. */
template <class Source>
inline int64_t multiply_few_rows(const Source &w, int64_t rows, int64_t K, const float *x,
                                 int64_t x_stride, int64_t first, int64_t columns, float *c,
                                 int64_t c_stride) {
  int64_t n = 0, gap = 1;
  while (gap < kMostGap && gap * w.row_bytes() < kApart) gap *= 2;
  for (; gap > 0; gap /= 2) {
    /* With few rows numbers come too fast for one sum in each element of a vector. */
    const auto columns_by = [&]<int G>() __attribute__((always_inline)) {
      if constexpr (G <= Source::kGroups)
        n += multiply_groups<G>(w, rows, K, x, x_stride, first + n, gap, columns - n, c + n,
                                c_stride);
    };
    if (rows == 1) columns_by.template operator()<4>();
    if (rows <= 3) columns_by.template operator()<2>();
    columns_by.template operator()<1>();
  }
  return n;
}

/* The same for a weight that is stored [K,N]. */
template <class Number>
inline int64_t multiply_sweep(int64_t rows, int64_t K, const float *x, int64_t x_stride,
                              const Number *w, int64_t along, int64_t columns, float *c,
                              int64_t c_stride) {
  columns -= columns % kWidth;
  for (int64_t n = 0; n < columns; n += kSweep) {
    const int64_t here = min_of(kSweep, columns - n);
    int64_t k = 0;
    do {
      const int64_t length = min_of(kDepth, K - k);
      const Number *from = w + k * along + n;
      for (int64_t r = 0; r < rows;) {
        const float *a = x + r * x_stride + k;
        float *to = c + r * c_stride + n;
        const int64_t left = rows - r;
        if (left >= 4)
          sweep<4>(length, a, x_stride, from, along, here, to, c_stride, k > 0), r += 4;
        else if (left >= 2)
          sweep<2>(length, a, x_stride, from, along, here, to, c_stride, k > 0), r += 2;
        else
          sweep<1>(length, a, x_stride, from, along, here, to, c_stride, k > 0), r += 1;
      }
      k += kDepth;
    } while (k < K);
  }
  return columns;
}

template <class Number>
inline void multiply_plain(const PlainMatrix &plain, int64_t rows, int64_t K, const float *x,
                           int64_t x_stride, int64_t first, int64_t columns, float *c,
                           int64_t c_stride, int64_t l2) {
  const Numbers<Number> w = {reinterpret_cast<const Number *>(plain.data), plain.row, plain.along};
  int64_t done = 0;
  if (rows <= w.kFewRows && w.along == 1)
    done = multiply_few_rows(w, rows, K, x, x_stride, first, columns, c, c_stride);
  else if (rows <= w.kFewRows && w.row == 1)
    done = multiply_sweep(rows, K, x, x_stride, w.data + first, w.along, columns, c, c_stride);
  if (done < columns)
    multiply_panels(w, rows, K, x, x_stride, first + done, columns - done, c + done, c_stride, l2);
}

template <class Format>
inline void multiply_quantized(const Weight &weight, int64_t rows, int64_t K, const float *x,
                               int64_t x_stride, int64_t first, int64_t columns, float *c,
                               int64_t c_stride, int64_t l2) {
  if (weight.transposed) {
    multiply_panels(QuantizedRows<Format>{weight.quantized}, rows, K, x, x_stride, first, columns,
                    c, c_stride, l2);
    return;
  }
  const QuantizedColumns<Format> w = {weight.quantized};
  int64_t done = 0;
  if (rows <= w.kFewRows)
    done = multiply_few_rows(w, rows, K, x, x_stride, first, columns, c, c_stride);
  if (done < columns)
    multiply_panels(w, rows, K, x, x_stride, first + done, columns - done, c + done, c_stride, l2);
}

}  // namespace

Weight weight_at(const transom_call *call, int first, int64_t e) {
  Weight w = weight_in(call->args + first, e);
  if (call->packed == nullptr || call->packed[first] == nullptr) return w;
  const transom_tensor *values = tensor(call, first);
  const char *flags = static_cast<const char *>(call->packed[first]);
  if (flags[e] == 0) return w;
  const int64_t E = values->shape[0], N = values->shape[1], K = depth(w, values);
  with_panels_of(w, [&]<class Format>(Format) {
    w.columns = N;
    w.panels = flags + flag_bytes(E) + e * matrix_bytes<Format>(N, K);
  });
  return w;
}

void multiply(int64_t rows, int64_t K, const float *x, int64_t x_stride, const Weight &w,
              int64_t first, int64_t columns, float *c, int64_t c_stride, int64_t l2) {
  if (w.integer_block > 0) {
    multiply_integers(rows, K, x, x_stride, w, first, columns, c, c_stride, l2);
    return;
  }
  if (w.panels != nullptr) {
    /* What lies before the first whole panel comes from where it is stored. */
    const int64_t before = min_of(up_to(first, kPanel) - first, columns);
    if (before > 0) {
      Weight stored = w;
      stored.panels = nullptr;
      multiply(rows, K, x, x_stride, stored, first, before, c, c_stride, l2);
    }
    if (before < columns)
      with_panels_of(w, [&]<class Format>(Format) {
        multiply_weight_panels<Format>(w, rows, K, x, x_stride, first + before, columns - before,
                                       c + before, c_stride, l2);
      });
    return;
  }
#define TRANSOM_MULTIPLY(how, w) how(w, rows, K, x, x_stride, first, columns, c, c_stride, l2)
  switch (w.kind) {
    case 0: return TRANSOM_MULTIPLY(multiply_plain<float>, w.plain);
    case 1: return TRANSOM_MULTIPLY(multiply_plain<bf16>, w.plain);
    case 2: return TRANSOM_MULTIPLY(multiply_plain<f16>, w.plain);
    default: break;
  }
  switch (w.quantized.format) {
    case kInt8: return TRANSOM_MULTIPLY(multiply_quantized<Int8>, w);
    case kInt4: return TRANSOM_MULTIPLY(multiply_quantized<Int4>, w);
    case kFp8: return TRANSOM_MULTIPLY(multiply_quantized<Fp8>, w);
    default: return TRANSOM_MULTIPLY(multiply_quantized<Mxfp4>, w);
  }
#undef TRANSOM_MULTIPLY
}

}  // namespace transom::TRANSOM_LEVEL
