/* Keys gathered into a tile, and one query's heads against them.
 *
 * One key head serves many query heads, so the heads of a query are the rows of the products. A
 * piece of at most kKeys keys is widened into a tile that stays in L2, where it serves as keys and
 * as values. Scores are keys times queries: the query is packed once, lanes are heads, and the
 * softmax needs no sum across a vector. Keys that a query does not see are not gathered, or lie
 * outside its range of the tile: there are no masks. Internal linkage, as in vector.h. */
#pragma once

#include "../output.h"
#include "_cache_rows.h"
#include "_softmax.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Keys of a piece. The order of all sums follows from it: it must not depend on sizes or threads.
 * 128 keys are a chain of multiply_panel and the window of DeepSeek-V4. */
constexpr int64_t kKeys = 128;
static_assert(kKeys <= kDepth && kKeys % kWidth == 0);

/* Floats between rows of a tile: kPanel may be read from the last column on, and rows of a power of
 * two would share cache sets. */
inline int64_t tile_stride(int64_t width) { return up_to(width, kPanel) + 16; }

/* Rows that will be needed next, fetched into L2 a few at a time while products run. */
struct Soon {
  static constexpr int64_t kMost = 3 * kKeys;
  const char *rows[kMost];
  int32_t bytes[kMost];
  int64_t count = 0, done = 0;

  /* A row whose last dim is in one piece. */
  void add(const transom_tensor *t, int64_t first) {
    const int last = t->ndim - 1;
    if (count == kMost || t->strides[last] != 1) return;
    rows[count] = static_cast<const char *>(at(t, first));
    bytes[count++] = static_cast<int32_t>(min_of(t->shape[last] * size_of(t), 1 << 16));
  }
  void fetch(int64_t most) {
    for (const int64_t stop = min_of(done + most, count); done < stop; done++)
      for (int32_t i = 0; i < bytes[done]; i += 64) __builtin_prefetch(rows[done] + i, 0, 2);
  }
};

/* tile[i] = row list[i] of t, rows of its last dim that are `step` elements apart and begin with
 * element `origin`, as float32; packed rows are decoded. */
inline void gather(const transom_tensor *t, int64_t origin, int64_t step, const int64_t *list,
                   int64_t count, float *tile, int64_t stride) {
  const int last = t->ndim - 1;
  for (int64_t i = 0; i < count; i++) {
    const int64_t first = origin + list[i] * step;
    if (t->dtype_code == TRANSOM_UINT)
      decode_row(t, first, tile + i * stride);
    else
      read_row(t, first, t->strides[last], t->shape[last], tile + i * stride);
  }
}

/* Rows of batch b of t[B,N,D]. */
inline void gather(const transom_tensor *t, int64_t b, const int64_t *list, int64_t count,
                   float *tile, int64_t stride) {
  gather(t, b * t->strides[0], t->strides[1], list, count, tile, stride);
}

/* Heads of a query, packed: panels of kPanel heads, [D][kPanel] each. */
inline void pack_heads(const transom_tensor *q, int64_t first, int64_t heads, float *panels) {
  const int64_t D = q->shape[3], row = q->strides[2], along = q->strides[3];
  for (int64_t h = 0; h < heads; h += kPanel) {
    const int64_t start = first + h * row, columns = min_of(kPanel, heads - h);
    if (q->dtype_bits == 32)
      pack(static_cast<const float *>(q->data) + start, row, along, columns, D, panels);
    else if (q->dtype_code == TRANSOM_BFLOAT)
      pack(static_cast<const bf16 *>(q->data) + start, row, along, columns, D, panels);
    else
      pack(static_cast<const f16 *>(q->data) + start, row, along, columns, D, panels);
    panels += D * kPanel;
  }
}

/* What the heads of a query have collected, by head: [heads] and [heads][stride]. Padded heads
 * have a largest and a mass, and no row of the sum. */
struct Collected {
  float *largest, *mass, *sum;
};

/* Cuts memory into parts, or counts it where there is none. */
struct Cutter {
  float *base;
  int64_t floats = 0;
  float *part(int64_t n) {
    float *start = base == nullptr ? nullptr : base + floats;
    floats += up_to(n, 16);
    return start;
  }
  Collected collected(int64_t lanes, int64_t sums) {
    float *largest = part(lanes), *mass = part(lanes);
    return {largest, mass, part(sums)};
  }
};

/* Where attend() keeps its scores, [kKeys][kPanel], and weights, [heads][kKeys]. */
struct Scratch {
  float *scores, *weights;
};
inline int64_t scratch_floats(int64_t heads) { return kKeys * (kPanel + up_to(heads, kPanel)); }

/* Rows of `soon` to fetch with each product: all of them in those of 64 heads of 512. */
constexpr int64_t kFetch = 8 * kPanel / 16;

/* `heads` packed heads against `count` keys, 1..kKeys; values are value_dim columns of their tile.
 * Everything in `out` is overwritten. */
inline void attend(const float *panels, int64_t heads, int64_t D, float scale, const float *keys,
                   int64_t key_stride, const float *values, int64_t value_stride,
                   int64_t value_dim, int64_t count, Scratch scratch, Collected out,
                   int64_t out_stride, Soon *soon) {
  for (int64_t h = 0; h < heads; h += kPanel, panels += D * kPanel) {
    if (D == 0) memset(scratch.scores, 0, static_cast<size_t>(count * kPanel) * sizeof(float));
    for (int64_t d = 0; d < D; d += kDepth) {
      if (soon != nullptr) soon->fetch(kFetch);
      multiply_panel(count, min_of(kDepth, D - d), keys + d, key_stride, panels + d * kPanel,
                     kPanel, scratch.scores, kPanel, d > 0);
    }
    weigh(scratch.scores, count, scale, out.largest + h, out.mass + h);
    for (int64_t j = 0; j < count; j += kWidth)
      for (int64_t i = 0; i < kPanel; i += 4) {
        vf turned[4];
        turn(scratch.scores + j * kPanel + i, kPanel, turned);
        for (int64_t r = 0; r < 4; r++)
          store(scratch.weights + (h + i + r) * kKeys + j, turned[r]);
      }
  }
  for (int64_t d = 0; d < value_dim; d += kPanel) {
    if (soon != nullptr) soon->fetch(kFetch);
    multiply_panel(heads, count, scratch.weights, kKeys, values + d, value_stride, out.sum + d,
                   out_stride, false);
  }
}

/* Takes up the next piece of `heads` heads. */
inline void merge(Collected into, Collected next, int64_t heads, int64_t stride) {
  for (int64_t h = 0; h < heads; h++)
    merge(into.largest + h, into.mass + h, into.sum + h * stride, next.largest[h], next.mass[h],
          next.sum + h * stride, stride);
}

/* The result of `heads` heads from `first` on, as element `row` + head of o and lse; what was
 * collected is used up. `past`: o is stored past the caches, see goes_past_caches(). */
inline void finish(Collected from, bool any, int64_t first, int64_t heads, int64_t stride,
                   const transom_tensor *sink, const transom_tensor *o, const transom_tensor *lse,
                   int64_t row, bool past) {
  const int64_t n = o->shape[3];
  for (int64_t h = 0; h < heads; h++) {
    float *sum = from.sum + h * stride;
    float given = 0.0f, norm = kNever;
    void *out = at(o, (row + first + h) * n);
    if (sink != nullptr) given = number(sink, (first + h) * sink->strides[0]);
    if (any) {
      const vf share = all(share_of(from.largest[h], from.mass[h], sink ? &given : nullptr));
      int64_t d = 0;
      if (past)
        as_held(o, [&]<class Number>(const Number *) {
          for (Number *to = static_cast<Number *>(out); d < n; d += kWidth)
            stream(to + d, load(sum + d) * share);
        });
      else if (kind(o) == 0)
        for (float *to = static_cast<float *>(out); d + kWidth <= n; d += kWidth)
          store(to + d, load(sum + d) * share);
      const int64_t done = d;
      for (; d < n; d += kWidth) store(sum + d, load(sum + d) * share);
      write_row(static_cast<char *>(out) + done * size_of(o), kind(o), sum + done, n - done);
      norm = from.largest[h] + log_of(from.mass[h]);
    } else {
      memset(out, 0, static_cast<size_t>(n * size_of(o)));
    }
    static_cast<float *>(lse->data)[row + first + h] = norm;
  }
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
