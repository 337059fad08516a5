/* hashed_embedding_pooled: the sum or mean of the rows that the n-grams of each token choose. */
#include "_lookup.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(hashed_embedding_pooled, supports, workspace, run)

namespace {

Lookup describe(const transom_call *call) {
  return describe_lookup<Arguments>(call, up_to(call->outs[0]->shape[2], kWidth));
}

struct Sums {
  const transom_tensor *y;
  int64_t columns;
  float divisor; /* 0 for none */
  float *sum;

  void token(Position position, const Embedding *embedding, const int64_t *rows,
             const int64_t *coming) {
    const int64_t d = embedding->d;
    if (embedding->kind >= 0 && (d <= 1 || embedding->along == 1)) {
      if (embedding->kind == 0)
        add_up<float>(embedding, rows, coming);
      else if (embedding->kind == 1)
        add_up<bf16>(embedding, rows, coming);
      else
        add_up<f16>(embedding, rows, coming);
    } else {
      memset(sum, 0, static_cast<size_t>(up_to(d, kWidth)) * sizeof(float));
      for (int64_t c = 0; c < columns; c++) {
        if (coming != nullptr) prefetch_row(embedding, coming[c]);
        if (rows[c] >= 0) read_embedding<true>(embedding, rows[c], sum);
      }
    }
    if (divisor > 0)
      for (int64_t i = 0; i < d; i += kWidth) store(sum + i, load(sum + i) / divisor);
    write_row(at(y, (position.b * y->shape[1] + position.s) * d), kind(y), sum, d);
  }

  /* A few vectors of every row are taken at a time, so that the sums stay in registers. */
  template <class Number>
  void add_up(const Embedding *embedding, const int64_t *rows, const int64_t *coming) {
    constexpr int64_t kChunk = 4 * kWidth;
    const char *values = embedding->values;
    const int64_t d = embedding->d, down = embedding->down;
    int64_t k = 0;
    for (; k + kChunk <= d; k += kChunk) {
      vf total[4] = {};
      for (int64_t c = 0; c < columns; c++) {
        if (coming != nullptr && k == 0) prefetch_row(embedding, coming[c]);
        if (rows[c] < 0) continue;
        const Number *row = reinterpret_cast<const Number *>(values + rows[c] * down) + k;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) total[i] += load(row + i * kWidth);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) store(sum + k + i * kWidth, total[i]);
    }
    for (; k < d; k += kWidth) {
      vf total = {};
      const int64_t n = min_of(kWidth, d - k);
      for (int64_t c = 0; c < columns; c++) {
        if (coming != nullptr && k == 0) prefetch_row(embedding, coming[c]);
        if (rows[c] >= 0)
          total += load_some(reinterpret_cast<const Number *>(values + rows[c] * down) + k, n);
      }
      store(sum + k, total);
    }
  }

  void end() {}
};

int32_t supports(const transom_call *call, transom_status *status) {
  return embedding_fits(call, ARG(TABLE), status);
}

uint64_t workspace(const transom_call *call) { return lookup_workspace(describe(call)); }

int32_t run(const transom_call *call, transom_status *) {
  Lookup lookup = describe(call);
  const transom_tensor *y = call->outs[0];
  if (lookup.tokens == 0 || y->shape[2] == 0) return 0;
  const int64_t columns = lookup.hash.columns;
  const float divisor = call->args[ARG(MEAN)].i != 0 ? static_cast<float>(columns) : 0.0f;
  look_up(&lookup, call->workspace, [&](const LookupWorkspace &own) {
    return Sums{y, columns, divisor, own.floats};
  });
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
