/* driver.c: what the Python side of the device calls besides the table's services. */
#include <stdlib.h>
#include <string.h>

#include "chip.h"
#include "device.h"

/* Elements of a strided tensor from another one, or all from one value. */
typedef struct {
  command base;
  char *to;
  const char *from; /* NULL: `value` */
  int64_t shape[16], to_strides[16], from_strides[16];
  int32_t ndim, size;
  char value[16];
} strided;

static void move_dim(const strided *s, int dim, char *to, const char *from) {
  if (dim == s->ndim) {
    memcpy(to, from, (size_t)s->size);
    return;
  }
  const int64_t n = s->shape[dim], a = s->to_strides[dim] * s->size,
                b = s->from_strides[dim] * s->size;
  if (dim == s->ndim - 1 && a == s->size && b == s->size) {
    memmove(to, from, (size_t)(n * s->size));
    return;
  }
  for (int64_t i = 0; i < n; i++) move_dim(s, dim + 1, to + i * a, from + i * b);
}

static void run_strided(command *c) {
  const strided *s = (const strided *)c;
  uint64_t count = (uint64_t)s->size;
  for (int i = 0; i < s->ndim; i++) count *= (uint64_t)s->shape[i];
  if (count) move_dim(s, 0, host_address(s->to), s->from ? host_address(s->from) : s->value);
  count_transfer(count, true);
}

static int32_t strided_command(void *to, const int64_t *to_strides, const void *from,
                               const int64_t *from_strides, const void *value, int32_t size,
                               int32_t ndim, const int64_t *shape, void *stream,
                               transom_status *status) {
  strided *s = calloc(1, sizeof *s);
  if (!s || ndim > 16 || size > 16) {
    free(s);
    return say(status, TRANSOM_ERROR_DEVICE, "%d dims of %d bytes; supported: 16 of 16", ndim, size);
  }
  s->base.execute = run_strided;
  s->to = to, s->from = from, s->size = size, s->ndim = ndim;
  if (value) memcpy(s->value, value, (size_t)size);
  for (int i = 0; i < ndim; i++) {
    s->shape[i] = shape[i], s->to_strides[i] = to_strides[i];
    s->from_strides[i] = from_strides ? from_strides[i] : 0;
  }
  return issue(stream, &s->base, status);
}

/* `to` and `from` have the same shape and dtype. */
TRANSOM_EXPORT int32_t sim_copy(void *to, const int64_t *to_strides, const void *from,
                                const int64_t *from_strides, int32_t size, int32_t ndim,
                                const int64_t *shape, void *stream, transom_status *status) {
  return strided_command(to, to_strides, from, from_strides, NULL, size, ndim, shape, stream,
                         status);
}

TRANSOM_EXPORT int32_t sim_fill(void *to, const int64_t *to_strides, const void *value,
                                int32_t size, int32_t ndim, const int64_t *shape, void *stream,
                                transom_status *status) {
  return strided_command(to, to_strides, NULL, NULL, value, size, ndim, shape, stream, status);
}

/* Streams and events. An event is a stream and how many commands it had when it was recorded. */

typedef struct {
  command base;
  int other;
  uint64_t until;
} wait_command;

static void run_wait(command *c) {
  const wait_command *w = (const wait_command *)c;
  drain(w->other, w->until);
}

TRANSOM_EXPORT void *sim_stream(int32_t number) { return stream_handle(number); }

TRANSOM_EXPORT int32_t sim_current(void) { return current_stream(); }

TRANSOM_EXPORT void sim_set_current(int32_t number) { set_current_stream(number); }

TRANSOM_EXPORT uint64_t sim_record(int32_t number) {
  lock();
  const uint64_t now = issued(number);
  unlock();
  return now;
}

TRANSOM_EXPORT int32_t sim_reached(int32_t number, uint64_t until) {
  lock();
  const bool done = reached(number, until);
  unlock();
  return done;
}

/* The host waits. */
TRANSOM_EXPORT void sim_wait(int32_t number, uint64_t until) {
  lock();
  drain(number, until);
  unlock();
}

/* Stream `number` waits for the other one; false: there is no memory to note it. */
TRANSOM_EXPORT int32_t sim_stream_waits(int32_t number, int32_t other, uint64_t until) {
  wait_command *w = malloc(sizeof *w);
  if (!w) return 0;
  *w = (wait_command){{.execute = run_wait}, other, until};
  lock();
  enqueue(number, &w->base);
  unlock();
  return 1;
}

/* Tensor.record_stream: the block is not reused before this stream has come so far, either. */
TRANSOM_EXPORT int32_t sim_hold(const void *address, int32_t number) {
  lock();
  const bool known = memory_hold(address, number);
  unlock();
  return known;
}

/* Counters ----------------------------------------------------------------------------------- */

TRANSOM_EXPORT void sim_memory(uint64_t *now, uint64_t *peak) {
  lock();
  *now = memory_allocated();
  *peak = memory_peak();
  unlock();
}

/* Of everything that has been enqueued: it is done first. */
TRANSOM_EXPORT void sim_counters(counters *to) {
  lock();
  drain_all();
  *to = count_now();
  unlock();
}

TRANSOM_EXPORT void sim_peaks(double *flops, double *bytes) {
  *flops = PEAK_FLOPS;
  *bytes = PEAK_BYTES;
}
