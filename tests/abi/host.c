/* A host of the minor version whose header it is compiled with: loads a plugin, checks what that
 * version says of the table, and calls its grouped_gemm. Prints the ABI, the implementation's name
 * and the sum of the output. */
#include "transom_ops.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static transom_tensor tensor(void *data, int bits, int code, int ndim, int64_t *sizes) {
  transom_tensor t = {data, 1, 0, ndim, (uint8_t)code, (uint8_t)bits, 1, sizes, sizes + ndim, 0};
  return t;
}

int main(int count, char **names) {
  transom_host host = {sizeof host, TRANSOM_ABI_MAJOR, TRANSOM_ABI_MINOR, "0.0"};
  transom_status status;
  void *library = count == 2 ? dlopen(names[1], RTLD_NOW | RTLD_LOCAL) : NULL;
  void *symbol = library ? dlsym(library, "transom_plugin_v1") : NULL;
  transom_plugin_function *enter;
  memset(&status, 0, sizeof status);
  memcpy(&enter, &symbol, sizeof enter);
  const transom_plugin *plugin = enter ? enter(&host, &status) : NULL;
  if (!plugin || plugin->struct_size < sizeof *plugin || plugin->abi_major != TRANSOM_ABI_MAJOR)
    return puts(status.message), 1;

  /* At the end of memory that ends here: a plugin that reads a later field of the call reads
   * poison. */
  struct {
    transom_call call;
    unsigned char poison[64];
  } at;
  float x[6] = {1, 2, 3, 4, 5, 6}, w[4] = {1, 0, 0, 1}, y[6], workspace[16];
  int64_t ends[1] = {3}, xs[] = {3, 2, 2, 1}, ws[] = {1, 2, 2, 4, 2, 1}, os[] = {1, 1};
  transom_tensor tensors[] = {tensor(x, 32, 2, 2, xs), tensor(w, 32, 2, 3, ws),
                              tensor(ends, 64, 0, 1, os), tensor(y, 32, 2, 2, xs)};
  transom_value args[TRANSOM_GROUPED_GEMM_N_ARGS];
  transom_tensor *outs[] = {&tensors[3]};
  memset(args, 0, sizeof args);
  memset(&at, 0, sizeof at);
  memset(at.poison, 0xff, sizeof at.poison);
  int places[] = {TRANSOM_GROUPED_GEMM_X, TRANSOM_GROUPED_GEMM_WEIGHT,
                  TRANSOM_GROUPED_GEMM_OFFSETS};
  for (int i = 0; i < 3; i++) {
    args[places[i]].tag = TRANSOM_VALUE_TENSOR;
    args[places[i]].tensor = &tensors[i];
  }
  at.call.struct_size = sizeof at.call;
  at.call.n_args = TRANSOM_GROUPED_GEMM_N_ARGS;
  at.call.args = args;
  at.call.n_outs = 1;
  at.call.outs = outs;
  at.call.workspace = workspace;
  at.call.workspace_bytes = sizeof workspace;
  at.call.threads = 1;
  for (uint32_t i = 0; i < plugin->n_impls; i++) {
    const transom_impl *impl = plugin->impls[i];
    if (strcmp(impl->op, "grouped_gemm")) continue;
    if (impl->supports && impl->supports(&at.call, &status) != 1) return puts(status.message), 1;
    if (impl->run(&at.call, &status)) return puts(status.message), 1;
    printf("%d.%d %s %g\n", plugin->abi_major, plugin->abi_minor, impl->name,
           (double)(y[0] + y[1] + y[2] + y[3] + y[4] + y[5]));
    return 0;
  }
  return puts("no grouped_gemm"), 1;
}
