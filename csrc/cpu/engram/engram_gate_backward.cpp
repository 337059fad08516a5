/* engram_gate_backward: dx, dkey, dvalue and dweight, the statistics taken again.
 *
 * A task is a part of the tokens, of which there are as many as the number of tokens says, whatever
 * the number of threads. Each has a row of partial sums of dweight of its own, which are added in
 * order at the end: the same bits. It is bound by memory: dy, x, key, dx and dkey once each; the rows
 * that the second pass reads lie in the cache. */
#include "_gate.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(engram_gate_backward, supports, workspace, run)

namespace {

constexpr int64_t kMostParts = 64, kLeastTokens = 8, kSlice = 4096;

struct Work {
  Gated gated;
  const transom_tensor *dy;
  transom_tensor *const *outs;
  int64_t parts;
  int32_t threads;
  float *partial; /* [parts,R,D] */
  char *buffers;  /* for each thread: dvalue of a token in float32, and four rows */
  int64_t buffer_bytes, row_bytes;
};

Work describe(const transom_call *call) {
  Work work = {};
  work.gated = describe_gated<Arguments>(call);
  work.dy = tensor(call, ARG(DY));
  work.outs = call->outs;
  const Gated *g = &work.gated;
  work.parts = clamp((g->T + kLeastTokens - 1) / kLeastTokens, 1, kMostParts);
  work.threads = threads_for(
      16.0 * static_cast<double>(g->T * g->R) * static_cast<double>(g->D), call->threads);
  work.row_bytes = up_to(g->D * 4, 64);
  work.buffer_bytes = 5 * work.row_bytes;
  return work;
}

void lay_out(Work *work, Arena &arena) {
  const Gated *g = &work->gated;
  lay_out_weight(&work->gated, arena);
  work->partial = arena.take<float>(work->parts * g->R * g->D);
  work->buffers = arena.take<char>(work->threads * work->buffer_bytes);
}

template <class Number>
void masked(const Work *work, int64_t token) {
  const Gated *g = &work->gated;
  const int64_t D = g->D;
  const transom_tensor *dy = work->dy;
  for (int64_t j = 0; j < g->R; j++) {
    const int64_t at = (token * g->R + j) * D;
    Number *dx = static_cast<Number *>(work->outs[0]->data) + at;
    memset(static_cast<Number *>(work->outs[1]->data) + at, 0,
           static_cast<size_t>(D) * sizeof(Number));
    if (!g->residual) {
      memset(dx, 0, static_cast<size_t>(D) * sizeof(Number));
      continue;
    }
    const Number *from = dense_row(
        dy, start_of(dy, 2, token) + j * dy->strides[dy->ndim - 2], D, dx);
    if (from != dx) memcpy(dx, from, static_cast<size_t>(D) * sizeof(Number));
  }
  memset(static_cast<Number *>(work->outs[2]->data) + token * D, 0,
         static_cast<size_t>(D) * sizeof(Number));
}

template <class Number>
void one(const Work *work, int64_t token, int64_t last, float *partial, char *buffer) {
  const Gated *g = &work->gated;
  const int64_t D = g->D;
  const transom_tensor *x = g->x, *key = g->key, *dy = work->dy;
  float *dvalue = reinterpret_cast<float *>(buffer);
  Number *rows[4];
  for (int i = 0; i < 4; i++)
    rows[i] = reinterpret_cast<Number *>(buffer + (i + 1) * work->row_bytes);
  const Number *value = dense_row(g->value, start_of(g->value, 1, token), D, rows[0]);
  for (int64_t j = 0; j < g->R; j++) {
    const int64_t at = (token * g->R + j) * D;
    const Number *xs = dense_row(
        x, start_of(x, 2, token) + j * x->strides[x->ndim - 2], D, rows[1]);
    const Number *keys = dense_row(
        key, start_of(key, 2, token) + j * key->strides[key->ndim - 2], D, rows[2]);
    const Number *dys = dense_row(
        dy, start_of(dy, 2, token) + j * dy->strides[dy->ndim - 2], D, rows[3]);
    const float *weight = g->weights + j * g->weights_stride;
    float dgate = 0;
    const Statistics s = statistics<Number, true>(g, xs, keys, weight, dys, value, &dgate);
    const float size = s.dot < 0 ? -s.dot : s.dot, gate = gate_of(s.dot, g->clamp);
    const float c = size < g->clamp
                        ? 0.0f
                        : dgate * 0.5f * gate * (1.0f - gate) / __builtin_sqrtf(size);
    const vf rx = all(s.rx), rk = all(s.rk), gx = all(c * s.rx), gk = all(c * s.rk);
    const vf root = all(1.0f / g->root), over = all(c / g->root), open = all(gate);
    const vf through = all(s.dot / static_cast<float>(max_of(1, D)));
    Number *dx = static_cast<Number *>(work->outs[0]->data) + at;
    Number *dkey = static_cast<Number *>(work->outs[1]->data) + at;
    float *sums = partial + j * D;
    const Rows next = j + 1 < g->R       ? rows_of(g, dy, token, j + 1)
                      : token + 1 < last ? rows_of(g, dy, token + 1, 0)
                                         : Rows{};
    each_vector(D, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      prefetch<Number>(next, i);
      const vf d = load_up_to(dys + i, n), w = load_up_to(weight + i, n) * root;
      const vf nx = load_up_to(xs + i, n) * rx, nk = load_up_to(keys + i, n) * rk;
      const vf moved = gx * (nk * w - nx * through);
      const vf through_x = g->residual ? d + moved : moved, through_k = gk * (nx * w - nk * through);
      const vf to_value = open * d + (j > 0 ? load(dvalue + i) : vf{});
      const vf to_weight = load_up_to(sums + i, n) + over * nx * nk;
      store(dvalue + i, to_value);
      store_up_to(dx + i, through_x, n);
      store_up_to(dkey + i, through_k, n);
      store_up_to(sums + i, to_weight, n);
    });
  }
  if (g->R == 0) memset(dvalue, 0, static_cast<size_t>(D) * sizeof(float));
  write_numbers(static_cast<Number *>(work->outs[2]->data) + token * D, dvalue, D);
}

template <class Number>
void take_part(const Work *work, int64_t part, int32_t thread) {
  const Gated *g = &work->gated;
  const int64_t size = g->R * g->D, end = g->T * (part + 1) / work->parts;
  char *buffer = work->buffers + thread * work->buffer_bytes;
  float *partial = work->partial + part * size;
  memset(partial, 0, static_cast<size_t>(size) * sizeof(float));
  for (int64_t t = g->T * part / work->parts; t < end; t++) {
    if (takes_part(g, t))
      one<Number>(work, t, end, partial, buffer);
    else
      masked<Number>(work, t);
  }
}

/* A slice of dweight: the parts in order. */
void add_parts(const Work *work, int64_t first) {
  const int64_t size = work->gated.R * work->gated.D, n = min_of(kSlice, size - first);
  float *dweight = static_cast<float *>(work->outs[3]->data) + first;
  memcpy(dweight, work->partial + first, static_cast<size_t>(n) * sizeof(float));
  for (int64_t part = 1; part < work->parts; part++) {
    const float *more = work->partial + part * size + first;
    for (int64_t i = 0; i < n; i++) dweight[i] += more[i];
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  return readable(work.gated.x, "x", status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  Arena arena;
  lay_out(&work, arena);
  return arena.bytes();
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  const Gated *g = &work.gated;
  Arena arena(call->workspace);
  lay_out(&work, arena);
  copy_weight(g);
  for (int i = 0; i < 2; i++)
    about_to_write(work.outs[i]->data, g->T * g->R * g->D * size_of(work.outs[i]));
  with_type_of(g->x, [&]<class Number>(const Number *) {
    tasks(work.threads, work.parts,
          [&](int64_t part, int32_t thread) { take_part<Number>(&work, part, thread); });
  });
  tasks(work.threads, (g->R * g->D + kSlice - 1) / kSlice,
        [&](int64_t slice, int32_t) { add_parts(&work, slice * kSlice); });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
