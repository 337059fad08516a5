/* lightning_indexer_kl_backward: the gradients of queries, keys, weights and targets.
 *
 * A task is a query, of kQueries in hand: it writes its own gradients, and leaves what its keys
 * collect in rows of its own. When all in hand are done, these rows are added to dk in the order of
 * the queries, every row by one thread. Bound by FMA: four products of keys * heads * D. Sums of
 * 16-bit gradients are kept as float32, those of one batch at a time. */
#include "../base/parallel.h"
#include "_indexer_loss.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_LIGHTNING_INDEXER_KL_BACKWARD_##name

/* Queries in hand: more threads than these have nothing to do. */
constexpr int64_t kQueries = 16;

/* What a query in hand gives to its keys: rows [L][key_stride] of the keys [L]. */
struct Hand {
  float *rows;
  int64_t *keys, *count;
};

struct Work : Listed {
  const transom_call *call;
  const transom_tensor *dloss;
  int64_t q_stride, thread_floats, hand_floats;
  int32_t threads;
  float *base, *dk; /* of the workspace; sums of the batch in hand */
  int64_t b, first, next;
};

/* One thread's part of the workspace. */
struct Desk {
  Scored one;
  float *rows, *factors, *mixed, *dq, *dweights;
};

Desk lay_out(const Work *work, Cutter *cutter) {
  Desk desk = {};
  desk.one = cut_scored(cutter, *work);
  desk.rows = cutter->part(work->H * work->key_stride);
  desk.factors = cutter->part(kKeys * work->padded);
  desk.mixed = cutter->part(kKeys * work->padded);
  desk.dq = cutter->part(work->H * work->q_stride);
  desk.dweights = cutter->part(work->padded);
  return desk;
}

Hand lay_out_hand(const Work *work, Cutter *cutter) {
  Hand hand = {};
  hand.rows = cutter->part(work->L * work->key_stride);
  hand.keys = reinterpret_cast<int64_t *>(cutter->part(2 * work->L));
  hand.count = reinterpret_cast<int64_t *>(cutter->part(2));
  return hand;
}

Hand hand_of(const Work *work, int64_t i) {
  Cutter cutter = {work->base + i * work->hand_floats};
  return lay_out_hand(work, &cutter);
}

Work describe(const transom_call *call) {
  Work work = {};
  work.call = call;
  work.dloss = tensor(call, ARGUMENT(DLOSS));
  static_cast<Listed &>(work) =
      listed_of(tensor(call, ARGUMENT(Q)), tensor(call, ARGUMENT(K)),
                tensor(call, ARGUMENT(WEIGHTS)), tensor(call, ARGUMENT(TARGET)),
                tensor(call, ARGUMENT(INDICES)));
  work.q_stride = up_to(work.D, kPanel);
  work.threads = threads_for(4.0 * static_cast<double>(min_of(work.S, kQueries) * work.L) *
                                 static_cast<double>(work.H * work.D),
                             call->threads);
  Cutter desk = {nullptr}, hand = {nullptr};
  lay_out(&work, &desk);
  lay_out_hand(&work, &hand);
  work.thread_floats = desk.floats, work.hand_floats = hand.floats;
  return work;
}

/* Floats of the sums, which 16-bit gradients need. */
int64_t sum_floats(const Work *work) {
  return kind(work->k) == 0 ? 0 : up_to(work->N * work->D, 16);
}

/* The scores' gradients of the keys of a piece, as those of the products of each head. */
void spread(const Work *work, const Desk &desk, int64_t first, int64_t count, float outer,
            float total) {
  const Scored &one = desk.one;
  for (int64_t j = 0; j < count; j++) {
    const float share = one.shares[first + j] / one.mass;
    const vf dscore = all(outer * (share * total - one.goals[first + j]));
    for (int64_t h = 0; h < work->padded; h += kWidth) {
      const vf dot = load(one.dots + j * work->padded + h);
      const vf zero = {};
      store(desk.factors + j * work->padded + h,
            dot > 0.0f ? load(one.weights + h) * dscore : zero);
      store(desk.dweights + h, load(desk.dweights + h) + (dot < 0.0f ? zero : dot) * dscore);
    }
  }
}

void write_targets(const Work *work, const Scored &one, int64_t s, float outer) {
  const transom_tensor *dtarget = work->call->outs[3];
  const int64_t row = (work->b * work->S + s) * work->L;
  memset(at(dtarget, row), 0, static_cast<size_t>(work->L * size_of(dtarget)));
  for (int64_t i = 0; i < one.count; i++) {
    const float goal = one.goals[i];
    if (goal == 0.0f) continue;
    const float found = outer * (1.0f + log_of(goal) - (one.scores[i] - one.norm));
    write_row(at(dtarget, row + one.places[i]), kind(dtarget), &found, 1);
  }
}

void take_query(const Work *work, Desk *desk, const Hand &hand, int64_t s) {
  const int64_t b = work->b, query = b * work->S + s;
  const transom_tensor *q = work->q, *dq = work->call->outs[0], *dweights = work->call->outs[2];
  const float outer =
      number(work->dloss, b * work->dloss->strides[0] + s * work->dloss->strides[1]);
  Scored *one = &desk->one;
  score(*work, one, b, s);
  *hand.count = work->H == 0 ? 0 : one->count;
  memcpy(hand.keys, one->keys, static_cast<size_t>(one->count) * sizeof(int64_t));
  memset(desk->dq, 0, static_cast<size_t>(work->H * work->q_stride) * sizeof(float));
  memset(desk->dweights, 0, static_cast<size_t>(work->padded) * sizeof(float));
  read_heads(q, b * q->strides[0] + s * q->strides[1], work->H, desk->rows, work->key_stride);
  double total = 0.0;
  for (int64_t i = 0; i < one->count; i++) total += static_cast<double>(one->goals[i]);
  for (int64_t first = 0; work->H > 0 && first < one->count; first += kKeys) {
    const int64_t count = min_of(kKeys, one->count - first);
    read_piece(*work, *one, b, first, count);
    spread(work, *desk, first, count, outer, static_cast<float>(total));
    mix(desk->factors, work->padded, work->H, one->tile, work->key_stride, work->D, count,
        desk->mixed, desk->dq, work->q_stride);
    collect(desk->factors, work->padded, work->H, desk->rows, work->key_stride, work->D, count,
            hand.rows + first * work->key_stride, work->key_stride, false);
  }
  write_targets(work, *one, s, outer);
  write_row(at(dweights, query * work->H), kind(dweights), desk->dweights, work->H);
  for (int64_t h = 0; h < work->H; h++)
    write_row(at(dq, (query * work->H + h) * work->D), kind(dq), desk->dq + h * work->q_stride,
              work->D);
}

void take_queries(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  Cutter cutter = {work->base + kQueries * work->hand_floats + thread * work->thread_floats};
  Desk desk = lay_out(work, &cutter);
  for (;;) {
    const int64_t i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (i >= kQueries || work->first + i >= work->S) return;
    take_query(work, &desk, hand_of(work, i), work->first + i);
  }
}

/* Rows of dk that are shared out at once: neighbours go to different threads. */
constexpr int64_t kShares = 16;

void add_rows(void *context, int32_t) {
  Work *work = static_cast<Work *>(context);
  const int64_t shares = work->threads > 1 ? kShares : 1;
  for (;;) {
    const int64_t mine = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
    if (mine >= shares) return;
    for (int64_t i = 0; i < min_of(kQueries, work->S - work->first); i++) {
      const Hand hand = hand_of(work, i);
      for (int64_t r = 0; r < *hand.count; r++) {
        if (hand.keys[r] % shares != mine) continue;
        const float *from = hand.rows + r * work->key_stride;
        float *to = work->dk + hand.keys[r] * work->D;
        for (int64_t d = 0; d < work->D; d++) to[d] += from[d];
      }
    }
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARGUMENT(Q)), "q", status);
}

uint64_t workspace(const transom_call *call) {
  const Work work = describe(call);
  return static_cast<uint64_t>(sum_floats(&work) + kQueries * work.hand_floats +
                               work.threads * work.thread_floats) *
         sizeof(float);
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  const transom_tensor *dk = call->outs[1];
  const int64_t numbers = work.N * work.D;
  float *start = static_cast<float *>(call->workspace);
  work.base = start + sum_floats(&work);
  for (work.b = 0; work.b < work.B; work.b++) {
    work.dk = kind(dk) == 0 ? static_cast<float *>(at(dk, work.b * numbers)) : start;
    if (numbers > 0) memset(work.dk, 0, static_cast<size_t>(numbers) * sizeof(float));
    for (work.first = 0; work.first < work.S; work.first += kQueries) {
      work.next = 0;
      parallel(work.threads, take_queries, &work);
      work.next = 0;
      parallel(work.threads, add_rows, &work);
    }
    if (kind(dk) != 0 && numbers > 0)
      write_row(at(dk, work.b * numbers), kind(dk), work.dk, numbers);
  }
  return 0;
}

}  // namespace

extern const transom_impl lightning_indexer_kl_backward = {
    sizeof(transom_impl), TRANSOM_TUNED, "lightning_indexer_kl_backward", "native",
    TRANSOM_LIGHTNING_INDEXER_KL_BACKWARD_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
