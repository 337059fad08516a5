/* moe_experts: gate and up, activation, down, weighted sum over a token's slots.
 *
 * A piece of the tokens at a time, as many as the workspace holds: a stable counting sort of their
 * slots by expert; then three rounds of tasks. First gate and up of a slice of columns into a tile
 * of the thread, where the activation is applied: only h leaves it. Then down. Then each token adds
 * its slots' results in slot order. No order depends on threads or on the other tokens. */
#include <stdlib.h>

#include "../parallel.h"
#include "gated.h"
#include "_tasks.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_MOE_EXPERTS_##name

/* Columns of gate, and of up, in a tile. */
constexpr int64_t kTile = kMostColumns / 2;

struct Work {
  const transom_call *call;
  const transom_tensor *x, *ids, *weights, *gate_up, *down, *gate_up_bias, *down_bias;
  int64_t T, D, I, E, K;
  int64_t x_stride, h_stride, rows, thread_floats;
  Gated gated;
  bool interleaved, before;
  /* The piece of the tokens in hand, and its parts of the workspace. */
  int64_t tokens, first, count, pairs;
  float *threads, *h, *products;
  int64_t *ends;              /* by expert: where its rows end */
  int32_t *order, *positions; /* slot of a row; row of a slot or -1 */
  Tasks tasks;
};

/* Bytes of workspace that a piece of `tokens` needs. */
int64_t lay_out(Work *work, int64_t tokens) {
  const int64_t pairs = tokens * work->K;
  char *base = static_cast<char *>(work->call->workspace);
  int64_t bytes = 0;
  const auto part = [&](int64_t size) {
    char *start = base == nullptr ? nullptr : base + bytes;
    bytes += up_to(size, 64);
    return start;
  };
  work->threads =
      reinterpret_cast<float *>(part(work->thread_floats * work->call->threads * 4));
  work->h = reinterpret_cast<float *>(part(pairs * work->h_stride * 4));
  work->products = reinterpret_cast<float *>(part(pairs * work->D * 4));
  work->ends = reinterpret_cast<int64_t *>(part(work->E * 8));
  work->order = reinterpret_cast<int32_t *>(part(pairs * 4));
  work->positions = reinterpret_cast<int32_t *>(part(pairs * 4));
  return bytes;
}

/* Bytes for the rows of a piece: half of TRANSOM_WORKSPACE_MB, the rest is the threads'. */
int64_t budget() {
  const char *text = getenv("TRANSOM_WORKSPACE_MB");
  const double mib = text == nullptr ? 0.0 : atof(text);
  return static_cast<int64_t>((mib > 0.0 && mib < 1e6 ? mib : 64.0) * 524288.0);
}

Work describe(const transom_call *call) {
  Work work = {};
  const transom_value *args = call->args;
  work.call = call;
  work.x = tensor(call, ARGUMENT(X));
  work.ids = tensor(call, ARGUMENT(IDS));
  work.weights = tensor(call, ARGUMENT(WEIGHTS));
  work.gate_up = tensor(call, ARGUMENT(GATE_UP));
  work.down = tensor(call, ARGUMENT(DOWN));
  work.gate_up_bias = tensor(call, ARGUMENT(GATE_UP_BIAS));
  work.down_bias = tensor(call, ARGUMENT(DOWN_BIAS));
  work.T = work.x->shape[0], work.D = work.x->shape[1], work.K = work.ids->shape[1];
  work.E = work.down->shape[0], work.I = work.down->shape[2];
  work.gated = gated_from(args[ARGUMENT(ACTIVATION)].string, &args[ARGUMENT(LIMIT)],
                          args[ARGUMENT(ALPHA)].f);
  work.interleaved = args[ARGUMENT(INTERLEAVED)].i != 0;
  work.before = strcmp(args[ARGUMENT(WEIGHT_POSITION)].string, "before") == 0;
  work.x_stride = padded(work.D), work.h_stride = padded(work.I);
  work.rows = rows_at_once(max_of(work.D, work.I), work.T * work.K, l2_bytes());
  /* rows of x, tiles of gate and up, one row each of sums and of a bias */
  work.thread_floats =
      up_to(work.rows * (work.x_stride + 2 * kTile) + 2 * max_of(work.x_stride, 2 * kTile), 16);
  const int64_t a_token = work.K * (work.h_stride + work.D + 2) * 4;
  work.tokens = clamp(budget() / max_of(a_token, 1), 1, max_of(work.T, 1));
  return work;
}

/* Fills ends, order and positions for the tokens first .. first + count. */
void sort(Work *work) {
  const transom_tensor *ids = work->ids;
  memset(work->ends, 0, static_cast<size_t>(work->E) * sizeof(int64_t));
  const auto expert = [&](int64_t pair) {
    const int64_t id = integer(ids, (work->first + pair / work->K) * ids->strides[0] +
                                        pair % work->K * ids->strides[1]);
    return id >= 0 && id < work->E ? id : -1;
  };
  const int64_t slots = work->count * work->K;
  for (int64_t pair = 0; pair < slots; pair++)
    if (const int64_t e = expert(pair); e >= 0) work->ends[e]++;
  int64_t total = 0;
  for (int64_t e = 0; e < work->E; e++) {
    const int64_t rows = work->ends[e];
    work->ends[e] = total;
    total += rows;
  }
  for (int64_t pair = 0; pair < slots; pair++) {
    const int64_t e = expert(pair), row = e < 0 ? -1 : work->ends[e]++;
    work->positions[pair] = static_cast<int32_t>(row);
    if (row >= 0) work->order[row] = static_cast<int32_t>(pair);
  }
  work->pairs = total;
}

float weight_of(const Work *work, int64_t pair) {
  const transom_tensor *w = work->weights;
  return number(w, (work->first + pair / work->K) * w->strides[0] +
                       pair % work->K * w->strides[1]);
}

/* A tile of gate or up: the product, and its bias. `first`, first + step, ...: rows of gate_up. */
void half_tile(const Work *work, const Task &task, const float *panel, int64_t first,
               int64_t step, float *out, float *bias) {
  multiply(task.rows, panel, work->x_stride, work->gate_up, task.e, first, step, task.columns, out,
           kTile);
  const transom_tensor *b = work->gate_up_bias;
  if (b == nullptr) return;
  read_row(b, task.e * b->strides[0] + first * b->strides[1], step * b->strides[1], task.columns,
           bias);
  for (int64_t r = 0; r < task.rows; r++)
    for (int64_t c = 0; c < task.columns; c++) out[r * kTile + c] += bias[c];
}

void gate_and_up(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const transom_tensor *x = work->x;
  float *panel = work->threads + thread * work->thread_floats;
  float *gate = panel + work->rows * work->x_stride, *up = gate + work->rows * kTile;
  float *row = up + work->rows * kTile;
  const int64_t step = work->interleaved ? 2 : 1, between = work->interleaved ? 1 : work->I;
  Walk walk;
  Task task;
  while (take(&work->tasks, &walk, [&](int64_t e) { return work->ends[e]; }, &task)) {
    for (int64_t r = 0; r < task.rows; r++) {
      const int64_t token = work->first + work->order[task.row + r] / work->K;
      read_row(x, token * x->strides[0], x->strides[1], work->D, panel + r * work->x_stride);
    }
    half_tile(work, task, panel, task.column * step, step, gate, row);
    half_tile(work, task, panel, task.column * step + between, step, up, row);
    for (int64_t r = 0; r < task.rows; r++) {
      const vf scale = all(work->before ? weight_of(work, work->order[task.row + r]) : 1.0f);
      for (int64_t c = 0; c < task.columns; c += kWidth) {
        const vf h = apply(work->gated, load(gate + r * kTile + c), load(up + r * kTile + c));
        store(row + c, work->before ? h * scale : h);
      }
      float *h = work->h + (task.row + r) * work->h_stride + task.column;
      memcpy(h, row, static_cast<size_t>(task.columns) * sizeof(float));
      if (task.column + task.columns == work->I)
        memset(h + task.columns, 0,
               static_cast<size_t>(work->h_stride - work->I) * sizeof(float));
    }
  }
}

void down(void *context, int32_t) {
  Work *work = static_cast<Work *>(context);
  Walk walk;
  Task task;
  while (take(&work->tasks, &walk, [&](int64_t e) { return work->ends[e]; }, &task))
    multiply(task.rows, work->h + task.row * work->h_stride, work->h_stride, work->down, task.e,
             task.column, 1, task.columns, work->products + task.row * work->D + task.column,
             work->D);
}

void combine(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const transom_tensor *y = work->call->outs[0], *b = work->down_bias;
  float *total = work->threads + thread * work->thread_floats, *bias = total + work->x_stride;
  const int64_t D = work->D;
  for (;;) {
    const int64_t t = __atomic_fetch_add(&work->tasks.next, 1, __ATOMIC_RELAXED);
    if (t >= work->count) return;
    memset(total, 0, static_cast<size_t>(D) * sizeof(float));
    for (int64_t pair = t * work->K; pair < (t + 1) * work->K; pair++) {
      const int64_t row = work->positions[pair];
      if (row < 0) continue;
      const float w = weight_of(work, pair), *product = work->products + row * D;
      const float of_product = work->before ? 1.0f : w;
      for (int64_t d = 0; d < D; d++) total[d] += of_product * product[d];
      if (b == nullptr) continue;
      const transom_tensor *ids = work->ids;
      const int64_t e = integer(ids, (work->first + t) * ids->strides[0] +
                                         (pair - t * work->K) * ids->strides[1]);
      read_row(b, e * b->strides[0], b->strides[1], D, bias);
      for (int64_t d = 0; d < D; d++) total[d] += w * bias[d];
    }
    write_row(at(y, (work->first + t) * D), kind(y), total, D);
  }
}

/* The tasks of a product with N columns, at most `most` in one, and the threads that do them. */
void share(Work *work, int64_t N, int64_t most, int32_t threads, void (*body)(void *, int32_t)) {
  int64_t stop;
  const int64_t blocks = count_blocks(work->E, work->pairs, work->rows,
                                      [&](int64_t e) { return work->ends[e]; }, &stop);
  const int64_t columns = min_of(columns_at_once(N, blocks, threads), most);
  work->tasks = {work->E, work->pairs, N, work->rows, columns, 0};
  parallel(threads, body, work);
}

int32_t supports(const transom_call *call, transom_status *status) {
  return fits(call, ARGUMENT(X), "x", ARGUMENT(GATE_UP), "gate_up", status) &&
         fits(call, ARGUMENT(X), "x", ARGUMENT(DOWN), "down", status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  return static_cast<uint64_t>(lay_out(&work, work.tokens));
}

int32_t run(const transom_call *call, transom_status *status) {
  Work work = describe(call);
  if (work.T == 0 || work.D == 0) return 0;
  if (static_cast<uint64_t>(lay_out(&work, work.tokens)) > call->workspace_bytes) {
    status->code = TRANSOM_ERROR_MEMORY;
    snprintf(status->message, sizeof status->message,
             "the workspace is smaller than what was asked for; expected TRANSOM_WORKSPACE_MB to "
             "stay during a call");
    return 1;
  }
  for (work.first = 0; work.first < work.T; work.first += work.tokens) {
    work.count = min_of(work.tokens, work.T - work.first);
    sort(&work);
    const double products = static_cast<double>(work.pairs * work.D) * static_cast<double>(work.I);
    const int32_t threads = threads_for(3.0 * products, call->threads);
    share(&work, work.I, kTile, threads, gate_and_up);
    share(&work, work.D, kMostColumns, threads, down);
    work.tasks.next = 0;
    parallel(work.count > 1 ? threads : 1, combine, &work);
  }
  return 0;
}

}  // namespace

extern const transom_impl moe_experts = {
    sizeof(transom_impl), TRANSOM_TUNED, "moe_experts", "native", TRANSOM_MOE_EXPERTS_HASH,
    TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
