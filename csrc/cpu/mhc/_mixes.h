/* u = x_flat @ fn.T and the squares of x_flat, of tokens whose R streams of D stand side by side in
 * x_flat, K = R * D; and the weighted sum of a token's streams. For mhc_pre, mhc_head and their
 * gradients.
 *
 * One chunk of K is taken at a time: the rows of fn in it stay in L1, widened once for a block of
 * tokens, while groups of tokens pass by, widened too; the next group, and the next chunk of fn, are
 * fetched meanwhile. A sum is a vector until all chunks are in it: each chunk is added up from zero,
 * in kWidth chains along K, and the chunks in their order, whatever the tile or the block. So a
 * token has the same bits alone and among others. */
#pragma once

#include "../base/kernel.h"
#include "../base/output.h"
#include "_sinkhorn.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Tokens and rows of fn of a tile: with its operands it fills the vector registers, of which there
 * are 32 with AVX-512 and on AArch64, else 16. */
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 4, kColumns = 6;
#else
constexpr int kRows = 4, kColumns = 3;
#endif
constexpr int64_t kChunk = 256; /* elements of K in a chunk */
/* Floats between rows of a panel: rows of a power of two would share cache sets. */
constexpr int64_t kPanel = kChunk + 16;
constexpr int64_t kBlock = 64;      /* tokens that a chunk of fn serves */
constexpr int64_t kGroup = kRows;   /* tokens whose products are taken together */
/* Bytes between what is read and what is fetched: rows end where the prefetchers start anew. */
constexpr int64_t kAhead = 1024;

struct Mixes {
  const transom_tensor *x, *fn;
  int64_t first, T; /* tokens first .. first + T of x, numbered from 0 here */
  int64_t R, D, K, N, chunks;
  int64_t sums; /* vectors of a token: N products, then the squares */
};

/* The workspace of a thread. */
struct MixWorkspace {
  float *x, *fn; /* panels [kGroup] and [N] of kPanel */
  vf *sums;      /* [kBlock][sums] */
};

inline Mixes mixes_of(const transom_tensor *x, const transom_tensor *fn, int64_t N) {
  Mixes work = {};
  work.x = x, work.fn = fn, work.N = N, work.sums = N + 1;
  work.T = tokens_of(x, 2);
  work.R = x->shape[x->ndim - 2], work.D = x->shape[x->ndim - 1];
  work.K = work.R * work.D;
  work.chunks = max_of(1, (work.K + kChunk - 1) / kChunk);
  return work;
}

inline MixWorkspace lay_out(const Mixes &work, Arena &arena) {
  MixWorkspace own = {};
  own.x = arena.take<float>(kGroup * kPanel);
  own.fn = arena.take<float>(work.N * kPanel);
  own.sums = arena.take<vf>(kBlock * work.sums);
  return own;
}

/* Where the streams of a token begin, and whether they stand side by side there. */
struct Streams {
  int64_t start, between, last;
  bool side_by_side;
};

inline Streams streams_of(const transom_tensor *x, int64_t token) {
  const int64_t last = x->strides[x->ndim - 1], between = x->strides[x->ndim - 2];
  return {start_of(x, 2, token), between, last, between == x->shape[x->ndim - 1] * last};
}

/* Elements k .. k + n of a token's x_flat, and zeros after them up to the width. */
inline void widen(const transom_tensor *x, int64_t token, int64_t k, int64_t n, float *to) {
  const Streams at = streams_of(x, token);
  const int64_t D = x->shape[x->ndim - 1];
  for (int64_t done = 0; done < n;) {
    const int64_t j = (k + done) / D, d = (k + done) % D;
    const int64_t here = at.side_by_side ? n - done : min_of(D - d, n - done);
    read_row(x, at.start + j * at.between + d * at.last, at.last, here, to + done);
    done += here;
  }
  for (int64_t i = n; i < up_to(n, kWidth); i++) to[i] = 0.0f;
}

/* Where a chunk of x_flat stands in each token, if it is in one run of stride 1. */
struct Run {
  bool whole;
  int64_t offset, n; /* from a token's start; elements */
};

inline Run run_of(const Mixes &work, int64_t chunk) {
  const int64_t k = chunk * kChunk, n = min_of(kChunk, work.K - k);
  if (n <= 0) return {false, 0, 0};
  const Streams at = streams_of(work.x, 0);
  const int64_t j = k / work.D, d = k % work.D;
  return {at.last == 1 && (at.side_by_side || d + n <= work.D), j * at.between + d, n};
}

inline void fetch_row(const transom_tensor *fn, int64_t row, int64_t k, int64_t n) {
  const int64_t size = size_of(fn);
  const char *from = static_cast<const char *>(fn->data) + (row * fn->strides[0] + k) * size;
  for (int64_t i = 0; i < n * size; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

/* A chunk of `rows` tokens as float32; its squares are added to `squares`, or set without `more`. */
template <class Number>
inline void widen_run(const Number *const *from, int64_t rows, int64_t n, float *to, vf *squares,
                      int64_t stride, bool more) {
  vf sums[kGroup] = {};
  for (int64_t k = 0; k < n; k += kWidth)
#pragma GCC unroll 4
    for (int r = 0; r < kGroup; r++) {
      const vf x = load(from[r] + k);
      store(to + r * kPanel + k, x);
      sums[r] += x * x;
    }
  for (int64_t r = 0; r < rows; r++) {
    vf *at = squares + r * stride;
    *at = more ? *at + sums[r] : sums[r];
  }
}

inline void widen_any(const Mixes &work, int64_t first, int64_t rows, int64_t chunk, float *to,
                      vf *squares, int64_t stride, bool more) {
  const int64_t k = chunk * kChunk, n = min_of(kChunk, work.K - k);
  for (int64_t r = 0; r < rows; r++) {
    widen(work.x, work.first + first + r, k, n, to + r * kPanel);
    vf sum = {};
    for (int64_t i = 0; i < n; i += kWidth)
      sum += load(to + r * kPanel + i) * load(to + r * kPanel + i);
    vf *at = squares + r * stride;
    *at = more ? *at + sum : sum;
  }
}

/* The products of a chunk of C rows of fn with R tokens are added to their sums, or set; x, and fn
 * where it is a panel, have zeros after n. This is not inlined, since gcc then runs out of registers
 * in the loop. `size` is n where that is known, which saves a tenth of the time; else 0. */
template <int R, int C, int64_t size = 0, class Weight>
__attribute__((noinline)) void products(const float *x, const Weight *fn, int64_t fn_stride,
                                        int64_t length, vf *sums, int64_t stride, bool more) {
  const int64_t n = size > 0 ? size : length;
  vf here[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) here[r][c] = vf{};
  for (int64_t k = 0; k < n; k += kWidth) {
    vf right[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) right[c] = load(fn + c * fn_stride + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const vf left = load(x + r * kPanel + k);
#pragma GCC unroll 8
      for (int c = 0; c < C; c++) here[r][c] += left * right[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < C; c++) {
      vf *to = sums + r * stride + c;
      *to = more ? *to + here[r][c] : here[r][c];
    }
}

template <int C>
inline void columns(int64_t rows, const float *x, const float *fn, int64_t n, vf *sums,
                    int64_t stride, bool more) {
  switch (rows) {
    case 1: products<1, C>(x, fn, kPanel, n, sums, stride, more); break;
    case 2: products<2, C>(x, fn, kPanel, n, sums, stride, more); break;
    case 3: products<3, C>(x, fn, kPanel, n, sums, stride, more); break;
    default:
      if (n == kChunk)
        products<4, C, kChunk>(x, fn, kPanel, n, sums, stride, more);
      else
        products<4, C>(x, fn, kPanel, n, sums, stride, more);
  }
}

/* A chunk of `tokens` tokens, at most kBlock, that begin at starts[]; with `more` its sums are added
 * to those before. */
inline void add_chunk(const Mixes &work, int64_t first, int64_t tokens, const int64_t *starts,
                      int64_t chunk, bool more, const MixWorkspace &own, vf *sums) {
  const transom_tensor *fn = work.fn;
  const int64_t k = chunk * kChunk, n = min_of(kChunk, work.K - k), N = work.N, stride = work.sums;
  const Run run = run_of(work, chunk), after = run_of(work, chunk + 1);
  const int64_t size = size_of(work.x);
  const char *data = static_cast<const char *>(work.x->data);
  for (int64_t r = 0; r < N; r++)
    read_row(fn, r * fn->strides[0] + k, 1, n, own.fn + r * kPanel);
  const int64_t groups = (tokens + kGroup - 1) / kGroup;
  const int64_t steps = (N + kColumns - 1) / kColumns;
  int64_t row = 0; /* of fn, to be fetched next */
  for (int64_t g = 0; g < groups; g++) {
    const int64_t t = g * kGroup, rows = min_of(kGroup, tokens - t);
    vf *here = sums + t * stride;
    if (run.whole && n % kWidth == 0) {
      with_type_of(work.x, [&]<class Number>(const Number *) {
        const Number *from[kGroup];
        for (int64_t r = 0; r < kGroup; r++)
          from[r] = static_cast<const Number *>(work.x->data) + starts[t + min_of(r, rows - 1)] +
                    run.offset;
        widen_run(from, rows, n, own.x, here + N, stride, more);
      });
    } else {
      widen_any(work, first + t, rows, chunk, own.x, here + N, stride, more);
    }
    /* What comes next are tokens of this chunk, or the first ones of the chunk after it. */
    const Run next = g + 1 < groups ? run : after;
    const int64_t next_t = g + 1 < groups ? t + kGroup : 0;
    const int64_t next_rows = min_of(kGroup, tokens - next_t), bytes = next.n * size;
    const char *fetched[kGroup];
    for (int64_t r = 0; r < next_rows; r++)
      fetched[r] = data + (starts[next_t + r] + next.offset) * size;
    for (int64_t c = 0, step = 0; c < N; step++) {
      if (next.whole)
        for (int64_t r = 0; r < next_rows; r++)
          for (int64_t i = step * kLine; i < bytes; i += steps * kLine)
            __builtin_prefetch(fetched[r] + i);
      for (const int64_t due = N * (g * steps + step + 1) / (groups * steps); row < due; row++)
        fetch_row(fn, row, k + n, after.n);
      const float *w = own.fn + c * kPanel;
      if (N - c >= kColumns && N - c != kColumns + 1) {
        columns<kColumns>(rows, own.x, w, n, here + c, stride, more);
        c += kColumns;
      } else if (N - c >= 2) {
        columns<2>(rows, own.x, w, n, here + c, stride, more);
        c += 2;
      } else {
        columns<1>(rows, own.x, w, n, here + c, stride, more);
        c += 1;
      }
    }
  }
}

/* The same for one token: each row of fn is read where it stands, once. */
template <class Weight>
inline void add_chunk_of_one(const Mixes &work, const Weight *fn, int64_t token, int64_t chunk,
                             const MixWorkspace &own, vf *sums) {
  const int64_t k = chunk * kChunk, n = min_of(kChunk, work.K - k), N = work.N;
  const int64_t between = work.fn->strides[0];
  if (n % kWidth > 0) {
    const int64_t start = start_of(work.x, 2, work.first + token);
    add_chunk(work, token, 1, &start, chunk, false, own, sums);
    return;
  }
  widen_any(work, token, 1, chunk, own.x, sums + N, 0, false);
  int64_t c = 0;
  for (; c + 8 <= N; c += 8)
    products<1, 8>(own.x, fn + c * between + k, between, n, sums + c, 0, false);
  for (; c < N; c++)
    products<1, 1>(own.x, fn + c * between + k, between, n, sums + c, 0, false);
}

/* u[c] of a token, and 1 / sqrt(mean(x_flat**2) + rms_eps) after them. */
inline void totals(const Mixes &work, const vf *sums, float rms_eps, float *u) {
  int64_t c = 0;
  for (; c + 4 <= work.sums; c += 4) {
    const v4 four = sum(sums[c], sums[c + 1], sums[c + 2], sums[c + 3]);
    memcpy(u + c, &four, sizeof four);
  }
  for (; c < work.sums; c++) u[c] = sum(sums[c]);
  const float mean = u[work.N] / static_cast<float>(max_of(1, work.K));
  u[work.N] = 1.0f / __builtin_sqrtf(mean + rms_eps);
}

/* Tokens are worked on block by block; few of them chunk by chunk of K, and what each chunk gave is
 * added up token by token. */
struct Schedule {
  int32_t threads;
  bool by_chunk;
  int64_t block, at_once; /* tokens of a task; chunks of a task */
};

inline Schedule schedule(const Mixes &work, int32_t threads) {
  Schedule out = {};
  const double products = static_cast<double>(work.T * work.N) * static_cast<double>(work.K);
  /* With one token memory is the limit, and a number of fn weighs as much as some four FMAs. */
  out.threads = threads_for(work.T == 1 ? 4.0 * products : products, threads);
  out.by_chunk = work.T < 4 * out.threads && work.T <= kBlock && out.threads > 1;
  out.block = clamp((work.T + out.threads - 1) / out.threads, 1, kBlock);
  out.at_once = clamp(work.chunks / (4 * out.threads), 1, 8);
  return out;
}

/* What mix_all() works in: one part for each thread, and the sums of each chunk if it goes by
 * chunks. */
struct MixMemory {
  char *threads;
  int64_t thread_bytes;
  vf *chunks; /* [chunks][T][sums] */
};

inline MixMemory lay_out(const Mixes &work, const Schedule &how, Arena &arena) {
  MixMemory memory = {};
  memory.thread_bytes = bytes_of([&](Arena &own) { lay_out(work, own); });
  memory.threads = arena.take<char>(how.threads * memory.thread_bytes);
  memory.chunks = arena.take<vf>(how.by_chunk ? work.chunks * work.T * work.sums : 0);
  return memory;
}

/* finish(thread, first, tokens, sums) for all tokens, with the sums of at most kBlock of them. */
template <class Finish>
inline void mix_all(const Mixes &work, const Schedule &how, const MixMemory &memory,
                    Finish finish) {
  const auto workspace_of = [&](int32_t thread) {
    Arena arena(memory.threads + thread * memory.thread_bytes);
    return lay_out(work, arena);
  };
  if (!how.by_chunk) {
    Counter blocks((work.T + how.block - 1) / how.block);
    on_threads(how.threads, [&](int32_t thread) {
      const MixWorkspace own = workspace_of(thread);
      for (int64_t task; blocks.take(&task);) {
        const int64_t first = task * how.block, tokens = min_of(how.block, work.T - first);
        int64_t starts[kBlock];
        for (int64_t t = 0; t < tokens; t++)
          starts[t] = start_of(work.x, 2, work.first + first + t);
        for (int64_t chunk = 0; chunk < work.chunks; chunk++)
          add_chunk(work, first, tokens, starts, chunk, chunk > 0, own, own.sums);
        finish(thread, first, tokens, own.sums);
      }
      fence();
    });
    return;
  }
  Counter some((work.chunks + how.at_once - 1) / how.at_once);
  on_threads(how.threads, [&](int32_t thread) {
    const MixWorkspace own = workspace_of(thread);
    int64_t starts[kBlock];
    for (int64_t t = 0; t < work.T; t++) starts[t] = start_of(work.x, 2, work.first + t);
    for (int64_t task; some.take(&task);) {
      const int64_t first = task * how.at_once, end = min_of(first + how.at_once, work.chunks);
      for (int64_t chunk = first; chunk < end; chunk++) {
        vf *sums = memory.chunks + chunk * work.T * work.sums;
        if (work.T > 1)
          add_chunk(work, 0, work.T, starts, chunk, false, own, sums);
        else
          with_type_of(work.fn, [&]<class Weight>(const Weight *) {
            add_chunk_of_one(work, static_cast<const Weight *>(work.fn->data), 0, chunk, own,
                             sums);
          });
      }
    }
  });
  Counter tokens(work.T);
  on_threads(static_cast<int32_t>(min_of(work.T, how.threads)), [&](int32_t thread) {
    for (int64_t t; tokens.take(&t);) {
      vf *sums = memory.chunks + t * work.sums;
      for (int64_t chunk = 1; chunk < work.chunks; chunk++)
        for (int64_t c = 0; c < work.sums; c++) sums[c] += sums[chunk * work.T * work.sums + c];
      finish(thread, t, 1, sums);
    }
    fence();
  });
}

/* h = sum over j of pre[j] * x[j], from memory to memory. Sums begin with zero: of two products the
 * compiler may fuse either with the addition, and not the same one everywhere. */
template <class Number, bool past_caches>
inline void collapse_four(const Mixes &work, int64_t token, const float *pre, Number *h) {
  constexpr int kMany = kLine / sizeof(Number), kVectors = kMany / kWidth;
  const Streams at = streams_of(work.x, token);
  const Number *x = static_cast<const Number *>(work.x->data) + at.start;
  const int64_t between = at.between, D = work.D;
  const vf a = all(pre[0]), b = all(pre[1]), c = all(pre[2]), e = all(pre[3]);
  alignas(kLine) Number line[kMany];
  int64_t i = 0;
  for (; i + kMany <= D; i += kMany) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) __builtin_prefetch(x + j * between + i + kAhead / sizeof(Number));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
      const Number *p = x + i + v * kWidth;
      vf sum = {};
      sum += a * load(p);
      sum += b * load(p + between);
      sum += c * load(p + 2 * between);
      sum += e * load(p + 3 * between);
      store(past_caches ? line + v * kWidth : h + i + v * kWidth, sum);
    }
    if constexpr (past_caches) store_line(h + i, line);
  }
  for (; i < D; i += kWidth) {
    const int64_t here = min_of(kWidth, D - i);
    const Number *p = x + i;
    vf sum = {};
    sum += a * load_some(p, here);
    sum += b * load_some(p + between, here);
    sum += c * load_some(p + 2 * between, here);
    sum += e * load_some(p + 3 * between, here);
    store_some(h + i, sum, here);
  }
}

inline void collapse(const Mixes &work, int64_t token, const float *pre, const transom_tensor *h,
                     bool past_caches) {
  const Streams streams = streams_of(work.x, token);
  if (work.R == 4 && streams.last == 1) {
    with_type_of(h, [&]<class Number>(const Number *) {
      Number *to = static_cast<Number *>(h->data) + token * work.D;
      if (past_caches)
        collapse_four<Number, true>(work, token, pre, to);
      else
        collapse_four<Number, false>(work, token, pre, to);
    });
    return;
  }
  alignas(64) float x[kChunk], out[kChunk];
  for (int64_t d = 0; d < work.D; d += kChunk) {
    const int64_t n = min_of(kChunk, work.D - d);
    for (int64_t j = 0; j < work.R; j++) {
      read_row(work.x, streams.start + j * streams.between + d * streams.last, streams.last, n, x);
      const vf by = all(pre[j]);
      for (int64_t i = 0; i < n; i += kWidth)
        store(out + i, (j == 0 ? vf{} : load(out + i)) + by * load(x + i));
    }
    write_row(at(h, token * work.D + d), kind(h), out, n);
  }
}

/* False, and the reason, for a weight with strided rows. */
inline bool rows_fit(const transom_tensor *fn, transom_status *status) {
  if (fn->shape[1] <= 1 || fn->strides[1] == 1) return true;
  snprintf(status->message, sizeof status->message,
           "fn has a last dim of stride %lld; supported: 1; call .contiguous()",
           static_cast<long long>(fn->strides[1]));
  return false;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
