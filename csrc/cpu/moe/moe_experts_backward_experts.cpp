/* moe_experts_backward_experts: the gradients in gate_up and down.
 *
 * Some experts at a time have h and the gradients of gate and up taken (_backward.h), then blocks of
 * both gradients, each summed by one thread over the expert's rows in order. An expert with more
 * rows than fit is summed in float32 until its last ones: in the result, or beside it. */
#include "_backward.h"
#include "_outer.h"

namespace transom::TRANSOM_LEVEL {

TRANSOM_KERNEL(moe_experts_backward_experts, supports, workspace, run)

namespace {

struct Work : Backward {
  OuterSpace *spaces;
  float *beside[2];                   /* one expert's sums of each gradient */
  int64_t heights[2], widths[2], blocks[2]; /* of gate_up [2I,D], and of down [D,I] */
};

void lay_out(Work *work, Arena &arena) {
  work->threads = arena.take<float>(work->thread_floats * work->call->threads);
  work->spaces = arena.take<OuterSpace>(work->call->threads);
  work->dboth = arena.take<float>(work->part_rows * work->both_stride);
  work->h = arena.take<float>(work->part_rows * work->h_stride);
  work->routed.ends = arena.take<int64_t>(work->routed.E);
  work->routed.order = arena.take<int32_t>(work->T * work->routed.K);
  const bool parted = work->part_rows < work->T * work->routed.K;
  for (int i = 0; i < 2; i++) {
    const int64_t entries = (2 - i) * work->I * work->D;
    work->beside[i] =
        arena.take<float>(parted && kind(work->call->outs[i]) != 0 ? entries : 0);
  }
}

Work describe(const transom_call *call) {
  Work work = {};
  static_cast<Backward &>(work) = backward_from<Arguments>(call, true);
  work.tokens = work.T;
  const int64_t a_row = (work.both_stride + work.h_stride) * 4;
  work.part_rows =
      clamp(workspace_budget(call) * 3 / 4 / a_row, 1, max_of(work.T * work.routed.K, 1));
  size_threads(&work);
  work.heights[0] = 2 * work.I, work.heights[1] = work.D;
  work.widths[0] = work.D, work.widths[1] = work.I;
  for (int i = 0; i < 2; i++)
    work.blocks[i] =
        ceil_of(work.heights[i], kOuterHeight) * ceil_of(work.widths[i], kOuterWidth);
  return work;
}

/* One block of one gradient of one expert. */
void gradient_block(const Work *work, int64_t task, int32_t thread) {
  const Routed &routed = work->routed;
  OuterSpace *space = work->spaces + thread;
  const int64_t an_expert = work->blocks[0] + work->blocks[1];
  const int64_t e = task / an_expert;
  const int64_t first = e == 0 ? 0 : routed.ends[e - 1], end = routed.ends[e];
  const int64_t start = max_of(first, work->from), stop = min_of(end, work->to);
  if (start >= stop && (first < end || work->from > 0)) return;
  const int of = task % an_expert >= work->blocks[0];
  const int64_t block = task % an_expert - of * work->blocks[0];
  const int64_t across = ceil_of(work->widths[of], kOuterWidth);
  const int64_t i = block / across * kOuterHeight, j = block % across * kOuterWidth;
  const int64_t height = min_of(kOuterHeight, work->heights[of] - i);
  const int64_t width = min_of(kOuterWidth, work->widths[of] - j);
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
    const int64_t entry = (i + r) * work->widths[of] + j;
    const int64_t matrix = e * work->heights[of] * work->widths[of];
    return kind(out) != 0 ? work->beside[of] + entry
                          : static_cast<float *>(at(out, matrix + entry));
  };
  const size_t bytes = static_cast<size_t>(width) * sizeof(float);
  const bool more = start > first;
  for (int64_t r = 0; r < height && more; r++) memcpy(sums + r * kStride, partial(r), bytes);
  sum_outer(max_of(stop - start, 0), height, width, left, right, space, more);
  for (int64_t r = 0; r < height; r++) {
    if (first < end && stop < end)
      memcpy(partial(r), sums + r * kStride, bytes);
    else
      write_row(at(out, (e * work->heights[of] + i + r) * work->widths[of] + j), kind(out),
                sums + r * kStride, width);
  }
}

int32_t supports(const transom_call *call, transom_status *status) {
  return readable(tensor(call, ARG(DY)), "dy", status);
}

uint64_t workspace(const transom_call *call) {
  Work work = describe(call);
  Arena arena;
  lay_out(&work, arena);
  return arena.bytes();
}

int32_t run(const transom_call *call, transom_status *) {
  Work work = describe(call);
  Routed *routed = &work.routed;
  if (work.D == 0 || work.I == 0) return 0;
  Arena arena(call->workspace);
  lay_out(&work, arena);
  routed->count = work.T;
  sort(routed);
  do {
    work.to = part_end(*routed, work.from, work.part_rows);
    const int32_t threads = run_activations_backward(&work);
    tasks(threads, routed->E * (work.blocks[0] + work.blocks[1]),
          [&](int64_t task, int32_t thread) { gradient_block(&work, task, thread); });
    work.from = work.to;
  } while (work.from < routed->rows);
  return 0;
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
