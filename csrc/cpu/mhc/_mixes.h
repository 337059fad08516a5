/* u = x_flat @ fn.T and the squares of x_flat, of tokens whose R streams of D stand side by side in
 * x_flat, K = R * D; and the weighted sum of a token's streams. For mhc_pre, mhc_head and their
 * gradients.
 *
 * A piece of K is taken at a time: the rows of fn in it stay in L1, widened once for a block of
 * tokens, while groups of tokens pass by, widened too; the next group, and the next piece of fn, are
 * fetched meanwhile. A sum is a vector until all pieces are in it: each piece is added up from zero,
 * in kWidth chains along K, and the pieces in their order, whatever the tile or the block. So a
 * token has the same bits alone and among others. Internal linkage, as in vector.h. */
#pragma once

#include "../base/output.h"
#include "../base/parallel.h"
#include "../base/tensor.h"
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
constexpr int64_t kOfK = 256; /* elements of K in a piece */
/* Floats between rows of a panel: rows of a power of two would share cache sets. */
constexpr int64_t kPanel = kOfK + 16;
constexpr int64_t kBlock = 64;       /* tokens that a piece of fn serves */
constexpr int64_t kTogether = kRows; /* tokens of a group */
/* Bytes between what is read and what is fetched: rows end where the prefetchers start anew. */
constexpr int64_t kAhead = 1024;

struct Mixes {
  const transom_tensor *x, *fn;
  int64_t first, T; /* tokens first .. first + T of x, numbered from 0 here */
  int64_t R, D, K, N, pieces;
  int64_t sums; /* vectors of a token: N products, then the squares */
};

/* What a thread works in. */
struct Room {
  float *x, *fn; /* panels [kTogether] and [N] of kPanel */
  vf *sums;      /* [kBlock][sums] */
};

inline Mixes mixes_of(const transom_tensor *x, const transom_tensor *fn, int64_t N) {
  Mixes work = {};
  work.x = x, work.fn = fn, work.N = N, work.sums = N + 1;
  work.T = 1;
  for (int i = 0; i < x->ndim - 2; i++) work.T *= x->shape[i];
  work.R = x->shape[x->ndim - 2], work.D = x->shape[x->ndim - 1];
  work.K = work.R * work.D;
  work.pieces = max_of(1, (work.K + kOfK - 1) / kOfK);
  return work;
}

inline int64_t room_bytes(const Mixes &work) {
  const int64_t panels = (kTogether + work.N) * kPanel * static_cast<int64_t>(sizeof(float));
  return up_to(panels, 64) + kBlock * work.sums * static_cast<int64_t>(sizeof(vf));
}

inline Room room_at(const Mixes &work, void *memory, int64_t thread) {
  Room room;
  room.x = reinterpret_cast<float *>(static_cast<char *>(memory) + thread * room_bytes(work));
  room.fn = room.x + kTogether * kPanel;
  room.sums = reinterpret_cast<vf *>(room.fn + up_to(work.N * kPanel, 16));
  return room;
}

/* Where the streams of a token begin, and whether they stand side by side there. */
struct Place {
  int64_t start, between, last;
  bool side_by_side;
};

inline Place place_of(const transom_tensor *x, int64_t token) {
  const int64_t last = x->strides[x->ndim - 1], between = x->strides[x->ndim - 2];
  return {start_of(x, 2, token), between, last, between == x->shape[x->ndim - 1] * last};
}

/* Elements k .. k + n of a token's x_flat, and zeros after them up to the width. */
inline void widen(const transom_tensor *x, int64_t token, int64_t k, int64_t n, float *to) {
  const Place at = place_of(x, token);
  const int64_t D = x->shape[x->ndim - 1];
  for (int64_t done = 0; done < n;) {
    const int64_t j = (k + done) / D, d = (k + done) % D;
    const int64_t here = at.side_by_side ? n - done : min_of(D - d, n - done);
    read_row(x, at.start + j * at.between + d * at.last, at.last, here, to + done);
    done += here;
  }
  for (int64_t i = n; i < up_to(n, kWidth); i++) to[i] = 0.0f;
}

/* Where a piece of x_flat stands in each token, if it is in one run of stride 1. */
struct Run {
  bool whole;
  int64_t offset, n; /* from a token's start; elements */
};

inline Run run_of(const Mixes &work, int64_t piece) {
  const int64_t k = piece * kOfK, n = min_of(kOfK, work.K - k);
  if (n <= 0) return {false, 0, 0};
  const Place at = place_of(work.x, 0);
  const int64_t j = k / work.D, d = k % work.D;
  return {at.last == 1 && (at.side_by_side || d + n <= work.D), j * at.between + d, n};
}

inline void fetch_row(const transom_tensor *fn, int64_t row, int64_t k, int64_t n) {
  const int64_t size = size_of(fn);
  const char *from = static_cast<const char *>(fn->data) + (row * fn->strides[0] + k) * size;
  for (int64_t i = 0; i < n * size; i += kLine) __builtin_prefetch(from + i, 0, 2);
}

/* A piece of `rows` tokens as float32, and its squares added to `squares` or set. */
template <class Number>
inline void widen_run(const Number *const *from, int64_t rows, int64_t n, float *to, vf *squares,
                      int64_t stride, bool more) {
  vf sums[kTogether] = {};
  for (int64_t k = 0; k < n; k += kWidth)
#pragma GCC unroll 4
    for (int r = 0; r < kTogether; r++) {
      const vf x = load(from[r] + k);
      store(to + r * kPanel + k, x);
      sums[r] += x * x;
    }
  for (int64_t r = 0; r < rows; r++) {
    vf *at = squares + r * stride;
    *at = more ? *at + sums[r] : sums[r];
  }
}

inline void widen_any(const Mixes &work, int64_t first, int64_t rows, int64_t piece, float *to,
                      vf *squares, int64_t stride, bool more) {
  const int64_t k = piece * kOfK, n = min_of(kOfK, work.K - k);
  for (int64_t r = 0; r < rows; r++) {
    widen(work.x, work.first + first + r, k, n, to + r * kPanel);
    vf sum = {};
    for (int64_t i = 0; i < n; i += kWidth)
      sum += load(to + r * kPanel + i) * load(to + r * kPanel + i);
    vf *at = squares + r * stride;
    *at = more ? *at + sum : sum;
  }
}

/* The products of a piece of C rows of fn with R tokens, added to their sums or set; x, and fn where
 * it is a panel, have zeros after n. Not inlined: gcc then runs out of registers in the loop. `size`
 * is n where that is known, which saves a tenth of the time; else 0. */
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
      if (n == kOfK)
        products<4, C, kOfK>(x, fn, kPanel, n, sums, stride, more);
      else
        products<4, C>(x, fn, kPanel, n, sums, stride, more);
  }
}

/* A piece of `tokens` tokens, at most kBlock, that begin at starts[]; `more`: its sums are added to
 * those before. */
inline void add_piece(const Mixes &work, int64_t first, int64_t tokens, const int64_t *starts,
                      int64_t piece, bool more, const Room &room, vf *sums) {
  const transom_tensor *fn = work.fn;
  const int64_t k = piece * kOfK, n = min_of(kOfK, work.K - k), N = work.N, stride = work.sums;
  const Run run = run_of(work, piece), after = run_of(work, piece + 1);
  const int64_t size = size_of(work.x);
  const char *data = static_cast<const char *>(work.x->data);
  for (int64_t r = 0; r < N; r++)
    read_row(fn, r * fn->strides[0] + k, 1, n, room.fn + r * kPanel);
  const int64_t groups = (tokens + kTogether - 1) / kTogether;
  const int64_t steps = (N + kColumns - 1) / kColumns;
  int64_t row = 0; /* of fn, to be fetched next */
  for (int64_t g = 0; g < groups; g++) {
    const int64_t t = g * kTogether, rows = min_of(kTogether, tokens - t);
    vf *here = sums + t * stride;
    if (run.whole && n % kWidth == 0) {
      as_held(work.x, [&]<class Number>(const Number *) {
        const Number *from[kTogether];
        for (int64_t r = 0; r < kTogether; r++)
          from[r] = static_cast<const Number *>(work.x->data) + starts[t + min_of(r, rows - 1)] +
                    run.offset;
        widen_run(from, rows, n, room.x, here + N, stride, more);
      });
    } else {
      widen_any(work, first + t, rows, piece, room.x, here + N, stride, more);
    }
    /* What comes next: tokens of this piece, or the first ones of the piece after it. */
    const Run next = g + 1 < groups ? run : after;
    const int64_t next_t = g + 1 < groups ? t + kTogether : 0;
    const int64_t next_rows = min_of(kTogether, tokens - next_t), bytes = next.n * size;
    const char *fetched[kTogether];
    for (int64_t r = 0; r < next_rows; r++)
      fetched[r] = data + (starts[next_t + r] + next.offset) * size;
    for (int64_t c = 0, step = 0; c < N; step++) {
      if (next.whole)
        for (int64_t r = 0; r < next_rows; r++)
          for (int64_t i = step * kLine; i < bytes; i += steps * kLine)
            __builtin_prefetch(fetched[r] + i);
      for (const int64_t due = N * (g * steps + step + 1) / (groups * steps); row < due; row++)
        fetch_row(fn, row, k + n, after.n);
      const float *w = room.fn + c * kPanel;
      if (N - c >= kColumns && N - c != kColumns + 1) {
        columns<kColumns>(rows, room.x, w, n, here + c, stride, more);
        c += kColumns;
      } else if (N - c >= 2) {
        columns<2>(rows, room.x, w, n, here + c, stride, more);
        c += 2;
      } else {
        columns<1>(rows, room.x, w, n, here + c, stride, more);
        c += 1;
      }
    }
  }
}

/* The same for one token: each row of fn is read where it stands, once. */
template <class Weight>
inline void add_piece_of_one(const Mixes &work, const Weight *fn, int64_t token, int64_t piece,
                             const Room &room, vf *sums) {
  const int64_t k = piece * kOfK, n = min_of(kOfK, work.K - k), N = work.N;
  const int64_t between = work.fn->strides[0];
  if (n % kWidth > 0) {
    const int64_t start = start_of(work.x, 2, work.first + token);
    add_piece(work, token, 1, &start, piece, false, room, sums);
    return;
  }
  widen_any(work, token, 1, piece, room.x, sums + N, 0, false);
  int64_t c = 0;
  for (; c + 8 <= N; c += 8)
    products<1, 8>(room.x, fn + c * between + k, between, n, sums + c, 0, false);
  for (; c < N; c++)
    products<1, 1>(room.x, fn + c * between + k, between, n, sums + c, 0, false);
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

/* Work on tokens by blocks, or, with few of them, by pieces of K: finish(thread, first, tokens,
 * sums) has the sums of `tokens` tokens, at most kBlock. */
struct Schedule {
  int32_t threads;
  bool by_piece;
  int64_t block, at_once; /* tokens of a task; pieces of a task */
};

inline Schedule schedule(const Mixes &work, int32_t threads) {
  Schedule out = {};
  const double products = static_cast<double>(work.T * work.N) * static_cast<double>(work.K);
  /* One token: memory is the limit, and a number of fn weighs as much as some four FMAs. */
  out.threads = threads_for(work.T == 1 ? 4.0 * products : products, threads);
  out.by_piece = work.T < 4 * out.threads && work.T <= kBlock && out.threads > 1;
  out.block = clamp((work.T + out.threads - 1) / out.threads, 1, kBlock);
  out.at_once = clamp(work.pieces / (4 * out.threads), 1, 8);
  return out;
}

inline int64_t workspace_of(const Mixes &work, const Schedule &how) {
  const int64_t parts =
      how.by_piece ? work.pieces * work.T * work.sums * static_cast<int64_t>(sizeof(vf)) : 0;
  return how.threads * room_bytes(work) + parts;
}

template <class Finish>
struct Mixing {
  const Mixes *work;
  const Schedule *how;
  void *memory;
  vf *parts; /* [pieces][T][sums], by piece */
  Finish *finish;
  int64_t next;
};

template <class Finish>
inline void mix_blocks(void *context, int32_t thread) {
  Mixing<Finish> *all = static_cast<Mixing<Finish> *>(context);
  const Mixes &work = *all->work;
  const Room room = room_at(work, all->memory, thread);
  const int64_t block = all->how->block;
  for (;;) {
    const int64_t first = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED) * block;
    if (first >= work.T) break;
    const int64_t tokens = min_of(block, work.T - first);
    int64_t starts[kBlock];
    for (int64_t t = 0; t < tokens; t++) starts[t] = start_of(work.x, 2, work.first + first + t);
    for (int64_t piece = 0; piece < work.pieces; piece++)
      add_piece(work, first, tokens, starts, piece, piece > 0, room, room.sums);
    (*all->finish)(thread, first, tokens, room.sums);
  }
  fence();
}

template <class Finish>
inline void mix_pieces(void *context, int32_t thread) {
  Mixing<Finish> *all = static_cast<Mixing<Finish> *>(context);
  const Mixes &work = *all->work;
  const Room room = room_at(work, all->memory, thread);
  int64_t starts[kBlock];
  for (int64_t t = 0; t < work.T; t++) starts[t] = start_of(work.x, 2, work.first + t);
  for (;;) {
    const int64_t once = all->how->at_once;
    const int64_t first = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED) * once;
    if (first >= work.pieces) return;
    for (int64_t piece = first; piece < min_of(first + once, work.pieces); piece++) {
      vf *sums = all->parts + piece * work.T * work.sums;
      if (work.T > 1)
        add_piece(work, 0, work.T, starts, piece, false, room, sums);
      else
        as_held(work.fn, [&]<class Weight>(const Weight *) {
          add_piece_of_one(work, static_cast<const Weight *>(work.fn->data), 0, piece, room, sums);
        });
    }
  }
}

/* After mix_pieces: the pieces of one token a task. */
template <class Finish>
inline void mix_tokens(void *context, int32_t thread) {
  Mixing<Finish> *all = static_cast<Mixing<Finish> *>(context);
  const Mixes &work = *all->work;
  for (;;) {
    const int64_t t = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
    if (t >= work.T) break;
    vf *sums = all->parts + t * work.sums;
    for (int64_t piece = 1; piece < work.pieces; piece++)
      for (int64_t c = 0; c < work.sums; c++) sums[c] += sums[piece * work.T * work.sums + c];
    (*all->finish)(thread, t, 1, sums);
  }
  fence();
}

template <class Finish>
inline void mix_all(const Mixes &work, const Schedule &how, void *memory, Finish finish) {
  char *parts = static_cast<char *>(memory) + how.threads * room_bytes(work);
  Mixing<Finish> all = {&work, &how, memory, reinterpret_cast<vf *>(parts), &finish, 0};
  if (!how.by_piece) {
    parallel(how.threads, mix_blocks<Finish>, &all);
    return;
  }
  parallel(how.threads, mix_pieces<Finish>, &all);
  all.next = 0;
  parallel(static_cast<int32_t>(min_of(work.T, how.threads)), mix_tokens<Finish>, &all);
}

/* h = sum over j of pre[j] * x[j], from memory to memory. Sums begin with zero: of two products the
 * compiler may fuse either with the addition, and not the same one everywhere. */
template <class Number, bool past_caches>
inline void collapse_four(const Mixes &work, int64_t token, const float *pre, Number *h) {
  constexpr int kMany = kLine / sizeof(Number), kVectors = kMany / kWidth;
  const Place at = place_of(work.x, token);
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
  const Place place = place_of(work.x, token);
  if (work.R == 4 && place.last == 1) {
    as_held(h, [&]<class Number>(const Number *) {
      Number *to = static_cast<Number *>(h->data) + token * work.D;
      if (past_caches)
        collapse_four<Number, true>(work, token, pre, to);
      else
        collapse_four<Number, false>(work, token, pre, to);
    });
    return;
  }
  alignas(64) float x[kOfK], out[kOfK];
  for (int64_t d = 0; d < work.D; d += kOfK) {
    const int64_t n = min_of(kOfK, work.D - d);
    for (int64_t j = 0; j < work.R; j++) {
      read_row(work.x, place.start + j * place.between + d * place.last, place.last, n, x);
      const vf by = all(pre[j]);
      for (int64_t i = 0; i < n; i += kWidth)
        store(out + i, (j == 0 ? vf{} : load(out + i)) + by * load(x + i));
    }
    write_row(at(h, token * work.D + d), kind(h), out, n);
  }
}

/* False, and the reason, for a weight whose rows are not in one piece. */
inline bool rows_fit(const transom_tensor *fn, transom_status *status) {
  if (fn->shape[1] <= 1 || fn->strides[1] == 1) return true;
  snprintf(status->message, sizeof status->message,
           "fn has a last dim of stride %lld; supported: 1; call .contiguous()",
           static_cast<long long>(fn->strides[1]));
  return false;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
