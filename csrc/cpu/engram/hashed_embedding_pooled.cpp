/* hashed_embedding_pooled: the sum or mean of the rows that the n-grams of each token choose. */
#include "_lookup.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_HASHED_EMBEDDING_POOLED_##name

struct Work {
  Lookup lookup;
  const transom_tensor *y;
  float columns; /* that the sum is divided by; 0: it is not */
};

Work describe(const transom_call *call) {
  Work work = {};
  work.y = call->outs[0];
  work.lookup = describe_lookup(call, HASH_ARGUMENTS, ARGUMENT(TABLE), ARGUMENT(SHARD),
                                up_to(work.y->shape[2], kWidth));
  if (call->args[ARGUMENT(MEAN)].i != 0)
    work.columns = static_cast<float>(work.lookup.hash.columns);
  return work;
}

struct Sums {
  const transom_tensor *y;
  int64_t columns;
  float divisor; /* 0: none */
  float *sum;

  void token(Place place, const Table *table, const int64_t *rows, const int64_t *coming) {
    const int64_t d = table->d;
    if (table->format <= kF16 && (d <= 1 || table->along == 1)) {
      if (table->format == kF32)
        add_up<float>(table, rows, coming);
      else if (table->format == kBf16)
        add_up<bf16>(table, rows, coming);
      else
        add_up<f16>(table, rows, coming);
    } else {
      memset(sum, 0, static_cast<size_t>(up_to(d, kWidth)) * sizeof(float));
      for (int64_t c = 0; c < columns; c++) {
        if (coming != nullptr) prefetch_row(table, coming[c]);
        if (rows[c] >= 0) read_table<true>(table, rows[c], sum);
      }
    }
    if (divisor > 0)
      for (int64_t i = 0; i < d; i += kWidth) store(sum + i, load(sum + i) / divisor);
    write_row(at(y, (place.b * y->shape[1] + place.s) * d), kind(y), sum, d);
  }

  /* A few vectors of every row at a time: the sums stay in registers. */
  template <class Number>
  void add_up(const Table *table, const int64_t *rows, const int64_t *coming) {
    constexpr int64_t kPiece = 4 * kWidth;
    const char *values = table->values;
    const int64_t d = table->d, down = table->down;
    int64_t k = 0;
    for (; k + kPiece <= d; k += kPiece) {
      vf total[4] = {};
      for (int64_t c = 0; c < columns; c++) {
        if (coming != nullptr && k == 0) prefetch_row(table, coming[c]);
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
        if (coming != nullptr && k == 0) prefetch_row(table, coming[c]);
        if (rows[c] >= 0)
          total += load_some(reinterpret_cast<const Number *>(values + rows[c] * down) + k, n);
      }
      store(sum + k, total);
    }
  }
};

void tasks(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  Sums sink = {work->y, work->lookup.hash.columns, work->columns,
               floats_of(&work->lookup, thread)};
  look_up(&work->lookup, thread, &sink);
}

int32_t supports(const transom_call *call, transom_status *status) {
  return table_fits(call, ARGUMENT(TABLE), status);
}

uint64_t workspace(const transom_call *call) { return lookup_workspace(describe(call).lookup); }

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  if (work.lookup.tokens == 0 || work.y->shape[2] == 0) return 0;
  prepare_lookup(&work.lookup, call->workspace);
  parallel(work.lookup.threads, tasks, &work);
  return 0;
}

}  // namespace

extern const transom_impl hashed_embedding_pooled = {
    sizeof(transom_impl), TRANSOM_TUNED, "hashed_embedding_pooled", "native",
    TRANSOM_HASHED_EMBEDDING_POOLED_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
