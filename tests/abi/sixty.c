/* mhc_post in float32, in sixty lines: y[k] = post[k] * f + sum over j of comb[j,k] * x[j]. */
#include "transom_ops.h"

#include <stdio.h>
static const transom_tensor *argument(const transom_call *call, int at) {
  return call->args[at].tensor;
}

static int32_t supports(const transom_call *call, transom_status *status) {
  for (int at = 0; at < TRANSOM_MHC_POST_N_ARGS; at++) {
    const transom_tensor *t = argument(call, at);
    int64_t stride = 1;
    for (int i = t->ndim - 1; i >= 0; stride *= t->shape[i--])
      if (t->shape[i] > 1 && t->strides[i] != stride) {
        snprintf(status->message, sizeof status->message,
                 "argument %d is not contiguous; supported: contiguous; call .contiguous()", at);
        return 0;
      }
    if (t->dtype_code != TRANSOM_FLOAT || t->dtype_bits != 32) {
      snprintf(status->message, sizeof status->message,
               "argument %d has dtype code %d of %d bits; supported: float32", at, t->dtype_code,
               t->dtype_bits);
      return 0;
    }
  }
  return 1;
}

static int32_t run(const transom_call *call, transom_status *status) {
  const transom_tensor *streams = argument(call, TRANSOM_MHC_POST_X);
  const int64_t *size = streams->shape + streams->ndim - 2, R = size[0], D = size[1];
  const float *f = argument(call, TRANSOM_MHC_POST_F)->data, *x = streams->data;
  const float *post = argument(call, TRANSOM_MHC_POST_POST)->data;
  const float *comb = argument(call, TRANSOM_MHC_POST_COMB)->data;
  float *y = call->outs[0]->data;
  int64_t T = 1;
  (void)status;
  for (int i = 0; i < streams->ndim - 2; i++) T *= streams->shape[i];
  for (int64_t t = 0; t < T; t++, f += D, x += R * D, post += R, comb += R * R)
    for (int64_t k = 0; k < R; k++)
      for (int64_t d = 0; d < D; d++) {
        float sum = post[k] * f[d];
        for (int64_t j = 0; j < R; j++) sum += comb[j * R + k] * x[j * D + d];
        *y++ = sum;
      }
  return 0;
}

static const transom_impl mhc_post = {.struct_size = sizeof(transom_impl), .tier = TRANSOM_TUNED,
    .op = "mhc_post", .name = "sixty", .schema_hash = TRANSOM_MHC_POST_HASH,
    .flags = TRANSOM_DETERMINISTIC, .supports = supports, .run = run};
static const transom_impl *const impls[] = {&mhc_post};
static const transom_plugin plugin = {.struct_size = sizeof(transom_plugin), .abi_major = 1,
    .abi_minor = TRANSOM_ABI_MINOR, .vendor = "sixty", .version = "1", .device_type = "cpu",
    .n_impls = 1, .impls = impls};

const transom_plugin *transom_plugin_v1(const transom_host *host, transom_status *status) {
  (void)host, (void)status;
  return &plugin;
}
