/* The gradient of an embedding: what every n-gram that chose a row has as gradient, added up in the
 * order of the tokens.
 *
 * There are three passes, of which the first two only hash. The first counts how many rows of each
 * range of the embedding are read; the second puts a key for each (its row within the range, and the
 * number of the n-gram) where its range begins, parts of the tokens in order; the third has a task
 * for each range, which sorts its keys and walks the rows in order. Equal rows lie side by side then,
 * and their sum is taken in float32 in the order of the tokens, rounded once: the same bits at any
 * number of threads. Each row that is read takes eight bytes of workspace; nothing of the size of the
 * gradient is moved twice. It is bound by memory: dy once, and the embedding's gradient, where all of
 * it is written. */
#pragma once

#include "_embedding_rows.h"
#include "_hash.h"

namespace transom::TRANSOM_LEVEL {
namespace {

constexpr int64_t kKeysOfARange = 512, kMostRanges = 4096, kMostParts = 64;
/* Rows of dy asked for before they are added. */
constexpr int64_t kComing = 8;

struct RowSums {
  Hash hash;
  Embedding shape; /* rows and first of the shard; holds no values */
  const transom_tensor *dy;
  int64_t tokens, columns, d, items;
  int64_t parts, ranges, shift; /* a range: 2^shift rows */
  int32_t threads;
  int64_t *counts; /* [parts,ranges], then where each writes */
  int64_t *starts; /* [ranges+1] */
  int64_t *unique; /* [ranges+1], different rows before each range */
  uint64_t *keys;  /* [items] */
  char *memory;    /* of the threads */
  int64_t thread_bytes;
};

/* Args: the arguments of either gradient. */
template <class Args>
inline RowSums describe_row_sums(const transom_call *call) {
  RowSums work = {};
  work.hash = describe_hash<Args>(call);
  work.dy = tensor(call, Args::DY);
  work.shape.rows = call->args[Args::ROWS].i;
  work.shape.first = call->args[Args::SHARD].count > 0 ? call->args[Args::SHARD].ints[0] : 0;
  work.tokens = work.hash.B * work.hash.S, work.columns = work.hash.columns;
  work.d = work.dy->shape[3], work.items = work.tokens * work.columns;
  const double moved = static_cast<double>(work.items + work.shape.rows) *
                       static_cast<double>(max_of(64, work.d));
  work.threads = threads_for(4.0 * moved, call->threads);
  work.parts = clamp(work.tokens / 64, 1, kMostParts);
  const int64_t wanted = clamp(max_of(work.items / kKeysOfARange, 8 * work.threads), 1, kMostRanges);
  while (work.shape.rows > 0 && (work.shape.rows - 1) >> work.shift >= wanted) work.shift++;
  work.ranges = work.shape.rows > 0 ? ((work.shape.rows - 1) >> work.shift) + 1 : 0;
  /* A thread wants the row numbers of a token while there are no sums yet, and then a sum. */
  work.thread_bytes = max_of(bytes_of([&](Arena &arena) { arena.take<int64_t>(work.columns); }),
                             bytes_of([&](Arena &arena) { arena.take<float>(work.d); }));
  return work;
}

inline bool row_sums_fit(const RowSums *work, transom_status *status) {
  if (!readable(work->dy, "dy", status)) return false;
  if (work->items < INT64_C(1) << 32 && work->shift <= 32) return true;
  snprintf(status->message, sizeof status->message,
           "%lld rows are read of %lld; supported: below 2^32 of 2^44",
           static_cast<long long>(work->items), static_cast<long long>(work->shape.rows));
  return false;
}

inline void lay_out_row_sums(RowSums *work, Arena &arena) {
  lay_out_hash(&work->hash, arena);
  work->counts = arena.take<int64_t>(work->parts * work->ranges);
  work->starts = arena.take<int64_t>(work->ranges + 1);
  work->unique = arena.take<int64_t>(work->ranges + 1);
  work->keys = arena.take<uint64_t>(work->items);
  work->memory = arena.take<char>(work->threads * work->thread_bytes);
}

inline uint64_t row_sums_workspace(RowSums work) {
  Arena arena;
  lay_out_row_sums(&work, arena);
  return arena.bytes();
}

inline float *sum_of(const RowSums *work, int32_t thread) {
  return reinterpret_cast<float *>(work->memory + thread * work->thread_bytes);
}

/* f(item, row) for each n-gram of a part of the tokens whose row this embedding has. */
template <class Found>
inline void each_row(const RowSums *work, int64_t part, int32_t thread, Found found) {
  const Hash hash = work->hash;
  int64_t *rows = reinterpret_cast<int64_t *>(work->memory + thread * work->thread_bytes);
  const int64_t first = work->tokens * part / work->parts;
  const int64_t end = work->tokens * (part + 1) / work->parts;
  if (first == end) return;
  Position position = position_of(&hash, first);
  for (int64_t t = first; t < end; t++, step(&hash, &position)) {
    hash_token(&hash, position, rows);
    for (int64_t c = 0; c < work->columns; c++) {
      const int64_t row = local_row(&work->shape, rows[c]);
      if (row >= 0) found(t * work->columns + c, row);
    }
  }
}

/* Ascending; all are different. Quicksort with the median of three, insertion for the rest, and heap
 * sort where the pivots were bad. Row by row in order of the tokens, as keys of one row come, is
 * seen at once. */
inline void sort_keys(uint64_t *keys, int64_t n, int depth = 48) {
  int64_t sorted = 1;
  while (sorted < n && keys[sorted - 1] < keys[sorted]) sorted++;
  if (sorted >= n) return;
  while (n > 24) {
    if (depth-- == 0) {
      for (int64_t start = n / 2, end = n; end > 1;) {
        if (start > 0) {
          start--;
        } else {
          const uint64_t last = keys[--end];
          keys[end] = keys[0], keys[0] = last;
        }
        const uint64_t moved = keys[start];
        int64_t at = start;
        for (int64_t child; (child = 2 * at + 1) < end; at = child) {
          if (child + 1 < end && keys[child] < keys[child + 1]) child++;
          if (keys[child] <= moved) break;
          keys[at] = keys[child];
        }
        keys[at] = moved;
      }
      return;
    }
    const uint64_t a = keys[0], b = keys[n / 2], c = keys[n - 1];
    const uint64_t pivot = a < b ? (b < c ? b : a < c ? c : a) : (a < c ? a : b < c ? c : b);
    int64_t i = -1, j = n;
    for (;;) {
      while (keys[++i] < pivot) {
      }
      while (keys[--j] > pivot) {
      }
      if (i >= j) break;
      const uint64_t low = keys[j];
      keys[j] = keys[i], keys[i] = low;
    }
    /* The smaller half is sorted by a call, the other one here, so that few calls are open at once. */
    if (j + 1 < n - j - 1) {
      sort_keys(keys, j + 1, depth);
      keys += j + 1, n -= j + 1;
    } else {
      sort_keys(keys + j + 1, n - j - 1, depth);
      n = j + 1;
    }
  }
  for (int64_t i = 1; i < n; i++) {
    const uint64_t moved = keys[i];
    int64_t at = i;
    for (; at > 0 && keys[at - 1] > moved; at--) keys[at] = keys[at - 1];
    keys[at] = moved;
  }
}

/* Keys of all ranges, each range sorted by the task that takes it. */
inline void find_keys(RowSums *work, void *workspace) {
  Arena arena(workspace);
  lay_out_row_sums(work, arena);
  prepare_hash(&work->hash);
  tasks(work->threads, work->parts, [&](int64_t part, int32_t thread) {
    int64_t *counts = work->counts + part * work->ranges;
    memset(counts, 0, static_cast<size_t>(work->ranges) * sizeof(int64_t));
    each_row(work, part, thread, [&](int64_t, int64_t row) { counts[row >> work->shift]++; });
  });
  int64_t at = 0;
  for (int64_t range = 0; range < work->ranges; range++) {
    work->starts[range] = at;
    for (int64_t part = 0; part < work->parts; part++) {
      int64_t *count = work->counts + part * work->ranges + range;
      const int64_t here = *count;
      *count = at, at += here;
    }
  }
  work->starts[work->ranges] = at;
  const int64_t shift = work->shift, within = (INT64_C(1) << shift) - 1;
  tasks(work->threads, work->parts, [&](int64_t part, int32_t thread) {
    int64_t *next = work->counts + part * work->ranges;
    each_row(work, part, thread, [&](int64_t item, int64_t row) {
      work->keys[next[row >> shift]++] =
          static_cast<uint64_t>(row & within) << 32 | static_cast<uint64_t>(item);
    });
  });
}

inline int64_t row_of(const RowSums *work, int64_t range, uint64_t key) {
  return (range << work->shift) + static_cast<int64_t>(key >> 32);
}

inline int64_t start_of_item(const RowSums *work, uint64_t key) {
  const int64_t item = static_cast<int64_t>(key & 0xffffffffu);
  const int64_t t = item / work->columns, c = item % work->columns;
  const int64_t b = t / work->hash.S, s = t % work->hash.S;
  const int64_t *strides = work->dy->strides;
  return b * strides[0] + s * strides[1] + c * strides[2];
}

/* to = the sum of the rows of dy of keys first .. last. */
inline void sum_rows(const RowSums *work, int64_t first, int64_t last, int64_t end, float *sum,
                     void *to) {
  const transom_tensor *dy = work->dy;
  const int64_t along = dy->strides[3], d = work->d;
  for (int64_t i = first; i < last; i++) {
    if (i + kComing < end && along == 1)
      prefetch_bytes(static_cast<const char *>(at(dy, start_of_item(work, work->keys[i + kComing]))),
                     d * size_of(dy));
    Embedding one = {};
    one.kind = kind(dy);
    one.d = d, one.along = along;
    one.values = static_cast<const char *>(at(dy, start_of_item(work, work->keys[i])));
    if (i == first)
      read_embedding<false>(&one, 0, sum);
    else
      read_embedding<true>(&one, 0, sum);
  }
  write_row(to, kind(dy), sum, d);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
