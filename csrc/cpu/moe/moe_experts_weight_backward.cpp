/* moe_experts_weight_backward: the gradients in gate_up and down.
 *
 * For some experts at a time: h and the gradients of gate and up (_backward.h), then blocks of both
 * gradients, each summed by one thread over the expert's rows in order. An expert with more rows
 * than fit is summed in float32 until its last ones: in the result, or beside it. */
#include "_backward.h"
#include "_outer.h"

namespace transom::TRANSOM_LEVEL {
namespace {

#define ARGUMENT(name) TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_##name

struct Work : Backward {
  OuterSpace *spaces;
  float *beside[2]; /* one expert's sums of each gradient */
};

int64_t lay_out(Work *work) {
  Parts parts = {static_cast<char *>(work->call->workspace)};
  work->threads = parts.take<float>(work->thread_floats * work->call->threads);
  work->spaces = parts.take<OuterSpace>(work->call->threads);
  work->dboth = parts.take<float>(work->part_rows * work->both_stride);
  work->h = parts.take<float>(work->part_rows * work->h_stride);
  work->routed.ends = parts.take<int64_t>(work->routed.E);
  work->routed.order = parts.take<int32_t>(work->T * work->routed.K);
  const bool parted = work->part_rows < work->T * work->routed.K;
  for (int i = 0; i < 2; i++) {
    const int64_t entries = (2 - i) * work->I * work->D;
    work->beside[i] =
        parts.take<float>(parted && kind(work->call->outs[i]) != 0 ? entries : 0);
  }
  return parts.bytes;
}

Work describe(const transom_call *call) {
  Work work = {};
  const BackwardArguments at = {
      ARGUMENT(DY), ARGUMENT(X), ARGUMENT(IDS), ARGUMENT(WEIGHTS), ARGUMENT(GATE_UP),
      ARGUMENT(DOWN), ARGUMENT(GATE_UP_BIAS), ARGUMENT(ACTIVATION), ARGUMENT(LIMIT),
      ARGUMENT(INTERLEAVED), ARGUMENT(ALPHA), true};
  static_cast<Backward &>(work) = backward_from(call, at);
  work.tokens = work.T;
  work.part_rows = clamp(workspace_budget(call) * 3 / 4 / ((work.both_stride + work.h_stride) * 4), 1,
                         max_of(work.T * work.routed.K, 1));
  size_threads(&work);
  return work;
}

void gradient_blocks(void *context, int32_t thread) {
  Work *work = static_cast<Work *>(context);
  const Routed &routed = work->routed;
  OuterSpace *space = work->spaces + thread;
  const int64_t D = work->D, I = work->I;
  /* Of gate_up [2I,D], then of down [D,I]. */
  const int64_t heights[2] = {2 * I, D}, widths[2] = {D, I};
  int64_t counts[2];
  for (int i = 0; i < 2; i++)
    counts[i] = ceil_of(heights[i], kOuterHeight) * ceil_of(widths[i], kOuterWidth);
  const int64_t an_expert = counts[0] + counts[1];
  for (;;) {
    const int64_t task = __atomic_fetch_add(&work->tasks.next, 1, __ATOMIC_RELAXED);
    const int64_t e = task / an_expert;
    if (e >= routed.E) return;
    const int64_t first = e == 0 ? 0 : routed.ends[e - 1], end = routed.ends[e];
    const int64_t start = max_of(first, work->from), stop = min_of(end, work->to);
    if (start >= stop && (first < end || work->from > 0)) continue;
    const int of = task % an_expert >= counts[0];
    const int64_t block = task % an_expert - of * counts[0];
    const int64_t across = ceil_of(widths[of], kOuterWidth);
    const int64_t i = block / across * kOuterHeight, j = block % across * kOuterWidth;
    const int64_t height = min_of(kOuterHeight, heights[of] - i);
    const int64_t width = min_of(kOuterWidth, widths[of] - j);
    const transom_tensor *out = work->call->outs[of];
    const auto token_row = [&](const transom_tensor *t, int64_t r, int64_t column, int64_t n,
                               float *to) {
      const int64_t token = routed.token(start + r);
      read_row(t, token * t->strides[0] + column * t->strides[1], t->strides[1], n, to);
    };
    const auto left = [&](int64_t r, float *to) {
      if (of == 0) {
        memcpy(to, work->dboth + (start + r - work->from) * work->both_stride + i,
               static_cast<size_t>(height) * sizeof(float));
        return;
      }
      token_row(work->dy, r, i, height, to);
      const float w = routed.weight(start + r);
      for (int64_t c = 0; c < height; c++) to[c] *= w;
    };
    const auto right = [&](int64_t r, float *to) {
      if (of == 0)
        token_row(work->x, r, j, width, to);
      else
        memcpy(to, work->h + (start + r - work->from) * work->h_stride + j,
               static_cast<size_t>(width) * sizeof(float));
    };
    constexpr int64_t kStride = kOuterWidth + kPanel;
    float *sums = space->sums;
    const auto partial = [&](int64_t r) {
      const int64_t entry = (i + r) * widths[of] + j;
      return kind(out) != 0 ? work->beside[of] + entry
                            : static_cast<float *>(at(out, e * heights[of] * widths[of] + entry));
    };
    const size_t bytes = static_cast<size_t>(width) * sizeof(float);
    const bool more = start > first;
    for (int64_t r = 0; r < height && more; r++) memcpy(sums + r * kStride, partial(r), bytes);
    sum_outer(max_of(stop - start, 0), height, width, left, right, space, more);
    for (int64_t r = 0; r < height; r++) {
      if (first < end && stop < end)
        memcpy(partial(r), sums + r * kStride, bytes);
      else
        write_row(at(out, (e * heights[of] + i + r) * widths[of] + j), kind(out),
                  sums + r * kStride, width);
    }
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARGUMENT(DY)), "dy", status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  return static_cast<uint64_t>(lay_out(&work));
}

int32_t run(const transom_call *call, transom_status *status) {
  Work work = describe(call);
  Routed *routed = &work.routed;
  if (work.D == 0 || work.I == 0) return 0;
  if (!holds(call, lay_out(&work), status)) return 1;
  routed->count = work.T;
  sort(routed);
  do {
    work.to = part_end(*routed, work.from, work.part_rows);
    const int32_t threads = run_activations_backward(&work);
    parallel(threads, gradient_blocks, &work);
    work.from = work.to;
  } while (work.from < routed->rows);
  return 0;
}

}  // namespace

extern const transom_impl moe_experts_weight_backward = {
    sizeof(transom_impl), TRANSOM_TUNED, "moe_experts_weight_backward", "native",
    TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_HASH, TRANSOM_DETERMINISTIC, 0, supports, workspace, run};

}  // namespace transom::TRANSOM_LEVEL
