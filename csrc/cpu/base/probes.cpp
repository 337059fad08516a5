/* The machine's ceilings, for `transom bench`: the fastest loop that each level has for one thing.
 *
 * Each function does a fixed amount of work on `threads` threads and returns how much it was
 * (operations or bytes; 0 where the level has no such instruction); the caller takes the time.
 * Tasks are taken by fetch-and-add, as kernels do, so that a thread which the system stops costs
 * its share of time and no more. Compiled once: each loop carries its own target, and `level` says
 * which one runs (0 baseline or NEON, 1 AVX2, 2 AVX-512); the caller asks for none that the
 * processor lacks. */
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "parallel.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace transom {
namespace {

struct Work {
  int64_t tasks, next;
  int64_t steps; /* of one task: iterations, bytes or rows */
  const char *data;
  int64_t bytes, row_bytes, ahead;
  const int64_t *rows;
  char *out;
  int32_t streaming, streams;
  volatile float sink;
};

/* The next task, or -1 when there is none left. */
inline int64_t take(Work *work) {
  const int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
  return task < work->tasks ? task : -1;
}

/* Chains of multiply-adds that hide the latency: four cycles on two ports, and some to spare. */
constexpr int kChains = 12;

/* Keeps the compiler from knowing what a register holds, at no cost. */
#if defined(__x86_64__)
#define UNKNOWN(x) __asm__ volatile("" : "+v"(x))
#else
#define UNKNOWN(x) __asm__ volatile("" : "+w"(x))
#endif

/* fma: kChains products and sums of vectors a step. read: every byte of a task once. */
#define TRANSOM_PROBES(level, attribute, size)                                      \
  namespace level {                                                                 \
  typedef float vf __attribute__((vector_size(size)));                              \
  typedef int64_t vl __attribute__((vector_size(size)));                            \
  constexpr int64_t kSize = size;                                                   \
  attribute void fma(void *context, int32_t) {                                      \
    Work *work = static_cast<Work *>(context);                                      \
    vf sums[kChains], a = {}, b = {};                                               \
    a += 0.999f;                                                                    \
    b += 0.001f;                                                                    \
    UNKNOWN(a);                                                                     \
    UNKNOWN(b);                                                                     \
    for (int i = 0; i < kChains; i++) sums[i] = b;                                  \
    while (take(work) >= 0)                                                         \
      for (int64_t step = 0; step < work->steps; step++)                            \
        _Pragma("GCC unroll 12") for (int i = 0; i < kChains; i++)                  \
            sums[i] = sums[i] * a + b;                                              \
    for (int i = 1; i < kChains; i++) sums[0] += sums[i];                           \
    work->sink = sums[0][0];                                                        \
  }                                                                                 \
  /* A task's bytes, in as many streams as the prefetchers are to follow. */         \
  template <int Streams>                                                            \
  attribute inline void xor_all(const Work *work, const char *at, vl *sums) {       \
    const int64_t length = work->steps / Streams;                                   \
    for (int64_t i = 0; i < length; i += 4 * kSize)                                 \
      _Pragma("GCC unroll 4") for (int s = 0; s < Streams; s++) {                   \
        const char *from = at + s * length + i;                                     \
        if (work->ahead > 0) __builtin_prefetch(from + work->ahead);                \
        _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {                       \
          vl v;                                                                     \
          memcpy(&v, from + j * kSize, kSize);                                      \
          sums[j] ^= v;                                                             \
        }                                                                           \
      }                                                                             \
  }                                                                                 \
  attribute void read(void *context, int32_t) {                                     \
    Work *work = static_cast<Work *>(context);                                      \
    vl sums[4] = {};                                                                \
    for (int64_t task; (task = take(work)) >= 0;) {                                 \
      const char *at = work->data + task * work->steps;                             \
      if (work->streams == 1) xor_all<1>(work, at, sums);                           \
      if (work->streams == 2) xor_all<2>(work, at, sums);                           \
      if (work->streams == 4) xor_all<4>(work, at, sums);                           \
    }                                                                               \
    sums[0] ^= sums[1] ^ sums[2] ^ sums[3];                                         \
    work->sink = static_cast<float>(sums[0][0]);                                    \
  }                                                                                 \
  }

#if defined(__x86_64__)
#define TARGET(features) __attribute__((target(features)))
TRANSOM_PROBES(baseline, , 16)
TRANSOM_PROBES(avx2, TARGET("avx2,fma"), 32)
TRANSOM_PROBES(avx512, TARGET("avx512f,avx512bw"), 64)

/* Dot products of bytes in sums of 32 bits: PRODUCTS is the sum with those of one vector added. */
#define TRANSOM_DOT(name, attribute, vector, bytes, PRODUCTS)                \
  attribute void name(void *context, int32_t) {                              \
    Work *work = static_cast<Work *>(context);                               \
    const vector one = bytes(1);                                             \
    (void)one;                                                               \
    vector a = bytes(3), b = bytes(5), sums[kChains] = {};                   \
    while (take(work) >= 0)                                                  \
      for (int64_t step = 0; step < work->steps; step++)                     \
        _Pragma("GCC unroll 12") for (int i = 0; i < kChains; i++) {         \
          UNKNOWN(a);                                                        \
          vector &sum = sums[i];                                             \
          sum = PRODUCTS;                                                    \
        }                                                                    \
    for (int i = 1; i < kChains; i++) sums[0] += sums[i];                    \
    work->sink = static_cast<float>(sums[0][0]);                             \
  }

/* Without VNNI: pairs to 16 bits, to 32, to the sum. */
TRANSOM_DOT(dot_avx2, TARGET("avx2"), __m256i, _mm256_set1_epi8,
            _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), one)))
TRANSOM_DOT(dot_avx512, TARGET("avx512f,avx512bw"), __m512i, _mm512_set1_epi8,
            _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), one)))
TRANSOM_DOT(dot_vnni, TARGET("avx512f,avx512bw,avx512vnni"), __m512i, _mm512_set1_epi8,
            _mm512_dpbusd_epi32(sum, a, b))
#else
TRANSOM_PROBES(baseline, , 16)
#endif

/* Rows of a table at random: each is prefetched whole `ahead` rows before it is read, and copied to
 * the output if there is one. Rows are bound by the memory's latency: vectors of 16 bytes do. */
void rows(void *context, int32_t) {
  typedef int64_t v2 __attribute__((vector_size(16)));
  Work *work = static_cast<Work *>(context);
  const int64_t size = work->row_bytes, count = work->bytes, whole = size - size % 16;
  v2 sum = {};
  for (int64_t task; (task = take(work)) >= 0;) {
    const int64_t end = (task + 1) * work->steps < count ? (task + 1) * work->steps : count;
    for (int64_t i = task * work->steps; i < end; i++) {
      if (i + work->ahead < count) {
        const char *next = work->data + work->rows[i + work->ahead] * size;
        for (int64_t j = 0; j < size; j += 64) __builtin_prefetch(next + j);
        __builtin_prefetch(next + size - 1);
      }
      const char *row = work->data + work->rows[i] * size;
      if (work->out == nullptr) {
        for (int64_t j = 0; j < whole; j += 16) {
          v2 v;
          memcpy(&v, row + j, sizeof v);
          sum ^= v;
        }
        for (int64_t j = whole; j < size; j++) sum[0] ^= row[j];
        continue;
      }
      char *to = work->out + i * size;
#if defined(__x86_64__)
      if (work->streaming && whole == size) {
        for (int64_t j = 0; j < size; j += 16) {
          __m128i v;
          memcpy(&v, row + j, sizeof v);
          _mm_stream_si128(reinterpret_cast<__m128i *>(to + j), v);
        }
        continue;
      }
#endif
      memcpy(to, row, static_cast<size_t>(size));
    }
  }
#if defined(__x86_64__)
  _mm_sfence();
#endif
  work->sink = static_cast<float>(sum[0] ^ sum[1]);
}

typedef void (*Body)(void *, int32_t);

/* The body of a level: all of them, the highest first. */
Body of(int32_t level, Body baseline, Body avx2, Body avx512) {
  return level >= 2 ? avx512 : level == 1 ? avx2 : baseline;
}

#if defined(__x86_64__)
#define BY_LEVEL(level, what) of(level, baseline::what, avx2::what, avx512::what)
#define BYTES_OF(level) (level >= 2 ? 64 : level == 1 ? 32 : 16)
#else
#define BY_LEVEL(level, what) of(level, baseline::what, baseline::what, baseline::what)
#define BYTES_OF(level) 16
#endif

constexpr int64_t kTasks = 64;

}  // namespace
}  // namespace transom

using transom::Work;

/* float32 multiply-adds: 2 operations for each element. */
EXPORT double transom_probe_fma(int32_t threads, int32_t level, int64_t steps) {
  using namespace transom;
  Work work = {};
  work.tasks = kTasks;
  work.steps = steps;
  parallel(threads, BY_LEVEL(level, fma), &work);
  return 2.0 * kChains * (BYTES_OF(level) / 4) * static_cast<double>(steps * kTasks);
}

/* Products of int8 added up in int32: 2 operations for each. With VNNI where the level is AVX-512
 * and the processor has it. */
EXPORT double transom_probe_dot(int32_t threads, int32_t level, int64_t steps) {
  using namespace transom;
#if defined(__x86_64__)
  if (level < 1) return 0;
  Work work = {};
  work.tasks = kTasks;
  work.steps = steps;
  Body body = level == 1 ? dot_avx2 : __builtin_cpu_supports("avx512vnni") ? dot_vnni : dot_avx512;
  parallel(threads, body, &work);
  return 2.0 * kChains * BYTES_OF(level) * static_cast<double>(steps * kTasks);
#else
  (void)threads, (void)level, (void)steps;
  return 0;
#endif
}

/* `bytes` from `data` on, each once, by each thread in 1, 2 or 4 streams that run side by side;
 * `ahead` is how far before the loads prefetches go, 0 for none. */
EXPORT double transom_probe_read(int32_t threads, int32_t level, const void *data, int64_t bytes,
                                 int32_t streams, int64_t ahead) {
  using namespace transom;
  Work work = {};
  work.steps = 1 << 20;
  work.streams = streams;
  work.tasks = bytes / work.steps;
  work.data = static_cast<const char *>(data);
  work.ahead = ahead;
  parallel(threads, BY_LEVEL(level, read), &work);
  return static_cast<double>(work.tasks * work.steps);
}

/* `count` rows of the table by their numbers; written one after the other to `out` unless that is
 * NULL, past the caches with `streaming` (rows of a multiple of 16 bytes, out on one). */
EXPORT double transom_probe_rows(int32_t threads, const void *table, int64_t row_bytes,
                                 const int64_t *numbers, int64_t count, int64_t ahead, void *out,
                                 int32_t streaming) {
  using namespace transom;
  Work work = {};
  work.steps = 256;
  work.tasks = (count + work.steps - 1) / work.steps;
  work.data = static_cast<const char *>(table);
  work.bytes = count;
  work.row_bytes = row_bytes;
  work.rows = numbers;
  work.ahead = ahead;
  work.out = static_cast<char *>(out);
  work.streaming = streaming;
  parallel(threads, rows, &work);
  return static_cast<double>(count * row_bytes);
}
