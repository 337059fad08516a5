/* The rows of an embedding, plain or quantised, as it is stored: prefetched, copied, or decoded into
 * float32. Addresses are formed in 64 bits from byte strides; nothing of a row is read before its
 * number was compared with the embedding's. */
#pragma once

#include "../base/kernel.h"
#include "../weights/weight.h"

namespace transom::TRANSOM_LEVEL {
namespace {

struct Embedding {
  int kind;            /* kind() of a plain one, else -1 */
  int64_t rows, d;     /* logical */
  int64_t first;       /* row of the whole embedding, if this is a shard */
  const char *values;
  int64_t down, bytes; /* between rows, and of one row whose elements lie side by side */
  int64_t along;       /* between elements of a plain row, in elements */
  QuantizedMatrix quantized;
};

/* `at`: the argument of a weight [V,d]; the reason is written where it cannot be read. */
inline bool embedding_fits(const transom_call *call, int at, transom_status *status) {
  if (is_quantized(call->args + at)) return weight_fits(call, at, "table", status);
  if (kind(tensor(call, at)) >= 0) return true;
  snprintf(status->message, sizeof status->message,
           "table is float64; supported: float32, bfloat16, float16, quantised");
  return false;
}

inline Embedding describe_embedding(const transom_call *call, int at, int shard) {
  Embedding out = {};
  const transom_tensor *values = tensor(call, at);
  out.rows = values->shape[0], out.d = values->shape[1];
  out.values = static_cast<const char *>(values->data);
  out.down = values->strides[0] * size_of(values), out.along = values->strides[1];
  out.bytes = values->shape[1] * size_of(values);
  out.first = call->args[shard].count > 0 ? call->args[shard].ints[0] : 0;
  out.kind = -1;
  if (!is_quantized(call->args + at)) {
    out.kind = kind(values);
    return out;
  }
  out.quantized = quantized_matrix(call->args + at, 0);
  out.d = out.quantized.columns;
  return out;
}

/* A row's number in this embedding; -1 if another shard holds it. */
inline int64_t local_row(const Embedding *embedding, int64_t row) {
  const uint64_t local = static_cast<uint64_t>(row) - static_cast<uint64_t>(embedding->first);
  return local < static_cast<uint64_t>(embedding->rows) ? static_cast<int64_t>(local) : -1;
}

/* Lines of a row that are asked for; what follows them the processor's own prefetchers fetch. */
constexpr int64_t kMostLines = 32;

/* gcc 12 takes a function that does nothing but prefetch for one without effects, and drops its
 * calls, unless it is put in their place before anything else. */
#define TRANSOM_PREFETCH inline __attribute__((always_inline))

TRANSOM_PREFETCH void prefetch_bytes(const char *from, int64_t bytes) {
  const int64_t asked = min_of(bytes, kMostLines * kLine);
  const char *line = from - reinterpret_cast<uintptr_t>(from) % kLine;
  for (; line < from + asked; line += kLine) __builtin_prefetch(line);
}

TRANSOM_PREFETCH void prefetch_row(const Embedding *embedding, int64_t row) {
  if (row < 0) return;
  prefetch_bytes(embedding->values + row * embedding->down, embedding->bytes);
  if (embedding->kind >= 0) return;
  const QuantizedMatrix &q = embedding->quantized;
  const int64_t block = q.grid_row(row);
  __builtin_prefetch(q.scales + block * q.scale_row * (q.e8m0 ? 1 : 4));
  if (q.zeros != nullptr) __builtin_prefetch(q.zeros + block * q.zero_row);
}

/* kWidth elements before scale and zero point, exactly. */
template <WeightFormat kFormat>
inline vf decoded(const uint8_t *codes) {
  if constexpr (kFormat == kFp8) return from_e4m3(load_bytes(codes));
  if constexpr (kFormat == kMxfp4) return from_e2m1(nibbles(codes));
  const vb bytes = kFormat == kInt4 ? nibbles(codes) : load_bytes(codes);
  return __builtin_convertvector(widen_to_32(bytes), vf);
}

/* to[0..d) = (or +=) one row; up to the next multiple of the width to may hold anything after. */
template <WeightFormat kFormat, bool kAdd>
inline void decode_row(const Embedding *embedding, int64_t row, float *to) {
  constexpr int64_t kNumbers = kFormats[kFormat].numbers; /* in a byte */
  const QuantizedMatrix &q = embedding->quantized;
  const uint8_t *codes = q.values + row * q.row;
  const int64_t block = q.grid_row(row), d = embedding->d;
  const int64_t wide = q.block_columns == 0 ? d : min_of(q.block_columns, d);
  const int64_t scales = block * q.scale_row, zeros = block * q.zero_row;
  const bool even = wide % kWidth == 0 || wide >= d;
  vf scale = {}, zero = {};
  int64_t next = 0, column = 0; /* where the next group begins, and its number */
  for (int64_t k = 0; k < d; k += kWidth) {
    if (even) {
      if (k == next) {
        scale = all(q.scale_at(scales + column * q.scale_along));
        if constexpr (kFormat == kInt4)
          zero = all(static_cast<float>(q.zeros[zeros + column * q.zero_along]));
        next += wide, column++;
      }
    } else {
      for (int64_t j = 0; j < kWidth && k + j < d; j++) {
        const int64_t c = (k + j) / wide;
        scale[j] = q.scale_at(scales + c * q.scale_along);
        if constexpr (kFormat == kInt4)
          zero[j] = static_cast<float>(q.zeros[zeros + c * q.zero_along]);
      }
    }
    const uint8_t *from = codes + k / kNumbers;
    uint8_t some[kWidth] = {};
    if (d - k < kWidth) {
      memcpy(some, from, static_cast<size_t>((d - k) / kNumbers));
      from = some;
    }
    vf value = decoded<kFormat>(from);
    if constexpr (kFormat == kInt4) value -= zero;
    value *= scale;
    store(to + k, kAdd ? load(to + k) + value : value);
  }
}

template <class Number, bool kAdd>
inline void plain_row(const Embedding *embedding, int64_t row, float *to) {
  const char *start = embedding->values + row * embedding->down;
  const Number *from = reinterpret_cast<const Number *>(start);
  const int64_t d = embedding->d;
  if constexpr (!kAdd) {
    read_numbers(from, embedding->along, d, to);
  } else if (embedding->along != 1) {
    alignas(64) float chunk[16 * kWidth];
    for (int64_t k = 0; k < d; k += 16 * kWidth) {
      const int64_t n = min_of(16 * kWidth, d - k);
      read_numbers(from + k * embedding->along, embedding->along, n, chunk);
      for (int64_t j = 0; j < n; j += kWidth) store(to + k + j, load(to + k + j) + load(chunk + j));
    }
  } else {
    int64_t k = 0;
    for (; k + kWidth <= d; k += kWidth) store(to + k, load(to + k) + load(from + k));
    if (k < d) store(to + k, load(to + k) + load_some(from + k, d - k));
  }
}

/* One row as float32, put into `to` or added to it; to is padded to a multiple of the width. */
template <bool kAdd>
inline void read_embedding(const Embedding *embedding, int64_t row, float *to) {
  switch (embedding->kind) {
    case 0: return plain_row<float, kAdd>(embedding, row, to);
    case 1: return plain_row<bf16, kAdd>(embedding, row, to);
    case 2: return plain_row<f16, kAdd>(embedding, row, to);
    default: break;
  }
  switch (embedding->quantized.format) {
    case kInt8: return decode_row<kInt8, kAdd>(embedding, row, to);
    case kInt4: return decode_row<kInt4, kAdd>(embedding, row, to);
    case kFp8: return decode_row<kFp8, kAdd>(embedding, row, to);
    default: return decode_row<kMxfp4, kAdd>(embedding, row, to);
  }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
