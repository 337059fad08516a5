/* attention.c: lightning_indexer, sparse_attention and its gradient. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "launch.h"

/* lightning_indexer -------------------------------------------------------------------------- */

#define KEYS (STRIPE * TILE) /* scored at a time */

/* The keys kept so far, a heap: the one to go first is on top, the lowest score and of equal
 * scores the highest index. */
typedef struct {
  float *score;
  int32_t *index;
  int64_t count, most;
} best;

static bool goes_before(const best *b, int64_t i, int64_t j) {
  return b->score[i] < b->score[j] || (b->score[i] == b->score[j] && b->index[i] > b->index[j]);
}

static void swap(best *b, int64_t i, int64_t j) {
  const float score = b->score[i];
  const int32_t index = b->index[i];
  b->score[i] = b->score[j], b->index[i] = b->index[j];
  b->score[j] = score, b->index[j] = index;
}

/* Keys come in ascending order, so that one of equal score never displaces another. */
static void offer(best *b, float score, int32_t index) {
  int64_t i = 0;
  if (isnan(score)) return;
  if (b->count < b->most) {
    i = b->count++;
    b->score[i] = score, b->index[i] = index;
    for (; i && goes_before(b, i, (i - 1) / 2); i = (i - 1) / 2) swap(b, i, (i - 1) / 2);
    return;
  }
  if (!(score > b->score[0])) return;
  b->score[0] = score, b->index[0] = index;
  for (;;) {
    int64_t first = i;
    for (int64_t child = 2 * i + 1; child <= 2 * i + 2 && child < b->count; child++)
      if (goes_before(b, child, first)) first = child;
    if (first == i) return;
    swap(b, i, first);
    i = first;
  }
}

static int by_number(const void *a, const void *b) {
  return (*(const int32_t *)a > *(const int32_t *)b) - (*(const int32_t *)a < *(const int32_t *)b);
}

static int32_t lightning_indexer_supports(const transom_call *call, transom_status *status) {
  const int64_t H = tensor_at(call, TRANSOM_LIGHTNING_INDEXER_Q)->shape[2];
  const int64_t top_k = call->args[TRANSOM_LIGHTNING_INDEXER_TOP_K].i;
  return takes(call, TRANSOM_LIGHTNING_INDEXER_Q, "q", false, status) &&
         takes(call, TRANSOM_LIGHTNING_INDEXER_WEIGHTS, "weights", false, status) &&
         fits(status, top_k < VECTOR_BYTES ? (H * (KEYS + 1) + 2 * top_k) * 4 : VECTOR_BYTES + 1,
              "H = %lld heads of %d keys and top_k = %lld keys with their scores", (long long)H,
              KEYS, (long long)top_k);
}

static void lightning_indexer_kernel(const transom_call *call) {
  const transom_tensor *q = tensor_at(call, TRANSOM_LIGHTNING_INDEXER_Q);
  const transom_tensor *k = tensor_at(call, TRANSOM_LIGHTNING_INDEXER_K);
  const transom_tensor *w = tensor_at(call, TRANSOM_LIGHTNING_INDEXER_WEIGHTS);
  const transom_tensor *visible = tensor_at(call, TRANSOM_LIGHTNING_INDEXER_VISIBLE);
  const int64_t B = q->shape[0], S = q->shape[1], H = q->shape[2], D = q->shape[3];
  const int64_t N = k->shape[1], top_k = call->args[TRANSOM_LIGHTNING_INDEXER_TOP_K].i;
  int32_t *indices = host_address(call->outs[0]->data);
  float *dots = vector_buffer(H * KEYS), *weights = vector_buffer(H);
  best kept = {.score = vector_buffer(top_k), .index = (int32_t *)vector_buffer(top_k),
               .most = top_k};
  for (int64_t b = 0; b < B; b++)
    for (int64_t s = 0; s < S; s++, indices += top_k) {
      const int64_t seen = clamped(integer_at(visible, b, s, 0), 0, N);
      load_row(weights, row_at(w, b, s), 0, H);
      kept.count = 0;
      for (int64_t j = 0; j < seen; j += KEYS) {
        const int64_t n = seen - j < KEYS ? seen - j : KEYS;
        matrix_product(H, n, D, matrix_at(q, b, s), transposed(at(matrix_at(k, b, 0), j, 0)),
                       on_chip(dots, KEYS), false);
        for (int64_t i = 0; i < n; i++) {
          float score = 0;
          for (int64_t h = 0; h < H; h++) {
            const float dot = dots[h * KEYS + i];
            score += weights[h] * (dot < 0 ? 0 : dot); /* NaN stays */
          }
          offer(&kept, score, (int32_t)(j + i));
        }
        count_vector(n, 2 * H + 2);
      }
      qsort(kept.index, (size_t)kept.count, sizeof *kept.index, by_number);
      for (int64_t i = kept.count; i < top_k; i++) kept.index[i] = -1;
      memcpy(indices, kept.index, (size_t)top_k * sizeof *indices);
      count_vector(top_k, 8);
    }
}

IMPLEMENTATION(lightning_indexer, "lightning_indexer", TRANSOM_LIGHTNING_INDEXER_HASH,
               lightning_indexer_supports, NULL);

/* Attention, forward and backward ------------------------------------------------------------ */

/* A block of queries' heads meets its keys TILE by TILE. */
#define HEADS TILE

typedef struct {
  const transom_tensor *q, *kv, *indices, *visible, *local, *sink, *local_valid;
  int64_t B, S, H, D, N, M, v_dim, window;
  float scale;
} attention;

/* The keys of one query, in order: entries, then local tokens. */
typedef struct {
  const attention *a;
  int64_t b, s, entry, token;
} walk;

typedef struct {
  int64_t count, row[TILE];
  bool local[TILE];
} keys;

static walk keys_of(const attention *a, int64_t b, int64_t s) {
  return (walk){a, b, s, 0, clamped(a->M - a->S + s - a->window + 1, 0, a->M)};
}

/* Up to TILE keys more; false: there are none. An index selects after it has been compared with
 * its bounds, so that no address is ever formed of one outside. */
static bool next_keys(walk *w, keys *k) {
  const attention *a = w->a;
  const int64_t bound =
      a->visible ? clamped(integer_at(a->visible, w->b, w->s, 0), 0, a->N) : a->N;
  const int64_t entries = a->indices ? a->indices->shape[2] : bound;
  const int64_t tokens = a->local && a->window ? a->M - a->S + w->s + 1 : 0;
  k->count = 0;
  for (; w->entry < entries && k->count < TILE; w->entry++) {
    const int64_t row = a->indices ? integer_at(a->indices, w->b, w->s, w->entry) : w->entry;
    if (row < 0 || row >= bound) continue;
    k->local[k->count] = false, k->row[k->count++] = row;
  }
  for (; w->token < tokens && k->count < TILE; w->token++) {
    if (a->local_valid && !integer_at(a->local_valid, w->b, w->token, 0)) continue;
    k->local[k->count] = true, k->row[k->count++] = w->token;
  }
  return k->count;
}

static void load_keys(const walk *w, const keys *k, float *to) {
  const attention *a = w->a;
  for (int64_t i = 0; i < k->count; i++)
    load_row(to + i * a->D, matrix_at(k->local[i] ? a->local : a->kv, w->b, 0), k->row[i], a->D);
}

static void load_rows(float *to, matrix from, int64_t first, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; i++) load_row(to + i * columns, from, first + i, columns);
}

/* What is left of the softmax beside the sink: e^lse / (e^lse + e^sink). */
static float kept_share(float lse, float sink) { return 1 / (1 + expf(sink - lse)); }

static attention forward_arguments(const transom_call *call) {
  attention a = {.q = tensor_at(call, TRANSOM_SPARSE_ATTENTION_Q),
                 .kv = tensor_at(call, TRANSOM_SPARSE_ATTENTION_KV),
                 .indices = tensor_at(call, TRANSOM_SPARSE_ATTENTION_INDICES),
                 .visible = tensor_at(call, TRANSOM_SPARSE_ATTENTION_VISIBLE),
                 .local = tensor_at(call, TRANSOM_SPARSE_ATTENTION_LOCAL_KV),
                 .sink = tensor_at(call, TRANSOM_SPARSE_ATTENTION_SINK),
                 .local_valid = tensor_at(call, TRANSOM_SPARSE_ATTENTION_LOCAL_VALID),
                 .window = call->args[TRANSOM_SPARSE_ATTENTION_WINDOW].i,
                 .v_dim = call->args[TRANSOM_SPARSE_ATTENTION_V_DIM].i,
                 .scale = (float)call->args[TRANSOM_SPARSE_ATTENTION_SCALE].f};
  a.B = a.q->shape[0], a.S = a.q->shape[1], a.H = a.q->shape[2], a.D = a.q->shape[3];
  a.N = a.kv->shape[1], a.M = a.local ? a.local->shape[1] : 0;
  return a;
}

static int32_t sparse_attention_supports(const transom_call *call, transom_status *status) {
  const attention a = forward_arguments(call);
  return takes(call, TRANSOM_SPARSE_ATTENTION_Q, "q", false, status) &&
         takes(call, TRANSOM_SPARSE_ATTENTION_SINK, "sink", false, status) &&
         fits(status, ((HEADS + TILE) * a.D + HEADS * a.v_dim + HEADS * (TILE + 3)) * 4,
              "D = %lld, v_dim = %lld: %d heads with their sums and %d keys", (long long)a.D,
              (long long)a.v_dim, HEADS, TILE);
}

static void sparse_attention_kernel(const transom_call *call) {
  const attention a = forward_arguments(call);
  const matrix sinks = a.sink ? row_at(a.sink, 0, 0) : (matrix){0};
  float *q = vector_buffer(HEADS * a.D), *rows = vector_buffer(TILE * a.D);
  float *out = vector_buffer(HEADS * a.v_dim), *p = vector_buffer(HEADS * TILE);
  float *largest = vector_buffer(HEADS), *mass = vector_buffer(HEADS), *sink = vector_buffer(HEADS);
  const matrix values = on_chip(rows, a.D);
  for (int64_t n = 0; n < a.B * a.S * ((a.H + HEADS - 1) / HEADS); n++) {
    const int64_t blocks = (a.H + HEADS - 1) / HEADS, b = n / blocks / a.S, s = n / blocks % a.S;
    const int64_t first = n % blocks * HEADS, heads = a.H - first < HEADS ? a.H - first : HEADS;
    load_rows(q, matrix_at(a.q, b, s), first, heads, a.D);
    if (a.sink) load_row(sink, at(sinks, 0, first), 0, heads);
    memset(out, 0, (size_t)(heads * a.v_dim) * sizeof *out);
    for (int64_t h = 0; h < heads; h++) largest[h] = -INFINITY, mass[h] = 0;
    keys k;
    for (walk w = keys_of(&a, b, s); next_keys(&w, &k);) {
      load_keys(&w, &k, rows);
      matrix_product(heads, k.count, a.D, on_chip(q, a.D), transposed(values), on_chip(p, TILE),
                     false);
      for (int64_t h = 0; h < heads; h++) {
        float *l = p + h * TILE, most = largest[h], sum = 0;
        for (int64_t i = 0; i < k.count; i++)
          if ((l[i] *= a.scale) > most) most = l[i];
        /* While nothing has weight the largest is -inf, and -inf - (-inf) would be NaN. */
        const float shift = most == -INFINITY ? 0 : most, earlier = expf(largest[h] - shift);
        for (int64_t i = 0; i < k.count; i++) sum += l[i] = expf(l[i] - shift);
        for (int64_t d = 0; d < a.v_dim; d++) out[h * a.v_dim + d] *= earlier;
        mass[h] = mass[h] * earlier + sum;
        largest[h] = most;
      }
      count_vector(heads * k.count, 6);
      count_vector(heads * a.v_dim, 1);
      matrix_product(heads, a.v_dim, k.count, on_chip(p, TILE), values, on_chip(out, a.v_dim),
                     true);
    }
    for (int64_t h = 0; h < heads; h++) {
      float lse = largest[h] + logf(mass[h]);
      float factor = mass[h] == 0 ? 0 : (a.sink ? kept_share(lse, sink[h]) : 1) / mass[h];
      for (int64_t d = 0; d < a.v_dim; d++) out[h * a.v_dim + d] *= factor;
      store_row(matrix_at(call->outs[0], b, s), first + h, out + h * a.v_dim, a.v_dim);
      store_row(at(row_at(call->outs[1], b, s), 0, first + h), 0, &lse, 1);
    }
    count_vector(heads * a.v_dim, 1);
  }
}

IMPLEMENTATION(sparse_attention, "sparse_attention", TRANSOM_SPARSE_ATTENTION_HASH,
               sparse_attention_supports, NULL);

/* sparse_attention_backward ------------------------------------------------------------------ */

static attention backward_arguments(const transom_call *call) {
  attention a = {.q = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_Q),
                 .kv = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_KV),
                 .indices = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_INDICES),
                 .visible = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_VISIBLE),
                 .local = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_LOCAL_KV),
                 .sink = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_SINK),
                 .local_valid = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_LOCAL_VALID),
                 .window = call->args[TRANSOM_SPARSE_ATTENTION_BACKWARD_WINDOW].i,
                 .v_dim = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_DO)->shape[3],
                 .scale = (float)call->args[TRANSOM_SPARSE_ATTENTION_BACKWARD_SCALE].f};
  a.B = a.q->shape[0], a.S = a.q->shape[1], a.H = a.q->shape[2], a.D = a.q->shape[3];
  a.N = a.kv->shape[1], a.M = a.local->shape[1];
  return a;
}

static int32_t sparse_attention_backward_supports(const transom_call *call,
                                                  transom_status *status) {
  const attention a = backward_arguments(call);
  return takes(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_Q, "q", false, status) &&
         takes(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_SINK, "sink", false, status) &&
         fits(status,
              ((2 * HEADS + 2 * TILE) * a.D + HEADS * a.v_dim + HEADS * (2 * TILE + 5)) * 4,
              "D = %lld, v_dim = %lld: %d heads and %d keys with their gradients", (long long)a.D,
              (long long)a.v_dim, HEADS, TILE);
}

/* Sums over queries in float32: of kv and local_kv, and of the sinks. */
static uint64_t sparse_attention_backward_workspace(const transom_call *call) {
  const attention a = backward_arguments(call);
  return (uint64_t)(a.B * (a.N + a.M) * a.D + a.H) * sizeof(float);
}

static void sparse_attention_backward_kernel(const transom_call *call) {
  const attention a = backward_arguments(call);
  const transom_tensor *dout = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_DO);
  const transom_tensor *dlses = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_DLSE);
  const transom_tensor *o = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_O);
  const transom_tensor *lses = tensor_at(call, TRANSOM_SPARSE_ATTENTION_BACKWARD_LSE);
  float *sums = host_address(call->workspace), *local_sums = sums + a.B * a.N * a.D;
  float *dsink = local_sums + a.B * a.M * a.D;
  float *q = vector_buffer(HEADS * a.D), *dq = vector_buffer(HEADS * a.D);
  float *rows = vector_buffer(TILE * a.D), *drows = vector_buffer(TILE * a.D);
  float *dy = vector_buffer(HEADS * a.v_dim), *p = vector_buffer(HEADS * TILE);
  float *ds = vector_buffer(HEADS * TILE);
  float *delta = vector_buffer(HEADS), *share = vector_buffer(HEADS), *lse = vector_buffer(HEADS);
  float *dlse = vector_buffer(HEADS), *sink = vector_buffer(HEADS);
  const matrix weights = on_chip(p, TILE), slopes = on_chip(ds, TILE), values = on_chip(rows, a.D);
  const uint64_t floats = sparse_attention_backward_workspace(call) / sizeof(float);
  if (floats) memset(sums, 0, floats * sizeof(float));
  count_vector((int64_t)floats, 1);
  for (int64_t n = 0; n < a.B * a.S * ((a.H + HEADS - 1) / HEADS); n++) {
    const int64_t blocks = (a.H + HEADS - 1) / HEADS, b = n / blocks / a.S, s = n / blocks % a.S;
    const int64_t first = n % blocks * HEADS, heads = a.H - first < HEADS ? a.H - first : HEADS;
    load_rows(q, matrix_at(a.q, b, s), first, heads, a.D);
    load_rows(dy, matrix_at(dout, b, s), first, heads, a.v_dim);
    load_row(lse, at(row_at(lses, b, s), 0, first), 0, heads);
    load_row(dlse, at(row_at(dlses, b, s), 0, first), 0, heads);
    load_row(sink, at(row_at(a.sink, 0, 0), 0, first), 0, heads);
    memset(dq, 0, (size_t)(heads * a.D) * sizeof *dq);
    for (int64_t h = 0; h < heads; h++) {
      /* do . o, before the first key takes the place of this row of o. */
      load_row(rows, matrix_at(o, b, s), first + h, a.v_dim);
      delta[h] = 0;
      for (int64_t d = 0; d < a.v_dim; d++) delta[h] += dy[h * a.v_dim + d] * rows[d];
      share[h] = kept_share(lse[h], sink[h]);
      if (lse[h] != -INFINITY) dsink[first + h] -= kept_share(sink[h], lse[h]) * delta[h];
    }
    count_vector(heads * a.v_dim, 2);
    keys k;
    for (walk w = keys_of(&a, b, s); next_keys(&w, &k);) {
      load_keys(&w, &k, rows);
      matrix_product(heads, k.count, a.D, on_chip(q, a.D), transposed(values), weights, false);
      matrix_product(heads, k.count, a.v_dim, on_chip(dy, a.v_dim), transposed(values), slopes,
                     false);
      for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < k.count; i++) {
          float *weight = p + h * TILE + i, *slope = ds + h * TILE + i;
          /* A head whose keys have no weight passes nothing on. */
          const float e = lse[h] == -INFINITY ? 0 : expf(a.scale * *weight - lse[h]);
          *slope = e == 0 ? 0 : a.scale * e * (share[h] * (*slope - delta[h]) + dlse[h]);
          *weight = share[h] * e;
        }
      count_vector(heads * k.count, 10);
      matrix_product(heads, a.D, k.count, slopes, values, on_chip(dq, a.D), true);
      matrix_product(k.count, a.D, heads, transposed(slopes), on_chip(q, a.D),
                     on_chip(drows, a.D), false);
      matrix_product(k.count, a.v_dim, heads, transposed(weights), on_chip(dy, a.v_dim),
                     on_chip(drows, a.D), true);
      for (int64_t i = 0; i < k.count; i++) {
        const matrix into = in_workspace(k.local[i] ? local_sums + b * a.M * a.D
                                                    : sums + b * a.N * a.D, a.D);
        load_row(rows, into, k.row[i], a.D); /* the keys are no longer needed */
        for (int64_t d = 0; d < a.D; d++) rows[d] += drows[i * a.D + d];
        store_row(into, k.row[i], rows, a.D);
        count_vector(a.D, 1);
      }
    }
    for (int64_t h = 0; h < heads; h++)
      store_row(matrix_at(call->outs[0], b, s), first + h, dq + h * a.D, a.D);
  }
  for (int64_t b = 0; b < a.B; b++) {
    for (int64_t i = 0; i < a.N; i++) {
      load_row(rows, in_workspace(sums + b * a.N * a.D, a.D), i, a.D);
      store_row(matrix_at(call->outs[1], b, 0), i, rows, a.D);
    }
    for (int64_t i = 0; i < a.M; i++) {
      load_row(rows, in_workspace(local_sums + b * a.M * a.D, a.D), i, a.D);
      store_row(matrix_at(call->outs[2], b, 0), i, rows, a.D);
    }
  }
  for (int64_t h = 0; h < a.H; h++)
    store_row(at(row_at(call->outs[3], 0, 0), 0, h), 0, dsink + h, 1);
}

IMPLEMENTATION(sparse_attention_backward, "sparse_attention_backward",
               TRANSOM_SPARSE_ATTENTION_BACKWARD_HASH, sparse_attention_backward_supports,
               sparse_attention_backward_workspace);
