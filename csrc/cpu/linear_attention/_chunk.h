/* Tokens of one value head, taken together: what the gated delta rule computes of them.
 *
 * With G the sums of g from the chunk's first token on, E_ij = e^(G_i - G_j) and S the state before:
 *
 *     (1 + A) D = beta (V - (e^G K) S), A_ij = beta_i k_i . (E_ij k_j), j < i
 *     O = scale ((e^G Q) S + P D), P_ij = q_i . (E_ij k_j), j <= i
 *     S <- e^(G_C) S + (e^(G_C - G) K)^T D
 *
 * Products go through the tile of gemm/. Where every channel has a decay of its own, E stands between
 * the two factors: for keys before a block of rows it is split at the block's first row, into two
 * factors of at most 1, and within a block each pair is taken by itself. So no exponential exceeds 1,
 * however fast the state forgets. */
#pragma once

#include "../base/kernel.h"
#include "../gemm/tile.h"

namespace transom::TRANSOM_LEVEL {
namespace {

/* Tokens of a chunk, and rows of a block of it. */
constexpr int64_t kChunk = 64, kBlock = 16;

struct Rule {
  const transom_tensor *q, *k, *v, *g, *beta, *state;
  int64_t B, S, Hk, Hv, Dk, Dv, Dg;
  int64_t dk, dv, across; /* floats between rows of keys, of values, of a chunk's products */
  float scale, eps;
  bool normed;
};

template <class Arguments>
Rule describe_rule(const transom_call *call) {
  Rule rule = {};
  rule.q = tensor(call, Arguments::Q), rule.k = tensor(call, Arguments::K);
  rule.v = tensor(call, Arguments::V), rule.g = tensor(call, Arguments::G);
  rule.beta = tensor(call, Arguments::BETA), rule.state = tensor(call, Arguments::STATE);
  rule.B = rule.q->shape[0], rule.S = rule.q->shape[1], rule.Hk = rule.q->shape[2];
  rule.Dk = rule.q->shape[3], rule.Hv = rule.v->shape[2], rule.Dv = rule.v->shape[3];
  rule.Dg = rule.g->shape[3];
  rule.dk = up_to(rule.Dk, kWidth), rule.dv = up_to(rule.Dv, kPanel);
  rule.across = up_to(kChunk, kPanel);
  rule.scale = static_cast<float>(call->args[Arguments::SCALE].f);
  const transom_value &eps = call->args[Arguments::L2NORM_EPS];
  rule.normed = eps.tag == TRANSOM_VALUE_FLOAT;
  rule.eps = rule.normed ? static_cast<float>(eps.f) : 0.0f;
  return rule;
}

/* The workspace of a head: rows of tokens, [kChunk][.], and the state, [Dk][dv]. */
struct Head {
  float *q, *k, *v;      /* q and k normed; v, then the rest, then D */
  float *total, *beta;   /* G[kChunk][dk or 1], beta[kChunk] */
  float *early, *out;    /* a factor of a product with the state, and the product */
  float *panels;         /* keys as right factors: panels of kPanel tokens, [Dk][kPanel] each */
  float *minus_a, *p;    /* -A and P, [kChunk][across] */
  float *state;
};

inline Head lay_out_head(const Rule &rule, Arena &arena) {
  Head own = {};
  const int64_t keys = kChunk * rule.dk, values = kChunk * rule.dv;
  own.q = arena.take<float>(keys), own.k = arena.take<float>(keys);
  own.v = arena.take<float>(values);
  own.total = arena.take<float>(kChunk * (rule.Dg == 1 ? 1 : rule.dk));
  own.beta = arena.take<float>(kChunk);
  own.early = arena.take<float>(keys), own.out = arena.take<float>(values);
  own.panels = arena.take<float>(rule.across * rule.dk);
  own.minus_a = arena.take<float>(kChunk * rule.across);
  own.p = arena.take<float>(kChunk * rule.across);
  own.state = arena.take<float>(rule.Dk * rule.dv);
  return own;
}

/* c[rows][N] (+)= a[rows][K] * b[K][N], rows of b and c with whole panels. */
inline void product(int64_t rows, int64_t K, int64_t N, const float *a, int64_t a_stride,
                    const float *b, int64_t b_stride, float *c, int64_t c_stride, bool add) {
  for (int64_t n = 0; n < N; n += kPanel)
    for (int64_t k = 0; k < K; k += kDepth)
      multiply_panel(rows, min_of(kDepth, K - k), a + k, a_stride, b + k * b_stride + n, b_stride,
                     c + n, c_stride, add || k > 0);
}

/* x / sqrt(sum x^2 + eps), zeros up to the width as before. */
inline void norm_row(float *x, int64_t dk, float eps) {
  vf squares = {};
  for (int64_t d = 0; d < dk; d += kWidth) squares += load(x + d) * load(x + d);
  const vf r = all(1.0f / __builtin_sqrtf(sum(squares) + eps));
  for (int64_t d = 0; d < dk; d += kWidth) store(x + d, load(x + d) * r);
}

/* Rows s .. s + n of value head h of sequence b. */
inline void read_tokens(const Rule &rule, int64_t b, int64_t h, int64_t s, int64_t n,
                        const Head &own) {
  const int64_t key = h / (rule.Hv / rule.Hk);
  const auto from = [&](const transom_tensor *t, int64_t head, int64_t row) {
    return b * t->strides[0] + (s + row) * t->strides[1] + head * t->strides[2];
  };
  for (int64_t i = 0; i < n; i++) {
    float *q = own.q + i * rule.dk, *k = own.k + i * rule.dk;
    read_row(rule.q, from(rule.q, key, i), rule.q->strides[3], rule.Dk, q);
    read_row(rule.k, from(rule.k, key, i), rule.k->strides[3], rule.Dk, k);
    if (rule.normed) norm_row(q, rule.dk, rule.eps), norm_row(k, rule.dk, rule.eps);
    read_row(rule.v, from(rule.v, h, i), rule.v->strides[3], rule.Dv, own.v + i * rule.dv);
    own.beta[i] = number(rule.beta, from(rule.beta, h, i));
    if (rule.Dg == 1) {
      own.total[i] = number(rule.g, from(rule.g, h, i)) + (i > 0 ? own.total[i - 1] : 0.0f);
      continue;
    }
    float *total = own.total + i * rule.dk;
    read_row(rule.g, from(rule.g, h, i), rule.g->strides[3], rule.Dk, total);
    for (int64_t d = 0; i > 0 && d < rule.dk; d += kWidth)
      store(total + d, load(total + d) + load(total + d - rule.dk));
  }
}

/* to = e^(+-(G_i - G_anchor)) x_i of rows first .. last; no anchor: G itself. */
inline void decayed(const Rule &rule, const Head &own, const float *x, int64_t first, int64_t last,
                    int64_t anchor, float sign, float *to) {
  for (int64_t i = first; i < last; i++) {
    const float *row = x + i * rule.dk;
    float *out = to + i * rule.dk;
    if (rule.Dg == 1) {
      const float base = anchor < 0 ? 0.0f : own.total[anchor];
      const vf factor = exp_below(all(sign * (own.total[i] - base)));
      for (int64_t d = 0; d < rule.dk; d += kWidth) store(out + d, load(row + d) * factor);
      continue;
    }
    const float *total = own.total + i * rule.dk;
    for (int64_t d = 0; d < rule.dk; d += kWidth) {
      const vf base = anchor < 0 ? vf{} : load(own.total + anchor * rule.dk + d);
      store(out + d, load(row + d) * exp_below(sign * (load(total + d) - base)));
    }
  }
}

/* Panels of rows 0 .. n of x. */
inline void as_panels(const Rule &rule, const float *x, int64_t n, float *panels) {
  for (int64_t j = 0; j < n; j += kPanel)
    write_panel(x + j * rule.dk, rule.dk, 1, min_of(kPanel, n - j), rule.Dk,
                panels + j * rule.Dk);
}

/* rows[i][0 .. n) = x_i . the tokens in panels, of rows first .. last. */
inline void dots(const Rule &rule, const float *x, int64_t first, int64_t last, int64_t n,
                 const float *panels, float *rows) {
  for (int64_t j = 0; j < n; j += kPanel) {
    float *to = rows + first * rule.across + j;
    if (rule.Dk == 0)
      for (int64_t i = first; i < last; i++) memset(rows + i * rule.across + j, 0, kPanel * 4);
    product(last - first, rule.Dk, kPanel, x + first * rule.dk, rule.dk, panels + j * rule.Dk,
            kPanel, to, rule.across, false);
  }
}

/* Both products of a block with itself, pair by pair. */
inline void own_pairs(const Rule &rule, const Head &own, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++)
    for (int64_t j = first; j <= i; j++) {
      vf with_k = {}, with_q = {};
      for (int64_t d = 0; d < rule.dk; d += kWidth) {
        const vf decay = exp_below(load(own.total + i * rule.dk + d) -
                                   load(own.total + j * rule.dk + d));
        const vf right = load(own.k + j * rule.dk + d) * decay;
        with_k += load(own.k + i * rule.dk + d) * right;
        with_q += load(own.q + i * rule.dk + d) * right;
      }
      own.minus_a[i * rule.across + j] = sum(with_k);
      own.p[i * rule.across + j] = sum(with_q);
    }
}

/* -A below the diagonal and P up to it, zeros beyond. own.early and own.panels are used up; with one
 * decay a head, panels are those of the keys. */
inline void weigh_pairs(const Rule &rule, const Head &own, int64_t n) {
  if (rule.Dg == 1) {
    as_panels(rule, own.k, n, own.panels);
    dots(rule, own.k, 0, n, n, own.panels, own.minus_a);
    dots(rule, own.q, 0, n, n, own.panels, own.p);
  } else {
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t last = min_of(first + kBlock, n);
      if (first > 0) {
        decayed(rule, own, own.k, 0, first, first, -1.0f, own.early);
        as_panels(rule, own.early, first, own.panels);
        decayed(rule, own, own.k, first, last, first, 1.0f, own.early);
        dots(rule, own.early, first, last, first, own.panels, own.minus_a);
        decayed(rule, own, own.q, first, last, first, 1.0f, own.early);
        dots(rule, own.early, first, last, first, own.panels, own.p);
      }
      own_pairs(rule, own, first, last);
    }
  }
  for (int64_t i = 0; i < n; i++) {
    float *a = own.minus_a + i * rule.across, *p = own.p + i * rule.across;
    for (int64_t j = 0; j <= i; j += kWidth) {
      vf decay = all(1.0f);
      /* The sums of tokens after i, in the last vector, belong to no pair. */
      if (rule.Dg == 1)
        decay = exp_below(own.total[i] - load_some(own.total + j, min_of(kWidth, i + 1 - j)));
      store(a + j, load(a + j) * decay * -own.beta[i]);
      store(p + j, load(p + j) * decay);
    }
    memset(a + i, 0, static_cast<size_t>(rule.across - i) * sizeof(float));
    memset(p + i + 1, 0, static_cast<size_t>(rule.across - i - 1) * sizeof(float));
  }
}

/* own.v = D: beta (V - (e^G K) S), then solved from the first row on. */
inline void solve(const Rule &rule, const Head &own, int64_t n) {
  decayed(rule, own, own.k, 0, n, -1, 1.0f, own.early);
  if (rule.Dk == 0) memset(own.out, 0, static_cast<size_t>(n * rule.dv) * sizeof(float));
  product(n, rule.Dk, rule.dv, own.early, rule.dk, own.state, rule.dv, own.out, rule.dv, false);
  for (int64_t i = 0; i < n; i++)
    for (int64_t d = 0; d < rule.dv; d += kWidth) {
      float *v = own.v + i * rule.dv + d;
      store(v, own.beta[i] * (load(v) - load(own.out + i * rule.dv + d)));
    }
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t last = min_of(first + kBlock, n);
    product(last - first, first, rule.dv, own.minus_a + first * rule.across, rule.across, own.v,
            rule.dv, own.v + first * rule.dv, rule.dv, true);
    for (int64_t i = first + 1; i < last; i++)
      for (int64_t d = 0; d < rule.dv; d += kWidth) {
        vf row = load(own.v + i * rule.dv + d);
        for (int64_t j = first; j < i; j++)
          row += own.minus_a[i * rule.across + j] * load(own.v + j * rule.dv + d);
        store(own.v + i * rule.dv + d, row);
      }
  }
}

/* own.out = (e^G Q) S + P D. */
inline void read_out(const Rule &rule, const Head &own, int64_t n) {
  decayed(rule, own, own.q, 0, n, -1, 1.0f, own.early);
  product(n, n, rule.dv, own.p, rule.across, own.v, rule.dv, own.out, rule.dv, false);
  product(n, rule.Dk, rule.dv, own.early, rule.dk, own.state, rule.dv, own.out, rule.dv, true);
}

/* S <- e^(G_C) S + (e^(G_C - G) K)^T D. */
inline void advance(const Rule &rule, const Head &own, int64_t n) {
  for (int64_t d = 0; d < rule.Dk; d++) {
    const float total = rule.Dg == 1 ? own.total[n - 1] : own.total[(n - 1) * rule.dk + d];
    const vf decay = exp_below(all(total));
    float *row = own.state + d * rule.dv;
    for (int64_t i = 0; i < rule.dv; i += kWidth) store(row + i, load(row + i) * decay);
  }
  decayed(rule, own, own.k, 0, n, n - 1, -1.0f, own.early);
  as_panels(rule, own.early, n, own.panels);
  for (int64_t j = 0; j < n; j += kPanel)
    product(rule.Dk, min_of(kPanel, n - j), rule.dv, own.panels + j * rule.Dk, kPanel,
            own.v + j * rule.dv, rule.dv, own.state, rule.dv, true);
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
