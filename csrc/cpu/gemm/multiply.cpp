/* multiply() of weight.h.
 *
 * Few rows of x: memory is the limit, and each number of the weight is used where it is read. More
 * rows: a piece of the weight is turned into a panel in L1, and while that is multiplied the next
 * piece is fetched. A weight in panels (packed.h) has been turned beforehand. An element of the
 * product has the same bits either way. */
#include "packed.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Rows of a weight lie at least so many bytes apart where they are read side by side. Only then has
 * each a page of its own, and the processor's prefetchers follow them all: 14.3 instead of 9 GB/s
 * for rows of 1.5 KB, of 15 that one core can read. */
constexpr int64_t kApart = 4096, kMostGap = 8;

/* G vectors of columns `gap` apart, and the gap - 1 columns that follow each, kDepth of k at a
 * time, while whole blocks of them are left. Returns the columns done. */
template <int G, class Source>
inline int64_t multiply_narrow(const Source &w, int64_t rows, int64_t K, const float *x,
                               int64_t x_stride, int64_t first, int64_t gap, int64_t columns,
                               float *c, int64_t c_stride) {
  constexpr int64_t kLanes = G * kWidth, kStride = kLanes * kMostGap;
  alignas(64) float sums[Source::kNarrow * kStride];
  int64_t n = 0;
  for (; n + kLanes * gap <= columns; n += kLanes * gap) {
    for (int64_t i = 0; i < gap; i++) {
      const int64_t here = first + n + i;
      const int64_t following = i + 1 < gap ? here + 1 : first + n + kLanes * gap;
      float *to = gap == 1 ? c + n : sums + i * kLanes;
      const int64_t to_stride = gap == 1 ? c_stride : kStride;
      int64_t k = 0;
      do {
        w.template narrow<G>(rows, here, gap, following, k, min_of(kDepth, K - k), K, x + k,
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

/* Every column that fills a vector; returns how many. */
template <class Source>
inline int64_t multiply_turned(const Source &w, int64_t rows, int64_t K, const float *x,
                               int64_t x_stride, int64_t first, int64_t columns, float *c,
                               int64_t c_stride) {
  int64_t n = 0, gap = 1;
  while (gap < kMostGap && gap * w.row_bytes() < kApart) gap *= 2;
  for (; gap > 0; gap /= 2) {
    /* Of few rows, numbers come too fast for one sum in each element of a vector. */
    const auto columns_by = [&]<int G>() __attribute__((always_inline)) {
      if constexpr (G <= Source::kGroups)
        n += multiply_narrow<G>(w, rows, K, x, x_stride, first + n, gap, columns - n, c + n,
                                c_stride);
    };
    if (rows == 1) columns_by.template operator()<4>();
    if (rows <= 3) columns_by.template operator()<2>();
    columns_by.template operator()<1>();
  }
  return n;
}

template <class Number>
inline int64_t multiply_sweep(int64_t rows, int64_t K, const float *x, int64_t x_stride,
                              const Number *w, int64_t along, int64_t columns, float *c,
                              int64_t c_stride) {
  columns -= columns % kWidth;
  for (int64_t n = 0; n < columns; n += kSweep) {
    const int64_t here = min_of(kSweep, columns - n);
    int64_t k = 0;
    do {
      const int64_t piece = min_of(kDepth, K - k);
      const Number *from = w + k * along + n;
      for (int64_t r = 0; r < rows;) {
        const float *a = x + r * x_stride + k;
        float *to = c + r * c_stride + n;
        const int64_t left = rows - r;
        if (left >= 4)
          sweep<4>(piece, a, x_stride, from, along, here, to, c_stride, k > 0), r += 4;
        else if (left >= 2)
          sweep<2>(piece, a, x_stride, from, along, here, to, c_stride, k > 0), r += 2;
        else
          sweep<1>(piece, a, x_stride, from, along, here, to, c_stride, k > 0), r += 1;
      }
      k += kDepth;
    } while (k < K);
  }
  return columns;
}

template <class Number>
inline void multiply_plain(const Plain &plain, int64_t rows, int64_t K, const float *x,
                           int64_t x_stride, int64_t first, int64_t columns, float *c,
                           int64_t c_stride, int64_t l2) {
  const Numbers<Number> w = {reinterpret_cast<const Number *>(plain.data), plain.row, plain.along};
  int64_t done = 0;
  if (rows <= w.kNarrow && w.along == 1)
    done = multiply_turned(w, rows, K, x, x_stride, first, columns, c, c_stride);
  else if (rows <= w.kNarrow && w.row == 1)
    done = multiply_sweep(rows, K, x, x_stride, w.data + first, w.along, columns, c, c_stride);
  if (done < columns)
    multiply_panels(w, rows, K, x, x_stride, first + done, columns - done, c + done, c_stride, l2);
}

template <class Format>
inline void multiply_stored(const Weight &weight, int64_t rows, int64_t K, const float *x,
                            int64_t x_stride, int64_t first, int64_t columns, float *c,
                            int64_t c_stride, int64_t l2) {
  if (weight.turned) {
    multiply_panels(Turned<Format>{weight.stored}, rows, K, x, x_stride, first, columns, c,
                    c_stride, l2);
    return;
  }
  const Blocks<Format> w = {weight.stored};
  int64_t done = 0;
  if (rows <= w.kNarrow)
    done = multiply_turned(w, rows, K, x, x_stride, first, columns, c, c_stride);
  if (done < columns)
    multiply_panels(w, rows, K, x, x_stride, first + done, columns - done, c + done, c_stride, l2);
}

/* K of a weight whose values stand in a tensor [E,N,K], or in one of bytes. */
inline int64_t depth(const Weight &w, const transom_tensor *values) {
  return w.number >= 0 ? values->shape[2] : w.stored.columns;
}

/* use(format) with the panels that a weight would have, if it would have some. */
template <class Use>
inline void as_panels(const Weight &w, Use use) {
  if (w.number == 1) {
    use(Bf16Panels());
  } else if (w.number == 2) {
    use(F16Panels());
  } else if (w.number < 0 && w.stored.format == kFp8 &&
             w.stored.block_columns % Fp8Panels::kSteps == 0) { /* of which all have one scale */
    use(Fp8Panels());
  }
}

/* True if Fp8Panels::decode() gives every number of the matrix. */
inline bool decodes(const Stored &w, int64_t N) {
  const int64_t rows = w.block_rows == 0 ? N : w.block_rows;
  const int64_t columns = w.block_columns == 0 ? w.columns : w.block_columns;
  for (int64_t n = 0; n < N; n += rows)
    for (int64_t k = 0; k < w.columns; k += columns)
      if (const float scale = w.scale(n, k); !(scale < 0x1p100f && scale > -0x1p100f))
        return false;
  for (int64_t n = 0; n < N; n++) {
    uint8_t largest = 0;
    for (int64_t k = 0; k < w.columns; k++) {
      const uint8_t magnitude = w.values[n * w.row + k] & 0x7f;
      largest = magnitude > largest ? magnitude : largest;
    }
    if (largest == 0x7f) return false;
  }
  return true;
}

template <class Format>
inline void write_matrix(const Weight &w, int64_t N, int64_t K, char *to) {
  typedef typename Format::Unit Unit;
  const bool plain = w.number >= 0;
  const Unit *from = reinterpret_cast<const Unit *>(
      plain ? w.plain.data : reinterpret_cast<const char *>(w.stored.values));
  const int64_t row = plain ? w.plain.row : w.stored.row, along = plain ? w.plain.along : 1;
  const int64_t bytes = panel_bytes<Format>(K);
  constexpr int64_t kSteps = Format::kSteps;
  memset(to, 0, static_cast<size_t>(matrix_bytes<Format>(N, K)));
  for (int64_t n = 0; n < N; n += kPanel, to += bytes)
    for (int64_t k = 0; k < K; k += kLine) /* what is written meanwhile stays in L1 */
      for (int64_t i = 0; i < min_of(kPanel, N - n); i++) {
        const Unit *next = from + (n + i) * row + k * along;
        Unit *at = reinterpret_cast<Unit *>(to) + k * kPanel + i * kSteps;
        const int64_t piece = min_of(kLine, K - k);
        int64_t j = 0;
        for (; j + kSteps <= piece; j += kSteps, at += kSteps * kPanel)
#pragma GCC unroll 4
          for (int s = 0; s < kSteps; s++, next += along) at[s] = *next;
        for (int s = 0; j < piece; j++, s++, next += along) at[s] = *next;
      }
}

}  // namespace

uint64_t panels_bytes(const transom_value *places) {
  const transom_tensor *values = places[0].tensor;
  const Weight w = weight_in(places, 0);
  const int64_t E = values->shape[0], N = values->shape[1], K = depth(w, values);
  int64_t bytes = 0;
  if (E > 0 && N > 0 && K > 0)
    as_panels(w, [&]<class Format>(Format) {
      bytes = flag_bytes(E) + E * matrix_bytes<Format>(N, K);
    });
  return static_cast<uint64_t>(bytes);
}

void write_panels(const transom_value *places, void *panels) {
  const transom_tensor *values = places[0].tensor;
  const int64_t E = values->shape[0], N = values->shape[1];
  char *flags = static_cast<char *>(panels), *to = flags + flag_bytes(E);
  memset(flags, 0, static_cast<size_t>(flag_bytes(E)));
  for (int64_t e = 0; e < E; e++) {
    const Weight w = weight_in(places, e);
    const int64_t K = depth(w, values);
    flags[e] = w.number >= 0 || decodes(w.stored, N);
    as_panels(w, [&]<class Format>(Format) {
      write_matrix<Format>(w, N, K, to);
      to += matrix_bytes<Format>(N, K);
    });
  }
}

Weight weight_at(const transom_call *call, int first, int64_t e) {
  Weight w = weight_in(call->args + first, e);
  if (call->packed == nullptr || call->packed[first] == nullptr) return w;
  const transom_tensor *values = tensor(call, first);
  const char *flags = static_cast<const char *>(call->packed[first]);
  if (flags[e] == 0) return w;
  const int64_t E = values->shape[0], N = values->shape[1], K = depth(w, values);
  as_panels(w, [&]<class Format>(Format) {
    w.columns = N;
    w.panels = flags + flag_bytes(E) + e * matrix_bytes<Format>(N, K);
  });
  return w;
}

void multiply(int64_t rows, int64_t K, const float *x, int64_t x_stride, const Weight &w,
              int64_t first, int64_t columns, float *c, int64_t c_stride, int64_t l2) {
  if (w.fixed > 0) {
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
      as_panels(w, [&]<class Format>(Format) {
        multiply_packed<Format>(w, rows, K, x, x_stride, first + before, columns - before,
                                c + before, c_stride, l2);
      });
    return;
  }
#define TRANSOM_MULTIPLY(how, w) how(w, rows, K, x, x_stride, first, columns, c, c_stride, l2)
  switch (w.number) {
    case 0: return TRANSOM_MULTIPLY(multiply_plain<float>, w.plain);
    case 1: return TRANSOM_MULTIPLY(multiply_plain<bf16>, w.plain);
    case 2: return TRANSOM_MULTIPLY(multiply_plain<f16>, w.plain);
    default: break;
  }
  switch (w.stored.format) {
    case kInt8: return TRANSOM_MULTIPLY(multiply_stored<Int8>, w);
    case kInt4: return TRANSOM_MULTIPLY(multiply_stored<Int4>, w);
    case kFp8: return TRANSOM_MULTIPLY(multiply_stored<Fp8>, w);
    default: return TRANSOM_MULTIPLY(multiply_stored<Mxfp4>, w);
  }
#undef TRANSOM_MULTIPLY
}

}  // namespace transom::TRANSOM_LEVEL
