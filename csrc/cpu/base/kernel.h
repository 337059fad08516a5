/* What every kernel is made of: its entry in the plugin's list, its arguments by name, its tasks and
 * its workspace. */
#pragma once

#include "arena.h"
#include "arguments.h"
#include "parallel.h"
#include "tensor.h"

/* TRANSOM_KERNEL(route, supports, workspace, run) stands at the top of a kernel's source, inside the
 * level's namespace: it declares the three functions that follow below and enters them for `op`.
 * A kernel that takes every call names `anything`, one without a workspace `nothing`. */
#define TRANSOM_KERNEL(op, supports, workspace, run)                                              \
  namespace {                                                                                     \
  typedef arguments::op Arguments;                                                                \
  int32_t supports(const transom_call *call, transom_status *status);                             \
  uint64_t workspace(const transom_call *call);                                                   \
  int32_t run(const transom_call *call, transom_status *status);                                  \
  }                                                                                               \
  extern const transom_impl op = {                                                                \
      sizeof(transom_impl),   TRANSOM_TUNED, #op,      "native", arguments::op::HASH,             \
      TRANSOM_DETERMINISTIC, 0,             supports, workspace, run};

/* The number of an argument of the kernel's operator, ARG(LOGITS). */
#define ARG(name) Arguments::name

namespace transom::TRANSOM_LEVEL {
namespace {

[[maybe_unused]] inline int32_t anything(const transom_call *, transom_status *) { return 1; }
[[maybe_unused]] inline uint64_t nothing(const transom_call *) { return 0; }

/* The numbers 0 .. count - 1 of tasks, which threads take one after the other. */
class Counter {
 public:
  explicit Counter(int64_t count) : count_(count) {}

  /* The next number in *task; false where none is left. */
  bool take(int64_t *task) {
    *task = __atomic_fetch_add(&next_, 1, __ATOMIC_RELAXED);
    return *task < count_;
  }

 private:
  int64_t next_ = 0;
  const int64_t count_;
};

/* f(thread) on up to `threads` threads of the pool. */
template <class F>
inline void on_threads(int32_t threads, F f) {
  parallel(threads, [](void *context, int32_t thread) { (*static_cast<F *>(context))(thread); }, &f);
}

/* f(task, thread) for each task 0 .. count - 1, on up to `threads` threads of the pool. */
template <class F>
inline void tasks(int32_t threads, int64_t count, F f) {
  if (count == 0) return;
  Counter counter(count);
  on_threads(threads, [&](int32_t thread) {
    for (int64_t task; counter.take(&task);) f(task, thread);
  });
}

}  // namespace
}  // namespace transom::TRANSOM_LEVEL
