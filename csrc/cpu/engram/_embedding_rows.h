/* The rows of a table, plain or quantised, as it is stored: prefetched, copied, or decoded into
 * float32. Addresses are formed in 64 bits from byte strides; nothing of a row is read before its
 * number was compared with the table's. Internal linkage, as in vector.h. */
#pragma once

#include <stdlib.h>

#include "../base/tensor.h"

namespace transom::TRANSOM_LEVEL {
namespace {

enum Format { kF32, kBf16, kF16, kInt8, kInt4, kFp8, kMxfp4 };

struct Table {
  Format format;
  int64_t rows, d;     /* logical */
  int64_t first;       /* of the whole table, if this is a shard */
  const char *values;
  int64_t down, bytes; /* between rows, and of one row that lies in one piece */
  int64_t along;       /* between elements of a plain row, in elements */
  /* One scale, and one zero point, for each group of rows x columns; 0 is the whole extent. */
  int64_t group_rows, group_columns;
  const char *scales;
  int64_t scales_down, scales_along; /* in elements */
  bool e8m0;
  const uint8_t *zeros;
  int64_t zeros_down, zeros_along;
};

/* `at`: the place of a weight [V,d]; the reason is written where it cannot be read. */
inline bool table_fits(const transom_call *call, int at, transom_status *status) {
  const transom_tensor *values = tensor(call, at);
  if (call->args[at + 3].tag != TRANSOM_VALUE_STRING) {
    if (kind(values) >= 0) return true;
    snprintf(status->message, sizeof status->message,
             "table is float64; supported: float32, bfloat16, float16, quantised");
    return false;
  }
  if (values->shape[1] <= 1 || values->strides[1] == 1) return true;
  snprintf(status->message, sizeof status->message,
           "table has values with a last dim of stride %lld; supported: 1; make its values "
           "contiguous", static_cast<long long>(values->strides[1]));
  return false;
}

inline Table describe_table(const transom_call *call, int at, int shard) {
  Table table = {};
  const transom_tensor *values = tensor(call, at);
  const bool quantised = call->args[at + 3].tag == TRANSOM_VALUE_STRING;
  table.rows = values->shape[0], table.d = values->shape[1];
  table.values = static_cast<const char *>(values->data);
  table.down = values->strides[0] * size_of(values), table.along = values->strides[1];
  table.bytes = values->shape[1] * size_of(values);
  table.first = call->args[shard].count > 0 ? call->args[shard].ints[0] : 0;
  if (!quantised) {
    table.format = static_cast<Format>(kind(values));
    return table;
  }
  const char *spec = call->args[at + 3].string;
  table.format = strncmp(spec, "int8", 4) == 0   ? kInt8
                 : strncmp(spec, "int4", 4) == 0 ? kInt4
                 : strncmp(spec, "fp8", 3) == 0  ? kFp8
                                                 : kMxfp4;
  if (table.format == kInt4 || table.format == kMxfp4) table.d *= 2;
  char *end = nullptr;
  table.group_rows = strtoll(strchr(spec, ':') + 1, &end, 10);
  table.group_columns = strtoll(end + 1, nullptr, 10);
  if (table.group_columns == 0 || table.group_columns > table.d) table.group_columns = table.d;
  const transom_tensor *scales = tensor(call, at + 1), *zeros = tensor(call, at + 2);
  table.scales = static_cast<const char *>(scales->data);
  table.scales_down = scales->strides[0], table.scales_along = scales->strides[1];
  table.e8m0 = scales->dtype_bits == 8;
  if (zeros != nullptr) {
    table.zeros = static_cast<const uint8_t *>(zeros->data);
    table.zeros_down = zeros->strides[0], table.zeros_along = zeros->strides[1];
  }
  return table;
}

/* A row's place in this table; -1 if another shard holds it. */
inline int64_t local_row(const Table *table, int64_t row) {
  const uint64_t local = static_cast<uint64_t>(row) - static_cast<uint64_t>(table->first);
  return local < static_cast<uint64_t>(table->rows) ? static_cast<int64_t>(local) : -1;
}

inline int64_t group_of(const Table *table, int64_t row) {
  return table->group_rows == 1 ? row : table->group_rows == 0 ? 0 : row / table->group_rows;
}

/* Lines of a row that are asked for: what follows them the processor's own prefetchers fetch. */
constexpr int64_t kMostLines = 32;

/* gcc 12 takes a function that does nothing but prefetch for one without effects, and drops its
 * calls, unless it is put in their place before anything else. */
#define TRANSOM_KEPT inline __attribute__((always_inline))

TRANSOM_KEPT void prefetch_bytes(const char *from, int64_t bytes) {
  const int64_t asked = min_of(bytes, kMostLines * kLine);
  const char *line = from - reinterpret_cast<uintptr_t>(from) % kLine;
  for (; line < from + asked; line += kLine) __builtin_prefetch(line);
}

TRANSOM_KEPT void prefetch_row(const Table *table, int64_t row) {
  if (row < 0) return;
  prefetch_bytes(table->values + row * table->down, table->bytes);
  if (table->scales == nullptr) return;
  const int64_t group = group_of(table, row);
  __builtin_prefetch(table->scales + group * table->scales_down * (table->e8m0 ? 1 : 4));
  if (table->zeros != nullptr) __builtin_prefetch(table->zeros + group * table->zeros_down);
}

inline float scale_at(const Table *table, int64_t index) {
  if (!table->e8m0) {
    float scale;
    memcpy(&scale, table->scales + index * 4, sizeof scale);
    return scale;
  }
  const uint32_t byte = static_cast<uint8_t>(table->scales[index]);
  return bits_as<float>(byte == 0 ? UINT32_C(1) << 22 : byte == 255 ? 0x7fc00000u : byte << 23);
}

typedef int8_t vb __attribute__((vector_size(kWidth)));
typedef int16_t vh __attribute__((vector_size(2 * kWidth)));
typedef uint8_t vhalf __attribute__((vector_size(kWidth / 2)));
typedef uint16_t vpair __attribute__((vector_size(kWidth)));

/* kWidth bytes of kWidth nibbles, the low one of a byte first. */
inline vb nibbles(const uint8_t *codes) {
  vhalf bytes;
  memcpy(&bytes, codes, sizeof bytes);
  const vpair pairs = __builtin_convertvector(bytes, vpair);
  return bits_as<vb>(static_cast<vpair>((pairs | (pairs << 4)) & 0x0f0f));
}

/* gcc 12 widens by halves what one instruction does. */
inline vi widened(vb bytes) {
#if defined(__AVX512F__)
  return bits_as<vi>(_mm512_maskz_cvtepi8_epi32(0xffff, bits_as<__m128i>(bytes)));
#elif defined(__AVX2__)
  return bits_as<vi>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bits_as<long long>(bytes))));
#else
  return __builtin_convertvector(bytes, vi);
#endif
}

inline vh doubled(vb bytes) {
#if defined(__AVX512F__)
  return bits_as<vh>(_mm256_cvtepi8_epi16(bits_as<__m128i>(bytes)));
#elif defined(__AVX2__)
  return bits_as<vh>(_mm_cvtepi8_epi16(_mm_cvtsi64_si128(bits_as<long long>(bytes))));
#else
  return __builtin_convertvector(bytes, vh);
#endif
}

inline vf from_f16(vh bits) { return widen<f16>(bits_as<vs>(bits)); }

/* kWidth elements before scale and zero point, exactly. */
template <Format kFormat>
inline vf decoded(const uint8_t *codes) {
  vb bytes;
  if constexpr (kFormat == kInt4 || kFormat == kMxfp4)
    bytes = nibbles(codes);
  else
    memcpy(&bytes, codes, sizeof bytes);
  if constexpr (kFormat == kInt8 || kFormat == kInt4)
    return __builtin_convertvector(widened(bytes), vf);
  const vh wide = doubled(bytes);
  if constexpr (kFormat == kFp8) {
    /* As float16 a code is 2^-8 of its value, subnormals included; the sign extension has filled
     * bit 14 too. 0x7f is NaN. */
    const vh nan = static_cast<vh>((wide & 0x7f) == 0x7f) & 0x7e00;
    return from_f16(static_cast<vh>(((wide << 7) & static_cast<int16_t>(0xbfff)) | nan)) * 256.0f;
  }
  /* As float16 a code is 2^-14 of its value. */
  const vh bits = static_cast<vh>(((wide & 8) << 12) | ((wide & 7) << 9));
  return from_f16(bits) * 16384.0f;
}

/* to[0..d) = (or +=) one row; up to the next multiple of the width to may hold anything after. */
template <Format kFormat, bool kAdd>
inline void decode_row(const Table *table, int64_t row, float *to) {
  constexpr bool kPacked = kFormat == kInt4 || kFormat == kMxfp4;
  const uint8_t *codes =
      reinterpret_cast<const uint8_t *>(table->values + row * table->down);
  const int64_t group = group_of(table, row), wide = table->group_columns, d = table->d;
  const int64_t scales = group * table->scales_down, zeros = group * table->zeros_down;
  const bool even = wide % kWidth == 0 || wide >= d;
  vf scale = {}, zero = {};
  int64_t next = 0, column = 0; /* where the next group begins, and its number */
  for (int64_t k = 0; k < d; k += kWidth) {
    if (even) {
      if (k == next) {
        scale = all(scale_at(table, scales + column * table->scales_along));
        if constexpr (kFormat == kInt4)
          zero = all(static_cast<float>(table->zeros[zeros + column * table->zeros_along]));
        next += wide, column++;
      }
    } else {
      for (int64_t j = 0; j < kWidth && k + j < d; j++) {
        const int64_t c = (k + j) / wide;
        scale[j] = scale_at(table, scales + c * table->scales_along);
        if constexpr (kFormat == kInt4)
          zero[j] = static_cast<float>(table->zeros[zeros + c * table->zeros_along]);
      }
    }
    const uint8_t *from = codes + (kPacked ? k / 2 : k);
    uint8_t some[kWidth] = {};
    if (d - k < kWidth) {
      memcpy(some, from, static_cast<size_t>(kPacked ? (d - k) / 2 : d - k));
      from = some;
    }
    vf value = decoded<kFormat>(from);
    if constexpr (kFormat == kInt4) value -= zero;
    value *= scale;
    store(to + k, kAdd ? load(to + k) + value : value);
  }
}

template <class Number, bool kAdd>
inline void plain_row(const Table *table, int64_t row, float *to) {
  const char *start = table->values + row * table->down;
  const Number *from = reinterpret_cast<const Number *>(start);
  const int64_t d = table->d;
  if constexpr (!kAdd) {
    read_numbers(from, table->along, d, to);
  } else if (table->along != 1) {
    alignas(64) float piece[16 * kWidth];
    for (int64_t k = 0; k < d; k += 16 * kWidth) {
      const int64_t n = min_of(16 * kWidth, d - k);
      read_numbers(from + k * table->along, table->along, n, piece);
      for (int64_t j = 0; j < n; j += kWidth) store(to + k + j, load(to + k + j) + load(piece + j));
    }
  } else {
    int64_t k = 0;
    for (; k + kWidth <= d; k += kWidth) store(to + k, load(to + k) + load(from + k));
    if (k < d) store(to + k, load(to + k) + load_some(from + k, d - k));
  }
}

/* One row as float32, put into `to` or added to it; to is padded to a multiple of the width. */
template <bool kAdd>
inline void read_table(const Table *table, int64_t row, float *to) {
  switch (table->format) {
    case kF32: return plain_row<float, kAdd>(table, row, to);
    case kBf16: return plain_row<bf16, kAdd>(table, row, to);
    case kF16: return plain_row<f16, kAdd>(table, row, to);
    case kInt8: return decode_row<kInt8, kAdd>(table, row, to);
    case kInt4: return decode_row<kInt4, kAdd>(table, row, to);
    case kFp8: return decode_row<kFp8, kAdd>(table, row, to);
    default: return decode_row<kMxfp4, kAdd>(table, row, to);
  }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
