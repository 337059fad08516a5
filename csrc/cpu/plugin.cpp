/* The table of our own CPU kernels: those of the best level that this processor has. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "parallel.h"
#include "transom_kernels.h"
#include "transom_ops.h"

/* Each level's sources define these; transom_kernels.h, which the build writes, lists them. */
#define TRANSOM_DECLARE(level, op)  \
  namespace transom::level {        \
  extern const transom_impl op;     \
  }
#define TRANSOM_ENTRY(level, op) &transom::level::op,
#define TRANSOM_TABLE(level)                                                            \
  TRANSOM_EACH(TRANSOM_DECLARE, level)                                                  \
  static const transom_impl *const level##_impls[] = {TRANSOM_EACH(TRANSOM_ENTRY, level)}; \
  static const transom_plugin level##_plugin = {                                           \
      sizeof(transom_plugin), TRANSOM_ABI_MAJOR, TRANSOM_ABI_MINOR,                     \
      "transom", "1." #level, "cpu", sizeof level##_impls / sizeof level##_impls[0],    \
      0, level##_impls, nullptr};

struct Level {
  const char *name;
  bool (*runs)();
  const transom_plugin *plugin;
};

static bool always() { return true; }

#if defined(__x86_64__)
static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
}
TRANSOM_TABLE(baseline)
TRANSOM_TABLE(avx2)
TRANSOM_TABLE(avx512)
static const Level levels[] = {{"avx512", has_avx512, &avx512_plugin},
                               {"avx2", has_avx2, &avx2_plugin},
                               {"baseline", always, &baseline_plugin}};
#elif defined(__aarch64__)
TRANSOM_TABLE(neon)
static const Level levels[] = {{"neon", always, &neon_plugin}};
#else
TRANSOM_TABLE(baseline)
static const Level levels[] = {{"baseline", always, &baseline_plugin}};
#endif

const transom_plugin *transom_plugin_v1(const transom_host *host, transom_status *status) {
  if (host->abi_major != TRANSOM_ABI_MAJOR) {
    snprintf(status->message, sizeof status->message,
             "the native kernels speak ABI %d; this transom speaks %d; reinstall transom",
             TRANSOM_ABI_MAJOR, host->abi_major);
    return nullptr;
  }
  transom::prepare();
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  const char *asked = getenv("TRANSOM_NATIVE_LEVEL");
  const bool any = asked == nullptr || asked[0] == '\0';
  for (const Level &level : levels)
    if ((any || strcmp(asked, level.name) == 0) && level.runs()) return level.plugin;
  snprintf(status->message, sizeof status->message,
           "TRANSOM_NATIVE_LEVEL is '%.60s', which this library or processor has not; "
           "unset it for the best that there is", any ? "" : asked);
  return nullptr;
}
