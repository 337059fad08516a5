/* launch.c: calls become commands; packed weights; faults. */
#include "launch.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Reading a call ----------------------------------------------------------------------------- */

matrix matrix_at(const transom_tensor *t, int64_t i, int64_t j) {
  const int n = t->ndim;
  const int64_t lead = (n > 2 ? i * t->strides[0] : 0) + (n > 3 ? j * t->strides[1] : 0);
  const number_type type = type_of(t);
  return (matrix){.data = (char *)host_address(t->data) + lead * size_of(type), .type = type,
                  .row = t->strides[n - 2], .column = t->strides[n - 1]};
}

matrix row_at(const transom_tensor *t, int64_t i, int64_t j) {
  const int n = t->ndim;
  const int64_t lead = (n > 1 ? i * t->strides[0] : 0) + (n > 2 ? j * t->strides[1] : 0);
  const number_type type = type_of(t);
  return (matrix){.data = (char *)host_address(t->data) + lead * size_of(type), .type = type,
                  .column = t->strides[n - 1]};
}

int64_t integer_at(const transom_tensor *t, int64_t i, int64_t j, int64_t k) {
  const int64_t index[] = {i, j, k};
  int64_t at = 0;
  for (int d = 0; d < t->ndim; d++) at += index[d] * t->strides[d];
  const void *data = host_address(t->data);
  switch (t->dtype_bits) {
    case 8: return ((const uint8_t *)data)[at] != 0;
    case 32: return ((const int32_t *)data)[at];
    default: return ((const int64_t *)data)[at];
  }
}

float float_at(matrix m, int64_t i, int64_t j) {
  float x;
  load_row(&x, at(m, 0, j), i, 1);
  return x;
}

matrix in_workspace(float *data, int64_t row) {
  return (matrix){.data = data, .type = F32, .row = row, .column = 1};
}

static const char *dtype_name(const transom_tensor *t, char *text, size_t size) {
  const char *kind = t->dtype_code == TRANSOM_FLOAT    ? "float"
                     : t->dtype_code == TRANSOM_BFLOAT ? "bfloat"
                     : t->dtype_code == TRANSOM_INT    ? "int"
                     : t->dtype_code == TRANSOM_UINT   ? "uint"
                                                       : "a dtype of bits ";
  snprintf(text, size, "%s%d", kind, t->dtype_bits);
  return text;
}

bool takes(const transom_call *call, int place, const char *name, bool weight,
           transom_status *status) {
  const transom_tensor *t = tensor_at(call, place);
  char text[32];
  if (!t) return true;
  if (weight && call->args[place + 3].tag == TRANSOM_VALUE_STRING) {
    say(status, 0, "%s is %s; supported: float32, float16, bfloat16; call .dequantize()", name,
        call->args[place + 3].string);
    return false;
  }
  if (type_of(t) != UNKNOWN) return true;
  say(status, 0, "%s is %s; supported: float32, float16, bfloat16", name,
      dtype_name(t, text, sizeof text));
  return false;
}

/* A call that outlives the caller's ---------------------------------------------------------- */

typedef struct {
  command base;
  kernel *run;
  fault_kind fault;
  transom_call call;
  char memory[]; /* all that the call points to */
} kernel_command;

/* Memory of a command handed out, or, with `next` NULL, its size added up. */
typedef struct {
  char *next;
  uint64_t bytes;
} arena;

static void *keep(arena *a, const void *from, uint64_t bytes) {
  const uint64_t whole = (bytes + 15) / 16 * 16;
  void *to = a->next;
  a->bytes += whole;
  if (!to) return NULL;
  memcpy(to, from, bytes);
  a->next += whole;
  return to;
}

static transom_tensor *keep_tensor(arena *a, const transom_tensor *t) {
  const uint64_t bytes = (uint64_t)t->ndim * sizeof(int64_t);
  transom_tensor *copy = keep(a, t, sizeof *t);
  int64_t *shape = keep(a, t->shape, bytes), *strides = keep(a, t->strides, bytes);
  if (copy) copy->shape = shape, copy->strides = strides;
  return copy;
}

static void keep_call(arena *a, transom_call *to, const transom_call *call) {
  transom_value *args = keep(a, call->args, call->n_args * sizeof *args);
  for (uint32_t i = 0; i < call->n_args; i++) {
    const transom_value *v = &call->args[i];
    const void *copy = NULL;
    if (v->tag == TRANSOM_VALUE_TENSOR) copy = keep_tensor(a, v->tensor);
    else if (v->tag == TRANSOM_VALUE_STRING) copy = keep(a, v->string, v->count + 1);
    else if (v->tag == TRANSOM_VALUE_INTS) copy = keep(a, v->ints, v->count * sizeof *v->ints);
    else continue;
    if (args) args[i].tensor = copy; /* the union's pointers share their place */
  }
  transom_tensor **outs = keep(a, call->outs, call->n_outs * sizeof *outs);
  for (uint32_t i = 0; i < call->n_outs; i++) {
    transom_tensor *copy = keep_tensor(a, call->outs[i]);
    if (outs) outs[i] = copy;
  }
  /* The host may be older than the field. */
  void *const *packed = TRANSOM_HAS(call, transom_call, packed) ? call->packed : NULL;
  if (packed) packed = keep(a, packed, call->n_args * sizeof *packed);
  if (to) {
    memcpy(to, call, call->struct_size < sizeof *to ? call->struct_size : sizeof *to);
    to->args = args, to->outs = outs, to->packed = packed;
  }
}

/* The sentence if a tensor does not lie in the device's memory. */
static bool lies_here(const transom_tensor *t, const char *what, uint32_t i,
                      transom_status *status) {
  int64_t last = 0;
  for (int d = 0; d < t->ndim; d++) {
    if (!t->shape[d]) return true;
    last += (t->shape[d] - 1) * t->strides[d];
  }
  if (memory_owns(t->data, (uint64_t)(last + 1) * t->dtype_bits / 8)) return true;
  say(status, TRANSOM_ERROR_DEVICE, "%s %u lies at %p, outside of the device's memory", what, i,
      t->data);
  return false;
}

/* Faults ------------------------------------------------------------------------------------- */

fault_kind fault_of(const char *op) {
  static const char *const names[] = {"none", "error", "wrong", "overrun", "late", "memory",
                                      "leak", "crash"};
  const char *text = getenv("TRANSOM_SIM_FAULT");
  if (!text) return FAULT_NONE;
  const char *colon = strchr(text, ':');
  const size_t length = colon ? (size_t)(colon - text) : strlen(text);
  if (colon && op && strcmp(colon + 1, op)) return FAULT_NONE;
  for (int kind = FAULT_ERROR; kind <= FAULT_CRASH; kind++)
    if (strlen(names[kind]) == length && !strncmp(text, names[kind], length))
      return (fault_kind)kind;
  return FAULT_NONE;
}

/* After a kernel: another last element, or bytes behind the output. */
static void spoil(const transom_call *call, fault_kind fault) {
  const transom_tensor *t = call->outs[0];
  int64_t elements = 1;
  for (int d = 0; d < t->ndim; d++) elements *= t->shape[d];
  if (!elements) return;
  unsigned char *end = (unsigned char *)host_address(t->data) + elements * t->dtype_bits / 8;
  if (fault == FAULT_OVERRUN) memset(end, 0x5A, 16);
  if (fault == FAULT_WRONG) end[-1] ^= 0x40; /* a float's exponent, an index's high bits */
}

/* Commands ----------------------------------------------------------------------------------- */

static void run_kernel(command *c) {
  kernel_command *k = (kernel_command *)c;
  begin_command();
  k->run(&k->call);
  end_command();
  if (k->fault == FAULT_WRONG || k->fault == FAULT_OVERRUN) spoil(&k->call, k->fault);
}

int32_t launch(const transom_call *call, transom_status *status, const char *op, kernel *run) {
  const fault_kind fault = fault_of(op);
  for (uint32_t i = 0; i < call->n_args; i++)
    if (call->args[i].tag == TRANSOM_VALUE_TENSOR &&
        !lies_here(call->args[i].tensor, "argument", i, status))
      return status->code;
  for (uint32_t i = 0; i < call->n_outs; i++)
    if (!lies_here(call->outs[i], "output", i, status)) return status->code;
  if (fault == FAULT_ERROR)
    return say(status, TRANSOM_ERROR_DEVICE, "the matrix unit does not answer; restart the device");
  if (fault == FAULT_MEMORY)
    return say(status, TRANSOM_ERROR_MEMORY, "no memory is left for the kernel's parameters");
  arena a = {0};
  keep_call(&a, NULL, call);
  kernel_command *k = calloc(1, sizeof *k + a.bytes);
  if (!k) return say(status, TRANSOM_ERROR_MEMORY, "the host has no memory for a command");
  a.next = k->memory;
  keep_call(&a, &k->call, call);
  k->base.execute = run_kernel;
  k->run = run;
  k->fault = fault;
  k->base.late = fault == FAULT_LATE && call->stream && stream_number(call->stream) != 0;
  if (fault == FAULT_LEAK) {
    lock();
    memory_allocate(4096, current_stream(), status);
    unlock();
  }
  return issue(call->stream, &k->base, status);
}

/* Packed weights ----------------------------------------------------------------------------- */

/* Of an expert's weight[N,K], which is the right-hand side [K,N] of the product. */
static void pack_kernel(const transom_call *call) {
  const transom_tensor *weight = call->args[0].tensor;
  const int64_t N = weight->shape[1], K = weight->shape[2];
  const int64_t bytes = packed_elements(K, N) * size_of(type_of(weight));
  char *to = host_address(call->outs[0]->data);
  for (int64_t e = 0; e < weight->shape[0]; e++)
    pack_matrix(to + e * bytes, transposed(matrix_at(weight, e, 0)), K, N);
}

uint64_t packed_bytes(const transom_impl *impl, uint32_t place, const transom_value *weight) {
  const transom_tensor *t = weight[0].tensor;
  (void)place;
  if (strcmp(impl->op, "grouped_gemm") && strcmp(impl->op, "moe_experts")) return 0;
  if (weight[3].tag == TRANSOM_VALUE_STRING || type_of(t) == UNKNOWN) return 0;
  return (uint64_t)(t->shape[0] * packed_elements(t->shape[2], t->shape[1]) * size_of(type_of(t)));
}

int32_t pack(const transom_impl *impl, uint32_t place, const transom_value *weight, void *packed,
             void *stream, transom_status *status) {
  (void)impl, (void)place;
  int64_t shape[] = {1}, strides[] = {1};
  transom_tensor form = {.data = packed, .ndim = 1, .dtype_bits = 8, .shape = shape,
                         .strides = strides};
  transom_tensor *outs[] = {&form};
  const transom_call call = {.struct_size = sizeof call, .n_args = 1, .args = weight, .n_outs = 1,
                             .outs = outs, .stream = stream};
  return launch(&call, status, "", pack_kernel);
}
