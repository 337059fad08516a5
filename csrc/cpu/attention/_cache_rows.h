/* Packed rows of a key cache (kernels/attention/cache_rows.py), decoded into float32. Internal
 * linkage, as in vector.h. */
#pragma once

#include "../base/tensor.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* DeepSeek-V4: 448 E4M3, 64 bfloat16, a scale (E8M0) for each 64 of the former, a byte of padding.
 * DeepSeek-V4.1: 512 E2M1, a scale (E4M3) for each 16. */
constexpr int64_t kV4 = 584, kPlain = 448, kScaled = 64, kV41 = 288, kHalf = 256, kGroup = 16;

typedef uint8_t vb __attribute__((vector_size(kWidth)));

inline vu codes(const uint8_t *p) {
  vb some;
  memcpy(&some, p, sizeof some);
  return __builtin_convertvector(some, vu);
}

inline vf chosen(vi mask, vf yes, vf no) {
  return bits_as<vf>((bits_as<vi>(yes) & mask) | (bits_as<vi>(no) & ~mask));
}

/* Subnormal codes become numbers as integers: as bits of a float they would be subnormal too, which
 * processors multiply slowly. */
inline vf from_e4m3(vu code) {
  const vu magnitude = code & 0x7fu;
  const vf whole = __builtin_convertvector(bits_as<vi>(magnitude), vf) * 0x1p-9f;
  const vf normal = bits_as<vf>((magnitude << 20) + (120u << 23));
  vf value = chosen(bits_as<vi>(magnitude) < 8, whole, normal);
  value = chosen(bits_as<vi>(magnitude) == 0x7f, all(__builtin_nanf("")), value);
  return bits_as<vf>(bits_as<vu>(value) | ((code & 0x80u) << 24));
}

inline vf from_e2m1(vu code) {
  const vu magnitude = code & 7u;
  const vf whole = __builtin_convertvector(bits_as<vi>(magnitude), vf) * 0.5f;
  const vf normal = bits_as<vf>((magnitude << 22) + (126u << 23));
  const vf value = chosen(bits_as<vi>(magnitude) < 2, whole, normal);
  return bits_as<vf>(bits_as<vu>(value) | ((code & 8u) << 28));
}

inline float from_e8m0(uint8_t byte) {
  if (byte == 255) return __builtin_nanf("");
  return bits_as<float>(byte == 0 ? 1u << 22 : static_cast<uint32_t>(byte) << 23);
}

inline void decode_v4(const uint8_t *row, float *to) {
  for (int64_t i = 0; i < kPlain; i += kScaled) {
    const vf scale = all(from_e8m0(row[kV4 - 8 + i / kScaled]));
    for (int64_t j = i; j < i + kScaled; j += kWidth) store(to + j, from_e4m3(codes(row + j)) * scale);
  }
  bf16 rotated[512 - kPlain];
  memcpy(rotated, row + kPlain, sizeof rotated);
  for (int64_t j = 0; j < 512 - kPlain; j += kWidth) store(to + kPlain + j, load(rotated + j));
}

inline void decode_v41(const uint8_t *row, float *to) {
  typedef uint8_t Eight __attribute__((vector_size(8)));
  float scales[512 / kGroup];
  for (int64_t i = 0; i < 512 / kGroup; i += kWidth)
    store(scales + i, from_e4m3(codes(row + kHalf + i)));
  for (int64_t i = 0; i < 512; i += kGroup) {
    Eight both;
    memcpy(&both, row + i / 2, sizeof both);
    const Eight low = both & 15, high = both >> 4;
    const auto apart = __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6,
                                               14, 7, 15);
    uint8_t code[kGroup];
    memcpy(code, &apart, sizeof code);
    for (int64_t j = 0; j < kGroup; j += kWidth)
      store(to + i + j, from_e2m1(codes(code + j)) * all(scales[i / kGroup]));
  }
}

/* The row of t[B,N,R] that begins at element `first`. */
inline void decode_row(const transom_tensor *t, int64_t first, float *to) {
  const int64_t bytes = t->shape[2], stride = t->strides[2];
  const uint8_t *row = static_cast<const uint8_t *>(t->data) + first;
  uint8_t near[kV4];
  if (stride != 1) {
    for (int64_t i = 0; i < bytes; i++) near[i] = row[i * stride];
    row = near;
  }
  bytes == kV4 ? decode_v4(row, to) : decode_v41(row, to);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
