/* The gradient of _mixes.h's mixing: of h = sum of pre[j] * x[j] and of a = mix * scale + base.
 *
 * Some hundred tokens, a span, are taken at a time, in two passes over their streams. The first has
 * u, r and the gradient of a for each token (what the caller makes of the sums) and leaves a record
 * of it: g = r * scale * da, along = r**3 / K * sum of scale * da * u, pre. The second takes a chunk
 * of K at a time, through all of these tokens: dx = g @ fn - along * x + pre[j] * dh and
 * dfn += g.T @ x. A task of it is a chunk, so dfn, like dscale and dbase, is a sum over tokens in
 * their order at any number of threads. It is bound by FMA, of which it needs three times those of
 * the mixing. */
#pragma once

#include "_mixes.h"

namespace transom::TRANSOM_LEVEL {
namespace {

constexpr int64_t kSpan = 256;  /* tokens between the two passes */
constexpr int64_t kInL1 = 16;   /* tokens whose x stays in L1 for dfn */
constexpr int64_t kSoon = 6;    /* tokens between what is read and what is fetched */
/* Vectors of a tile's row: with four rows its sums fill half of the registers, so that the operands
 * fit. */
constexpr int kVectors = kColumns > 3 ? 4 : 2;
constexpr int64_t kTile = kVectors * kWidth;

/* Gradients that mixing has besides dx. Parameter gradients are float32, contiguous. */
struct Gradients {
  const transom_tensor *dh, *dx;
  float *dfn, *dscale, *dbase;
};

/* The parts of the workspace. */
struct BackwardMemory {
  MixMemory mixing;
  float *records; /* [kSpan] */
  char *threads;  /* of the second pass */
  char *callers;  /* of each thread, for the caller */
};

struct Backward {
  Mixes mixes; /* of the span */
  Schedule how;
  Gradients out;
  int64_t T, record;            /* all tokens; floats of a token's record: g[N], da[N], da*mix[N],
                                   along, pre[R] */
  int64_t chunks;               /* of a stream */
  int64_t thread_bytes, caller_bytes; /* of a thread in the second pass, and for the caller */
  BackwardMemory memory;
  int64_t span;
};

/* Where the parts of a record stand. */
inline int64_t at_da(int64_t N) { return N; }
inline int64_t at_da_mix(int64_t N) { return 2 * N; }
inline int64_t at_along(int64_t N) { return 3 * N; }
inline int64_t at_pre(int64_t N) { return 3 * N + 1; }

/* The workspace of a thread in the second pass: rows of kPanel. */
struct ChunkWorkspace {
  float *w, *dw;      /* of fn, and of its gradient */
  float *xs, *out, *g; /* of kInL1 tokens: x and dx; of one token: dh */
};

inline ChunkWorkspace lay_out_chunk(const Mixes &mixes, Arena &arena) {
  const int64_t rows = up_to(mixes.N, 4) * kPanel;
  ChunkWorkspace own = {};
  own.w = arena.take<float>(rows), own.dw = arena.take<float>(rows);
  own.xs = arena.take<float>(kInL1 * kPanel), own.out = arena.take<float>(kInL1 * kPanel);
  own.g = arena.take<float>(kPanel);
  return own;
}

inline Backward backward_of(const Mixes &mixes, int32_t threads, int64_t caller_bytes) {
  Backward work = {};
  work.mixes = mixes;
  work.T = mixes.T;
  work.mixes.T = min_of(mixes.T, kSpan);
  work.how = schedule(work.mixes, threads);
  work.record = up_to(at_pre(mixes.N) + mixes.R, 16);
  work.chunks = (mixes.D + kChunk - 1) / kChunk;
  work.caller_bytes = up_to(caller_bytes, 64);
  work.thread_bytes = bytes_of([&](Arena &arena) { lay_out_chunk(mixes, arena); });
  return work;
}

inline void lay_out(Backward *work, Arena &arena) {
  BackwardMemory *memory = &work->memory;
  memory->mixing = lay_out(work->mixes, work->how, arena);
  memory->records = arena.take<float>(kSpan * work->record);
  memory->threads = arena.take<char>(work->how.threads * work->thread_bytes);
  memory->callers = arena.take<char>(work->how.threads * work->caller_bytes);
}

/* sums[j] = x[j] . dh of one token. */
inline void against_streams(const Mixes &mixes, const transom_tensor *dh, int64_t token,
                            float *sums) {
  alignas(64) float x[kChunk], g[kChunk];
  const Streams streams = streams_of(mixes.x, token);
  const int64_t last = dh->strides[dh->ndim - 1], start = start_of(dh, 1, token);
  vf totals[kMostStreams];
  for (int64_t j = 0; j < mixes.R; j++) totals[j] = vf{};
  for (int64_t d = 0; d < mixes.D; d += kChunk) {
    const int64_t n = min_of(kChunk, mixes.D - d);
    read_row(dh, start + d * last, last, n, g);
    for (int64_t j = 0; j < mixes.R; j++) {
      read_row(mixes.x, streams.start + j * streams.between + d * streams.last, streams.last, n, x);
      vf even = {}, odd = {};
      int64_t i = 0;
      for (; i + kWidth < n; i += 2 * kWidth) {
        even += load(x + i) * load(g + i);
        odd += load(x + i + kWidth) * load(g + i + kWidth);
      }
      if (i < n) even += load(x + i) * load(g + i);
      totals[j] += even + odd;
    }
  }
  for (int64_t j = 0; j < mixes.R; j++) sums[j] = sum(totals[j]);
}

/* The record of a token of the span from da[N], u[N] and r after it, scale of each row, and pre. */
inline void set_record(const Backward &work, int64_t token, const float *da, const float *u,
                       const float *scale, const float *pre) {
  const int64_t N = work.mixes.N;
  const float r = u[N];
  float *to = work.memory.records + token * work.record, along = 0.0f;
  for (int64_t c = 0; c < N; c++) {
    const float dmix = da[c] * scale[c];
    to[c] = dmix * r;
    to[at_da(N) + c] = da[c];
    to[at_da_mix(N) + c] = da[c] * u[c] * r;
    along += dmix * u[c];
  }
  to[at_along(N)] = along * (r * r * r) / static_cast<float>(max_of(1, work.mixes.K));
  for (int64_t j = 0; j < work.mixes.R; j++) to[at_pre(N) + j] = pre[j];
}

/* out [4] rows of kTile += sum over i of by[row * by_row + i * by_step] * x[i]. */
inline void add_products(const float *by, int64_t by_row, int64_t by_step, int64_t count,
                         const float *x, float *out) {
  vf sums[4][kVectors];
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) sums[r][v] = load(out + r * kPanel + v * kWidth);
  for (int64_t i = 0; i < count; i++) {
    vf right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) right[v] = load(x + i * kPanel + v * kWidth);
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      const vf left = all(by[r * by_row + i * by_step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sums[r][v] += left * right[v];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store(out + r * kPanel + v * kWidth, sums[r][v]);
}

/* n elements and zeros up to the tile's end. */
inline void read_panel(const transom_tensor *t, int64_t start, int64_t stride, int64_t n,
                       float *to) {
  read_row(t, start, stride, n, to);
  for (int64_t i = n; i < up_to(n, kTile); i++) to[i] = 0.0f;
}

/* Fetches n elements of a row, where they stand in one run; to be written: 1. */
template <int written>
inline void fetch_run(const transom_tensor *t, int64_t start, int64_t stride, int64_t n) {
  if (stride != 1) return;
  const char *from = static_cast<const char *>(t->data) + start * size_of(t);
  for (int64_t i = 0; i < n * size_of(t); i += kLine) __builtin_prefetch(from + i, written);
}

/* The second pass: chunks of a stream, each through all tokens of the span. */
inline void backward_chunks(const Backward &work, Counter *counter, int32_t thread) {
  const Mixes &mixes = work.mixes;
  const transom_tensor *x = mixes.x, *fn = mixes.fn, *dh = work.out.dh, *dx = work.out.dx;
  const int64_t N = mixes.N, D = mixes.D, up = up_to(N, 4);
  const int64_t dh_last = dh->strides[dh->ndim - 1];
  Arena arena(work.memory.threads + thread * work.thread_bytes);
  const auto [w, dw, xs, out, g] = lay_out_chunk(mixes, arena);
  alignas(64) float by[kInL1 * ((2 + kMostStreams) * kMostStreams + 4)];
  for (int64_t task; counter->take(&task);) {
    const int64_t j = task / work.chunks, d = task % work.chunks * kChunk;
    const int64_t n = min_of(kChunk, D - d), k = j * D + d;
    for (int64_t c = 0; c < up; c++) {
      float *row = dw + c * kPanel;
      memset(row, 0, static_cast<size_t>(kChunk) * sizeof(float));
      if (c >= N) continue;
      read_panel(fn, c * fn->strides[0] + k, 1, n, w + c * kPanel);
      if (work.span > 0)
        memcpy(row, work.out.dfn + c * mixes.K + k, static_cast<size_t>(n) * sizeof(float));
    }
    for (int64_t first = 0; first < mixes.T; first += kInL1) {
      const int64_t tokens = min_of(kInL1, mixes.T - first), rows = up_to(tokens, 4);
      for (int64_t t = 0; t < rows; t++) {
        float *to = xs + t * kPanel, *start = out + t * kPanel, *here = by + t * up;
        if (t >= tokens) {
          memset(to, 0, kChunk * sizeof(float));
          memset(start, 0, kChunk * sizeof(float));
          memset(here, 0, static_cast<size_t>(up) * sizeof(float));
          continue;
        }
        const int64_t token = mixes.first + first + t;
        const float *record = work.memory.records + (first + t) * work.record;
        const Streams streams = streams_of(x, token);
        if (first + t + kSoon < mixes.T) {
          /* A chunk of each token is far from the last one's: the prefetchers see no stream. */
          const int64_t soon = token + kSoon;
          fetch_run<0>(x, start_of(x, 2, soon) + j * streams.between + d, streams.last, n);
          fetch_run<0>(dh, start_of(dh, 1, soon) + d, dh_last, n);
          fetch_run<1>(dx, soon * mixes.K + k, 1, n);
        }
        read_panel(x, streams.start + j * streams.between + d * streams.last, streams.last, n, to);
        read_panel(dh, start_of(dh, 1, token) + d * dh_last, dh_last, n, g);
        const vf along = all(record[at_along(N)]), pre = all(record[at_pre(N) + j]);
        for (int64_t i = 0; i < n; i += kWidth)
          store(start + i, pre * load(g + i) - along * load(to + i));
        for (int64_t i = up_to(n, kWidth); i < up_to(n, kTile); i++) start[i] = 0.0f;
        for (int64_t c = 0; c < up; c++) here[c] = c < N ? record[c] : 0.0f;
      }
      for (int64_t i = 0; i < n; i += kTile) {
        for (int64_t t = 0; t < rows; t += 4)
          add_products(by + t * up, up, 1, N, w + i, out + t * kPanel + i);
        for (int64_t c = 0; c < up; c += 4)
          add_products(by + c, 1, up, tokens, xs + i, dw + c * kPanel + i);
      }
      for (int64_t t = 0; t < tokens; t++)
        write_row(at(dx, (mixes.first + first + t) * mixes.K + k), kind(dx), out + t * kPanel, n);
    }
    for (int64_t c = 0; c < N; c++)
      memcpy(work.out.dfn + c * mixes.K + k, dw + c * kPanel,
             static_cast<size_t>(n) * sizeof(float));
  }
}

/* Both passes over all spans. coefficients(work, thread, first, tokens, sums) sets the records of
 * `tokens` tokens of the span; scale_of(c): which of `scales` numbers of dscale row c of fn has. */
template <class Coefficients, class ScaleOf>
inline void run_backward(Backward *work, int64_t scales, Coefficients coefficients,
                         ScaleOf scale_of) {
  const Mixes whole = work->mixes;
  const int64_t N = whole.N;
  double dscale[3] = {}, dbase[(2 + kMostStreams) * kMostStreams] = {};
  about_to_write(work->out.dx->data, work->T * whole.K * size_of(work->out.dx));
  for (int64_t first = 0; first < work->T; first += kSpan, work->span++) {
    Mixes &mixes = work->mixes;
    mixes.first = first, mixes.T = min_of(kSpan, work->T - first);
    mix_all(mixes, work->how, work->memory.mixing,
            [&](int32_t thread, int64_t from, int64_t tokens, const vf *sums) {
              coefficients(*work, thread, from, tokens, sums);
            });
    for (int64_t t = 0; t < mixes.T; t++) {
      const float *record = work->memory.records + t * work->record;
      for (int64_t c = 0; c < N; c++) {
        dbase[c] += static_cast<double>(record[at_da(N) + c]);
        dscale[scale_of(c)] += static_cast<double>(record[at_da_mix(N) + c]);
      }
    }
    Counter counter(whole.R * work->chunks);
    on_threads(work->how.threads,
               [&](int32_t thread) { backward_chunks(*work, &counter, thread); });
  }
  if (work->T == 0)
    memset(work->out.dfn, 0, static_cast<size_t>(N * whole.K) * sizeof(float));
  for (int64_t c = 0; c < N; c++) work->out.dbase[c] = static_cast<float>(dbase[c]);
  for (int64_t i = 0; i < scales; i++) work->out.dscale[i] = static_cast<float>(dscale[i]);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
