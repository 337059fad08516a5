/* block_sparse_attention: tokens of the blocks that a query selects for each key head, and a sink.
 *
 * A task is a key head and a block of neighbouring queries; the query heads of the key head are the
 * rows of the products (_attention_tile.h). The tokens of a query's list are cut into pieces of kKeys places,
 * gathered, and merged in order: the same bits in prefill and decode. Queries that share a piece,
 * because they share a list or neighbours agree on it, share its tiles. Bound by FMA; a gather that
 * nobody shares costs (D + Dv) reads for G * (D + Dv) multiplications. */
#include "../base/parallel.h"
#include "../base/tensor.h"
#include "_blocks.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_BLOCK_SPARSE_ATTENTION_##name

constexpr int64_t kQueries = 16;

struct Work : Blocks {
  const transom_call *call;
  const transom_tensor *q, *sink;
  float scale;
  int64_t given_size; /* block_size as given */
  int64_t padded, sum_stride, block, thread_floats;
  int32_t threads;
  bool past_caches; /* the output is stored past them */
  int64_t next;
};

struct Desk {
  float *panels;          /* [block][padded * D] */
  Collected total, piece; /* of every query; of one */
  Scratch scratch;
  Tiles tiles;
};

Desk lay_out(const Work *work, Cutter *cutter) {
  const int64_t sums = work->G * work->sum_stride;
  Desk desk = {};
  desk.panels = cutter->part(work->block * work->padded * work->D);
  desk.total = cutter->collected(work->block * work->padded, work->block * sums);
  desk.piece = cutter->collected(work->padded, sums);
  desk.scratch = cut_scratch(cutter, work->G);
  desk.tiles.keys = cutter->part(kKeys * tile_stride(work->D));
  desk.tiles.values = cutter->part(kKeys * tile_stride(work->Dv));
  desk.tiles.count = -1;
  return desk;
}

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.q = tensor(call, ARGUMENT(Q));
  work.sink = tensor(call, ARGUMENT(SINK));
  work.given_size = call->args[ARGUMENT(BLOCK_SIZE)].i;
  work.scale = static_cast<float>(call->args[ARGUMENT(SCALE)].f);
  static_cast<Blocks &>(work) =
      blocks_of(work.q, tensor(call, ARGUMENT(K)), tensor(call, ARGUMENT(V)),
                tensor(call, ARGUMENT(BLOCK_INDICES)), work.given_size,
                call->args[ARGUMENT(CAUSAL)].i != 0);
  work.padded = up_to(work.G, kPanel), work.sum_stride = up_to(work.Dv, kPanel);
  const int64_t units = work.B * work.S * work.Hkv;
  work.threads = threads_for(static_cast<double>(units * work.G * (work.D + work.Dv)) *
                                 static_cast<double>(work.pieces * kKeys),
                             call->threads);
  work.block = clamp(units / (4 * work.threads), 1, kQueries);
  Cutter cutter = {nullptr};
  lay_out(&work, &cutter);
  work.thread_floats = cutter.floats;
  return work;
}

/* Queries s .. s + count against key head g. */
void attend_queries(const Work *work, Desk *desk, int64_t b, int64_t s, int64_t count, int64_t g) {
  const transom_tensor *q = work->q;
  const int64_t G = work->G, panels = work->padded * work->D;
  bool any[kQueries] = {};
  desk->tiles.count = -1;
  const auto total = [&](int64_t i) {
    return Collected{desk->total.largest + i * work->padded, desk->total.mass + i * work->padded,
                     desk->total.sum + i * G * work->sum_stride};
  };
  for (int64_t i = 0; i < count; i++)
    pack_heads(q, b * q->strides[0] + (s + i) * q->strides[1] + g * G * q->strides[2], G,
               desk->panels + i * panels);
  for (int64_t p = 0; p < work->pieces; p++)
    for (int64_t i = 0; i < count; i++) {
      int64_t list[kKeys];
      const int64_t keys = tokens(work, work->given_size, b, s + i, g, p, list);
      if (keys == 0) continue;
      gather(work, b, g, list, keys, &desk->tiles);
      attend(desk->panels + i * panels, G, work->D, work->scale, desk->tiles.keys,
             tile_stride(work->D), desk->tiles.values, tile_stride(work->Dv), work->Dv, keys,
             desk->scratch, any[i] ? desk->piece : total(i), work->sum_stride, nullptr);
      if (any[i]) merge(total(i), desk->piece, G, work->sum_stride);
      any[i] = true;
    }
  for (int64_t i = 0; i < count; i++)
    finish(total(i), any[i], g * G, G, work->sum_stride, work->sink, work->call->outs[0],
           work->call->outs[1], (b * work->S + s + i) * work->Hkv * G, work->past_caches);
}

void attend_tasks(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  Cutter cutter = {static_cast<float *>(work->call->workspace) + thread * work->thread_floats};
  Desk desk = lay_out(work, &cutter);
  const int64_t each = (work->S + work->block - 1) / work->block;
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (task >= work->B * each * work->Hkv) break;
    const int64_t g = task % work->Hkv, at = task / work->Hkv;
    const int64_t s = at % each * work->block;
    attend_queries(work, &desk, at / each, s, min_of(work->block, work->S - s), g);
  }
  fence();
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
  const transom_tensor *o = call->outs[0];
  work.past_caches = goes_past_caches(o, work.B * work.S * work.Hkv * work.G, work.Dv);
  parallel(work.threads, attend_tasks, &work);
  return 0;
}

}  // namespace

extern const transom_impl block_sparse_attention = {
    sizeof(transom_impl), TRANSOM_TUNED, "block_sparse_attention", "native",
    TRANSOM_BLOCK_SPARSE_ATTENTION_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
