/* The formats of quantised weights: what their specs say, and what their codes mean.
 *
 * One row of kFormats is all that tells a format from another; the codes of few bits (E4M3, E2M1,
 * E8M0 and nibbles) are decoded here and nowhere else. Source: OCP 8-bit Floating Point 1.0 (E4M3),
 * OCP Microscaling Formats 1.0 (E2M1, E8M0). */
#pragma once

#include "../base/vector.h"

namespace transom::TRANSOM_LEVEL {

/* Without internal linkage, since they are parts of what meets at the linker (weight.h). */
enum WeightFormat { kInt8, kInt4, kFp8, kMxfp4 };

struct FormatRow {
  const char *name;
  int numbers;        /* in a byte */
  bool float_scales;  /* float32 is allowed */
  bool e8m0_scales;   /* bytes are allowed */
  bool zeros;         /* each group has a zero point */
  bool whole_numbers; /* numbers and zero points are integers, or halves of some */
  int group;          /* of each row, if the format says it; else 0 */
};

constexpr FormatRow kFormats[] = {
    /* name, numbers, float_scales, e8m0_scales, zeros, whole_numbers, group */
    {"int8", 1, true, false, false, true, 0},
    {"int4", 2, true, false, true, true, 0},
    {"fp8", 1, true, true, false, false, 0},
    {"mxfp4", 2, false, true, false, true, 32},
};

/* `<format>:<rows>x<columns>`: the block that has one scale; 0 is the whole extent. */
struct Spec {
  WeightFormat format;
  int64_t rows, columns;
};

namespace {

/* A number of at most 18 digits from *text on, which then points behind it; -1 if there is none. */
inline int64_t parse_number(const char **text) {
  int64_t number = 0;
  int digits = 0;
  for (; **text >= '0' && **text <= '9'; (*text)++, digits++) {
    if (digits == 18) return -1;
    number = 10 * number + (**text - '0');
  }
  return digits > 0 ? number : -1;
}

/* False for what is no spec. */
inline bool parse_spec(const char *text, Spec *spec) {
  for (int i = 0; i < 4; i++) {
    const size_t length = strlen(kFormats[i].name);
    if (strncmp(text, kFormats[i].name, length) != 0 || text[length] != ':') continue;
    const char *at = text + length + 1;
    spec->format = static_cast<WeightFormat>(i);
    spec->rows = parse_number(&at);
    if (spec->rows < 0 || *at++ != 'x') return false;
    spec->columns = parse_number(&at);
    if (spec->columns < 0 || *at != '\0') return false;
    const int group = kFormats[i].group;
    return group == 0 || (spec->rows == 1 && spec->columns == group);
  }
  return false;
}

/* ---- E8M0: 2^(byte - 127), of which 0 is the subnormal 2^-127, and 255 is NaN ---- */

inline int32_t mask_of(bool holds) { return -int32_t{holds}; }
template <class Ints>
inline Ints mask_of(Ints holds) {
  return holds;
}

/* The bits of the float32 of a byte, in an int32_t or in a vector of some. */
template <class Ints>
inline Ints e8m0_bits(Ints byte) {
  const Ints half = Ints{} + (1 << 22), bits = byte << 23;
  return (bits > half ? bits : half) | (mask_of(byte == 255) & half);
}

inline float from_e8m0(uint8_t byte) { return bits_as<float>(e8m0_bits(int32_t{byte})); }

/* ---- Nibbles: the low one of a byte is the even number ---- */

inline int nibble(const uint8_t *row, int64_t k) { return (row[k / 2] >> k % 2 * 4) & 15; }

/* kWidth nibbles, a byte each. */
inline vb nibbles(const uint8_t *codes) {
  typedef uint8_t Half __attribute__((vector_size(kWidth / 2)));
  typedef uint16_t Pairs __attribute__((vector_size(kWidth)));
  Half bytes;
  memcpy(&bytes, codes, sizeof bytes);
  const Pairs pairs = __builtin_convertvector(bytes, Pairs);
  return bits_as<vb>(static_cast<Pairs>((pairs | (pairs << 4)) & 0x0f0f));
}

/* ---- E4M3 ---- */

/* Codes, taken as signed bytes and times 128, in 16-bit elements: as float16 of 2^-8 the value,
 * subnormals included. Of a NaN, 0x7f and 0xff, comes a number. As float16 they convert without the
 * penalty that subnormal numbers of float32 have. */
template <class Halves>
inline Halves e4m3_as_f16(Halves codes) {
  return codes & static_cast<int16_t>(0xbf80);
}
constexpr float kOfE4m3AsF16 = 256.0f;

/* Codes, a byte each; NaN is the default one. */
inline vf from_e4m3(vb codes) {
  const vh wide = widen_bytes(codes);
  const vh nan = (wide & 0x7f) == 0x7f;
  const vh bits = (e4m3_as_f16(static_cast<vh>(wide << 7)) & ~nan) | (nan & 0x7e00);
  return widen<f16>(bits_as<vs>(bits)) * kOfE4m3AsF16;
}

inline float from_e4m3(uint8_t code) {
  const vb codes = {static_cast<int8_t>(code)};
  return from_e4m3(codes)[0];
}

/* ---- E2M1 ---- */

/* Twice the value, which is a whole number. */
constexpr int8_t doubled_e2m1(int code) {
  const int e = code >> 1 & 3, m = code & 1, doubled = e == 0 ? m : (2 + m) << (e - 1);
  return static_cast<int8_t>((code & 8) != 0 ? -doubled : doubled);
}

/* By code, plus an offset. */
template <int offset>
struct DoubledE2m1 {
  int8_t values[16];
  constexpr DoubledE2m1() : values() {
    for (int code = 0; code < 16; code++)
      values[code] = static_cast<int8_t>(doubled_e2m1(code) + offset);
  }
};

/* Codes, a byte each, with the sign of a zero. As float16 they are 2^-14 of the value. */
inline vf from_e2m1(vb codes) {
  const vh wide = widen_bytes(codes);
  const vh bits = static_cast<vh>(((wide & 8) << 12) | ((wide & 7) << 9));
  return widen<f16>(bits_as<vs>(bits)) * 16384.0f;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
