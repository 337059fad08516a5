/* mhc_post: y[k] = post[k] * f + sum over j of comb[j][k] * x[j], for each token.
 *
 * One pass: a piece of every stream is read into L1 as float32, and each output stream is made from
 * it. Bound by memory: (2R + 1) * D elements a token, each once. */
#include "../parallel.h"
#include "../product.h"
#include "_steps.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_MHC_POST_##name

constexpr int64_t kPart = 1024, kInL1 = 256;

struct Work {
  const transom_call *call;
  const transom_tensor *f, *x, *post, *comb;
  int64_t T, R, D, parts;
  int64_t next; /* (token, part of D), by fetch-and-add */
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.f = tensor(call, ARGUMENT(F));
  work.x = tensor(call, ARGUMENT(X));
  work.post = tensor(call, ARGUMENT(POST));
  work.comb = tensor(call, ARGUMENT(COMB));
  const transom_tensor *x = work.x;
  work.T = 1;
  for (int i = 0; i < x->ndim - 2; i++) work.T *= x->shape[i];
  work.R = x->shape[x->ndim - 2], work.D = x->shape[x->ndim - 1];
  work.parts = (work.D + kPart - 1) / kPart;
  return work;
}

/* Elements d .. d + n of one token's streams, n at most kInL1. */
void mix(const Work *work, int64_t token, int64_t d, int64_t n, const float *post,
         const float *comb) {
  alignas(64) float f[kInL1], x[kMostStreams][kInL1], out[kInL1];
  const transom_tensor *in = work->x, *y = work->call->outs[0];
  const int64_t last = in->strides[in->ndim - 1], between = in->strides[in->ndim - 2];
  const int64_t first = start_of(in, 2, token) + d * last;
  const int64_t f_last = work->f->strides[work->f->ndim - 1];
  read_row(work->f, start_of(work->f, 1, token) + d * f_last, f_last, n, f);
  for (int64_t j = 0; j < work->R; j++) read_row(in, first + j * between, last, n, x[j]);
  for (int64_t k = 0; k < work->R; k++) {
    for (int64_t i = 0; i < n; i += kWidth) {
      vf sum = all(post[k]) * load(f + i);
      for (int64_t j = 0; j < work->R; j++)
        sum += all(comb[j * work->R + k]) * load(x[j] + i);
      store(out + i, sum);
    }
    write_row(at(y, (token * work->R + k) * work->D + d), kind(y), out, n);
  }
}

void mix_tasks(void *context, int32_t) {
  Work *work = static_cast<Work *>(context);
  const int64_t R = work->R;
  const transom_tensor *p = work->post, *c = work->comb;
  float post[kMostStreams], comb[kMostStreams * kMostStreams];
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (task >= work->T * work->parts) return;
    const int64_t token = task / work->parts, from = task % work->parts * kPart;
    const int64_t p0 = start_of(p, 1, token), c0 = start_of(c, 2, token);
    for (int64_t j = 0; j < R; j++) {
      post[j] = number(p, p0 + j * p->strides[p->ndim - 1]);
      for (int64_t k = 0; k < R; k++)
        comb[j * R + k] =
            number(c, c0 + j * c->strides[c->ndim - 2] + k * c->strides[c->ndim - 1]);
    }
    const int64_t end = min_of(from + kPart, work->D);
    for (int64_t d = from; d < end; d += kInL1)
      mix(work, token, d, min_of(kInL1, end - d), post, comb);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return streams_fit(work.x, "x", work.R, status);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  const double products = static_cast<double>(work.T * work.D) * static_cast<double>(work.R);
  /* Memory is the limit: an element weighs as much as some four multiplications. */
  parallel(threads_for(4.0 * products, call->threads), mix_tasks, &work);
  return 0;
}

}  // namespace

extern const transom_impl mhc_post = {
    sizeof(transom_impl), TRANSOM_TUNED, "mhc_post", "native", TRANSOM_MHC_POST_HASH,
    TRANSOM_DETERMINISTIC, 0, supports, nullptr, run};

}  // namespace transom::TRANSOM_LEVEL
