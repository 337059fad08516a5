/* lightning_indexer: the top_k keys by sum over heads of weight * relu(q . k).
 *
 * A task is a block of queries against the keys that they see: a panel of keys is turned once for
 * the block, each query's heads are the rows of a product with it, and its scores go from L1 into
 * the query's list of candidates. No row of scores exists. With few queries the keys are shared out
 * as well, and the lists of the shares are put together in the order of the keys: the selection is
 * the same, since a score's bits depend on nothing else. Bound by FMA. */
#include "../gemm/tile.h"
#include "../base/parallel.h"
#include "_top_k.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_LIGHTNING_INDEXER_##name

/* Fewest keys of a share. */
constexpr int64_t kLeastShare = 256;

struct Work {
  const transom_call *call;
  const transom_tensor *q, *k, *weights, *visible;
  int64_t B, S, N, H, D, top_k;
  int64_t block, blocks, shares; /* queries of a task; tasks of a sequence; shares of the keys */
  int64_t q_stride, room, panel_floats, products_floats, q_floats;
  int64_t thread_bytes, list_bytes; /* of a thread; of the list of one query */
  int64_t next;                     /* by fetch-and-add */
  char *threads, *lists;            /* lists: by task, share and query */
};

/* What a thread works in. */
struct Desk {
  float *q, *weights, *panel, *products;
};

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.q = tensor(call, ARGUMENT(Q));
  work.k = tensor(call, ARGUMENT(K));
  work.weights = tensor(call, ARGUMENT(WEIGHTS));
  work.visible = tensor(call, ARGUMENT(VISIBLE));
  work.B = work.q->shape[0], work.S = work.q->shape[1];
  work.H = work.q->shape[2], work.D = work.q->shape[3], work.N = work.k->shape[1];
  work.top_k = call->args[ARGUMENT(TOP_K)].i;
  work.q_stride = up_to(work.D, kWidth) + kWidth;
  work.room = room_for(work.top_k);
  /* The block's queries in a quarter of L2: a panel of keys passes by all of them. */
  const int64_t query = max_of(1, work.H * work.q_stride * 4);
  work.block = clamp(l2_bytes() / 4 / query, 1, max_of(1, min_of(work.S, 16)));
  work.blocks = (work.S + work.block - 1) / work.block;
  const int64_t tasks = max_of(1, work.B * work.blocks), wanted = 4 * call->threads;
  work.shares = tasks >= 2 * call->threads || call->threads == 1
                    ? 1
                    : clamp(wanted / tasks, 1, max_of(1, work.N / kLeastShare));
  work.list_bytes = up_to(work.room * 8, 64);
  work.panel_floats = kPanel * up_to(min_of(kDepth, work.D), 16);
  work.products_floats = up_to(work.H, 16) * kPanel;
  work.q_floats = up_to(work.block * work.H * work.q_stride, 16);
  work.thread_bytes = 4 * (work.panel_floats + work.products_floats + work.q_floats +
                           up_to(work.block * work.H, 16));
  return work;
}

/* Bytes of workspace. */
int64_t lay_out(Work *work) {
  const int64_t threads = work->thread_bytes * work->call->threads;
  const int64_t lists = work->shares == 1 ? work->call->threads
                                          : work->B * work->blocks * work->shares;
  work->threads = static_cast<char *>(work->call->workspace);
  work->lists = work->threads == nullptr ? nullptr : work->threads + threads;
  return threads + lists * work->block * (work->list_bytes + 64);
}

Desk desk_of(const Work *work, int32_t thread) {
  float *start = reinterpret_cast<float *>(work->threads + thread * work->thread_bytes);
  Desk desk;
  desk.panel = start;
  desk.products = desk.panel + work->panel_floats;
  desk.q = desk.products + work->products_floats;
  desk.weights = desk.q + work->q_floats;
  return desk;
}

/* The list of query i of the lists numbered `at`. */
Best *list_of(const Work *work, int64_t at, int64_t i) {
  char *start = work->lists + (at * work->block + i) * (work->list_bytes + 64);
  static_assert(sizeof(Best) <= 64);
  Best *best = reinterpret_cast<Best *>(start);
  best->top_k = work->top_k, best->room = work->room;
  best->scores = reinterpret_cast<float *>(start + 64);
  best->places = reinterpret_cast<int32_t *>(best->scores + work->room);
  return best;
}

int64_t visible_of(const Work *work, int64_t b, int64_t s) {
  const transom_tensor *v = work->visible;
  return clamp(integer(v, b * v->strides[0] + s * v->strides[1]), 0, work->N);
}

/* The keys n .. n + kPanel of sequence b, their numbers d .. d + depth, as a panel. */
void pack_keys(const Work *work, int64_t b, int64_t n, int64_t d, int64_t depth, float *panel) {
  const transom_tensor *k = work->k;
  const int64_t at = b * k->strides[0] + n * k->strides[1] + d * k->strides[2];
  const int64_t keys = min_of(kPanel, work->N - n), row = k->strides[1], along = k->strides[2];
  if (k->dtype_bits == 32)
    write_panel(static_cast<const float *>(k->data) + at, row, along, keys, depth, panel);
  else if (k->dtype_code == TRANSOM_BFLOAT)
    write_panel(static_cast<const bf16 *>(k->data) + at, row, along, keys, depth, panel);
  else
    write_panel(static_cast<const f16 *>(k->data) + at, row, along, keys, depth, panel);
}

/* Offers the scores of the keys n .. n + kPanel, those before `seen`, to the query's list. */
void score(const Work *work, const float *products, const float *weights, int64_t n,
           int64_t seen, Best *best) {
  vf sums[kTileVectors] = {};
  for (int64_t h = 0; h < work->H; h++) {
    const vf weight = all(weights[h]);
#pragma GCC unroll 4
    for (int v = 0; v < kTileVectors; v++) {
      const vf product = load(products + h * kPanel + v * kWidth);
      sums[v] += weight * (product < 0.0f ? vf{} : product); /* NaN stays NaN */
    }
  }
  for (int v = 0; v < kTileVectors; v++)
    if (const int64_t first = n + v * kWidth; first < seen)
      offer(best, sums[v], first, min_of(kWidth, seen - first));
}

/* The lists numbered `at`: queries s .. s + count of sequence b over the keys from .. to. */
void search(const Work *work, const Desk &desk, int64_t b, int64_t s, int64_t count, int64_t from,
            int64_t to, int64_t at) {
  const transom_tensor *q = work->q, *w = work->weights;
  const int64_t H = work->H, D = work->D, stride = work->q_stride;
  int64_t seen[16];
  for (int64_t i = 0; i < count; i++) {
    clear(list_of(work, at, i));
    seen[i] = min_of(to, visible_of(work, b, s + i));
    const int64_t start = b * q->strides[0] + (s + i) * q->strides[1];
    const int64_t first = b * w->strides[0] + (s + i) * w->strides[1];
    for (int64_t h = 0; h < H; h++) {
      read_row(q, start + h * q->strides[2], q->strides[3], D, desk.q + (i * H + h) * stride);
      desk.weights[i * H + h] = number(w, first + h * w->strides[2]);
    }
  }
  int64_t most = from;
  for (int64_t i = 0; i < count; i++) most = max_of(most, seen[i]);
  for (int64_t n = from; n < most; n += kPanel) {
    const bool once = D <= kDepth;
    if (once) pack_keys(work, b, n, 0, D, desk.panel);
    for (int64_t i = 0; i < count; i++) {
      if (seen[i] <= n) continue;
      const float *rows = desk.q + i * H * stride;
      for (int64_t d = 0; d == 0 || d < D; d += kDepth) {
        const int64_t depth = min_of(kDepth, D - d);
        if (!once) pack_keys(work, b, n, d, depth, desk.panel);
        multiply_panel(H, depth, rows + d, stride, desk.panel, kPanel, desk.products, kPanel,
                       d > 0);
      }
      score(work, desk.products, desk.weights + i * H, n, seen[i], list_of(work, at, i));
    }
  }
}

void write(const Work *work, int64_t b, int64_t s, Best *best) {
  int32_t *out = static_cast<int32_t *>(work->call->outs[0]->data);
  write_best(best, out + (b * work->S + s) * work->top_k);
}

void by_block(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const Desk desk = desk_of(work, thread);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (task >= work->B * work->blocks) return;
    /* The last blocks first: where later queries see more, the long tasks begin early. */
    const int64_t at = work->B * work->blocks - 1 - task;
    const int64_t b = at / work->blocks, s = at % work->blocks * work->block;
    const int64_t count = min_of(work->block, work->S - s);
    search(work, desk, b, s, count, 0, work->N, thread);
    for (int64_t i = 0; i < count; i++) write(work, b, s + i, list_of(work, thread, i));
  }
}

void by_share(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const Desk desk = desk_of(work, thread);
  for (;;) {
    const int64_t at = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (at >= work->B * work->blocks * work->shares) return;
    const int64_t task = at / work->shares, share = at % work->shares;
    const int64_t b = task / work->blocks, s = task % work->blocks * work->block;
    const int64_t count = min_of(work->block, work->S - s);
    int64_t most = 0;
    for (int64_t i = 0; i < count; i++) most = max_of(most, visible_of(work, b, s + i));
    const int64_t panels = (most + kPanel - 1) / kPanel;
    search(work, desk, b, s, count, share * panels / work->shares * kPanel,
           min_of(most, (share + 1) * panels / work->shares * kPanel), at);
  }
}

/* After by_share: the shares of each query, in the order of the keys, in one list. */
void join(void *context, int32_t) {
  Work *work = static_cast<Work *>(context);
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (task >= work->B * work->blocks) return;
    const int64_t b = task / work->blocks, s = task % work->blocks * work->block;
    for (int64_t i = 0; i < min_of(work->block, work->S - s); i++) {
      Best *first = list_of(work, task * work->shares, i);
      for (int64_t share = 1; share < work->shares; share++) {
        const Best *more = list_of(work, task * work->shares + share, i);
        for (int64_t from = 0; from < more->count;) {
          if (first->count == first->room) keep_best(first);
          const int64_t n = min_of(more->count - from, first->room - first->count);
          const size_t bytes = static_cast<size_t>(n) * 4;
          memcpy(first->scores + first->count, more->scores + from, bytes);
          memcpy(first->places + first->count, more->places + from, bytes);
          first->count += n, from += n;
        }
      }
      write(work, b, s + i, first);
    }
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  const Work work = describe(call);
  if (!readable(work.q, "q", status)) return 0;
  if (work.N <= INT32_MAX - 64) return 1;
  snprintf(status->message, sizeof status->message, "N = %lld; supported: at most %d",
           static_cast<long long>(work.N), INT32_MAX - 64);
  return 0;
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  return static_cast<uint64_t>(lay_out(&work));
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  if (work.B == 0 || work.S == 0) return 0;
  lay_out(&work);
  const double products = static_cast<double>(work.B * work.S * work.H) *
                          static_cast<double>(work.D) * static_cast<double>(work.N);
  const int32_t threads = threads_for(products, call->threads);
  if (work.shares == 1) {
    parallel(threads, by_block, &work);
  } else {
    parallel(threads, by_share, &work);
    work.next = 0;
    parallel(work.B * work.S > 1 ? threads : 1, join, &work);
  }
  return 0;
}

}  // namespace

extern const transom_impl lightning_indexer = {
    sizeof(transom_impl), TRANSOM_TUNED, "lightning_indexer", "native",
    TRANSOM_LIGHTNING_INDEXER_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
