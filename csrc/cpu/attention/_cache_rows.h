/* Quantised rows of a key cache (kernels/attention/cache_rows.py), decoded into float32. */
#pragma once

#include "../base/tensor.h"
#include "../weights/formats.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* A row of DeepSeek-V4 has 448 E4M3, 64 bfloat16, a scale (E8M0) for each 64 of the former and a
 * byte of padding; one of DeepSeek-V4.1 has 512 E2M1 and a scale (E4M3) for each 16. */
constexpr int64_t kRow = 512; /* numbers */
constexpr int64_t kV4Bytes = 584, kV4Quantised = 448, kV4Group = 64, kV4Scales = kV4Bytes - 8;
constexpr int64_t kV41Bytes = 288, kV41Scales = 256, kV41Group = 16;

inline void decode_v4(const uint8_t *row, float *to) {
  for (int64_t i = 0; i < kV4Quantised; i += kV4Group) {
    const vf scale = all(from_e8m0(row[kV4Scales + i / kV4Group]));
    for (int64_t j = i; j < i + kV4Group; j += kWidth)
      store(to + j, from_e4m3(load_bytes(row + j)) * scale);
  }
  bf16 rotated[kRow - kV4Quantised];
  memcpy(rotated, row + kV4Quantised, sizeof rotated);
  for (int64_t j = 0; j < kRow - kV4Quantised; j += kWidth)
    store(to + kV4Quantised + j, load(rotated + j));
}

inline void decode_v41(const uint8_t *row, float *to) {
  float scales[kRow / kV41Group];
  for (int64_t i = 0; i < kRow / kV41Group; i += kWidth)
    store(scales + i, from_e4m3(load_bytes(row + kV41Scales + i)));
  for (int64_t i = 0; i < kRow; i += kV41Group)
    for (int64_t j = i; j < i + kV41Group; j += kWidth)
      store(to + j, from_e2m1(nibbles(row + j / 2)) * all(scales[i / kV41Group]));
}

/* The row of t[B,N,R] that begins at element `first`. */
inline void decode_cache_row(const transom_tensor *t, int64_t first, float *to) {
  const int64_t bytes = t->shape[2], stride = t->strides[2];
  const uint8_t *row = static_cast<const uint8_t *>(t->data) + first;
  uint8_t side_by_side[kV4Bytes];
  if (stride != 1) {
    for (int64_t i = 0; i < bytes; i++) side_by_side[i] = row[i * stride];
    row = side_by_side;
  }
  bytes == kV4Bytes ? decode_v4(row, to) : decode_v41(row, to);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
