/* mhc_pre: mix = x_flat @ fn.T / rms(x_flat); pre, post and comb of it; h = sum of pre[j] * x[j].
 *
 * A task is a block of tokens, and takes a piece of their streams at a time: widened to float32
 * once, from where both the products with fn and the squares are taken; a piece of fn serves the
 * whole block from L2. Then the gates and Sinkhorn, a token in each place of a vector, and h,
 * for which x is read again, from the cache. With fewer tokens than threads a task is a piece
 * instead, and the pieces' sums are added afterwards in the same order: the same bits. Bound by FMA
 * with many tokens, by the memory of fn with one. */
#include "../parallel.h"
#include "../product.h"
#include "_steps.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_MHC_PRE_##name

constexpr int64_t kMostTokens = 32, kInL1 = 256;
constexpr int64_t kPanelStride = kPiece + kPad;

struct Work {
  const transom_call *call;
  const transom_tensor *x, *fn, *scale, *base;
  int64_t T, R, D, K, N, pieces;
  int64_t block, sums_stride; /* tokens in a block; N products and the sum of squares */
  int32_t threads;
  bool by_piece;
  float *panels, *sums; /* by thread; by thread and token, or by piece and token */
  int64_t next;         /* block or piece, by fetch-and-add */
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  const transom_tensor *x = work.x = tensor(call, ARGUMENT(X));
  work.fn = tensor(call, ARGUMENT(FN));
  work.scale = tensor(call, ARGUMENT(SCALE));
  work.base = tensor(call, ARGUMENT(BASE));
  work.T = 1;
  for (int i = 0; i < x->ndim - 2; i++) work.T *= x->shape[i];
  work.R = x->shape[x->ndim - 2], work.D = x->shape[x->ndim - 1];
  work.K = work.R * work.D, work.N = (2 + work.R) * work.R, work.sums_stride = work.N + 1;
  work.pieces = max_of(1, (work.K + kPiece - 1) / kPiece);
  const double products = static_cast<double>(work.T * work.N) * static_cast<double>(work.K);
  /* One token: memory is the limit, and a number of fn weighs as much as some four FMAs. */
  work.threads = threads_for(work.T == 1 ? 4.0 * products : products, call->threads);
  work.by_piece = work.T < work.threads;
  const int64_t share = (work.T + work.threads - 1) / work.threads;
  work.block = work.by_piece ? max_of(1, min_of(work.T, kMostTokens))
                             : clamp(share, 1, kMostTokens);
  return work;
}

/* Bytes of workspace. */
int64_t lay_out(Work *work) {
  const int64_t panels = up_to(work->threads * work->block * kPanelStride * 4, 64);
  const int64_t rows = work->by_piece ? work->pieces * work->T : work->threads * work->block;
  if (work->call->workspace != nullptr) {
    work->panels = static_cast<float *>(work->call->workspace);
    work->sums = work->panels + panels / 4;
  }
  return panels + rows * work->sums_stride * 4;
}

/* Elements k .. k + n of the streams of one token, side by side, and zeros after them. */
void widen(const Work *work, int64_t token, int64_t k, int64_t n, float *to) {
  const transom_tensor *x = work->x;
  const int64_t last = x->strides[x->ndim - 1], between = x->strides[x->ndim - 2], D = work->D;
  const int64_t start = start_of(x, 2, token);
  for (int64_t done = 0; done < n;) {
    const int64_t j = (k + done) / D, d = (k + done) % D;
    const int64_t here = between == D * last ? n - done : min_of(D - d, n - done);
    read_row(x, start + j * between + d * last, last, here, to + done);
    done += here;
  }
  memset(to + n, 0, static_cast<size_t>(up_to(n, kWidth) - n) * sizeof(float));
}

/* The sum of the squares of n elements with zeros after them. */
float squares(const float *x, int64_t n) {
  vf sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) sums[c] += load(x + i + c * kWidth) * load(x + i + c * kWidth);
  for (; i < n; i += kWidth) sums[0] += load(x + i) * load(x + i);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

/* Products and squares of one piece of `tokens` tokens; `more`: added to those before. */
void piece(const Work *work, int64_t first, int64_t tokens, int64_t at, bool more, float *panel,
           float *sums) {
  const int64_t k = at * kPiece, n = min_of(kPiece, work->K - k), stride = work->sums_stride;
  for (int64_t t = 0; t < tokens; t++) {
    float *row = panel + t * kPanelStride, *total = sums + t * stride + work->N;
    widen(work, first + t, k, n, row);
    const float here = squares(row, n);
    *total = more ? *total + here : here;
  }
  const transom_tensor *fn = work->fn;
  const int64_t between = fn->strides[0];
  if (fn->dtype_bits == 32)
    multiply(tokens, panel, kPanelStride, work->N, static_cast<const float *>(fn->data) + k,
             between, n, sums, stride, more);
  else if (fn->dtype_code == TRANSOM_BFLOAT)
    multiply(tokens, panel, kPanelStride, work->N, static_cast<const bf16 *>(fn->data) + k,
             between, n, sums, stride, more);
  else
    multiply(tokens, panel, kPanelStride, work->N, static_cast<const f16 *>(fn->data) + k, between,
             n, sums, stride, more);
}

vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

void mix(const Work *work, int64_t token, const float *pre) {
  alignas(64) float x[kMostStreams][kInL1], out[kInL1];
  const transom_tensor *in = work->x, *h = work->call->outs[0];
  const int64_t last = in->strides[in->ndim - 1], between = in->strides[in->ndim - 2];
  const int64_t start = start_of(in, 2, token);
  for (int64_t d = 0; d < work->D; d += kInL1) {
    const int64_t n = min_of(kInL1, work->D - d);
    for (int64_t j = 0; j < work->R; j++)
      read_row(in, start + j * between + d * last, last, n, x[j]);
    for (int64_t i = 0; i < n; i += kWidth) {
      vf sum = {};
      for (int64_t j = 0; j < work->R; j++) sum += all(pre[j]) * load(x[j] + i);
      store(out + i, sum);
    }
    write_row(at(h, token * work->D + d), kind(h), out, n);
  }
}

/* The outputs of at most kWidth tokens, from their sums. */
void finish(const Work *work, int64_t first, int64_t tokens, const float *sums) {
  const transom_value *args = work->call->args;
  const int64_t R = work->R, N = work->N, stride = work->sums_stride;
  const float eps = static_cast<float>(args[ARGUMENT(EPS)].f);
  const float rms_eps = static_cast<float>(args[ARGUMENT(RMS_EPS)].f);
  const float post_scale = static_cast<float>(args[ARGUMENT(POST_SCALE)].f);
  const float count = static_cast<float>(max_of(1, work->K));
  float *post = static_cast<float *>(work->call->outs[1]->data) + first * R;
  float *comb = static_cast<float *>(work->call->outs[2]->data) + first * R * R;
  float pre[kWidth][kMostStreams];
  vf r = {}, m[kMostStreams * kMostStreams];
  for (int64_t t = 0; t < tokens; t++)
    r[t] = 1.0f / __builtin_sqrtf(sums[t * stride + N] / count + rms_eps);
  for (int64_t c = 0; c < N; c++) {
    vf u = {};
    for (int64_t t = 0; t < tokens; t++) u[t] = sums[t * stride + c];
    const int64_t which = c < R ? 0 : c < 2 * R ? 1 : 2;
    const vf a = u * r * all(number(work->scale, which * work->scale->strides[0])) +
                 all(number(work->base, c * work->base->strides[0]));
    if (which == 2) {
      m[c - 2 * R] = a;
      continue;
    }
    const vf gate = which == 0 ? sigmoid(a) + eps : post_scale * sigmoid(a);
    for (int64_t t = 0; t < tokens; t++) {
      if (which == 0)
        pre[t][c] = gate[t];
      else
        post[t * R + c - R] = gate[t];
    }
  }
  steps(m, R, args[ARGUMENT(ITERATIONS)].i, eps);
  for (int64_t t = 0; t < tokens; t++) {
    for (int64_t i = 0; i < R * R; i++) comb[t * R * R + i] = m[i][t];
    mix(work, first + t, pre[t]);
  }
}

void by_block(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  float *panel = work->panels + thread * work->block * kPanelStride;
  float *sums = work->sums + thread * work->block * work->sums_stride;
  for (;;) {
    const int64_t first = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED) * work->block;
    if (first >= work->T) return;
    const int64_t tokens = min_of(work->block, work->T - first);
    for (int64_t at = 0; at < work->pieces; at++)
      piece(work, first, tokens, at, at > 0, panel, sums);
    for (int64_t t = 0; t < tokens; t += kWidth)
      finish(work, first + t, min_of(kWidth, tokens - t), sums + t * work->sums_stride);
  }
}

void by_piece(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  float *panel = work->panels + thread * work->block * kPanelStride;
  for (;;) {
    const int64_t at = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (at >= work->pieces) return;
    float *sums = work->sums + at * work->T * work->sums_stride;
    for (int64_t t = 0; t < work->T; t += work->block)
      piece(work, t, min_of(work->block, work->T - t), at, false, panel,
            sums + t * work->sums_stride);
  }
}

/* After by_piece: the outputs of one token a task. */
void each_token(void *context, int32_t) {
  Work *work = static_cast<Work *>(context);
  for (;;) {
    const int64_t t = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (t >= work->T) return;
    float *sums = work->sums + t * work->sums_stride;
    for (int64_t at = 1; at < work->pieces; at++)
      for (int64_t c = 0; c < work->sums_stride; c++)
        sums[c] += sums[at * work->T * work->sums_stride + c];
    finish(work, t, 1, sums);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  if (!streams_fit(work.x, "x", work.R, status)) return 0;
  if (work.K > 1 && work.fn->strides[1] != 1) {
    snprintf(status->message, sizeof status->message,
             "fn has a last dim of stride %lld; supported: 1; call .contiguous()",
             static_cast<long long>(work.fn->strides[1]));
    return 0;
  }
  return 1;
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  return static_cast<uint64_t>(lay_out(&work));
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  if (work.T == 0) return 0;
  lay_out(&work);
  parallel(work.threads, work.by_piece ? by_piece : by_block, &work);
  if (!work.by_piece) return 0;
  work.next = 0;
  parallel(static_cast<int32_t>(work.T), each_token, &work);
  return 0;
}

}  // namespace

extern const transom_impl mhc_pre = {
    sizeof(transom_impl), TRANSOM_TUNED, "mhc_pre", "native", TRANSOM_MHC_PRE_HASH,
    TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
