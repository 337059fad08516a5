/* Row numbers of n-grams: multiply and XOR in 64 bits, then a floor modulo for each column.
 *
 * A modulo is a product with the reciprocal, never a division. In a vector (a column in each
 * lane) the quotient is taken in float64: x / m is wrong by at most x / m * 2^-52, which is 1/4
 * for |x| <= 2^63 and m >= 2^13, and rounding it to a whole number adds 1/2 (1/8 more where product
 * and sum round apart), so that x - q * m lies within (-m, m) and its low 32 bits tell it exactly
 * for m < 2^31: one addition of m where it is negative gives the floor modulo, of negative x too.
 * Other moduli take 64-bit integers: y = x or ~x has 63 bits, y * floor((2^64 - 1) / m) / 2^64
 * falls short of y / m by less than 1, and -1 - y mod m is the remainder of a negative x. */
#pragma once

#include "../base/kernel.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Columns of one size of n-gram that are taken together: no more than models have heads. What is
 * known of a column stands in arrays of a multiple of kMostLanes at every level. */
constexpr int kLanes = kWidth < 8 ? kWidth : 8;
constexpr int64_t kMostLanes = 8;
typedef uint32_t vlu __attribute__((vector_size(4 * kLanes)));
typedef int32_t vli __attribute__((vector_size(4 * kLanes)));
typedef double vld __attribute__((vector_size(4 * kLanes))); /* half as many */
__extension__ typedef unsigned __int128 u128;

constexpr uint64_t kLeastModulus = UINT64_C(1) << 13, kMostModulus = (UINT64_C(1) << 31) - 1;

/* A matrix of integers or flags as it is read for each token: without the tensor's pointers, which
 * no compiler keeps in registers across a store. */
struct Ids {
  const char *data; /* NULL where it is not given */
  int64_t down, along;
  bool is_32bit;
};

inline Ids ids_of(const transom_tensor *t) {
  if (t == nullptr) return {};
  return {static_cast<const char *>(t->data), t->strides[0], t->strides[1], t->dtype_bits == 32};
}

inline int64_t read(Ids ids, int64_t row, int64_t column) {
  const int64_t at = row * ids.down + column * ids.along;
  if (ids.is_32bit) {
    int32_t id;
    memcpy(&id, ids.data + at * 4, sizeof id);
    return id;
  }
  int64_t id;
  memcpy(&id, ids.data + at * 8, sizeof id);
  return id;
}

/* What a hash is given, and what is made of it once a call. */
struct Hash {
  const transom_tensor *multipliers, *moduli, *offsets;
  Ids tokens, lookback, blocked;
  int64_t B, S, n, h, columns, lanes; /* lanes: h, rounded up */
  int64_t pad;
  uint64_t *factors;                /* [n] */
  double *inverses;                 /* [n-1,lanes], 1 / modulus */
  uint64_t *magics;                 /* [n-1,lanes], (2^64 - 1) / modulus */
  uint64_t *sizes;                  /* [n-1,lanes], the moduli */
  int64_t *starts;                  /* [n-1,lanes], the offsets */
  uint32_t *sizes_32, *starts_32;   /* [n-1,lanes], the same in 32 bits */
  uint32_t *vectored;               /* [n-1], whether the vector formula holds for all of a size */
};

/* Args: the arguments of an operator that hashes. */
template <class Args>
inline Hash describe_hash(const transom_call *call) {
  Hash hash = {};
  hash.multipliers = tensor(call, Args::MULTIPLIERS);
  hash.moduli = tensor(call, Args::MODULI);
  hash.offsets = tensor(call, Args::OFFSETS);
  hash.tokens = ids_of(tensor(call, Args::TOKENS));
  hash.lookback = ids_of(tensor(call, Args::LOOKBACK));
  hash.blocked = ids_of(tensor(call, Args::BLOCKED));
  hash.pad = call->args[Args::PAD].i;
  hash.B = tensor(call, Args::TOKENS)->shape[0], hash.S = tensor(call, Args::TOKENS)->shape[1];
  hash.n = hash.multipliers->shape[0], hash.h = hash.moduli->shape[1];
  hash.columns = (hash.n - 1) * hash.h;
  hash.lanes = up_to(hash.h, kMostLanes);
  return hash;
}

inline void lay_out_hash(Hash *hash, Arena &arena) {
  const int64_t lanes = (hash->n - 1) * hash->lanes;
  hash->inverses = arena.take<double>(lanes);
  hash->magics = arena.take<uint64_t>(lanes), hash->sizes = arena.take<uint64_t>(lanes);
  hash->starts = arena.take<int64_t>(lanes);
  hash->factors = arena.take<uint64_t>(hash->n);
  hash->sizes_32 = arena.take<uint32_t>(lanes), hash->starts_32 = arena.take<uint32_t>(lanes);
  hash->vectored = arena.take<uint32_t>(hash->n);
}

inline void prepare_hash(Hash *hash) {
  for (int64_t g = 0; g < hash->n; g++)
    hash->factors[g] =
        static_cast<uint64_t>(integer(hash->multipliers, g * hash->multipliers->strides[0]));
  for (int64_t g = 0; g + 1 < hash->n; g++) {
    bool all_small = true;
    for (int64_t j = 0; j < hash->lanes; j++) {
      const int64_t lane = g * hash->lanes + j;
      const bool real = j < hash->h;
      const int64_t given =
          real ? integer(hash->moduli, g * hash->moduli->strides[0] + j * hash->moduli->strides[1])
               : static_cast<int64_t>(kLeastModulus);
      /* The operator refuses moduli <= 0; memory must survive them all the same. */
      const uint64_t m = given > 0 ? static_cast<uint64_t>(given) : 1;
      hash->sizes[lane] = m;
      hash->magics[lane] = ~UINT64_C(0) / m;
      hash->inverses[lane] = 1.0 / static_cast<double>(m);
      hash->sizes_32[lane] = static_cast<uint32_t>(m);
      hash->starts[lane] =
          real && hash->offsets != nullptr
              ? integer(hash->offsets, (g * hash->h + j) * hash->offsets->strides[0])
              : 0;
      hash->starts_32[lane] = static_cast<uint32_t>(hash->starts[lane]);
      all_small = all_small && m >= kLeastModulus && m <= kMostModulus;
    }
    hash->vectored[g] = all_small;
  }
}

/* A position in the chunk, which moves on token by token. */
struct Position {
  int64_t b, s;
};

inline Position position_of(const Hash *hash, int64_t token) {
  return {token / hash->S, token % hash->S};
}

inline void step(const Hash *hash, Position *position) {
  if (++position->s == hash->S) position->s = 0, position->b++;
}

/* The id `back` tokens before the position; negative where no n-gram may read. */
inline int64_t id_before(const Hash *hash, Position position, int64_t back) {
  const int64_t p = position.s - back;
  if (p < 0)
    return hash->lookback.data == nullptr ? -1 : read(hash->lookback, position.b, hash->n - 1 + p);
  const char *flags = hash->blocked.data;
  if (flags != nullptr && flags[position.b * hash->blocked.down + p * hash->blocked.along] != 0)
    return -1;
  return read(hash->tokens, position.b, p);
}

inline uint64_t floor_modulo(uint64_t x, uint64_t m, uint64_t magic) {
  const uint64_t sign = static_cast<uint64_t>(static_cast<int64_t>(x) >> 63), y = x ^ sign;
  const uint64_t q = static_cast<uint64_t>(static_cast<u128>(y) * magic >> 64);
  uint64_t r = y - q * m;
  r -= r >= m ? m : 0;
  return sign != 0 ? m - 1 - r : r;
}

/* The low halves of the numbers of both. */
inline vlu low_halves(vld a, vld b) {
  const vlu x = bits_as<vlu>(a), y = bits_as<vlu>(b);
#if defined(__AVX2__)
  return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(x, y, 0, 2, 4, 6);
#endif
}

/* The floor modulo of x by kLanes moduli. */
inline vlu floor_modulo(int64_t x, const double *inverses, const uint32_t *moduli) {
  vld low, high;
  memcpy(&low, inverses, sizeof low);
  memcpy(&high, inverses + kLanes / 2, sizeof high);
  const vld wide = static_cast<double>(x) - vld{};
  /* Adding 1.5 * 2^52 leaves a whole number in the low bits, two's complement if negative. */
  const vlu q = low_halves(wide * low + 0x1.8p52, wide * high + 0x1.8p52);
  vlu m;
  memcpy(&m, moduli, sizeof m);
  const vlu r = static_cast<uint32_t>(x) - q * m;
  return r + (m & bits_as<vlu>(bits_as<vli>(r) >> 31));
}

/* The row numbers of `count` columns: what fills a vector is written as one. */
inline void put_rows(vlu r, const int64_t *starts, const uint32_t *, int64_t count, int64_t *to) {
  uint32_t rest[kLanes];
  memcpy(rest, &r, sizeof rest);
  if (count >= kLanes)
    for (int64_t j = 0; j < kLanes; j++) to[j] = starts[j] + rest[j];
  else
    for (int64_t j = 0; j < count; j++) to[j] = starts[j] + rest[j];
}

inline void put_rows(vlu r, const int64_t *, const uint32_t *starts, int64_t count, int32_t *to) {
  vlu first;
  memcpy(&first, starts, sizeof first);
  r += first;
  if (count >= kLanes)
    memcpy(to, &r, sizeof r);
  else
    memcpy(to, &r, static_cast<size_t>(count) * sizeof(int32_t));
}

/* Row numbers of all columns of one token; int32 wherever the operator promises that they fit. */
template <class Row>
inline void hash_token(const Hash *hash, Position position, Row *rows) {
  bool alive = true;
  uint64_t mix = 0;
  for (int64_t g = 0; g < hash->n; g++) {
    const int64_t id = alive ? id_before(hash, position, g) : -1;
    alive = id >= 0;
    mix ^= static_cast<uint64_t>(alive ? id : hash->pad) * hash->factors[g];
    if (g == 0) continue;
    const int64_t first = (g - 1) * hash->lanes;
    if (hash->vectored[g - 1]) {
      for (int64_t j = 0; j < hash->h; j += kLanes) {
        const int64_t at = first + j;
        const vlu r = floor_modulo(static_cast<int64_t>(mix), hash->inverses + at,
                                   hash->sizes_32 + at);
        put_rows(r, hash->starts + at, hash->starts_32 + at, hash->h - j, rows + j);
      }
    } else {
      for (int64_t j = 0; j < hash->h; j++)
        rows[j] = static_cast<Row>(
            hash->starts[first + j] +
            static_cast<int64_t>(floor_modulo(mix, hash->sizes[first + j], hash->magics[first + j])));
    }
    rows += hash->h;
  }
}

/* Tokens of one task: enough for each thread to take several, few enough to share them evenly. */
inline int64_t tokens_at_once(int64_t tokens, int32_t threads, int64_t most) {
  return clamp((tokens + 4 * threads - 1) / (4 * threads), 1, most);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
