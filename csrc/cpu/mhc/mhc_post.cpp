/* mhc_post: y[k] = post[k] * f + sum over j of comb[j][k] * x[j], for each token.
 *
 * One pass is bound by memory: (2R + 1) * D elements a token, each once. Four streams are mixed from
 * memory to memory, a cache line of each at a time, and lines of an output that no cache holds to
 * the end are stored past them. Other numbers of streams, and strided ones, go through a chunk of
 * each in L1. */
#include "../base/kernel.h"
#include "../base/output.h"
#include "_sinkhorn.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(mhc_post, supports, nothing, run)

namespace {

constexpr int64_t kInL1 = 256;
/* Bytes between what is mixed and what is fetched: rows end where the prefetchers start anew. */
constexpr int64_t kAhead = 1024;
/* Elements of a task, of a token's or of several tokens' output: a page of 2 MB or less, so that
 * two threads seldom ask the system for the same one. */
constexpr int64_t kTask = 1 << 19;

struct Work {
  const transom_call *call;
  const transom_tensor *f, *x, *post, *comb;
  int64_t T, R, D;
  int64_t tokens, part, parts; /* of a task: tokens, elements of D; parts of a token */
  bool direct, past_caches;
};

/* The factors of one token, each in all lanes of a vector. */
struct Factors {
  vf post[kMostStreams], comb[kMostStreams * kMostStreams];
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.f = tensor(call, ARG(F));
  work.x = tensor(call, ARG(X));
  work.post = tensor(call, ARG(POST));
  work.comb = tensor(call, ARG(COMB));
  const transom_tensor *x = work.x;
  work.T = tokens_of(x, 2);
  work.R = x->shape[x->ndim - 2], work.D = x->shape[x->ndim - 1];
  work.direct = work.R == 4 && x->strides[x->ndim - 1] == 1 &&
                work.f->strides[work.f->ndim - 1] == 1;
  return work;
}

/* Elements d .. d + n of one token's streams. Sums begin with zero: of two products the compiler
 * may fuse either with the addition, and not the same one everywhere. */
template <class Number, bool past_caches>
void mix_four(const Work *work, int64_t token, int64_t d, int64_t n, const Factors &by) {
  constexpr int R = 4, kMany = kLine / sizeof(Number), kVectors = kMany / kWidth;
  const transom_tensor *in = work->x;
  const int64_t D = work->D, between = in->strides[in->ndim - 2];
  const Number *f = static_cast<const Number *>(work->f->data) + start_of(work->f, 1, token) + d;
  const Number *x = static_cast<const Number *>(in->data) + start_of(in, 2, token) + d;
  Number *y = static_cast<Number *>(work->call->outs[0]->data) + token * R * D + d;
  alignas(kLine) Number line[R][kMany];
  int64_t i = 0;
  for (; i + kMany <= n; i += kMany) {
    __builtin_prefetch(f + i + kAhead / sizeof(Number));
#pragma GCC unroll 4
    for (int j = 0; j < R; j++)
      __builtin_prefetch(x + j * between + i + kAhead / sizeof(Number));
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v++) {
      const int64_t at = i + v * kWidth;
      const vf out = load(f + at), a = load(x + at), b = load(x + between + at),
               c = load(x + 2 * between + at), e = load(x + 3 * between + at);
#pragma GCC unroll 4
      for (int k = 0; k < R; k++) {
        vf sum = {};
        sum += by.post[k] * out;
        sum += by.comb[k] * a;
        sum += by.comb[R + k] * b;
        sum += by.comb[2 * R + k] * c;
        sum += by.comb[3 * R + k] * e;
        store(past_caches ? line[k] + v * kWidth : y + k * D + at, sum);
      }
    }
    if constexpr (past_caches)
#pragma GCC unroll 4
      for (int k = 0; k < R; k++) store_line(y + k * D + i, line[k]);
  }
  for (; i < n; i += kWidth) {
    const int64_t here = min_of(kWidth, n - i);
    for (int k = 0; k < R; k++) {
      vf sum = {};
      sum += by.post[k] * load_some(f + i, here);
      for (int j = 0; j < R; j++)
        sum += by.comb[j * R + k] * load_some(x + j * between + i, here);
      store_some(y + k * D + i, sum, here);
    }
  }
}

/* The same for n at most kInL1, of any number of streams and any strides. */
void mix_any(const Work *work, int64_t token, int64_t d, int64_t n, const Factors &by) {
  alignas(64) float f[kInL1], x[kMostStreams][kInL1], out[kInL1];
  const transom_tensor *in = work->x, *y = work->call->outs[0];
  const int64_t last = in->strides[in->ndim - 1], between = in->strides[in->ndim - 2];
  const int64_t first = start_of(in, 2, token) + d * last;
  const int64_t f_last = work->f->strides[work->f->ndim - 1];
  read_row(work->f, start_of(work->f, 1, token) + d * f_last, f_last, n, f);
  for (int64_t j = 0; j < work->R; j++) read_row(in, first + j * between, last, n, x[j]);
  for (int64_t k = 0; k < work->R; k++) {
    for (int64_t i = 0; i < n; i += kWidth) {
      vf sum = {};
      sum += by.post[k] * load(f + i);
      for (int64_t j = 0; j < work->R; j++) sum += by.comb[j * work->R + k] * load(x[j] + i);
      store(out + i, sum);
    }
    write_row(at(y, (token * work->R + k) * work->D + d), kind(y), out, n);
  }
}

void mix(const Work *work, int64_t token, int64_t d, int64_t n, const Factors &by) {
  if (work->direct) {
    with_type_of(work->x, [&]<class Number>(const Number *) {
      if (work->past_caches)
        mix_four<Number, true>(work, token, d, n, by);
      else
        mix_four<Number, false>(work, token, d, n, by);
    });
    return;
  }
  for (const int64_t end = d + n; d < end; d += kInL1)
    mix_any(work, token, d, min_of(kInL1, end - d), by);
}

void read_factors(const Work *work, int64_t token, Factors *by) {
  const transom_tensor *p = work->post, *c = work->comb;
  const int64_t p0 = start_of(p, 1, token), c0 = start_of(c, 2, token), R = work->R;
  for (int64_t j = 0; j < R; j++) {
    by->post[j] = all(number(p, p0 + j * p->strides[p->ndim - 1]));
    for (int64_t k = 0; k < R; k++)
      by->comb[j * R + k] =
          all(number(c, c0 + j * c->strides[c->ndim - 2] + k * c->strides[c->ndim - 1]));
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return streams_fit(work.x, "x", work.R, status);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  if (work.T * work.R * work.D == 0) return 0;
  const double products = static_cast<double>(work.T * work.D) * static_cast<double>(work.R);
  /* Memory is the limit: an element weighs as much as some four multiplications. */
  const int32_t threads = threads_for(4.0 * products, call->threads);
  const int64_t share = max_of(1, work.T / (4 * threads));
  work.tokens = clamp(kTask / (work.R * work.D), 1, share);
  work.parts = work.T >= 4 * threads ? 1 : clamp((work.D + kInL1 - 1) / kInL1, 1, 4 * threads);
  work.part = up_to((work.D + work.parts - 1) / work.parts, kInL1);
  work.parts = (work.D + work.part - 1) / work.part;
  work.past_caches = goes_past_caches(call->outs[0], work.T * work.R, work.D);
  Counter counter((work.T + work.tokens - 1) / work.tokens * work.parts);
  on_threads(threads, [&](int32_t) {
    Factors by;
    for (int64_t task; counter.take(&task);) {
      const int64_t first = task / work.parts * work.tokens, d = task % work.parts * work.part;
      const int64_t n = min_of(work.part, work.D - d);
      for (int64_t token = first; token < min_of(first + work.tokens, work.T); token++) {
        read_factors(&work, token, &by);
        mix(&work, token, d, n, by);
      }
    }
    fence();
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
