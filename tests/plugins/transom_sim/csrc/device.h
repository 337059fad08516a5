/* device.h: the simulated device as its driver sees it: memory, streams, commands.
 *
 * Memory is one anonymous file mapped twice. The addresses that leave this library belong to a
 * mapping that nobody may touch: a host that follows one dies at once. host_address() translates.
 *
 * Nothing that is enqueued runs before somebody waits for its stream, or the stream is full: a
 * result that is read without waiting is the poison that new memory holds, in every run alike. */
#ifndef SIM_DEVICE_H
#define SIM_DEVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "transom_ops.h"

#define STREAMS 8      /* 0 is the default stream; the others are handed out in turns, as torch does */
#define LONGEST 64     /* commands of a stream that wait; the next one makes the oldest run */
#define POISON 0xCD    /* what new and freed memory holds */
#define ALIGNMENT 512  /* of every block, which also ends in SLACK unused bytes or more */
#define SLACK 64

/* Faults, for testing who notices them. TRANSOM_SIM_FAULT names one, or one and an operator:
 * "wrong:grouped_gemm". */
typedef enum { FAULT_NONE, FAULT_ERROR, FAULT_WRONG, FAULT_OVERRUN, FAULT_LATE, FAULT_MEMORY,
               FAULT_LEAK, FAULT_CRASH } fault_kind;
fault_kind fault_of(const char *op);

/* Answers `code` with a sentence in the status. */
int32_t say(transom_status *status, int32_t code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* memory.c. All but host_address under lock(). */
void *memory_allocate(uint64_t bytes, int stream, transom_status *status);
bool memory_hold(const void *address, int stream); /* a further stream uses the block */
/* No longer the host's; which streams use it, a bit each. false: no such block. */
bool memory_give_back(const void *address, uint32_t *streams);
void memory_free(const void *address); /* after memory_give_back, when they have come so far */
uint64_t memory_allocated(void); /* and not given back */
uint64_t memory_peak(void);
bool memory_owns(const void *address, uint64_t bytes);
void *host_address(const void *address); /* NULL for NULL */

/* stream.c. A command runs once; what it needs it owns, and frees when it is dropped. */
typedef struct command {
  struct command *next;
  void (*execute)(struct command *);
  void (*drop)(struct command *); /* NULL: free() */
  bool late;                      /* FAULT_LATE: said to be done before it is */
} command;

void lock(void);
void unlock(void);
int current_stream(void); /* of this thread */
void set_current_stream(int number);
int stream_number(const void *handle); /* -1: no stream of this device */
void *stream_handle(int number);
extern const transom_services services;

/* All under lock(). */
uint64_t issued(int stream);               /* commands so far */
bool reached(int stream, uint64_t number); /* so many of them are done */
void enqueue(int stream, command *);
void run_now(command *);                /* after all that waits */
void drain(int stream, uint64_t until); /* runs the stream's commands up to this number */
void drain_all(void);

/* Enqueues, or runs now where stream is NULL. Takes the lock itself. */
int32_t issue(void *stream, command *, transom_status *);

/* launch.c */
uint64_t packed_bytes(const transom_impl *, uint32_t at, const transom_value *weight);
int32_t pack(const transom_impl *, uint32_t at, const transom_value *weight, void *packed,
             void *stream, transom_status *);

#endif
