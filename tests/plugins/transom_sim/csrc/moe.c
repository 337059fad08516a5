/* moe.c: grouped_gemm and its gradients, moe_experts. */
#include <math.h>
#include <string.h>

#include "launch.h"

#define PIECE 1024                /* elements of a row in the vector buffer at a time */
#define WORKSPACE ((int64_t)64 << 20) /* bytes, unless a single token takes more */

static void zero_rows(matrix to, int64_t start, int64_t stop, int64_t columns) {
  float *zeros = vector_buffer(PIECE);
  memset(zeros, 0, PIECE * sizeof *zeros);
  for (int64_t i = start; i < stop; i++)
    for (int64_t j = 0; j < columns; j += PIECE)
      store_row(at(to, 0, j), i, zeros, columns - j < PIECE ? columns - j : PIECE);
}

/* The right-hand side [K,N] of expert e: of the packed form if the host brought it. */
static matrix weight_of(const transom_call *call, int place, int64_t e) {
  const transom_tensor *t = tensor_at(call, place);
  if (!call->packed || !call->packed[place]) return transposed(matrix_at(t, e, 0));
  const number_type type = type_of(t);
  const int64_t N = t->shape[1], K = t->shape[2];
  char *forms = host_address(call->packed[place]);
  return packed_matrix(forms + e * packed_elements(K, N) * size_of(type), type, K);
}

/* The end of expert e's rows, which start at `start`. */
static int64_t end_of(const transom_tensor *offsets, int64_t e, int64_t start, int64_t M) {
  return clamped(integer_at(offsets, e, 0, 0), start, M);
}

/* grouped_gemm ------------------------------------------------------------------------------- */

static int32_t grouped_gemm_supports(const transom_call *call, transom_status *status) {
  return takes(call, TRANSOM_GROUPED_GEMM_X, "x", false, status) &&
         takes(call, TRANSOM_GROUPED_GEMM_WEIGHT, "weight", true, status);
}

static void grouped_gemm_kernel(const transom_call *call) {
  const transom_tensor *x = tensor_at(call, TRANSOM_GROUPED_GEMM_X);
  const transom_tensor *offsets = tensor_at(call, TRANSOM_GROUPED_GEMM_OFFSETS);
  const transom_tensor *out = call->outs[0];
  const int64_t M = x->shape[0], K = x->shape[1], N = out->shape[1], E = offsets->shape[0];
  const matrix rows = matrix_at(x, 0, 0), y = matrix_at(out, 0, 0);
  int64_t start = 0;
  for (int64_t e = 0; e < E; e++) {
    const int64_t end = end_of(offsets, e, start, M);
    matrix_product(end - start, N, K, at(rows, start, 0),
                   weight_of(call, TRANSOM_GROUPED_GEMM_WEIGHT, e), at(y, start, 0), false);
    start = end;
  }
  zero_rows(y, start, M, N);
}

IMPLEMENTATION(grouped_gemm, "grouped_gemm", TRANSOM_GROUPED_GEMM_HASH, grouped_gemm_supports,
               NULL);

/* grouped_gemm_backward_x ---------------------------------------------------------------------------- */

static int32_t grouped_gemm_backward_x_supports(const transom_call *call, transom_status *status) {
  return takes(call, TRANSOM_GROUPED_GEMM_BACKWARD_X_DY, "dy", false, status) &&
         takes(call, TRANSOM_GROUPED_GEMM_BACKWARD_X_WEIGHT, "weight", true, status);
}

static void grouped_gemm_backward_x_kernel(const transom_call *call) {
  const transom_tensor *dy = tensor_at(call, TRANSOM_GROUPED_GEMM_BACKWARD_X_DY);
  const transom_tensor *weight = tensor_at(call, TRANSOM_GROUPED_GEMM_BACKWARD_X_WEIGHT);
  const transom_tensor *offsets = tensor_at(call, TRANSOM_GROUPED_GEMM_BACKWARD_X_OFFSETS);
  const int64_t M = dy->shape[0], N = dy->shape[1], K = weight->shape[2], E = weight->shape[0];
  const matrix rows = matrix_at(dy, 0, 0), dx = matrix_at(call->outs[0], 0, 0);
  int64_t start = 0;
  for (int64_t e = 0; e < E; e++) {
    const int64_t end = end_of(offsets, e, start, M);
    matrix_product(end - start, K, N, at(rows, start, 0), matrix_at(weight, e, 0),
                   at(dx, start, 0), false);
    start = end;
  }
  zero_rows(dx, start, M, K);
}

IMPLEMENTATION(grouped_gemm_backward_x, "grouped_gemm_backward_x", TRANSOM_GROUPED_GEMM_BACKWARD_X_HASH,
               grouped_gemm_backward_x_supports, NULL);

/* grouped_gemm_backward_weight ---------------------------------------------------------------------------- */

static int32_t grouped_gemm_backward_weight_supports(const transom_call *call, transom_status *status) {
  return takes(call, TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_DY, "dy", false, status) &&
         takes(call, TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_X, "x", false, status) &&
         takes(call, TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_WEIGHT, "weight", false, status);
}

static void grouped_gemm_backward_weight_kernel(const transom_call *call) {
  const transom_tensor *dy = tensor_at(call, TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_DY);
  const transom_tensor *x = tensor_at(call, TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_X);
  const transom_tensor *offsets = tensor_at(call, TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_OFFSETS);
  const int64_t M = dy->shape[0], N = dy->shape[1], K = x->shape[1], E = offsets->shape[0];
  int64_t start = 0;
  for (int64_t e = 0; e < E; e++) {
    const int64_t end = end_of(offsets, e, start, M);
    matrix_product(N, K, end - start, transposed(at(matrix_at(dy, 0, 0), start, 0)),
                   at(matrix_at(x, 0, 0), start, 0), matrix_at(call->outs[0], e, 0), false);
    start = end;
  }
}

IMPLEMENTATION(grouped_gemm_backward_weight, "grouped_gemm_backward_weight", TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_HASH,
               grouped_gemm_backward_weight_supports, NULL);

/* moe_experts -------------------------------------------------------------------------------- */

/* Tokens are taken in chunks. For the slots of a chunk the workspace holds, a row each: gate and
 * up, the activation, the product with `down`, and the numbers of token and slot. */
typedef struct {
  int64_t T, K, E, D, I, chunk;
} moe_sizes;

static int64_t bytes_per_slot(moe_sizes s) {
  return (3 * s.I + s.D) * (int64_t)sizeof(float) + 2 * (int64_t)sizeof(int64_t);
}

static moe_sizes moe_sizes_of(const transom_call *call) {
  const transom_tensor *x = tensor_at(call, TRANSOM_MOE_EXPERTS_X);
  const transom_tensor *ids = tensor_at(call, TRANSOM_MOE_EXPERTS_IDS);
  const transom_tensor *down = tensor_at(call, TRANSOM_MOE_EXPERTS_DOWN);
  moe_sizes s = {.T = x->shape[0], .D = x->shape[1], .K = ids->shape[1], .E = down->shape[0],
                 .I = down->shape[2]};
  const int64_t token = s.K * bytes_per_slot(s);
  s.chunk = clamped(token ? WORKSPACE / token : s.T, 1, s.T > 1 ? s.T : 1);
  return s;
}

static int32_t moe_experts_supports(const transom_call *call, transom_status *status) {
  return takes(call, TRANSOM_MOE_EXPERTS_X, "x", false, status) &&
         takes(call, TRANSOM_MOE_EXPERTS_WEIGHTS, "weights", false, status) &&
         takes(call, TRANSOM_MOE_EXPERTS_GATE_UP, "gate_up", true, status) &&
         takes(call, TRANSOM_MOE_EXPERTS_DOWN, "down", true, status) &&
         takes(call, TRANSOM_MOE_EXPERTS_GATE_UP_BIAS, "gate_up_bias", false, status) &&
         takes(call, TRANSOM_MOE_EXPERTS_DOWN_BIAS, "down_bias", false, status);
}

static uint64_t moe_experts_workspace(const transom_call *call) {
  const moe_sizes s = moe_sizes_of(call);
  return (uint64_t)(s.chunk * s.K * bytes_per_slot(s));
}

typedef enum { SILU, GELU, GELU_TANH, RELU, SWIGLU_OAI } activation;

static activation activation_of(const char *name) {
  static const char *const names[] = {"silu", "gelu", "gelu_tanh", "relu", "swiglu_oai"};
  for (int i = 0; i < 5; i++)
    if (!strcmp(name, names[i])) return (activation)i;
  return SILU; /* the host has checked the name */
}

/* Comparisons that are false for NaN leave it as it is. */
static float gated(float gate, float up, activation f, float limit, float alpha) {
  if (gate > limit) gate = limit;
  if (up > limit) up = limit;
  if (up < -limit) up = -limit;
  switch (f) {
    case GELU: return 0.5f * gate * (1 + erff(gate * 0.70710678f)) * up;
    case GELU_TANH:
      return 0.5f * gate * (1 + tanhf(0.79788456f * (gate + 0.044715f * gate * gate * gate))) * up;
    case RELU: return (gate < 0 ? 0 : gate) * up;
    case SWIGLU_OAI: return (up + 1) * gate / (1 + expf(-alpha * gate));
    default: return gate / (1 + expf(-gate)) * up;
  }
}

/* One row of gate and up, in PIECEs: bias, activation and, where it comes before, the weight. */
typedef struct {
  activation f;
  float limit, alpha;
  int64_t step, up; /* between two gates; from a gate to its up */
  float *gates, *ups, *bias;
} gating;

static void add_bias(float *to, float *piece, matrix bias, int64_t n) {
  load_row(piece, bias, 0, n);
  for (int64_t j = 0; j < n; j++) to[j] += piece[j];
  count_vector(n, 1);
}

static void activate_row(const gating *g, matrix both, const matrix *bias, matrix h, int64_t i,
                         int64_t I, float weight) {
  matrix gate = both, bias_gate = bias ? *bias : both;
  gate.column = g->step;
  bias_gate.column *= g->step;
  const int64_t bias_up = bias ? g->up * bias->column : 0;
  for (int64_t j = 0; j < I; j += PIECE) {
    const int64_t n = I - j < PIECE ? I - j : PIECE;
    const matrix up = {.data = (float *)gate.data + g->up, .type = F32, .row = gate.row,
                       .column = gate.column};
    load_row(g->gates, at(gate, 0, j), i, n);
    load_row(g->ups, at(up, 0, j), i, n);
    if (bias) {
      matrix second = bias_gate;
      second.data = (char *)second.data + bias_up * size_of(second.type);
      add_bias(g->gates, g->bias, at(bias_gate, 0, j), n);
      add_bias(g->ups, g->bias, at(second, 0, j), n);
    }
    for (int64_t c = 0; c < n; c++)
      g->gates[c] = weight * gated(g->gates[c], g->ups[c], g->f, g->limit, g->alpha);
    count_vector(n, 8);
    store_row(at(h, 0, j), i, g->gates, n);
  }
}

/* y[t] = the sum over its slots, in their order. */
static void add_slots(const transom_call *call, moe_sizes s, int64_t first, int64_t t,
                      matrix products, bool before, float *total, float *piece) {
  const transom_tensor *ids = tensor_at(call, TRANSOM_MOE_EXPERTS_IDS);
  const transom_tensor *bias = tensor_at(call, TRANSOM_MOE_EXPERTS_DOWN_BIAS);
  const matrix weights = matrix_at(tensor_at(call, TRANSOM_MOE_EXPERTS_WEIGHTS), 0, 0);
  const matrix y = matrix_at(call->outs[0], 0, 0);
  for (int64_t j = 0; j < s.D; j += PIECE) {
    const int64_t n = s.D - j < PIECE ? s.D - j : PIECE;
    memset(total, 0, (size_t)n * sizeof *total);
    for (int64_t slot = 0; slot < s.K; slot++) {
      const int64_t e = integer_at(ids, t, slot, 0);
      if (e < 0 || e >= s.E) continue;
      const float weight = float_at(weights, t, slot), factor = before ? 1 : weight;
      load_row(piece, at(products, 0, j), (t - first) * s.K + slot, n);
      for (int64_t c = 0; c < n; c++) total[c] += factor * piece[c];
      if (bias) {
        load_row(piece, at(row_at(bias, e, 0), 0, j), 0, n);
        for (int64_t c = 0; c < n; c++) total[c] += weight * piece[c];
      }
      count_vector(n, bias ? 2 : 1);
    }
    store_row(at(y, 0, j), t, total, n);
  }
}

static void moe_experts_kernel(const transom_call *call) {
  const moe_sizes s = moe_sizes_of(call);
  const transom_value *args = call->args;
  const transom_tensor *ids = tensor_at(call, TRANSOM_MOE_EXPERTS_IDS);
  const transom_tensor *bias = tensor_at(call, TRANSOM_MOE_EXPERTS_GATE_UP_BIAS);
  const matrix weights = matrix_at(tensor_at(call, TRANSOM_MOE_EXPERTS_WEIGHTS), 0, 0);
  const bool before = !strcmp(args[TRANSOM_MOE_EXPERTS_WEIGHT_POSITION].string, "before");
  const bool interleaved = args[TRANSOM_MOE_EXPERTS_INTERLEAVED].i;
  const bool limited = args[TRANSOM_MOE_EXPERTS_LIMIT].tag == TRANSOM_VALUE_FLOAT;
  const gating g = {
      .f = activation_of(args[TRANSOM_MOE_EXPERTS_ACTIVATION].string),
      .limit = limited ? (float)args[TRANSOM_MOE_EXPERTS_LIMIT].f : INFINITY,
      .alpha = (float)args[TRANSOM_MOE_EXPERTS_ALPHA].f,
      .step = interleaved ? 2 : 1,
      .up = interleaved ? 1 : s.I,
      .gates = vector_buffer(PIECE), .ups = vector_buffer(PIECE), .bias = vector_buffer(PIECE)};
  float *total = vector_buffer(PIECE);
  const int64_t most = s.chunk * s.K;
  int64_t *token = host_address(call->workspace), *slot = token + most;
  float *numbers = (float *)(slot + most);
  matrix x = matrix_at(tensor_at(call, TRANSOM_MOE_EXPERTS_X), 0, 0);
  const matrix both = in_workspace(numbers, 2 * s.I);
  const matrix h = in_workspace(numbers + most * 2 * s.I, s.I);
  matrix products = in_workspace(numbers + most * 3 * s.I, s.D);
  for (int64_t first = 0; first < s.T; first += s.chunk) {
    const int64_t last = first + s.chunk < s.T ? first + s.chunk : s.T;
    for (int64_t e = 0; e < s.E; e++) {
      int64_t n = 0;
      for (int64_t t = first; t < last; t++)
        for (int64_t k = 0; k < s.K; k++)
          if (integer_at(ids, t, k, 0) == e) token[n] = t, slot[n++] = (t - first) * s.K + k;
      count_vector((last - first) * s.K, 1);
      if (!n) continue;
      x.rows = token, products.rows = slot;
      matrix_product(n, 2 * s.I, s.D, x, weight_of(call, TRANSOM_MOE_EXPERTS_GATE_UP, e), both,
                     false);
      const matrix some = bias ? row_at(bias, e, 0) : both;
      for (int64_t i = 0; i < n; i++) {
        const float weight = before ? float_at(weights, token[i], slot[i] % s.K) : 1;
        activate_row(&g, both, bias ? &some : NULL, h, i, s.I, weight);
      }
      matrix_product(n, s.D, s.I, h, weight_of(call, TRANSOM_MOE_EXPERTS_DOWN, e), products,
                     false);
    }
    products.rows = NULL;
    for (int64_t t = first; t < last; t++)
      add_slots(call, s, first, t, products, before, total, g.bias);
  }
}

IMPLEMENTATION(moe_experts, "moe_experts", TRANSOM_MOE_EXPERTS_HASH, moe_experts_supports,
               moe_experts_workspace);
