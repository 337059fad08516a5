/* memory.c: the device's memory and its allocator. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "device.h"

/* Blocks tile the memory without gaps; neighbours that are free are one block. */
typedef struct block {
  struct block *before, *after;         /* by address */
  struct block *free_before, *free_after;
  uint64_t offset, bytes, asked;
  uint32_t streams;
  bool used, given_back;
} block;

static char *mapped, *forbidden; /* the same memory: for this library; for everybody else */
static uint64_t capacity, allocated, peak;
static block *free_blocks;
static block **block_at; /* of each ALIGNMENT bytes that a block begins at */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void push_free(block *b) {
  b->used = false;
  b->free_before = NULL;
  b->free_after = free_blocks;
  if (free_blocks) free_blocks->free_before = b;
  free_blocks = b;
}

static void pull_free(block *b) {
  if (b->free_before) b->free_before->free_after = b->free_after;
  else free_blocks = b->free_after;
  if (b->free_after) b->free_after->free_before = b->free_before;
}

static void map_memory(void) {
  const char *text = getenv("TRANSOM_SIM_MEMORY");
  const uint64_t wanted = (text && atoll(text) > 0 ? (uint64_t)atoll(text) : 4096) << 20;
  const int file = memfd_create("transom_sim", MFD_CLOEXEC);
  block *all = calloc(1, sizeof *all);
  block_at = calloc(wanted / ALIGNMENT, sizeof *block_at);
  if (file < 0 || !all || !block_at || ftruncate(file, (off_t)wanted)) goto failed;
  mapped = mmap(NULL, wanted, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  forbidden = mmap(NULL, wanted, PROT_NONE, MAP_SHARED, file, 0);
  if (mapped == MAP_FAILED || forbidden == MAP_FAILED) goto failed;
  close(file);
  all->bytes = capacity = wanted;
  push_free(all);
  return;
failed: /* capacity stays 0: every allocation fails, in words */
  if (file >= 0) close(file);
}

static block *block_of(const void *address) {
  const uint64_t offset = (uint64_t)((const char *)address - forbidden);
  if (!forbidden || offset >= capacity || offset % ALIGNMENT) return NULL;
  block *b = block_at[offset / ALIGNMENT];
  return b && b->used && b->offset == offset ? b : NULL;
}

void *memory_allocate(uint64_t bytes, int stream, transom_status *status) {
  pthread_once(&once, map_memory);
  const uint64_t wanted =
      bytes < capacity ? (bytes + SLACK + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT : UINT64_MAX;
  for (int attempt = 0; attempt < 2; attempt++) {
    for (block *b = free_blocks; b; b = b->free_after) {
      if (b->bytes < wanted) continue;
      pull_free(b);
      if (b->bytes > wanted) {
        block *rest = calloc(1, sizeof *rest);
        if (!rest) break;
        *rest = (block){.before = b, .after = b->after, .offset = b->offset + wanted,
                        .bytes = b->bytes - wanted};
        if (b->after) b->after->before = rest;
        b->after = rest;
        b->bytes = wanted;
        push_free(rest);
      }
      b->used = true;
      b->given_back = false;
      b->asked = bytes;
      b->streams = 1u << stream;
      block_at[b->offset / ALIGNMENT] = b;
      allocated += bytes;
      if (allocated > peak) peak = allocated;
      memset(mapped + b->offset, POISON, b->bytes);
      return forbidden + b->offset;
    }
    drain_all(); /* what waits there may free some */
  }
  say(status, TRANSOM_ERROR_MEMORY,
      "%llu bytes do not fit; the device has %llu MiB, of which %llu bytes are in use; set "
      "TRANSOM_SIM_MEMORY to more MiB",
      (unsigned long long)bytes, (unsigned long long)(capacity >> 20),
      (unsigned long long)allocated);
  return NULL;
}

bool memory_hold(const void *address, int stream) {
  block *b = block_of(address);
  if (b) b->streams |= 1u << stream;
  return b;
}

bool memory_give_back(const void *address, uint32_t *streams) {
  block *b = block_of(address);
  if (!b || b->given_back) return false;
  allocated -= b->asked;
  b->given_back = true;
  *streams = b->streams;
  return true;
}

/* Takes the block after b into b. */
static void join(block *b) {
  block *gone = b->after;
  b->bytes += gone->bytes;
  b->after = gone->after;
  if (gone->after) gone->after->before = b;
  free(gone);
}

void memory_free(const void *address) {
  block *b = block_of(address);
  if (!b) return;
  memset(mapped + b->offset, POISON, b->bytes);
  block_at[b->offset / ALIGNMENT] = NULL;
  if (b->after && !b->after->used) {
    pull_free(b->after);
    join(b);
  }
  if (b->before && !b->before->used) {
    b = b->before;
    pull_free(b);
    join(b);
  }
  push_free(b);
}

uint64_t memory_allocated(void) { return allocated; }
uint64_t memory_peak(void) { return peak; }

bool memory_owns(const void *address, uint64_t bytes) {
  const uint64_t offset = (uint64_t)((const char *)address - forbidden);
  return forbidden && offset < capacity && bytes <= capacity - offset;
}

void *host_address(const void *address) {
  return address ? mapped + ((const char *)address - forbidden) : NULL;
}
