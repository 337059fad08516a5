/* Threads and caches of the host. Compiled once, for the baseline. */
#pragma once

#include <stdint.h>

namespace transom {

/* body(context, thread) on up to `threads` threads of the OpenMP pool that torch has loaded, thread
 * numbers below `threads`. Fewer may run: bodies take their work from a counter. */
void parallel(int32_t threads, void (*body)(void *context, int32_t thread), void *context);

/* Threads for this many multiplications: below some 10 us of work each, waking one costs more. */
int32_t threads_for(double products, int32_t threads);

/* Bytes of one core's second-level cache; a common size where the system does not tell. */
int64_t l2_bytes();

/* Says that a kernel is about to write all of an output; true if the system has provided its memory
 * already, as it has not for most large tensors. There, pages of 2 MB, where the system offers them
 * on request, take a third of the time of small ones: more than a kernel bound by memory itself. */
bool about_to_write(void *memory, int64_t bytes);

/* Once a process, before the first parallel(). */
void prepare();

}  // namespace transom
