/* launch.h: from a call of the table to a kernel that runs in its stream. */
#ifndef SIM_LAUNCH_H
#define SIM_LAUNCH_H

#include "chip.h"
#include "device.h"

/* A kernel runs on the chip, one at a time, after everything before it in its stream. It cannot
 * fail: supports() has refused what it does not take, and values that the operator excludes are
 * clamped. */
typedef void kernel(const transom_call *);

/* Copies what the call points to and enqueues the kernel. */
int32_t launch(const transom_call *, transom_status *, const char *op, kernel *);

/* An implementation NAME of the operator, with its kernel NAME_kernel. The first of these that
 * refuses ... supports and workspace may be NULL. */
#define IMPLEMENTATION(NAME, OP, HASH, SUPPORTS, WORKSPACE)                             \
  static int32_t NAME##_run(const transom_call *call, transom_status *status) {         \
    return launch(call, status, OP, NAME##_kernel);                                     \
  }                                                                                     \
  const transom_impl NAME##_impl = {                                                    \
      .struct_size = sizeof(transom_impl), .tier = TRANSOM_TUNED, .op = OP, .name = "sim", \
      .schema_hash = HASH, .flags = TRANSOM_DETERMINISTIC, .supports = SUPPORTS,        \
      .workspace = WORKSPACE, .run = NAME##_run}

/* Reading a call ----------------------------------------------------------------------------- */

/* The tensor in this place; NULL: not given. */
static inline const transom_tensor *tensor_at(const transom_call *call, int place) {
  const transom_value *value = &call->args[place];
  return value->tag == TRANSOM_VALUE_TENSOR ? value->tensor : 0;
}

/* The matrix of a tensor's last two dims, at (i, j) of those before; spare indices are 0. */
matrix matrix_at(const transom_tensor *, int64_t i, int64_t j);
/* The row of its last dim, at (i, j) of those before, as a matrix of one row. */
matrix row_at(const transom_tensor *, int64_t i, int64_t j);
/* An element of a tensor of integers or bools, by up to three indices. */
int64_t integer_at(const transom_tensor *, int64_t i, int64_t j, int64_t k);
float float_at(matrix, int64_t i, int64_t j);
/* A contiguous matrix of float32 in the workspace. */
matrix in_workspace(float *data, int64_t row);

/* True if the tensor in this place, where one is given, holds numbers that the mover converts, and
 * is no quantised weight (which `weight` says it may be). */
bool takes(const transom_call *, int place, const char *name, bool weight, transom_status *);

static inline int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

#endif
