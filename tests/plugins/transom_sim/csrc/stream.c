/* stream.c: streams and the commands that wait in them; the services of the table. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "chip.h"
#include "device.h"

typedef struct {
  command *first, **last;
  uint64_t issued, done; /* how many commands */
} stream;

static stream streams[STREAMS];
static command *late; /* FAULT_LATE: the one whose stream says that it is done */
static _Thread_local int current;
static pthread_mutex_t mutex;
static pthread_once_t once = PTHREAD_ONCE_INIT;

int32_t say(transom_status *status, int32_t code, const char *format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(status->message, sizeof status->message, format, args);
  va_end(args);
  return status->code = code;
}

/* One lock for the whole device. The thread that waits for a stream does the stream's work. */
static void make_lock(void) {
  pthread_mutexattr_t attributes;
  pthread_mutexattr_init(&attributes);
  pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_RECURSIVE);
  pthread_mutex_init(&mutex, &attributes);
  for (int i = 0; i < STREAMS; i++) streams[i].last = &streams[i].first;
}

void lock(void) {
  pthread_once(&once, make_lock);
  pthread_mutex_lock(&mutex);
}

void unlock(void) { pthread_mutex_unlock(&mutex); }

int current_stream(void) { return current; }

void set_current_stream(int number) { current = number; }

uint64_t issued(int number) { return streams[number].issued; }

bool reached(int number, uint64_t until) { return streams[number].done >= until; }

void *stream_handle(int number) { return &streams[number]; }

int stream_number(const void *handle) {
  for (int i = 0; i < STREAMS; i++)
    if (handle == &streams[i]) return i;
  return -1;
}

static void finish(command *c) {
  c->execute(c);
  if (c->drop) c->drop(c);
  else free(c);
}

static void finish_late(void) {
  command *c = late;
  late = NULL;
  if (c) finish(c);
}

void drain(int number, uint64_t until) {
  stream *s = &streams[number];
  while (s->done < until && s->first) {
    command *c = s->first;
    s->first = c->next;
    if (!s->first) s->last = &s->first;
    s->done++;
    if (c->late) {
      finish_late();
      late = c;
    } else {
      finish(c);
    }
  }
}

void drain_all(void) {
  for (int i = 0; i < STREAMS; i++) drain(i, UINT64_MAX);
  finish_late();
}

void enqueue(int number, command *c) {
  stream *s = &streams[number];
  c->next = NULL;
  *s->last = c;
  s->last = &c->next;
  s->issued++;
  if (s->issued - s->done > LONGEST) drain(number, s->issued - LONGEST / 2);
}

void run_now(command *c) {
  drain_all();
  finish(c);
}

/* Commands of the driver itself -------------------------------------------------------------- */

/* Bytes between host and device or within it. What comes from the host is kept here: its memory
 * may be gone when the command runs. */
typedef struct {
  command base;
  void *to;
  const void *from;
  uint64_t bytes;
  int32_t direction;
  char kept[];
} transfer;

static void run_transfer(command *c) {
  const transfer *t = (const transfer *)c;
  switch (t->direction) {
    case TRANSOM_TO_DEVICE: memcpy(host_address(t->to), t->kept, t->bytes); break;
    case TRANSOM_FROM_DEVICE: memcpy(t->to, host_address(t->from), t->bytes); break;
    default: memmove(host_address(t->to), host_address(t->from), t->bytes);
  }
  count_transfer(t->bytes, t->direction == TRANSOM_WITHIN_DEVICE);
}

int32_t issue(void *stream, command *c, transom_status *status) {
  const int number = stream ? stream_number(stream) : 0;
  if (number < 0) {
    free(c);
    return say(status, TRANSOM_ERROR_DEVICE, "%p is no stream of this device", stream);
  }
  lock();
  if (stream) enqueue(number, c);
  else run_now(c);
  unlock();
  return 0;
}

static int32_t copy(int32_t device, void *to, const void *from, uint64_t bytes, int32_t direction,
                    void *stream, transom_status *status) {
  (void)device;
  if (direction < TRANSOM_TO_DEVICE || direction > TRANSOM_WITHIN_DEVICE)
    return say(status, TRANSOM_ERROR_DEVICE, "direction is %d; supported: 1, 2, 3", direction);
  if ((direction != TRANSOM_FROM_DEVICE && !memory_owns(to, bytes)) ||
      (direction != TRANSOM_TO_DEVICE && !memory_owns(from, bytes)))
    return say(status, TRANSOM_ERROR_DEVICE, "the copy leaves the device's memory");
  const bool keep = direction == TRANSOM_TO_DEVICE;
  transfer *t = malloc(sizeof *t + (keep ? bytes : 0));
  if (!t) return say(status, TRANSOM_ERROR_MEMORY, "the host has no %llu bytes to stage a copy",
                     (unsigned long long)bytes);
  *t = (transfer){{.execute = run_transfer}, to, from, bytes, direction};
  if (keep) memcpy(t->kept, from, bytes);
  return issue(stream, &t->base, status);
}

typedef struct {
  command base;
  const void *address;
  int *holders; /* streams that have not come to it yet */
} release_command;

static void run_release(command *c) {
  release_command *r = (release_command *)c;
  if (--*r->holders) return;
  memory_free(r->address);
  free(r->holders);
}

/* A block is free once every stream that uses it has come to where it was given back. */
static bool give_back(const void *address) {
  uint32_t used;
  int *holders = malloc(sizeof *holders);
  if (!holders || !memory_give_back(address, &used)) {
    free(holders);
    return false;
  }
  *holders = __builtin_popcount(used);
  for (int i = 0; i < STREAMS; i++) {
    if (!(used >> i & 1)) continue;
    release_command *r = malloc(sizeof *r);
    if (!r) return false; /* the block stays used */
    *r = (release_command){{.execute = run_release}, address, holders};
    enqueue(i, &r->base);
  }
  return true;
}

/* Services of the table ---------------------------------------------------------------------- */

static void *allocate(int32_t device, uint64_t bytes, transom_status *status) {
  if (device) {
    say(status, TRANSOM_ERROR_DEVICE, "device is %d; there is only device 0", device);
    return NULL;
  }
  lock();
  void *address = memory_allocate(bytes, current, status);
  unlock();
  return address;
}

static int32_t release(int32_t device, void *address, transom_status *status) {
  (void)device;
  lock();
  const bool known = give_back(address);
  unlock();
  return known ? 0 : say(status, TRANSOM_ERROR_DEVICE, "%p was not allocated", address);
}

static int32_t synchronize(int32_t device, void *stream, transom_status *status) {
  (void)device;
  const int number = stream ? stream_number(stream) : 0;
  if (number < 0) return say(status, TRANSOM_ERROR_DEVICE, "%p is no stream of this device", stream);
  lock();
  if (stream) drain(number, UINT64_MAX);
  else drain_all();
  unlock();
  return 0;
}

static void *the_stream(int32_t device) {
  (void)device;
  return stream_handle(current);
}

const transom_services services = {
    .struct_size = sizeof(transom_services),
    .allocate = allocate,
    .release = release,
    .copy = copy,
    .synchronize = synchronize,
    .stream = the_stream,
    .packed_bytes = packed_bytes,
    .pack = pack,
};
