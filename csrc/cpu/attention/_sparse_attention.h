/* Entries, a window of raw tokens and a sink under one softmax; keys are values. Entries are numbers
 * (sparse_attention) or packed rows (sparse_attention_rows); the arguments are the same ones.
 *
 * A query's keys are cut into pieces of kKeys places: of its list or of all entries, then of its
 * window, counted from the window's own start. Each piece is gathered, multiplied with all heads
 * (_attention_tile.h) and merged, in this order, whatever the size of the call: the same bits in prefill and
 * decode.
 *
 * Prefill: a task is a block of neighbouring queries, which share the tile of their windows, and of
 * entries where there are no lists. With fewer queries than threads can share evenly, a round of
 * tasks computes single pieces of one query, a second one merges them; of a query that has one
 * piece, a window alone, the heads are shared. Bound by FMA; a piece costs a gather of kKeys rows
 * for heads * (D + v_dim) multiplications each, and rows that only one query reads are fetched
 * while those before them are multiplied. Internal linkage, as in vector.h. */
#pragma once

#include <sched.h>

#include "../base/parallel.h"
#include "../base/tensor.h"
#include "_positions.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_SPARSE_ATTENTION_##name

static_assert(+ARGUMENT(KV) == +TRANSOM_SPARSE_ATTENTION_ROWS_ROWS &&
              +ARGUMENT(LOCAL_VALID) == +TRANSOM_SPARSE_ATTENTION_ROWS_LOCAL_VALID &&
              +ARGUMENT(N_ARGS) == +TRANSOM_SPARSE_ATTENTION_ROWS_N_ARGS);

/* Queries of a task: a window of kKeys is then gathered for 1 + 1/8 times its size. */
constexpr int64_t kQueries = 16;
/* Pieces of one query that wait for their merge, for each thread. */
constexpr int64_t kWaiting = 4;
/* Keys that are gathered at a time where nothing has fetched them: a whole number of tiles. */
constexpr int64_t kStep = 36;

struct Work : Places {
  const transom_call *call;
  const transom_tensor *q, *sink;
  int64_t H, D, v_dim;
  float scale;
  int64_t padded, key_stride, sum_stride; /* heads in panels; floats of a row of a tile, of a sum */
  int64_t groups;                         /* of a query's heads, shared by threads */
  int64_t most_heads;                     /* of a group, in panels */
  bool split;                             /* a query's pieces are shared by threads */
  bool past_caches;                       /* the output is stored past them */
  int64_t block, at_once, local_rows;     /* queries of a task, in hand at a time; rows of a tile */
  int64_t thread_floats;
  int32_t threads;
  /* A round of pieces of one query. */
  int64_t b, s, first, count, whole, parts;
  float *packed;
  Collected waiting, total;
  bool *some, any;
  int64_t next[3], done[2]; /* tasks of packing, of pieces, of merging: taken, done */
};

/* A piece of some source as it lies in a tile. */
struct Tile {
  float *rows;
  int64_t b, piece, count;
};

/* One thread's part of the workspace. */
struct Desk {
  float *panels;
  Collected total, piece;
  Scratch scratch;
  Tile entries, local;
};

Desk lay_out(const Work *work, Cutter *cutter) {
  const int64_t queries = work->at_once, heads = work->most_heads;
  const int64_t sums = heads * work->sum_stride;
  Desk desk = {};
  desk.panels = cutter->part(queries * heads * work->D);
  desk.total = cutter->collected(queries * heads, queries * sums);
  desk.piece = cutter->collected(heads, sums);
  desk.scratch = cut_scratch(cutter, heads);
  const bool needed = work->N > 0 || work->block == 1;
  desk.entries = {cutter->part(needed ? kKeys * work->key_stride : 0), -1, -1, 0};
  desk.local = {cutter->part(work->local_rows * work->key_stride), -1, -1, 0};
  return desk;
}

/* The part that all threads share when the pieces of a query are. */
void lay_out_shared(Work *work, Cutter *cutter) {
  if (!work->split) return;
  const int64_t slots = kWaiting * work->call->threads, sums = work->H * work->sum_stride;
  work->packed = cutter->part(work->padded * work->D);
  work->total = cutter->collected(work->padded, sums);
  work->waiting = cutter->collected(slots * work->padded, slots * sums);
  work->some = reinterpret_cast<bool *>(cutter->part(slots));
}

/* Into how many groups the heads of a query are cut, `panels` of them: as few as leave the threads
 * least idle, since each group gathers the keys anew. */
int64_t groups_for(int64_t units, int64_t panels, int64_t threads) {
  const auto taken = [&](int64_t groups) {
    return (units * groups + threads - 1) / threads * ((panels + groups - 1) / groups);
  };
  int64_t best = 1;
  for (int64_t groups = 2; groups <= panels; groups++)
    if (taken(groups) < taken(best)) best = groups;
  return best;
}

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.q = tensor(call, ARGUMENT(Q));
  work.sink = tensor(call, ARGUMENT(SINK));
  static_cast<Places &>(work) = places_of(
      work.q, tensor(call, ARGUMENT(KV)), tensor(call, ARGUMENT(INDICES)),
      tensor(call, ARGUMENT(VISIBLE)), tensor(call, ARGUMENT(LOCAL_KV)),
      tensor(call, ARGUMENT(LOCAL_VALID)), call->args[ARGUMENT(WINDOW)].i);
  work.scale = static_cast<float>(call->args[ARGUMENT(SCALE)].f);
  work.v_dim = call->args[ARGUMENT(V_DIM)].i;
  work.H = work.q->shape[2], work.D = work.q->shape[3];
  work.padded = up_to(work.H, kPanel);
  work.key_stride = tile_stride(work.D), work.sum_stride = up_to(work.v_dim, kPanel);
  const int64_t units = work.B * work.S;
  const double products = static_cast<double>(units * work.H * (work.D + work.v_dim)) *
                          static_cast<double>(kKeys * work.pieces);
  work.threads = threads_for(products, call->threads);
  /* One query each leaves threads idle where the last round of queries is far from full. */
  const int64_t rounds = (units + work.threads - 1) / work.threads;
  const bool idle = work.threads > 1 && 5 * units < 4 * rounds * work.threads;
  const int64_t panels = work.padded / kPanel;
  work.split = idle && work.pieces > 1;
  work.groups = idle && !work.split ? groups_for(units, panels, work.threads) : 1;
  work.most_heads = (panels + work.groups - 1) / work.groups * kPanel;
  work.block = work.split || work.groups > 1 ? 1 : clamp(units / (4 * work.threads), 1, kQueries);
  /* Queries in hand share a tile that does not last: their sums must not push it out of L2. */
  const bool lasting = work.indices != nullptr || work.entry_pieces <= 1;
  const int64_t state = work.padded * (work.D + work.sum_stride) * 4;
  const int64_t fit = l2_bytes() / 2 / max_of(state, 1);
  work.at_once =
      lasting && work.window <= kKeys ? 1 : clamp(fit, 1, work.block);
  /* Longer windows are taken in pieces, whose tiles last no longer than the queries in hand. */
  if (work.window > kKeys) work.block = work.at_once;
  work.local_rows = work.window == 0 || work.block == 1
                        ? 0
                        : work.block - 1 + min_of(work.window, kKeys);
  Cutter cutter = {nullptr};
  lay_out(&work, &cutter);
  work.thread_floats = cutter.floats;
  return work;
}

/* The rows of a piece that a query sees. */
struct Rows {
  const transom_tensor *of;
  int64_t count, list[kKeys];
};

void find_rows(const Work *work, int64_t b, int64_t s, int64_t piece, Rows *rows) {
  const int64_t local = piece - work->entry_pieces;
  if (local >= 0) {
    int16_t before[kKeys + 1];
    rows->of = work->local;
    rows->count = near(work, b, s, 1, local, rows->list, before);
  } else if (work->indices != nullptr) {
    rows->of = work->kv;
    rows->count = listed(work, b, s, piece, rows->list);
  } else {
    const int64_t start = piece * kKeys;
    rows->of = work->kv;
    rows->count = clamp(bound_of(work, b, s) - start, 0, kKeys);
    for (int64_t i = 0; i < rows->count; i++) rows->list[i] = start + i;
  }
}

/* Rows from the `from`-th on will be needed. */
void expect(const Rows *rows, int64_t b, int64_t from, Soon *soon) {
  const transom_tensor *t = rows->of;
  for (int64_t i = from; i < rows->count; i++)
    soon->add(t, b * t->strides[0] + rows->list[i] * t->strides[1]);
}

/* Some heads of a query against rows that it shares with no other one, gathered `step` at a time;
 * 0: they are in the tile. */
void attend_rows(const Work *work, const Rows *rows, int64_t b, int64_t step, const float *panels,
                 int64_t heads, float *tile, Scratch scratch, Collected out, Soon *soon) {
  const bool held = step == 0;
  if (held) step = kKeys;
  for (int64_t i = 0; i < rows->count; i += step) {
    const int64_t count = min_of(step, rows->count - i);
    float *keys = tile + i * work->key_stride;
    if (!held) gather(rows->of, b, rows->list + i, count, keys, work->key_stride);
    score(panels, heads, work->D, keys, work->key_stride, count, scratch.scores + i * kPanel, soon);
  }
  add_up(heads, work->scale, tile, work->key_stride, work->v_dim, rows->count, scratch, out,
         work->sum_stride, soon);
}

/* Heads first .. first + heads of query s, whose rows are fetched while others are in work. */
void attend_alone(const Work *work, Desk *desk, int64_t b, int64_t s, int64_t first,
                  int64_t heads) {
  const transom_tensor *q = work->q;
  Rows rows[2];
  bool any = false;
  find_rows(work, b, s, 0, rows);
  pack_heads(q, b * q->strides[0] + s * q->strides[1] + first * q->strides[2], heads,
             desk->panels);
  for (int64_t p = 0; p < work->pieces; p++) {
    const Rows *here = rows + p % 2;
    Rows *next = rows + (p + 1) % 2;
    Soon soon;
    if (p == 0) expect(here, b, kStep, &soon);
    if (p + 1 < work->pieces) {
      find_rows(work, b, s, p + 1, next);
      expect(next, b, 0, &soon);
    }
    if (here->count == 0) continue;
    attend_rows(work, here, b, p == 0 ? kStep : kKeys, desk->panels, heads, desk->entries.rows,
                desk->scratch, any ? desk->piece : desk->total, &soon);
    if (any) merge(desk->total, desk->piece, heads, work->sum_stride);
    any = true;
  }
  finish(desk->total, any, first, heads, work->sum_stride, work->sink, work->call->outs[0],
         work->call->outs[1], (b * work->S + s) * work->H, work->past_caches);
}

/* A piece of a query's list will be needed. Without lists neighbouring rows are, which the
 * prefetchers of the processor follow. */
void expect(const Work *work, int64_t b, int64_t s, int64_t piece, Soon *soon) {
  if (work->indices == nullptr || piece >= work->entry_pieces) return;
  int64_t list[kKeys];
  const int64_t count = listed(work, b, s, piece, list);
  for (int64_t i = 0; i < count; i++)
    soon->add(work->kv, b * work->kv->strides[0] + list[i] * work->kv->strides[1]);
}

/* The entries of piece `piece` that a query sees are gathered; how many there are. */
int64_t gather_entries(const Work *work, Tile *tile, int64_t b, int64_t s, int64_t piece) {
  int64_t list[kKeys], count = 0;
  if (work->indices != nullptr) {
    count = listed(work, b, s, piece, list);
    gather(work->kv, b, list, count, tile->rows, work->key_stride);
    return count;
  }
  const int64_t start = piece * kKeys, bound = bound_of(work, b, s);
  /* All entries: the tile serves every query of the batch, each sees its first rows. Rows are
   * added to it as queries come to see them; what no query sees is not read. */
  if (tile->b != b || tile->piece != piece) tile->b = b, tile->piece = piece, tile->count = 0;
  const int64_t seen = clamp(bound - start, 0, kKeys);
  for (int64_t i = tile->count; i < seen; i++) list[count++] = start + i;
  gather(work->kv, b, list, count, tile->rows + tile->count * work->key_stride, work->key_stride);
  tile->count = max_of(tile->count, seen);
  return seen;
}

/* Which keys a query finds in a tile: rows first .. first + count. */
struct Range {
  const float *rows;
  int64_t count;
};

/* Piece `piece` of the windows of queries s .. s + queries, see near(). */
void gather_local(const Work *work, Tile *tile, int64_t b, int64_t s, int64_t queries,
                  int64_t piece, int16_t *before) {
  int64_t list[kKeys + kQueries];
  const int64_t count = near(work, b, s, queries, piece, list, before);
  gather(work->local, b, list, count, tile->rows, work->key_stride);
}

/* Some heads of a query against the keys in a range; into `total` if it is empty, else through
 * `piece`. */
void take_up(const Work *work, const float *panels, int64_t heads, Range range, Scratch scratch,
             Collected total, Collected piece, Soon *soon, bool *any) {
  if (range.count == 0) return;
  attend(panels, heads, work->D, work->scale, range.rows, work->key_stride, range.rows,
         work->key_stride, work->v_dim, range.count, scratch, *any ? piece : total,
         work->sum_stride, soon);
  if (*any) merge(total, piece, heads, work->sum_stride);
  *any = true;
}

/* Queries s .. s + count, all heads. */
void attend_queries(const Work *work, Desk *desk, int64_t b, int64_t s, int64_t count,
                    int64_t local_s, const int16_t *kept) {
  const transom_tensor *q = work->q;
  const int64_t H = work->H, panels = work->padded * work->D;
  const auto total = [&](int64_t i) {
    return Collected{desk->total.largest + i * work->padded, desk->total.mass + i * work->padded,
                     desk->total.sum + i * H * work->sum_stride};
  };
  bool any[kQueries] = {};
  int16_t own[kKeys + kQueries];
  for (int64_t i = 0; i < count; i++)
    pack_heads(q, b * q->strides[0] + (s + i) * q->strides[1], H, desk->panels + i * panels);
  for (int64_t p = 0; p < work->pieces; p++) {
    const int64_t local_piece = p - work->entry_pieces;
    const int16_t *before = kept;
    if (local_piece >= 0 && kept == nullptr) {
      gather_local(work, &desk->local, b, s, count, local_piece, own);
      before = own, local_s = s;
    }
    const int64_t length = local_piece < 0 ? 0 : window_length(work, local_piece);
    for (int64_t i = 0; i < count; i++) {
      Range range = {desk->entries.rows, 0};
      if (local_piece < 0) {
        range.count = gather_entries(work, &desk->entries, b, s + i, p);
      } else {
        const int64_t place = s + i - local_s;
        range.rows = desk->local.rows + before[place] * work->key_stride;
        range.count = before[place + length] - before[place];
      }
      Soon soon;
      if (p + 1 < work->pieces) {
        if (count == 1) expect(work, b, s, p + 1, &soon);
      } else if (s + count + i < work->S) {
        /* Beyond the task's own queries it may be in vain. */
        expect(work, b, s + count + i, 0, &soon);
        for (int64_t h = 0; h < H; h++)
          soon.add(q, b * q->strides[0] + (s + count + i) * q->strides[1] + h * q->strides[2]);
      }
      take_up(work, desk->panels + i * panels, H, range, desk->scratch, total(i), desk->piece,
              &soon, any + i);
    }
  }
  for (int64_t i = 0; i < count; i++)
    finish(total(i), any[i], 0, H, work->sum_stride, work->sink, work->call->outs[0],
           work->call->outs[1], (b * work->S + s + i) * H, work->past_caches);
}

void blocks(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  Cutter cutter = {static_cast<float *>(work->call->workspace) + thread * work->thread_floats};
  Desk desk = lay_out(work, &cutter);
  const int64_t each = (work->S + work->block - 1) / work->block;
  const int64_t panels = work->padded / kPanel;
  int16_t before[kKeys + kQueries];
  for (;;) {
    const int64_t task = __atomic_fetch_add(work->next, 1, __ATOMIC_RELAXED);
    if (task >= work->B * each * work->groups) break;
    const int64_t group = task % work->groups, at = task / work->groups;
    const int64_t b = at / each, s = at % each * work->block;
    if (work->block == 1) {
      const int64_t first = group * panels / work->groups * kPanel;
      const int64_t stop = min_of((group + 1) * panels / work->groups * kPanel, work->H);
      attend_alone(work, &desk, b, s, first, stop - first);
      continue;
    }
    const int64_t count = min_of(work->block, work->S - s);
    const bool lasting = work->window > 0 && work->window <= kKeys;
    if (lasting) gather_local(work, &desk.local, b, s, count, 0, before);
    for (int64_t i = 0; i < count; i += work->at_once)
      attend_queries(work, &desk, b, s + i, min_of(work->at_once, count - i), s,
                     lasting ? before : nullptr);
  }
  fence();
}

/* Waits until `done` has reached `all`. What is missing is in the hands of threads that run. */
void await(int64_t *done, int64_t all) {
  for (int64_t turn = 0; __atomic_load_n(done, __ATOMIC_ACQUIRE) < all; turn++)
    if (turn > 1000) sched_yield();
}

/* Pieces of the query in hand: first as many whole ones as all threads have equally many of, then
 * those left, each in parts of its heads. */
void attend_pieces(Work *work, Desk *desk) {
  const int64_t H = work->H, tasks = work->whole + (work->count - work->whole) * work->parts;
  const int64_t panels = work->padded / kPanel;
  const int64_t last = work->first + work->count - 1;
  int64_t held = -1;
  bool fetched = false;
  Rows rows, next;
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->next[1], 1, __ATOMIC_RELAXED);
    if (task >= tasks) break;
    int64_t slot = task, from = 0, stop = H;
    if (task >= work->whole) {
      slot = work->whole + (task - work->whole) / work->parts;
      const int64_t part = (task - work->whole) % work->parts;
      from = part * panels / work->parts * kPanel;
      stop = min_of((part + 1) * panels / work->parts * kPanel, H);
    }
    const int64_t p = work->first + slot, after = min_of(p + work->threads, last);
    find_rows(work, work->b, work->s, p, &rows);
    Soon soon;
    if (held != p && !fetched) expect(&rows, work->b, kStep, &soon);
    if (after > p) {
      find_rows(work, work->b, work->s, after, &next);
      expect(&next, work->b, 0, &soon);
    }
    await(&work->done[0], panels);
    const Collected here = {work->waiting.largest + slot * work->padded + from,
                            work->waiting.mass + slot * work->padded + from,
                            work->waiting.sum + (slot * H + from) * work->sum_stride};
    if (from == 0) work->some[slot] = rows.count > 0;
    if (rows.count > 0)
      attend_rows(work, &rows, work->b, held == p ? 0 : fetched ? kKeys : kStep,
                  work->packed + from * work->D, stop - from, desk->entries.rows, desk->scratch,
                  here, &soon);
    held = p, fetched = true;
    __atomic_fetch_add(&work->done[1], 1, __ATOMIC_RELEASE);
  }
  await(&work->done[1], tasks);
}

/* Every head of the query in hand takes up the round's pieces, in order. */
void merge_pieces(Work *work) {
  const int64_t stride = work->sum_stride;
  const bool last = work->first + work->count == work->pieces;
  for (;;) {
    const int64_t h = __atomic_fetch_add(&work->next[2], 1, __ATOMIC_RELAXED);
    if (h >= work->H) return;
    const auto waiting = [&](int64_t slot) {
      return Collected{work->waiting.largest + slot * work->padded + h,
                       work->waiting.mass + slot * work->padded + h,
                       work->waiting.sum + (slot * work->H + h) * stride};
    };
    /* Much of it lies in other cores' caches: fetched for the head that this one will take next. */
    for (int64_t slot = 0; h + work->threads < work->H && slot < work->count; slot++)
      for (int64_t d = 0; d < stride; d += 16)
        __builtin_prefetch(waiting(slot).sum + work->threads * stride + d, 0, 3);
    const Collected into = {work->total.largest + h, work->total.mass + h,
                            work->total.sum + h * stride};
    bool any = work->any;
    for (int64_t slot = 0; slot < work->count; slot++) {
      if (!work->some[slot]) continue;
      const Collected from = waiting(slot);
      if (any) {
        merge(into, from, 1, stride);
      } else {
        *into.largest = *from.largest, *into.mass = *from.mass;
        memcpy(into.sum, from.sum, static_cast<size_t>(stride) * sizeof(float));
      }
      any = true;
    }
    if (last)
      finish(into, any, h, 1, stride, work->sink, work->call->outs[0], work->call->outs[1],
             (work->b * work->S + work->s) * work->H, work->past_caches);
  }
}

/* A round: the query is packed if it is the first, its pieces are computed, then merged. Threads
 * wait for each other only where one may read what another writes. */
void round_of_pieces(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  Cutter cutter = {static_cast<float *>(work->call->workspace) + thread * work->thread_floats};
  Desk desk = lay_out(work, &cutter);
  const transom_tensor *q = work->q;
  const int64_t start = work->b * q->strides[0] + work->s * q->strides[1];
  for (;;) {
    const int64_t panel = __atomic_fetch_add(&work->next[0], 1, __ATOMIC_RELAXED);
    if (panel >= work->padded / kPanel) break;
    const int64_t h = panel * kPanel;
    if (work->first == 0)
      pack_heads(q, start + h * q->strides[2], min_of(kPanel, work->H - h),
                 work->packed + h * work->D);
    __atomic_fetch_add(&work->done[0], 1, __ATOMIC_RELEASE);
  }
  attend_pieces(work, &desk);
  merge_pieces(work);
  fence();
}

void attend_one(Work *work) {
  const int64_t round = kWaiting * work->call->threads;
  work->any = false;
  for (work->first = 0; work->first < work->pieces; work->first += work->count) {
    work->count = min_of(round, work->pieces - work->first);
    work->whole = work->count / work->threads * work->threads;
    const int64_t left = max_of(work->count - work->whole, 1);
    work->parts = clamp((work->threads + left - 1) / left, 1, work->padded / kPanel);
    memset(work->next, 0, sizeof work->next);
    memset(work->done, 0, sizeof work->done);
    parallel(work->threads, round_of_pieces, work);
    for (int64_t slot = 0; slot < work->count; slot++) work->any |= work->some[slot];
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARGUMENT(Q)), "q", status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  Cutter shared = {nullptr};
  lay_out_shared(&work, &shared);
  return static_cast<uint64_t>(work.thread_floats * work.threads + shared.floats) * sizeof(float);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  if (work.B == 0 || work.S == 0 || work.H == 0) return 0;
  const transom_tensor *o = call->outs[0];
  work.past_caches = goes_past_caches(o, work.B * work.S * work.H, work.v_dim);
  if (!work.split) {
    parallel(work.threads, blocks, &work);
    return 0;
  }
  Cutter shared = {static_cast<float *>(call->workspace) + work.threads * work.thread_floats};
  lay_out_shared(&work, &shared);
  for (work.b = 0; work.b < work.B; work.b++)
    for (work.s = 0; work.s < work.S; work.s++) attend_one(&work);
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
