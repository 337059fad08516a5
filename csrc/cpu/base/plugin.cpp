/* The table of our own CPU kernels: those of the best level that this processor has. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "parallel.h"
#include "transom_kernels.h"
#include "transom_ops.h"

/* Each level's sources define these; transom_kernels.h, which the build writes, lists them and the
 * levels, the best one first. */
#define TRANSOM_DECLARE(level, op)        \
  namespace transom::level {              \
  extern const transom_impl op;           \
  extern const transom_services services; \
  }
#define TRANSOM_ENTRY(level, op) &transom::level::op,
#define TRANSOM_TABLE(level)                                                            \
  TRANSOM_EACH(TRANSOM_DECLARE, level)                                                  \
  static const transom_impl *const level##_impls[] = {TRANSOM_EACH(TRANSOM_ENTRY, level)}; \
  static const transom_plugin level##_plugin = {                                           \
      sizeof(transom_plugin), TRANSOM_ABI_MAJOR, TRANSOM_ABI_MINOR,                     \
      "transom", "1." #level, "cpu", sizeof level##_impls / sizeof level##_impls[0],    \
      0, level##_impls, &transom::level::services};

struct Level {
  const char *name;
  bool (*runs)();
  const transom_plugin *plugin;
};

#if defined(__x86_64__)
/* clang 14 has no __builtin_cpu_supports("f16c"); that the system saves the registers, avx2 says. */
[[maybe_unused]] static bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
[[maybe_unused]] static bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
}
[[maybe_unused]] static bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
}
#endif
[[maybe_unused]] static bool has_baseline() { return true; }
[[maybe_unused]] static bool has_neon() { return true; }

TRANSOM_LEVELS(TRANSOM_TABLE)
#define TRANSOM_ROW(level) {#level, has_##level, &level##_plugin},
static const Level levels[] = {TRANSOM_LEVELS(TRANSOM_ROW)};

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
