/* sparse_attention_backward: the gradients of q, entries, tokens of the windows and sink.
 *
 * A task is a block of kBlock queries and one piece of their keys, cut as in the forward. It
 * recomputes the weights from the lse, adds to the block's dq, and leaves what the keys collect in
 * rows of its own: of its band of tokens, of the piece of all entries, or of each query's list.
 * When kBlocks blocks are done with a piece, these rows are added to dkv and dlocal_kv in the order
 * of the blocks, every row by one thread. Bound by FMA: five
 * products of keys * heads * D for a piece. Sums of 16-bit gradients are kept as float32, those of
 * one batch at a time. */
#include "../base/parallel.h"
#include "../base/tensor.h"
#include "_gradient.h"
#include "_positions.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_SPARSE_ATTENTION_BACKWARD_##name

/* Queries of a block, and blocks in hand. The order in which a row of dkv takes up what it is given
 * follows from them (piece by piece, and in it block by block), so neither depends on threads; more
 * threads than kBlocks have nothing to do. */
constexpr int64_t kBlock = 4, kBlocks = 16;

/* A block of queries in hand. */
struct Block {
  float *dq;       /* [kBlock][H][q_stride] */
  Norms norms;     /* of each query */
  float *dsink;    /* [padded] */
  float *rows;     /* [row_slots][key_stride], what keys collect */
  int64_t *places; /* whose rows they are */
  int64_t *counts; /* rows of each list; [0] of a band */
};

struct Work : Places {
  const transom_call *call;
  const transom_tensor *q;
  Given given;
  transom_tensor *const *outs; /* dq, dkv, dlocal, dsink */
  int64_t H, D, v_dim, padded;
  float scale;
  int64_t key_stride, value_stride, q_stride, row_slots, blocks, thread_floats, block_floats;
  int32_t threads;
  float *shared;
  float *dkv, *dlocal, *dsink; /* sums: rows of D for the first two */
  int64_t b, first, piece;     /* first: block */
  int64_t next;
};

Backward lay_out(const Work *work, Cutter *cutter, float **tile) {
  const Backward desk = cut_backward(cutter, work->H, work->D, work->v_dim);
  *tile = cutter->part((kKeys + kBlock) * work->key_stride);
  return desk;
}

Block lay_out_block(const Work *work, Cutter *cutter) {
  Block block = {};
  block.dq = cutter->part(kBlock * work->H * work->q_stride);
  block.norms = cut_norms(cutter, kBlock * work->padded);
  block.dsink = cutter->part(work->padded);
  block.rows = cutter->part(work->row_slots * work->key_stride);
  block.places = reinterpret_cast<int64_t *>(cutter->part(2 * work->row_slots));
  block.counts = reinterpret_cast<int64_t *>(cutter->part(2 * kBlock));
  return block;
}

/* Sums that all blocks share; those of float32 gradients are the gradients themselves. */
void lay_out_sums(Work *work, Cutter *cutter) {
  work->dsink = cutter->part(work->padded);
  const bool narrow = kind(work->q) != 0;
  work->dkv = narrow ? cutter->part(work->N * work->D) : nullptr;
  work->dlocal = narrow ? cutter->part(work->M * work->D) : nullptr;
}

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.q = tensor(call, ARGUMENT(Q));
  work.given = {tensor(call, ARGUMENT(DO)), tensor(call, ARGUMENT(DLSE)),
                tensor(call, ARGUMENT(O)), tensor(call, ARGUMENT(LSE)),
                tensor(call, ARGUMENT(SINK))};
  work.outs = call->outs;
  static_cast<Places &>(work) = places_of(
      work.q, tensor(call, ARGUMENT(KV)), tensor(call, ARGUMENT(INDICES)),
      tensor(call, ARGUMENT(VISIBLE)), tensor(call, ARGUMENT(LOCAL_KV)),
      tensor(call, ARGUMENT(LOCAL_VALID)), call->args[ARGUMENT(WINDOW)].i);
  work.scale = static_cast<float>(call->args[ARGUMENT(SCALE)].f);
  work.H = work.q->shape[2], work.D = work.q->shape[3], work.v_dim = work.given.dout->shape[3];
  work.padded = up_to(work.H, kPanel);
  if (work.H == 0) work.pieces = 0;
  work.key_stride = tile_stride(work.D), work.value_stride = tile_stride(work.v_dim);
  work.q_stride = up_to(work.D, kPanel);
  const bool listed = work.indices != nullptr && work.entry_pieces > 0;
  work.row_slots = listed ? kBlock * kKeys : kBlock + kKeys;
  work.threads = threads_for(2.5 * static_cast<double>(work.B * work.S * work.H * work.D) *
                                 static_cast<double>(work.pieces * kKeys),
                             call->threads);
  work.blocks = min_of(kBlocks, (work.S + kBlock - 1) / kBlock);
  Cutter cutter = {nullptr}, block = {nullptr};
  float *tile;
  lay_out(&work, &cutter, &tile);
  lay_out_block(&work, &block);
  work.thread_floats = cutter.floats, work.block_floats = block.floats;
  return work;
}

float *part_of(const Work *work, int64_t thread) {
  return work->shared + work->blocks * work->block_floats + thread * work->thread_floats;
}

Block block_of(const Work *work, int64_t i) {
  Cutter cutter = {work->shared + i * work->block_floats};
  return lay_out_block(work, &cutter);
}

Norms norms_of(const Work *work, const Block &block, int64_t i) {
  const int64_t lane = i * work->padded;
  return {block.norms.lse + lane, block.norms.share + lane, block.norms.delta + lane,
          block.norms.dlse + lane};
}

/* What the softmax of each head was, and the block's part of dsink. */
void begin(const Work *work, Block *block, int64_t s, int64_t count) {
  const transom_tensor *sink = work->given.sink;
  memset(block->dq, 0, static_cast<size_t>(count * work->H * work->q_stride) * sizeof(float));
  for (int64_t h = 0; h < work->padded; h++) block->dsink[h] = 0.0f;
  for (int64_t i = 0; i < count; i++) {
    const Norms norms = norms_of(work, *block, i);
    read_norms(work->given, work->b, s + i, 0, work->H, norms);
    for (int64_t h = 0; h < work->H; h++)
      block->dsink[h] +=
          sink_gradient(number(sink, h * sink->strides[0]), norms.lse[h], norms.delta[h]);
  }
}

/* Query i of a block against `count` keys: their share of dq, and into rows what they collect. */
void attend_back(const Work *work, const Backward &desk, const Block &block, int64_t s, int64_t i,
                 const float *keys, int64_t count, float *rows, bool add) {
  if (count == 0) return;
  const transom_tensor *q = work->q, *dout = work->given.dout;
  const int64_t H = work->H, lanes = work->padded;
  const int64_t q_first = work->b * q->strides[0] + (s + i) * q->strides[1];
  const int64_t o_first = work->b * dout->strides[0] + (s + i) * dout->strides[1];
  pack_heads(q, q_first, H, desk.queries);
  pack_heads(dout, o_first, H, desk.outputs);
  read_heads(q, q_first, H, desk.query_rows, work->key_stride);
  read_heads(dout, o_first, H, desk.output_rows, work->value_stride);
  against(desk.queries, lanes, work->D, keys, work->key_stride, count, desk.scores);
  against(desk.outputs, lanes, work->v_dim, keys, work->key_stride, count, desk.products);
  weigh_back(desk.scores, desk.products, count, lanes, work->scale, norms_of(work, block, i));
  mix(desk.scores, lanes, H, keys, work->key_stride, work->D, count, desk.weights,
      block.dq + i * H * work->q_stride, work->q_stride);
  collect(desk.scores, lanes, H, desk.query_rows, work->key_stride, work->D, count, rows,
          work->key_stride, add);
  collect(desk.products, lanes, H, desk.output_rows, work->value_stride, work->v_dim, count, rows,
          work->key_stride, true);
}

/* Piece work->piece of a block's keys. */
void attend_block(const Work *work, const Backward &desk, float *tile, const Block &block,
                  int64_t s, int64_t count) {
  const int64_t stride = work->key_stride, local = work->piece - work->entry_pieces;
  for (int64_t i = 0; i < kBlock; i++) block.counts[i] = 0;
  if (local < 0 && work->indices != nullptr) {
    for (int64_t i = 0; i < count; i++) {
      int64_t *list = block.places + i * kKeys;
      block.counts[i] = listed(work, work->b, s + i, work->piece, list);
      gather(work->kv, work->b, list, block.counts[i], tile, stride);
      attend_back(work, desk, block, s, i, tile, block.counts[i], block.rows + i * kKeys * stride,
                  false);
    }
    return;
  }
  int16_t before[kKeys + kBlock];
  int64_t rows = 0, seen[kBlock];
  if (local < 0) {
    const int64_t start = work->piece * kKeys;
    for (int64_t i = 0; i < count; i++) {
      seen[i] = clamp(bound_of(work, work->b, s + i) - start, 0, kKeys);
      rows = max_of(rows, seen[i]);
    }
    for (int64_t j = 0; j < rows; j++) block.places[j] = start + j;
    gather(work->kv, work->b, block.places, rows, tile, stride);
  } else {
    rows = near(work, work->b, s, count, local, block.places, before);
    gather(work->local, work->b, block.places, rows, tile, stride);
  }
  block.counts[0] = rows;
  memset(block.rows, 0, static_cast<size_t>(rows * stride) * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    const int64_t from = local < 0 ? 0 : before[i];
    const int64_t n = local < 0 ? seen[i] : before[i + window_length(work, local)] - from;
    attend_back(work, desk, block, s, i, tile + from * stride, n, block.rows + from * stride,
                true);
  }
}

/* dq of a block, rounded. */
void end(const Work *work, const Block &block, int64_t s, int64_t count) {
  const transom_tensor *dq = work->outs[0];
  for (int64_t row = 0; row < count * work->H; row++)
    write_row(at(dq, ((work->b * work->S + s) * work->H + row) * work->D), kind(dq),
              block.dq + row * work->q_stride, work->D);
}

void attend_blocks(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  float *tile;
  Cutter cutter = {part_of(work, thread)};
  const Backward desk = lay_out(work, &cutter, &tile);
  for (;;) {
    const int64_t i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    const int64_t s = (work->first + i) * kBlock, count = min_of(kBlock, work->S - s);
    if (i >= work->blocks || count <= 0) return;
    Block block = block_of(work, i);
    if (work->piece == 0) begin(work, &block, s, count);
    if (work->piece < work->pieces) attend_block(work, desk, tile, block, s, count);
    if (work->piece + 1 >= work->pieces) end(work, block, s, count);
  }
}

/* Rows of the sums that are shared out at once: neighbours go to different threads. */
constexpr int64_t kShares = 16;

void add_rows(void *context, int32_t) {
  Work *work = static_cast<Work *>(context);
  const int64_t D = work->D, share = (work->threads > 1) ? kShares : 1;
  float *sums = work->piece < work->entry_pieces ? work->dkv : work->dlocal;
  for (;;) {
    const int64_t mine = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (mine >= share) return;
    for (int64_t i = 0; i < work->blocks && (work->first + i) * kBlock < work->S; i++) {
      const Block block = block_of(work, i);
      const bool lists = work->piece < work->entry_pieces && work->indices != nullptr;
      for (int64_t list = 0; list < (lists ? kBlock : 1); list++)
        for (int64_t r = list * kKeys; r < list * kKeys + block.counts[list]; r++) {
          if (block.places[r] % share != mine) continue;
          const float *from = block.rows + r * work->key_stride;
          float *to = sums + block.places[r] * D;
          for (int64_t d = 0; d < D; d++) to[d] += from[d];
        }
    }
  }
}

/* float32 sums of a batch as gradients of 16 bits. */
void round_sums(const Work *work) {
  for (int which = 1; which <= 2; which++) {
    const transom_tensor *out = work->outs[which];
    const int64_t n = out->shape[1] * work->D;
    if (n > 0 && kind(out) != 0)
      write_row(at(out, work->b * n), kind(out), which == 1 ? work->dkv : work->dlocal, n);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARGUMENT(Q)), "q", status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  Cutter sums = {nullptr};
  lay_out_sums(&work, &sums);
  return static_cast<uint64_t>(work.threads * work.thread_floats + work.blocks * work.block_floats +
                               sums.floats) *
         sizeof(float);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  Cutter sums = {static_cast<float *>(call->workspace)};
  lay_out_sums(&work, &sums);
  work.shared = static_cast<float *>(call->workspace) + sums.floats;
  for (int64_t h = 0; h < work.H; h++) work.dsink[h] = 0.0f;
  for (work.b = 0; work.b < work.B; work.b++) {
    if (kind(work.q) == 0) {
      work.dkv = static_cast<float *>(at(work.outs[1], work.b * work.N * work.D));
      work.dlocal = static_cast<float *>(at(work.outs[2], work.b * work.M * work.D));
    }
    if (work.N > 0) memset(work.dkv, 0, static_cast<size_t>(work.N * work.D) * sizeof(float));
    if (work.M > 0) memset(work.dlocal, 0, static_cast<size_t>(work.M * work.D) * sizeof(float));
    for (work.first = 0; work.first * kBlock < work.S; work.first += work.blocks)
      for (work.piece = 0; work.piece < max_of(work.pieces, 1); work.piece++) {
        work.next = 0;
        parallel(work.threads, attend_blocks, &work);
        if (work.piece == 0)
          for (int64_t i = 0; i < work.blocks && (work.first + i) * kBlock < work.S; i++)
            for (int64_t h = 0; h < work.H; h++) work.dsink[h] += block_of(&work, i).dsink[h];
        work.next = 0;
        if (work.piece < work.pieces) parallel(work.threads, add_rows, &work);
      }
    round_sums(&work);
  }
  write_row(work.outs[3]->data, kind(work.outs[3]), work.dsink, work.H);
  return 0;
}

}  // namespace

extern const transom_impl sparse_attention_backward = {
    sizeof(transom_impl), TRANSOM_TUNED, "sparse_attention_backward", "native",
    TRANSOM_SPARSE_ATTENTION_BACKWARD_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
