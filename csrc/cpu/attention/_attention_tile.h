/* Keys gathered into a tile, and one query's heads against them.
 *
 * One key head serves many query heads, so the heads of a query are the rows of the products. A
 * piece of at most kKeys keys is widened into a tile that stays in L2, where it serves as keys and
 * as values. Scores are keys times queries: the query is packed once, lanes are heads, and the
 * softmax needs no sum across a vector. Keys that a query does not see are not gathered, or lie
 * outside its range of the tile: there are no masks. Internal linkage, as in vector.h. */
#pragma once

#include "../base/output.h"
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

/* Rows that will be needed next, fetched into L2 line by line while products run: of a burst the
 * lines beyond those that a core can wait for at once would hold up the products. */
struct Soon {
  static constexpr int64_t kMost = 3 * kKeys;
  const char *rows[kMost];
  int32_t bytes[kMost];
  int64_t count = 0, done = 0, begun = 0; /* rows; bytes of the next one */

  /* A row whose last dim is in one piece. */
  void add(const transom_tensor *t, int64_t first) {
    const int last = t->ndim - 1;
    if (count == kMost || t->strides[last] != 1) return;
    rows[count] = static_cast<const char *>(at(t, first));
    bytes[count++] = static_cast<int32_t>(min_of(t->shape[last] * size_of(t), 1 << 16));
  }
  /* What a tile of K steps fetches: at most kLines of a row every kApart steps. */
  Ahead next(int64_t K) {
    constexpr int64_t kLines = 2, kApart = 16, kTogether = 16;
    if (done == count) return {};
    /* Their pages are looked up together, several at a time. */
    if (begun == 0 && done % kTogether == 0)
      for (int64_t i = done; i < min_of(done + kTogether, count); i++)
        __builtin_prefetch(rows[i], 0, 2);
    const int64_t left = bytes[done] - begun, steps = max_of(K / kApart, 1);
    const int64_t lines = clamp(left / (kLine * steps), 1, kLines);
    const Ahead out = {rows[done] + begun, lines, kLine, lines * kLine,
                       max_of(kApart, K * kLine / max_of(left, 1))};
    begun += steps * lines * kLine;
    if (begun >= bytes[done]) done++, begun = 0;
    return out;
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
      decode_cache_row(t, first, tile + i * stride);
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
      write_panel(static_cast<const float *>(q->data) + start, row, along, columns, D, panels);
    else if (q->dtype_code == TRANSOM_BFLOAT)
      write_panel(static_cast<const bf16 *>(q->data) + start, row, along, columns, D, panels);
    else
      write_panel(static_cast<const f16 *>(q->data) + start, row, along, columns, D, panels);
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

/* Where scores are kept, a panel of heads after the other, [kKeys][kPanel] each, and weights,
 * [heads][kKeys]. */
struct Scratch {
  float *scores, *weights;
};
inline Scratch cut_scratch(Cutter *cutter, int64_t heads) {
  const int64_t floats = kKeys * up_to(heads, kPanel);
  return {cutter->part(floats), cutter->part(floats)};
}

/* multiply_panel(), between whose tiles' steps `soon` is fetched. */
inline void multiply_panel(int64_t rows, int64_t K, const float *a, int64_t a_stride,
                           const float *b, int64_t b_stride, float *c, int64_t c_stride, bool add,
                           Soon *soon) {
  int64_t left = (rows + kTileRows - 1) / kTileRows;
  if (soon == nullptr || soon->done == soon->count)
    return multiply_panel(rows, K, a, a_stride, b, b_stride, c, c_stride, add);
  for (; left > 0; left--) {
    const int64_t r = (rows + left - 1) / left;
    multiply_panel(r, K, a, a_stride, b, b_stride, c, c_stride, add, soon->next(K));
    rows -= r;
    a += r * a_stride;
    c += r * c_stride;
  }
}

/* scores = `count` keys times packed heads; scores begin with those of the first key. */
inline void score(const float *panels, int64_t heads, int64_t D, const float *keys,
                  int64_t key_stride, int64_t count, float *scores, Soon *soon) {
  for (int64_t h = 0; h < heads; h += kPanel, panels += D * kPanel, scores += kKeys * kPanel) {
    if (D == 0) memset(scores, 0, static_cast<size_t>(count * kPanel) * sizeof(float));
    for (int64_t d = 0; d < D; d += kDepth) {
      multiply_panel(count, min_of(kDepth, D - d), keys + d, key_stride, panels + d * kPanel,
                     kPanel, scores, kPanel, d > 0, soon);
    }
  }
}

/* out = the values of `count` keys, value_dim columns of their tile, under the softmax of the
 * scores. Everything in `out` is overwritten. */
inline void add_up(int64_t heads, float scale, const float *values, int64_t value_stride,
                   int64_t value_dim, int64_t count, Scratch scratch, Collected out,
                   int64_t out_stride, Soon *soon) {
  for (int64_t h = 0; h < heads; h += kPanel) {
    float *scores = scratch.scores + h * kKeys;
    weigh(scores, count, scale, out.largest + h, out.mass + h);
    for (int64_t j = 0; j < count; j += kWidth)
      for (int64_t i = 0; i < kPanel; i += 4) {
        vf four[4];
        transpose(scores + j * kPanel + i, kPanel, four);
        for (int64_t r = 0; r < 4; r++)
          store(scratch.weights + (h + i + r) * kKeys + j, four[r]);
      }
  }
  for (int64_t d = 0; d < value_dim; d += kPanel)
    multiply_panel(heads, count, scratch.weights, kKeys, values + d, value_stride, out.sum + d,
                   out_stride, false, soon);
}

/* `heads` packed heads against `count` keys, 1..kKeys. */
inline void attend(const float *panels, int64_t heads, int64_t D, float scale, const float *keys,
                   int64_t key_stride, const float *values, int64_t value_stride,
                   int64_t value_dim, int64_t count, Scratch scratch, Collected out,
                   int64_t out_stride, Soon *soon) {
  score(panels, heads, D, keys, key_stride, count, scratch.scores, soon);
  add_up(heads, scale, values, value_stride, value_dim, count, scratch, out, out_stride, soon);
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
        with_type_of(o, [&]<class Number>(const Number *) {
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
