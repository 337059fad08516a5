/* sinkhorn that copies its input, and grouped_gemm that writes zeros, with the fault that
 * -DFAULT=... names: for tests of replay.cpp. */
#include <string.h>

#include "transom_ops.h"

enum {
  NONE,
  READS_BEHIND,
  READS_BEFORE,
  WRITES_BEHIND,
  WRITES_INPUT,
  LEAVES_A_HOLE,
  READS_WORKSPACE,
  OVERRUNS_WORKSPACE,
  COUNTS_THREADS,
  NEEDS_THREADS,
  ASKS_FOR_MORE,
  KEEPS_STATE,
  WRAPS_ADDRESSES,
  RACES,
  OVERFLOWS,
  NEEDS_AVX,
  OVERRUNS_ITS_PACK,
  DIFFERS_WHEN_PACKED
};

void GOMP_parallel(void (*body)(void *), void *data, unsigned threads, unsigned flags);
int omp_get_thread_num(void);

static int state;

static void mark(void *marks) { ((float *)marks)[omp_get_thread_num()] = 1; }
static void race(void *count) {
  for (int i = 0; i < 1000; i++) ++*(volatile int *)count;
}

static uint64_t workspace(const transom_call *call) {
  (void)call;
  return 100;
}

static int32_t run(const transom_call *call, transom_status *status) {
  const transom_tensor *in = call->args[0].tensor;
  const unsigned threads = (unsigned)call->threads;
  float *from = (float *)in->data, *to = (float *)call->outs[0]->data, marks[64] = {0};
  char *space = (char *)call->workspace;
  int64_t n = 1;
  int last = 2147483600;
  for (int i = 0; i < in->ndim; i++) n *= in->shape[i];
  memcpy(to, from, (uint64_t)(n - (FAULT == LEAVES_A_HOLE)) * sizeof(float));
  switch (FAULT) {
    case READS_BEHIND: to[0] = from[n]; break;
    case READS_BEFORE: to[0] = from[-1]; break;
    case WRITES_BEHIND: to[n] = 0; break;
    case WRITES_INPUT: from[0] = 1; break;
    case READS_WORKSPACE: memcpy(to, space, sizeof(float)); break;
    case OVERRUNS_WORKSPACE: space[101] = 1; break;
    case COUNTS_THREADS: to[0] = (float)threads; break;
    case NEEDS_THREADS:
      GOMP_parallel(mark, marks, threads, 0);
      to[0] = threads < 7 || marks[1] > 0 ? 1.0f : 0.0f;
      break;
    case ASKS_FOR_MORE: GOMP_parallel(mark, marks, threads + 1, 0); break;
    case KEEPS_STATE: to[0] = (float)state++; break;
    case WRAPS_ADDRESSES:
      for (int i = 0; i < in->shape[0]; i++)
        to[i * n / in->shape[0]] = from[(int)(unsigned)(i * in->strides[0])];
      break;
    case RACES: GOMP_parallel(race, &state, threads, 0); break;
    case OVERFLOWS: to[0] = last + 50 * call->threads > 0 ? 1.0f : 0.0f; break;
#if defined(__x86_64__)
    case NEEDS_AVX: __asm__ volatile("vxorps %%ymm0, %%ymm0, %%ymm0" ::: "xmm0"); break;
#endif
    default: break;
  }
  (void)status, (void)space, (void)last;
  return 0;
}

static const transom_impl impl = {
    sizeof impl, TRANSOM_TUNED, "sinkhorn", "wrong", TRANSOM_SINKHORN_HASH, 0, 0, NULL, workspace,
    run};

static int32_t zeros(const transom_call *call, transom_status *status) {
  const transom_tensor *out = call->outs[0];
  const int64_t bytes = out->shape[0] * out->shape[1] * (out->dtype_bits / 8);
  const int packed = call->packed != NULL && call->packed[TRANSOM_GROUPED_GEMM_WEIGHT] != NULL;
  (void)status;
  memset(out->data, packed && FAULT == DIFFERS_WHEN_PACKED, (uint64_t)bytes);
  return 0;
}
static uint64_t packed_bytes(const transom_impl *of, uint32_t at, const transom_value *weight) {
  (void)of, (void)weight;
  return at == TRANSOM_GROUPED_GEMM_WEIGHT ? 100 : 0;
}
static int32_t pack(const transom_impl *of, uint32_t at, const transom_value *weight, void *packed,
                    void *stream, transom_status *status) {
  (void)of, (void)at, (void)weight, (void)stream, (void)status;
  memset(packed, 1, 100 + (FAULT == OVERRUNS_ITS_PACK));
  return 0;
}

static const transom_impl gemm = {
    sizeof gemm, TRANSOM_TUNED, "grouped_gemm", "wrong", TRANSOM_GROUPED_GEMM_HASH, 0, 0, NULL,
    NULL, zeros};
static const transom_services services = {
    .struct_size = sizeof services, .packed_bytes = packed_bytes, .pack = pack};
static const transom_impl *const impls[] = {&impl, &gemm};
static const transom_plugin plugin = {
    sizeof plugin, TRANSOM_ABI_MAJOR, TRANSOM_ABI_MINOR, "wrong", "1", "cpu", 2, 0, impls,
    &services};

const transom_plugin *transom_plugin_v1(const transom_host *host, transom_status *status) {
  (void)host, (void)status;
  return &plugin;
}
