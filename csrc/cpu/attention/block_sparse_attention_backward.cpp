/* block_sparse_attention_backward: the gradients of q, k, v and sink.
 *
 * First those of queries: a task is a key head and a block of neighbouring queries, whose keys are
 * cut and gathered as in the forward. Then those of keys and values: a task is a key head and kKeys
 * tokens, whose sums stay in L2 while the queries that select some of them pass by in order. So
 * every gradient is summed by one thread in one order and written once, and no workspace grows
 * with the call. The price is a second computation of q . k and do . v, two of seven products, and
 * that each task of tokens searches all lists: one comparison for S * L * N / kKeys, against
 * 4 * heads * block_size * (D + Dv) multiplications for S * L. Bound by FMA. */
#include "../base/parallel.h"
#include "../base/tensor.h"
#include "_blocks.h"
#include "_gradient.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_##name

constexpr int64_t kQueries = 4;

struct Work : Blocks {
  const transom_call *call;
  const transom_tensor *q;
  Given given;
  float scale;
  int64_t given_size; /* block_size as given */
  int64_t padded, key_stride, value_stride, sum_stride, thread_floats;
  int32_t threads;
  int64_t next;
};

struct Desk {
  Backward back;
  Norms norms;              /* of one query */
  float *dq;                /* [kQueries][G][sum_stride] */
  float *dkeys, *dvalues;   /* of kKeys tokens, as in tiles */
  float *queries, *outputs; /* packed, of every query of a block */
  Tiles tiles;
};

Desk lay_out(const Work *work, Cutter *cutter) {
  Desk desk = {};
  desk.back = cut_backward(cutter, work->G, work->D, work->Dv);
  desk.norms = cut_norms(cutter, kQueries * work->padded);
  desk.dq = cutter->part(kQueries * work->G * work->sum_stride);
  desk.dkeys = cutter->part(kKeys * work->key_stride);
  desk.dvalues = cutter->part(kKeys * work->value_stride);
  desk.queries = cutter->part(kQueries * work->padded * work->D);
  desk.outputs = cutter->part(kQueries * work->padded * work->Dv);
  desk.tiles.keys = cutter->part(kKeys * work->key_stride);
  desk.tiles.values = cutter->part(kKeys * work->value_stride);
  return desk;
}

Desk desk_of(const Work *work, int32_t thread) {
  Cutter cutter = {static_cast<float *>(work->call->workspace) + thread * work->thread_floats};
  return lay_out(work, &cutter);
}

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.q = tensor(call, ARGUMENT(Q));
  work.given = {tensor(call, ARGUMENT(DO)), tensor(call, ARGUMENT(DLSE)),
                tensor(call, ARGUMENT(O)), tensor(call, ARGUMENT(LSE)),
                tensor(call, ARGUMENT(SINK))};
  work.given_size = call->args[ARGUMENT(BLOCK_SIZE)].i;
  work.scale = static_cast<float>(call->args[ARGUMENT(SCALE)].f);
  static_cast<Blocks &>(work) =
      blocks_of(work.q, tensor(call, ARGUMENT(K)), tensor(call, ARGUMENT(V)),
                tensor(call, ARGUMENT(BLOCK_INDICES)), work.given_size,
                call->args[ARGUMENT(CAUSAL)].i != 0);
  work.padded = up_to(work.G, kPanel), work.sum_stride = up_to(work.D, kPanel);
  work.key_stride = tile_stride(work.D), work.value_stride = tile_stride(work.Dv);
  work.threads = threads_for(3.5 * static_cast<double>(work.B * work.S * work.Hkv * work.G) *
                                 static_cast<double>((work.D + work.Dv) * work.pieces * kKeys),
                             call->threads);
  Cutter cutter = {nullptr};
  lay_out(&work, &cutter);
  work.thread_floats = cutter.floats;
  return work;
}

/* Where head h of query s begins. */
int64_t start_at(const transom_tensor *t, int64_t b, int64_t s, int64_t h) {
  return b * t->strides[0] + s * t->strides[1] + h * t->strides[2];
}

Norms norms_at(const Work *work, const Desk &desk, int64_t i) {
  const int64_t lane = i * work->padded;
  return {desk.norms.lse + lane, desk.norms.share + lane, desk.norms.delta + lane,
          desk.norms.dlse + lane};
}

/* dS and the weights of a query's heads against `count` keys, in desk.back.scores and products. */
void weights_of(const Work *work, const Desk &desk, const float *queries, const float *outputs,
                Norms norms, const float *keys, const float *values, int64_t count) {
  const int64_t lanes = work->padded;
  against(queries, lanes, work->D, keys, work->key_stride, count, desk.back.scores);
  against(outputs, lanes, work->Dv, values, work->value_stride, count, desk.back.products);
  weigh_back(desk.back.scores, desk.back.products, count, lanes, work->scale, norms);
}

/* dq of queries s .. s + count for key head g. */
void query_gradients(const Work *work, Desk *desk, int64_t b, int64_t s, int64_t count,
                     int64_t g) {
  const int64_t G = work->G, packed_q = work->padded * work->D, packed_o = work->padded * work->Dv;
  const transom_tensor *dq = work->call->outs[0];
  desk->tiles.count = -1;
  memset(desk->dq, 0, static_cast<size_t>(count * G * work->sum_stride) * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    read_norms(work->given, b, s + i, g * G, G, norms_at(work, *desk, i));
    pack_heads(work->q, start_at(work->q, b, s + i, g * G), G, desk->queries + i * packed_q);
    pack_heads(work->given.dout, start_at(work->given.dout, b, s + i, g * G), G,
               desk->outputs + i * packed_o);
  }
  for (int64_t p = 0; p < work->pieces; p++)
    for (int64_t i = 0; i < count; i++) {
      int64_t list[kKeys];
      const int64_t keys = tokens(work, work->given_size, b, s + i, g, p, list);
      if (keys == 0) continue;
      gather(work, b, g, list, keys, &desk->tiles);
      weights_of(work, *desk, desk->queries + i * packed_q, desk->outputs + i * packed_o,
                 norms_at(work, *desk, i), desk->tiles.keys, desk->tiles.values, keys);
      mix(desk->back.scores, work->padded, G, desk->tiles.keys, work->key_stride, work->D, keys,
          desk->back.weights, desk->dq + i * G * work->sum_stride, work->sum_stride);
    }
  for (int64_t i = 0; i < count; i++)
    for (int64_t h = 0; h < G; h++)
      write_row(at(dq, (((b * work->S + s + i) * work->Hkv + g) * G + h) * work->D), kind(dq),
                desk->dq + (i * G + h) * work->sum_stride, work->D);
}

/* dk and dv of tokens first .. first + count of key head g. */
void key_gradients(const Work *work, Desk *desk, int64_t b, int64_t first, int64_t count,
                   int64_t g) {
  const transom_tensor *named = work->indices, *q = work->q, *dout = work->given.dout;
  const int64_t G = work->G, ks = work->key_stride, vs = work->value_stride;
  const int64_t size = work->block_size;
  const int64_t lowest = first / size, highest = (first + count - 1) / size;
  int64_t list[kKeys];
  for (int64_t j = 0; j < count; j++) list[j] = first + j;
  desk->tiles.count = -1;
  gather(work, b, g, list, count, &desk->tiles);
  memset(desk->dkeys, 0, static_cast<size_t>(count * ks) * sizeof(float));
  memset(desk->dvalues, 0, static_cast<size_t>(count * vs) * sizeof(float));
  for (int64_t s = 0; s < work->S; s++) {
    const int64_t own = work->lists == work->S ? s : s / work->given_size;
    const int64_t row = start_at(named, b, own, g), stop = first_unseen(work, s);
    bool ready = false;
    for (int64_t slot = 0; stop > first && slot < work->length; slot++) {
      const int64_t block = integer(named, row + slot * named->strides[3]);
      if (block < lowest || block > highest) continue;
      const int64_t from = max_of(block * size - first, 0);
      const int64_t n = min_of(min_of((block + 1) * size, stop) - first, count) - from;
      if (n <= 0) continue;
      if (!ready) {
        const int64_t head = g * G;
        read_norms(work->given, b, s, head, G, desk->norms);
        pack_heads(q, start_at(q, b, s, head), G, desk->back.queries);
        pack_heads(dout, start_at(dout, b, s, head), G, desk->back.outputs);
        read_heads(q, start_at(q, b, s, head), G, desk->back.query_rows, ks);
        read_heads(dout, start_at(dout, b, s, head), G, desk->back.output_rows, vs);
        ready = true;
      }
      weights_of(work, *desk, desk->back.queries, desk->back.outputs, desk->norms,
                 desk->tiles.keys + from * ks, desk->tiles.values + from * vs, n);
      collect(desk->back.scores, work->padded, G, desk->back.query_rows, ks, work->D, n,
              desk->dkeys + from * ks, ks, true);
      collect(desk->back.products, work->padded, G, desk->back.output_rows, vs, work->Dv, n,
              desk->dvalues + from * vs, vs, true);
    }
  }
  const transom_tensor *dk = work->call->outs[1], *dv = work->call->outs[2];
  for (int64_t j = 0; j < count; j++) {
    const int64_t to = (b * work->N + first + j) * work->Hkv + g;
    write_row(at(dk, to * work->D), kind(dk), desk->dkeys + j * ks, work->D);
    write_row(at(dv, to * work->Dv), kind(dv), desk->dvalues + j * vs, work->Dv);
  }
}

/* dsink of head h. */
void sink_gradient(const Work *work, int64_t h) {
  const transom_tensor *sink = work->given.sink, *dsink = work->call->outs[3];
  const float logit = number(sink, h * sink->strides[0]);
  double total = 0.0;
  for (int64_t b = 0; logit != kNever && b < work->B; b++)
    for (int64_t s = 0; s < work->S; s++) {
      const float lse = number_of(work->given.lse, b, s, h);
      if (lse != kNever)
        total += static_cast<double>(sink_gradient(logit, lse, delta_of(work->given, b, s, h)));
    }
  const float rounded = static_cast<float>(total);
  write_row(at(dsink, h), kind(dsink), &rounded, 1);
}

void attend_tasks(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  Desk desk = desk_of(work, thread);
  const int64_t blocks = (work->S + kQueries - 1) / kQueries;
  const int64_t chunks = (work->N + kKeys - 1) / kKeys;
  const int64_t of_queries = work->B * blocks * work->Hkv, of_keys = work->B * chunks * work->Hkv;
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    const int64_t g = task % work->Hkv;
    if (task < of_queries) {
      const int64_t at = task / work->Hkv, s = at % blocks * kQueries;
      query_gradients(work, &desk, at / blocks, s, min_of(kQueries, work->S - s), g);
    } else if (task - of_queries < of_keys) {
      const int64_t at = (task - of_queries) / work->Hkv, first = at % chunks * kKeys;
      key_gradients(work, &desk, at / chunks, first, min_of(kKeys, work->N - first),
                    (task - of_queries) % work->Hkv);
    } else if (task - of_queries - of_keys < work->Hkv * work->G) {
      sink_gradient(work, task - of_queries - of_keys);
    } else {
      return;
    }
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARGUMENT(Q)), "q", status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(work.thread_floats * work.threads) * sizeof(float);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  parallel(work.threads, attend_tasks, &work);
  return 0;
}

}  // namespace

extern const transom_impl block_sparse_attention_backward = {
    sizeof(transom_impl), TRANSOM_TUNED, "block_sparse_attention_backward", "native",
    TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace,
    run};

}  // namespace transom::TRANSOM_LEVEL
