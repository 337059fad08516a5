/* The rows of a token side by side, in the table's dtype or another. Internal linkage, as in
 * vector.h. */
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

/* Both of whole cache lines, `to` aligned to one. */
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
  bool copies, streams; /* rows as they are; past the caches */
  bool lines;           /* a row is a whole number of lines */
};

/* `out` [B,S,columns * d]: the output, or the caller's tensor with any strides. */
inline Gather describe_gather(const transom_call *call, HashArguments at, int table, int shard,
                              const transom_tensor *out) {
  Gather work = {};
  work.lookup = describe_lookup(call, at, table, shard, 0);
  const Table *t = &work.lookup.table;
  work.out = out;
  const bool same = t->format <= kF16 && kind(out) == static_cast<int>(t->format);
  work.copies = same && (t->d <= 1 || t->along == 1) && (out->shape[2] <= 1 || out->strides[2] == 1);
  work.lines = t->bytes % kLine == 0;
  /* A row in float32; or all rows of a token, if none of them can be streamed alone. */
  int64_t floats = 0;
  if (!work.copies)
    floats = up_to(t->d, kWidth);
  else if (!work.lines)
    floats = (work.lookup.hash.columns * t->bytes + 3) / 4;
  if (floats > 0) work.lookup = describe_lookup(call, at, table, shard, floats);
  return work;
}

struct Copies {
  const transom_tensor *out;
  int64_t columns;
  bool streams; /* each row */
  char *token_rows; /* not NULL: all of a token are put here first, then streamed */

  void token(Place place, const Table *table, const int64_t *rows,
             const int64_t *coming) {
    char *const own = static_cast<char *>(
        at(out, place.b * out->strides[0] + place.s * out->strides[1]));
    char *to = token_rows != nullptr ? token_rows : own;
    const char *values = table->values;
    const int64_t bytes = table->bytes, down = table->down;
    for (int64_t c = 0; c < columns; c++, to += bytes) {
      if (coming != nullptr) prefetch_row(table, coming[c]);
      if (rows[c] < 0)
        memset(to, 0, static_cast<size_t>(bytes));
      else if (streams)
        stream_bytes(to, values + rows[c] * down, bytes);
      else
        copy_bytes(to, values + rows[c] * down, bytes);
    }
    if (token_rows != nullptr) stream_bytes(own, token_rows, columns * bytes);
  }
};

struct Conversions {
  const transom_tensor *out;
  int64_t columns;
  float *wide;

  void token(Place place, const Table *table, const int64_t *rows,
             const int64_t *coming) {
    const int64_t d = table->d, stride = out->strides[2];
    int64_t first = place.b * out->strides[0] + place.s * out->strides[1];
    for (int64_t c = 0; c < columns; c++, first += d * stride) {
      if (coming != nullptr) prefetch_row(table, coming[c]);
      if (rows[c] < 0)
        memset(wide, 0, static_cast<size_t>(d) * sizeof(float));
      else
        read_table<false>(table, rows[c], wide);
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
};

inline void gather_tasks(void *context, int32_t thread) {
  Gather *work = static_cast<Gather *>(context);
  if (work->copies) {
    Copies sink = {work->out, work->lookup.hash.columns, work->streams && work->lines, nullptr};
    if (work->streams && !work->lines)
      sink.token_rows = reinterpret_cast<char *>(floats_of(&work->lookup, thread));
    look_up(&work->lookup, thread, &sink);
    if (work->streams) fence();
  } else {
    Conversions sink = {work->out, work->lookup.hash.columns, floats_of(&work->lookup, thread)};
    look_up(&work->lookup, thread, &sink);
  }
}

inline int32_t run_gather(Gather *work, const transom_call *call) {
  if (work->lookup.tokens == 0 || work->out->shape[2] == 0) return 0;
  prepare_lookup(&work->lookup, call->workspace);
  const transom_tensor *out = work->out;
  const int64_t line = kLine / size_of(out);
  work->streams = work->copies && out->strides[0] % line == 0 && out->strides[1] % line == 0 &&
                  goes_past_caches(out, work->lookup.tokens, out->shape[2]);
  parallel(work->lookup.threads, gather_tasks, work);
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
