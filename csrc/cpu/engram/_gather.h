/* The rows of a token side by side, in the embedding's dtype or another. */
#pragma once

#include "../base/output.h"
#include "_lookup.h"

namespace transom::TRANSOM_LEVEL {
namespace {

inline void copy_bytes(char *to, const char *from, int64_t bytes) {
  constexpr int64_t kStep = 4 * kWidth;
  vf v;
  int64_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    memcpy(&v, from + i, sizeof v);
    memcpy(to + i, &v, sizeof v);
  }
  if (i == bytes) return;
  if (bytes < kStep) {
    memcpy(to, from, static_cast<size_t>(bytes));
  } else { /* the last step again, as far as it is new */
    memcpy(&v, from + bytes - kStep, sizeof v);
    memcpy(to + bytes - kStep, &v, sizeof v);
  }
}

/* Both have whole cache lines, and `to` is aligned to one. */
inline void stream_bytes(char *to, const char *from, int64_t bytes) {
  vf v;
  for (int64_t i = 0; i < bytes; i += 4 * kWidth) {
    memcpy(&v, from + i, sizeof v);
    stream(reinterpret_cast<float *>(to + i), v);
  }
}

struct Gather {
  Lookup lookup;
  const transom_tensor *out;
  bool copies; /* rows as they are */
  bool lines;  /* a row is a whole number of cache lines */
};

/* `out` [B,S,columns * d]: the output, or the caller's tensor with any strides. */
template <class Args>
inline Gather describe_gather(const transom_call *call, const transom_tensor *out) {
  Gather work = {};
  work.lookup = describe_lookup<Args>(call, 0);
  const Embedding *e = &work.lookup.embedding;
  work.out = out;
  const bool same = e->kind >= 0 && kind(out) == e->kind;
  work.copies = same && (e->d <= 1 || e->along == 1) && (out->shape[2] <= 1 || out->strides[2] == 1);
  work.lines = e->bytes % kLine == 0;
  /* A row in float32; or all rows of a token, if none of them can be streamed alone. */
  int64_t floats = 0;
  if (!work.copies)
    floats = up_to(e->d, kWidth);
  else if (!work.lines)
    floats = (work.lookup.hash.columns * e->bytes + 3) / 4;
  if (floats > 0) work.lookup = describe_lookup<Args>(call, floats);
  return work;
}

struct Copies {
  const transom_tensor *out;
  int64_t columns;
  bool streams; /* each row */
  char *token_rows; /* if it is given, all of a token are put there first, then streamed */

  void token(Position position, const Embedding *embedding, const int64_t *rows,
             const int64_t *coming) {
    char *const own = static_cast<char *>(
        at(out, position.b * out->strides[0] + position.s * out->strides[1]));
    char *to = token_rows != nullptr ? token_rows : own;
    const char *values = embedding->values;
    const int64_t bytes = embedding->bytes, down = embedding->down;
    for (int64_t c = 0; c < columns; c++, to += bytes) {
      if (coming != nullptr) prefetch_row(embedding, coming[c]);
      if (rows[c] < 0)
        memset(to, 0, static_cast<size_t>(bytes));
      else if (streams)
        stream_bytes(to, values + rows[c] * down, bytes);
      else
        copy_bytes(to, values + rows[c] * down, bytes);
    }
    if (token_rows != nullptr) stream_bytes(own, token_rows, columns * bytes);
  }
  void end() {
    if (streams || token_rows != nullptr) fence();
  }
};

struct Conversions {
  const transom_tensor *out;
  int64_t columns;
  float *wide;

  void token(Position position, const Embedding *embedding, const int64_t *rows,
             const int64_t *coming) {
    const int64_t d = embedding->d, stride = out->strides[2];
    int64_t first = position.b * out->strides[0] + position.s * out->strides[1];
    for (int64_t c = 0; c < columns; c++, first += d * stride) {
      if (coming != nullptr) prefetch_row(embedding, coming[c]);
      if (rows[c] < 0)
        memset(wide, 0, static_cast<size_t>(d) * sizeof(float));
      else
        read_embedding<false>(embedding, rows[c], wide);
      if (out->dtype_bits == 64) {
        double *to = static_cast<double *>(out->data) + first;
        for (int64_t i = 0; i < d; i++) to[i * stride] = static_cast<double>(wide[i]);
      } else if (stride == 1) {
        write_row(at(out, first), kind(out), wide, d);
      } else {
        for (int64_t i = 0; i < d; i++)
          write_row(at(out, first + i * stride), kind(out), wide + i, 1);
      }
    }
  }
  void end() {}
};

inline int32_t run_gather(Gather work, const transom_call *call) {
  const transom_tensor *out = work.out;
  if (work.lookup.tokens == 0 || out->shape[2] == 0) return 0;
  const int64_t line = kLine / size_of(out), columns = work.lookup.hash.columns;
  const bool streams = work.copies && out->strides[0] % line == 0 && out->strides[1] % line == 0 &&
                       goes_past_caches(out, work.lookup.tokens, out->shape[2]);
  if (work.copies)
    look_up(&work.lookup, call->workspace, [&](const LookupWorkspace &own) {
      char *token_rows = reinterpret_cast<char *>(own.floats);
      return Copies{out, columns, streams && work.lines,
                    streams && !work.lines ? token_rows : nullptr};
    });
  else
    look_up(&work.lookup, call->workspace, [&](const LookupWorkspace &own) {
      return Conversions{out, columns, own.floats};
    });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
