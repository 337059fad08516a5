/* transom_ops.h: what a plugin includes. Made by `python csrc/write_ops_header.py` from the
 * declarations in kernels/; edit those instead.
 *
 * For each operator: its schema (arguments in order, shapes, dtypes), the hash of that text, and
 * the place of each argument in transom_call.args. A weight has four, see transom_plugin.h. */
#ifndef TRANSOM_OPS_H
#define TRANSOM_OPS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "transom_plugin.h"

/* True if the struct that `pointer` was given as holds `field`: ask before you read a field that
 * came with a later minor than the first one that you support. */
#define TRANSOM_HAS(pointer, type, field) \
  ((pointer)->struct_size >= offsetof(type, field) + sizeof((pointer)->field))

#if defined(_WIN32)
#define TRANSOM_EXPORT __declspec(dllexport)
#else
#define TRANSOM_EXPORT __attribute__((visibility("default")))
#endif

/* The function that a plugin defines; its type is transom_plugin_function. */
TRANSOM_EXPORT const transom_plugin *transom_plugin_v1(const transom_host *host,
                                                       transom_status *status);

#ifdef __cplusplus
}
#endif

/* block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_indices, int block_size,
 * bool causal, Tensor? sink, float scale); q[B,S,Hq,D], k[B,N,Hkv,D], v[B,N,Hkv,Dv],
 * block_indices[B,Sq,Hkv,L], sink?[Hq] -> o[B,S,Hq,Dv], lse[B,S,Hq]; q: float; k: q; v: q;
 * block_indices: index; sink: q | f32; o: q; lse: acc(q) */
#define TRANSOM_BLOCK_SPARSE_ATTENTION_HASH UINT64_C(0x24f5d046402d5025)
enum {
  TRANSOM_BLOCK_SPARSE_ATTENTION_Q,
  TRANSOM_BLOCK_SPARSE_ATTENTION_K,
  TRANSOM_BLOCK_SPARSE_ATTENTION_V,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BLOCK_INDICES,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BLOCK_SIZE,
  TRANSOM_BLOCK_SPARSE_ATTENTION_CAUSAL,
  TRANSOM_BLOCK_SPARSE_ATTENTION_SINK,
  TRANSOM_BLOCK_SPARSE_ATTENTION_SCALE,
  TRANSOM_BLOCK_SPARSE_ATTENTION_N_ARGS
};

/* block_sparse_attention_backward(Tensor do, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor
 * block_indices, Tensor sink, Tensor o, Tensor lse, int block_size, bool causal, float scale);
 * do[B,S,Hq,Dv], dlse[B,S,Hq], q[B,S,Hq,D], k[B,N,Hkv,D], v[B,N,Hkv,Dv],
 * block_indices[B,Sq,Hkv,L], sink[Hq], o[B,S,Hq,Dv], lse[B,S,Hq] -> dq[B,S,Hq,D],
 * dk[B,N,Hkv,D], dv[B,N,Hkv,Dv], dsink[Hq]; do: q; dlse: acc(q); q: float; k: q; v: q;
 * block_indices: index; sink: q | f32; o: q; lse: acc(q); dq: q; dk: q; dv: q; dsink: sink */
#define TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_HASH UINT64_C(0x4f69089083eeb5f3)
enum {
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_DO,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_DLSE,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_Q,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_K,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_V,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_BLOCK_INDICES,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_SINK,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_O,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_LSE,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_BLOCK_SIZE,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_CAUSAL,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_SCALE,
  TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_N_ARGS
};

/* compress_kv(Tensor kv, Tensor gate, Tensor position_bias, bool overlap, Tensor? state_kv,
 * Tensor? state_gate, int pending); kv[B,S,W], gate[B,S,W], position_bias[m,W],
 * state_kv?[B,(1+overlap)*m,W], state_gate?[B,(1+overlap)*m,W] ->
 * entries[B,(pending+S)//m,W//(1+overlap)], next_kv[B,(1+overlap)*m,W],
 * next_gate[B,(1+overlap)*m,W]; kv: float; gate: kv | f32; position_bias: kv | f32; state_kv:
 * acc(kv); state_gate: acc(kv); entries: kv; next_kv: acc(kv); next_gate: acc(kv) */
#define TRANSOM_COMPRESS_KV_HASH UINT64_C(0xd7235ad299c2bc01)
enum {
  TRANSOM_COMPRESS_KV_KV,
  TRANSOM_COMPRESS_KV_GATE,
  TRANSOM_COMPRESS_KV_POSITION_BIAS,
  TRANSOM_COMPRESS_KV_OVERLAP,
  TRANSOM_COMPRESS_KV_STATE_KV,
  TRANSOM_COMPRESS_KV_STATE_GATE,
  TRANSOM_COMPRESS_KV_PENDING,
  TRANSOM_COMPRESS_KV_N_ARGS
};

/* compress_kv_backward(Tensor kv, Tensor gate, Tensor position_bias, Tensor dentries, Tensor
 * dnext_kv, Tensor dnext_gate, bool overlap, Tensor? state_kv, Tensor? state_gate, int
 * pending); kv[B,S,W], gate[B,S,W], position_bias[m,W], dentries[B,(pending+S)//(m if m else
 * 1),W//(1+overlap)], dnext_kv[B,(1+overlap)*m,W], dnext_gate[B,(1+overlap)*m,W],
 * state_kv?[B,(1+overlap)*m,W], state_gate?[B,(1+overlap)*m,W] -> dkv[B,S,W], dgate[B,S,W],
 * dposition_bias[m,W], dstate_kv[B,(1+overlap)*m,W], dstate_gate[B,(1+overlap)*m,W]; kv: float;
 * gate: kv | f32; position_bias: kv | f32; dentries: kv; dnext_kv: acc(kv); dnext_gate:
 * acc(kv); state_kv: acc(kv); state_gate: acc(kv); dkv: kv; dgate: gate; dposition_bias:
 * position_bias; dstate_kv: acc(kv); dstate_gate: acc(kv) */
#define TRANSOM_COMPRESS_KV_BACKWARD_HASH UINT64_C(0x82ef6e4c8d6e645b)
enum {
  TRANSOM_COMPRESS_KV_BACKWARD_KV,
  TRANSOM_COMPRESS_KV_BACKWARD_GATE,
  TRANSOM_COMPRESS_KV_BACKWARD_POSITION_BIAS,
  TRANSOM_COMPRESS_KV_BACKWARD_DENTRIES,
  TRANSOM_COMPRESS_KV_BACKWARD_DNEXT_KV,
  TRANSOM_COMPRESS_KV_BACKWARD_DNEXT_GATE,
  TRANSOM_COMPRESS_KV_BACKWARD_OVERLAP,
  TRANSOM_COMPRESS_KV_BACKWARD_STATE_KV,
  TRANSOM_COMPRESS_KV_BACKWARD_STATE_GATE,
  TRANSOM_COMPRESS_KV_BACKWARD_PENDING,
  TRANSOM_COMPRESS_KV_BACKWARD_N_ARGS
};

/* dequantize_fp8(Tensor values, Tensor scales, int rows, int columns); values[*B,N,K],
 * scales[*B,(N+rows-1)//rows if rows>0 else 0,(K+columns-1)//columns if columns>0 else 0] ->
 * weight[*B,N,K]; values: u8; scales: f32 | u8; weight: f32 */
#define TRANSOM_DEQUANTIZE_FP8_HASH UINT64_C(0x4743966cd60bee55)
enum {
  TRANSOM_DEQUANTIZE_FP8_VALUES,
  TRANSOM_DEQUANTIZE_FP8_SCALES,
  TRANSOM_DEQUANTIZE_FP8_ROWS,
  TRANSOM_DEQUANTIZE_FP8_COLUMNS,
  TRANSOM_DEQUANTIZE_FP8_N_ARGS
};

/* dequantize_int4(Tensor values, Tensor scales, Tensor zeros, int group); values[*B,N,P],
 * scales[*B,N,(2*P+group-1)//group if group>0 else 0], zeros[*B,N,(2*P+group-1)//group if
 * group>0 else 0] -> weight[*B,N,2*P]; values: u8; scales: f32; zeros: u8; weight: f32 */
#define TRANSOM_DEQUANTIZE_INT4_HASH UINT64_C(0xeb8c1fdc4dd47a60)
enum {
  TRANSOM_DEQUANTIZE_INT4_VALUES,
  TRANSOM_DEQUANTIZE_INT4_SCALES,
  TRANSOM_DEQUANTIZE_INT4_ZEROS,
  TRANSOM_DEQUANTIZE_INT4_GROUP,
  TRANSOM_DEQUANTIZE_INT4_N_ARGS
};

/* dequantize_int8(Tensor values, Tensor scales, int group); values[*B,N,K],
 * scales[*B,N,(K+group-1)//group if group>0 else 0] -> weight[*B,N,K]; values: i8; scales: f32;
 * weight: f32 */
#define TRANSOM_DEQUANTIZE_INT8_HASH UINT64_C(0x501d214e8e6b1201)
enum {
  TRANSOM_DEQUANTIZE_INT8_VALUES,
  TRANSOM_DEQUANTIZE_INT8_SCALES,
  TRANSOM_DEQUANTIZE_INT8_GROUP,
  TRANSOM_DEQUANTIZE_INT8_N_ARGS
};

/* dequantize_mxfp4(Tensor values, Tensor scales); values[*B,N,P], scales[*B,N,(2*P+31)//32] ->
 * weight[*B,N,2*P]; values: u8; scales: u8; weight: f32 */
#define TRANSOM_DEQUANTIZE_MXFP4_HASH UINT64_C(0x84848bd5311395d9)
enum {
  TRANSOM_DEQUANTIZE_MXFP4_VALUES,
  TRANSOM_DEQUANTIZE_MXFP4_SCALES,
  TRANSOM_DEQUANTIZE_MXFP4_N_ARGS
};

/* engram_gate(Tensor x, Tensor key, Tensor value, Tensor weight, float eps, float clamp,
 * Tensor? mask, bool residual); x[*T,R,D], key[*T,R,D], value[*T,D], weight[R,D], mask?[*T] ->
 * y[*T,R,D]; x: float; key: x; value: x; weight: x | f32; mask: bool; y: x */
#define TRANSOM_ENGRAM_GATE_HASH UINT64_C(0xf6cb49b29b3ebc4d)
enum {
  TRANSOM_ENGRAM_GATE_X,
  TRANSOM_ENGRAM_GATE_KEY,
  TRANSOM_ENGRAM_GATE_VALUE,
  TRANSOM_ENGRAM_GATE_WEIGHT,
  TRANSOM_ENGRAM_GATE_EPS,
  TRANSOM_ENGRAM_GATE_CLAMP,
  TRANSOM_ENGRAM_GATE_MASK,
  TRANSOM_ENGRAM_GATE_RESIDUAL,
  TRANSOM_ENGRAM_GATE_N_ARGS
};

/* engram_gate_backward(Tensor dy, Tensor x, Tensor key, Tensor value, Tensor weight, float eps,
 * float clamp, Tensor? mask, bool residual); dy[*T,R,D], x[*T,R,D], key[*T,R,D], value[*T,D],
 * weight[R,D], mask?[*T] -> dx[*T,R,D], dkey[*T,R,D], dvalue[*T,D], dweight[R,D]; dy: x; x:
 * float; key: x; value: x; weight: x | f32; mask: bool; dx: x; dkey: x; dvalue: x; dweight:
 * acc(x) */
#define TRANSOM_ENGRAM_GATE_BACKWARD_HASH UINT64_C(0x61d80c67c1c6d277)
enum {
  TRANSOM_ENGRAM_GATE_BACKWARD_DY,
  TRANSOM_ENGRAM_GATE_BACKWARD_X,
  TRANSOM_ENGRAM_GATE_BACKWARD_KEY,
  TRANSOM_ENGRAM_GATE_BACKWARD_VALUE,
  TRANSOM_ENGRAM_GATE_BACKWARD_WEIGHT,
  TRANSOM_ENGRAM_GATE_BACKWARD_EPS,
  TRANSOM_ENGRAM_GATE_BACKWARD_CLAMP,
  TRANSOM_ENGRAM_GATE_BACKWARD_MASK,
  TRANSOM_ENGRAM_GATE_BACKWARD_RESIDUAL,
  TRANSOM_ENGRAM_GATE_BACKWARD_N_ARGS
};

/* gated_delta_rule(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? state, float
 * scale, float? l2norm_eps); q[B,S,Hk,Dk], k[B,S,Hk,Dk], v[B,S,Hv,Dv], g[B,S,Hv,Dg],
 * beta[B,S,Hv], state?[B,Hv,Dk,Dv] -> o[B,S,Hv,Dv], new_state[B,Hv,Dk,Dv]; q: float; k: q; v:
 * q; g: q | f32; beta: q | f32; state: acc(q); o: q; new_state: acc(q) */
#define TRANSOM_GATED_DELTA_RULE_HASH UINT64_C(0x8c0df8d83a60696c)
enum {
  TRANSOM_GATED_DELTA_RULE_Q,
  TRANSOM_GATED_DELTA_RULE_K,
  TRANSOM_GATED_DELTA_RULE_V,
  TRANSOM_GATED_DELTA_RULE_G,
  TRANSOM_GATED_DELTA_RULE_BETA,
  TRANSOM_GATED_DELTA_RULE_STATE,
  TRANSOM_GATED_DELTA_RULE_SCALE,
  TRANSOM_GATED_DELTA_RULE_L2NORM_EPS,
  TRANSOM_GATED_DELTA_RULE_N_ARGS
};

/* gated_delta_rule_backward(Tensor do, Tensor dnew_state, Tensor q, Tensor k, Tensor v, Tensor
 * g, Tensor beta, Tensor? state, float scale, float? l2norm_eps); do[B,S,Hv,Dv],
 * dnew_state[B,Hv,Dk,Dv], q[B,S,Hk,Dk], k[B,S,Hk,Dk], v[B,S,Hv,Dv], g[B,S,Hv,Dg], beta[B,S,Hv],
 * state?[B,Hv,Dk,Dv] -> dq[B,S,Hk,Dk], dk[B,S,Hk,Dk], dv[B,S,Hv,Dv], dg[B,S,Hv,Dg],
 * dbeta[B,S,Hv], dstate[B,Hv,Dk,Dv]; do: q; dnew_state: acc(q); q: float; k: q; v: q; g: q |
 * f32; beta: q | f32; state: acc(q); dq: q; dk: q; dv: q; dg: g; dbeta: beta; dstate: acc(q) */
#define TRANSOM_GATED_DELTA_RULE_BACKWARD_HASH UINT64_C(0x8fe76053af406758)
enum {
  TRANSOM_GATED_DELTA_RULE_BACKWARD_DO,
  TRANSOM_GATED_DELTA_RULE_BACKWARD_DNEW_STATE,
  TRANSOM_GATED_DELTA_RULE_BACKWARD_Q,
  TRANSOM_GATED_DELTA_RULE_BACKWARD_K,
  TRANSOM_GATED_DELTA_RULE_BACKWARD_V,
  TRANSOM_GATED_DELTA_RULE_BACKWARD_G,
  TRANSOM_GATED_DELTA_RULE_BACKWARD_BETA,
  TRANSOM_GATED_DELTA_RULE_BACKWARD_STATE,
  TRANSOM_GATED_DELTA_RULE_BACKWARD_SCALE,
  TRANSOM_GATED_DELTA_RULE_BACKWARD_L2NORM_EPS,
  TRANSOM_GATED_DELTA_RULE_BACKWARD_N_ARGS
};

/* grouped_gemm(Tensor x, Weight weight, Tensor? weight_scales, Tensor? weight_zeros, str?
 * weight_spec, Tensor offsets); x[M,K], weight[E,N,K], offsets[E] -> y[M,N]; x: float; weight:
 * x | f32 | quant; offsets: index; y: x */
#define TRANSOM_GROUPED_GEMM_HASH UINT64_C(0xf98441c084fb2aac)
enum {
  TRANSOM_GROUPED_GEMM_X,
  TRANSOM_GROUPED_GEMM_WEIGHT,
  TRANSOM_GROUPED_GEMM_WEIGHT_SCALES,
  TRANSOM_GROUPED_GEMM_WEIGHT_ZEROS,
  TRANSOM_GROUPED_GEMM_WEIGHT_SPEC,
  TRANSOM_GROUPED_GEMM_OFFSETS,
  TRANSOM_GROUPED_GEMM_N_ARGS
};

/* grouped_gemm_backward_weight(Tensor dy, Tensor x, Tensor offsets, Tensor weight); dy[M,N],
 * x[M,K], offsets[E], weight[E,N,K] -> dw[E,N,K]; dy: float; x: dy; offsets: index; weight: dy
 * | f32; dw: weight */
#define TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_HASH UINT64_C(0xa8a6fa1e5859d5f2)
enum {
  TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_DY,
  TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_X,
  TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_OFFSETS,
  TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_WEIGHT,
  TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_N_ARGS
};

/* grouped_gemm_backward_x(Tensor dy, Weight weight, Tensor? weight_scales, Tensor?
 * weight_zeros, str? weight_spec, Tensor offsets); dy[M,N], weight[E,N,K], offsets[E] ->
 * dx[M,K]; dy: float; weight: dy | f32 | quant; offsets: index; dx: dy */
#define TRANSOM_GROUPED_GEMM_BACKWARD_X_HASH UINT64_C(0x54b96c4cdfef88b1)
enum {
  TRANSOM_GROUPED_GEMM_BACKWARD_X_DY,
  TRANSOM_GROUPED_GEMM_BACKWARD_X_WEIGHT,
  TRANSOM_GROUPED_GEMM_BACKWARD_X_WEIGHT_SCALES,
  TRANSOM_GROUPED_GEMM_BACKWARD_X_WEIGHT_ZEROS,
  TRANSOM_GROUPED_GEMM_BACKWARD_X_WEIGHT_SPEC,
  TRANSOM_GROUPED_GEMM_BACKWARD_X_OFFSETS,
  TRANSOM_GROUPED_GEMM_BACKWARD_X_N_ARGS
};

/* hashed_embedding(Tensor tokens, Weight table, Tensor? table_scales, Tensor? table_zeros, str?
 * table_spec, Tensor multipliers, Tensor moduli, Tensor offsets, int pad, Tensor? lookback,
 * Tensor? blocked, int[] shard); tokens[B,S], table[V,d], multipliers[n], moduli[n-1,h],
 * offsets[(n-1)*h], lookback?[B,n-1], blocked?[B,S] -> y[B,S,(n-1)*h*d]; tokens: index;
 * multipliers: i64; moduli: index; offsets: index; lookback: index; blocked: bool; table: float
 * | quant; y: table */
#define TRANSOM_HASHED_EMBEDDING_HASH UINT64_C(0x5f4b381a71cac441)
enum {
  TRANSOM_HASHED_EMBEDDING_TOKENS,
  TRANSOM_HASHED_EMBEDDING_TABLE,
  TRANSOM_HASHED_EMBEDDING_TABLE_SCALES,
  TRANSOM_HASHED_EMBEDDING_TABLE_ZEROS,
  TRANSOM_HASHED_EMBEDDING_TABLE_SPEC,
  TRANSOM_HASHED_EMBEDDING_MULTIPLIERS,
  TRANSOM_HASHED_EMBEDDING_MODULI,
  TRANSOM_HASHED_EMBEDDING_OFFSETS,
  TRANSOM_HASHED_EMBEDDING_PAD,
  TRANSOM_HASHED_EMBEDDING_LOOKBACK,
  TRANSOM_HASHED_EMBEDDING_BLOCKED,
  TRANSOM_HASHED_EMBEDDING_SHARD,
  TRANSOM_HASHED_EMBEDDING_N_ARGS
};

/* hashed_embedding_backward(Tensor dy, Tensor tokens, Tensor multipliers, Tensor moduli, Tensor
 * offsets, int pad, int rows, Tensor? lookback, Tensor? blocked, int[] shard);
 * dy[B,S,(n-1)*h,d], tokens[B,S], multipliers[n], moduli[n-1,h], offsets[(n-1)*h],
 * lookback?[B,n-1], blocked?[B,S] -> dtable[rows,d]; tokens: index; multipliers: i64; moduli:
 * index; offsets: index; lookback: index; blocked: bool; dy: float; dtable: dy */
#define TRANSOM_HASHED_EMBEDDING_BACKWARD_HASH UINT64_C(0x3e21f5b9c90a08b0)
enum {
  TRANSOM_HASHED_EMBEDDING_BACKWARD_DY,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_TOKENS,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_MULTIPLIERS,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_MODULI,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_OFFSETS,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_PAD,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_LOOKBACK,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_BLOCKED,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_SHARD,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_N_ARGS
};

/* hashed_embedding_backward_rows(Tensor dy, Tensor tokens, Tensor multipliers, Tensor moduli,
 * Tensor offsets, int pad, int rows, Tensor? lookback, Tensor? blocked, int[] shard);
 * dy[B,S,(n-1)*h,d], tokens[B,S], multipliers[n], moduli[n-1,h], offsets[(n-1)*h],
 * lookback?[B,n-1], blocked?[B,S] -> ids[B*S*(n-1)*h], gradients[B*S*(n-1)*h,d]; tokens: index;
 * multipliers: i64; moduli: index; offsets: index; lookback: index; blocked: bool; dy: float;
 * ids: i64; gradients: dy */
#define TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_HASH UINT64_C(0x89f1413921faa7f7)
enum {
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_DY,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_TOKENS,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_MULTIPLIERS,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_MODULI,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_OFFSETS,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_PAD,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_ROWS,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_LOOKBACK,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_BLOCKED,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_SHARD,
  TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_N_ARGS
};

/* hashed_embedding_out(Tensor tokens, Weight table, Tensor? table_scales, Tensor? table_zeros,
 * str? table_spec, Tensor out, Tensor multipliers, Tensor moduli, Tensor offsets, int pad,
 * Tensor? lookback, Tensor? blocked, int[] shard); tokens[B,S], table[V,d], out[B,S,(n-1)*h*d],
 * multipliers[n], moduli[n-1,h], offsets[(n-1)*h], lookback?[B,n-1], blocked?[B,S] -> ; tokens:
 * index; multipliers: i64; moduli: index; offsets: index; lookback: index; blocked: bool;
 * table: float | quant; out: float ; writes out */
#define TRANSOM_HASHED_EMBEDDING_OUT_HASH UINT64_C(0x2619d03973c73b5e)
enum {
  TRANSOM_HASHED_EMBEDDING_OUT_TOKENS,
  TRANSOM_HASHED_EMBEDDING_OUT_TABLE,
  TRANSOM_HASHED_EMBEDDING_OUT_TABLE_SCALES,
  TRANSOM_HASHED_EMBEDDING_OUT_TABLE_ZEROS,
  TRANSOM_HASHED_EMBEDDING_OUT_TABLE_SPEC,
  TRANSOM_HASHED_EMBEDDING_OUT_OUT,
  TRANSOM_HASHED_EMBEDDING_OUT_MULTIPLIERS,
  TRANSOM_HASHED_EMBEDDING_OUT_MODULI,
  TRANSOM_HASHED_EMBEDDING_OUT_OFFSETS,
  TRANSOM_HASHED_EMBEDDING_OUT_PAD,
  TRANSOM_HASHED_EMBEDDING_OUT_LOOKBACK,
  TRANSOM_HASHED_EMBEDDING_OUT_BLOCKED,
  TRANSOM_HASHED_EMBEDDING_OUT_SHARD,
  TRANSOM_HASHED_EMBEDDING_OUT_N_ARGS
};

/* hashed_embedding_pooled(Tensor tokens, Weight table, Tensor? table_scales, Tensor?
 * table_zeros, str? table_spec, Tensor multipliers, Tensor moduli, Tensor offsets, int pad,
 * Tensor? lookback, Tensor? blocked, int[] shard, bool mean); tokens[B,S], table[V,d],
 * multipliers[n], moduli[n-1,h], offsets[(n-1)*h], lookback?[B,n-1], blocked?[B,S] -> y[B,S,d];
 * tokens: index; multipliers: i64; moduli: index; offsets: index; lookback: index; blocked:
 * bool; table: float | quant; y: table */
#define TRANSOM_HASHED_EMBEDDING_POOLED_HASH UINT64_C(0xa090f451e3bf2418)
enum {
  TRANSOM_HASHED_EMBEDDING_POOLED_TOKENS,
  TRANSOM_HASHED_EMBEDDING_POOLED_TABLE,
  TRANSOM_HASHED_EMBEDDING_POOLED_TABLE_SCALES,
  TRANSOM_HASHED_EMBEDDING_POOLED_TABLE_ZEROS,
  TRANSOM_HASHED_EMBEDDING_POOLED_TABLE_SPEC,
  TRANSOM_HASHED_EMBEDDING_POOLED_MULTIPLIERS,
  TRANSOM_HASHED_EMBEDDING_POOLED_MODULI,
  TRANSOM_HASHED_EMBEDDING_POOLED_OFFSETS,
  TRANSOM_HASHED_EMBEDDING_POOLED_PAD,
  TRANSOM_HASHED_EMBEDDING_POOLED_LOOKBACK,
  TRANSOM_HASHED_EMBEDDING_POOLED_BLOCKED,
  TRANSOM_HASHED_EMBEDDING_POOLED_SHARD,
  TRANSOM_HASHED_EMBEDDING_POOLED_MEAN,
  TRANSOM_HASHED_EMBEDDING_POOLED_N_ARGS
};

/* lightning_indexer(Tensor q, Tensor k, Tensor weights, int top_k, Tensor visible); q[B,S,H,D],
 * k[B,N,D], weights[B,S,H], visible[B,S] -> indices[B,S,top_k]; q: float; k: q; weights: q |
 * f32; visible: index; indices: i32 */
#define TRANSOM_LIGHTNING_INDEXER_HASH UINT64_C(0xf069766047df31f6)
enum {
  TRANSOM_LIGHTNING_INDEXER_Q,
  TRANSOM_LIGHTNING_INDEXER_K,
  TRANSOM_LIGHTNING_INDEXER_WEIGHTS,
  TRANSOM_LIGHTNING_INDEXER_TOP_K,
  TRANSOM_LIGHTNING_INDEXER_VISIBLE,
  TRANSOM_LIGHTNING_INDEXER_N_ARGS
};

/* lightning_indexer_kl(Tensor q, Tensor k, Tensor weights, Tensor target, Tensor indices);
 * q[B,S,H,D], k[B,N,D], weights[B,S,H], target[B,S,L], indices[B,S,L] -> loss[B,S]; q: float;
 * k: q; weights: q | f32; target: q | f32; indices: index; loss: acc(q) */
#define TRANSOM_LIGHTNING_INDEXER_KL_HASH UINT64_C(0x88ec5e14e480effb)
enum {
  TRANSOM_LIGHTNING_INDEXER_KL_Q,
  TRANSOM_LIGHTNING_INDEXER_KL_K,
  TRANSOM_LIGHTNING_INDEXER_KL_WEIGHTS,
  TRANSOM_LIGHTNING_INDEXER_KL_TARGET,
  TRANSOM_LIGHTNING_INDEXER_KL_INDICES,
  TRANSOM_LIGHTNING_INDEXER_KL_N_ARGS
};

/* lightning_indexer_kl_backward(Tensor q, Tensor k, Tensor weights, Tensor target, Tensor
 * indices, Tensor dloss); q[B,S,H,D], k[B,N,D], weights[B,S,H], target[B,S,L], indices[B,S,L],
 * dloss[B,S] -> dq[B,S,H,D], dk[B,N,D], dweights[B,S,H], dtarget[B,S,L]; q: float; k: q;
 * weights: q | f32; target: q | f32; indices: index; dloss: acc(q); dq: q; dk: k; dweights:
 * weights; dtarget: target */
#define TRANSOM_LIGHTNING_INDEXER_KL_BACKWARD_HASH UINT64_C(0x431f5b928a1b5ae0)
enum {
  TRANSOM_LIGHTNING_INDEXER_KL_BACKWARD_Q,
  TRANSOM_LIGHTNING_INDEXER_KL_BACKWARD_K,
  TRANSOM_LIGHTNING_INDEXER_KL_BACKWARD_WEIGHTS,
  TRANSOM_LIGHTNING_INDEXER_KL_BACKWARD_TARGET,
  TRANSOM_LIGHTNING_INDEXER_KL_BACKWARD_INDICES,
  TRANSOM_LIGHTNING_INDEXER_KL_BACKWARD_DLOSS,
  TRANSOM_LIGHTNING_INDEXER_KL_BACKWARD_N_ARGS
};

/* mhc_head(Tensor x, Tensor fn, Tensor scale, Tensor base, float eps, float rms_eps);
 * x[*T,R,D], fn[R,R*D], scale[1], base[R] -> h[*T,D]; x: float; fn: x | f32; scale: x | f32;
 * base: x | f32; h: x */
#define TRANSOM_MHC_HEAD_HASH UINT64_C(0xb70cb6e3df687771)
enum {
  TRANSOM_MHC_HEAD_X,
  TRANSOM_MHC_HEAD_FN,
  TRANSOM_MHC_HEAD_SCALE,
  TRANSOM_MHC_HEAD_BASE,
  TRANSOM_MHC_HEAD_EPS,
  TRANSOM_MHC_HEAD_RMS_EPS,
  TRANSOM_MHC_HEAD_N_ARGS
};

/* mhc_head_backward(Tensor dh, Tensor x, Tensor fn, Tensor scale, Tensor base, float eps, float
 * rms_eps); dh[*T,D], x[*T,R,D], fn[R,R*D], scale[1], base[R] -> dx[*T,R,D], dfn[R,R*D],
 * dscale[1], dbase[R]; dh: x; x: float; fn: x | f32; scale: x | f32; base: x | f32; dx: x; dfn:
 * acc(x); dscale: acc(x); dbase: acc(x) */
#define TRANSOM_MHC_HEAD_BACKWARD_HASH UINT64_C(0xed38ef48b1546def)
enum {
  TRANSOM_MHC_HEAD_BACKWARD_DH,
  TRANSOM_MHC_HEAD_BACKWARD_X,
  TRANSOM_MHC_HEAD_BACKWARD_FN,
  TRANSOM_MHC_HEAD_BACKWARD_SCALE,
  TRANSOM_MHC_HEAD_BACKWARD_BASE,
  TRANSOM_MHC_HEAD_BACKWARD_EPS,
  TRANSOM_MHC_HEAD_BACKWARD_RMS_EPS,
  TRANSOM_MHC_HEAD_BACKWARD_N_ARGS
};

/* mhc_post(Tensor f, Tensor x, Tensor post, Tensor comb); f[*T,D], x[*T,R,D], post[*T,R],
 * comb[*T,R,R] -> y[*T,R,D]; f: x; x: float; post: x | f32; comb: x | f32; y: x */
#define TRANSOM_MHC_POST_HASH UINT64_C(0x9d4922a731fdd22d)
enum {
  TRANSOM_MHC_POST_F,
  TRANSOM_MHC_POST_X,
  TRANSOM_MHC_POST_POST,
  TRANSOM_MHC_POST_COMB,
  TRANSOM_MHC_POST_N_ARGS
};

/* mhc_post_backward(Tensor dy, Tensor f, Tensor x, Tensor post, Tensor comb); dy[*T,R,D],
 * f[*T,D], x[*T,R,D], post[*T,R], comb[*T,R,R] -> df[*T,D], dx[*T,R,D], dpost[*T,R],
 * dcomb[*T,R,R]; dy: x; f: x; x: float; post: x | f32; comb: x | f32; df: x; dx: x; dpost:
 * acc(x); dcomb: acc(x) */
#define TRANSOM_MHC_POST_BACKWARD_HASH UINT64_C(0x3f0b27a83e76538d)
enum {
  TRANSOM_MHC_POST_BACKWARD_DY,
  TRANSOM_MHC_POST_BACKWARD_F,
  TRANSOM_MHC_POST_BACKWARD_X,
  TRANSOM_MHC_POST_BACKWARD_POST,
  TRANSOM_MHC_POST_BACKWARD_COMB,
  TRANSOM_MHC_POST_BACKWARD_N_ARGS
};

/* mhc_pre(Tensor x, Tensor fn, Tensor scale, Tensor base, int iterations, float eps, float
 * rms_eps, float post_scale); x[*T,R,D], fn[(2+R)*R,R*D], scale[3], base[(2+R)*R] -> h[*T,D],
 * post[*T,R], comb[*T,R,R]; x: float; fn: x | f32; scale: x | f32; base: x | f32; h: x; post:
 * acc(x); comb: acc(x) */
#define TRANSOM_MHC_PRE_HASH UINT64_C(0x445ab31623fd5f26)
enum {
  TRANSOM_MHC_PRE_X,
  TRANSOM_MHC_PRE_FN,
  TRANSOM_MHC_PRE_SCALE,
  TRANSOM_MHC_PRE_BASE,
  TRANSOM_MHC_PRE_ITERATIONS,
  TRANSOM_MHC_PRE_EPS,
  TRANSOM_MHC_PRE_RMS_EPS,
  TRANSOM_MHC_PRE_POST_SCALE,
  TRANSOM_MHC_PRE_N_ARGS
};

/* mhc_pre_backward(Tensor dh, Tensor dpost, Tensor dcomb, Tensor x, Tensor fn, Tensor scale,
 * Tensor base, int iterations, float eps, float rms_eps, float post_scale); dh[*T,D],
 * dpost[*T,R], dcomb[*T,R,R], x[*T,R,D], fn[(2+R)*R,R*D], scale[3], base[(2+R)*R] ->
 * dx[*T,R,D], dfn[(2+R)*R,R*D], dscale[3], dbase[(2+R)*R]; dh: x; dpost: acc(x); dcomb: acc(x);
 * x: float; fn: x | f32; scale: x | f32; base: x | f32; dx: x; dfn: acc(x); dscale: acc(x);
 * dbase: acc(x) */
#define TRANSOM_MHC_PRE_BACKWARD_HASH UINT64_C(0x9c4c820581806bc0)
enum {
  TRANSOM_MHC_PRE_BACKWARD_DH,
  TRANSOM_MHC_PRE_BACKWARD_DPOST,
  TRANSOM_MHC_PRE_BACKWARD_DCOMB,
  TRANSOM_MHC_PRE_BACKWARD_X,
  TRANSOM_MHC_PRE_BACKWARD_FN,
  TRANSOM_MHC_PRE_BACKWARD_SCALE,
  TRANSOM_MHC_PRE_BACKWARD_BASE,
  TRANSOM_MHC_PRE_BACKWARD_ITERATIONS,
  TRANSOM_MHC_PRE_BACKWARD_EPS,
  TRANSOM_MHC_PRE_BACKWARD_RMS_EPS,
  TRANSOM_MHC_PRE_BACKWARD_POST_SCALE,
  TRANSOM_MHC_PRE_BACKWARD_N_ARGS
};

/* moe_experts(Tensor x, Tensor ids, Tensor weights, Weight gate_up, Tensor? gate_up_scales,
 * Tensor? gate_up_zeros, str? gate_up_spec, Weight down, Tensor? down_scales, Tensor?
 * down_zeros, str? down_spec, str activation, float? limit, Tensor? gate_up_bias, Tensor?
 * down_bias, str weight_position, bool interleaved, float alpha); x[T,D], ids[T,K],
 * weights[T,K], gate_up[E,2*I,D], down[E,D,I], gate_up_bias?[E,2*I], down_bias?[E,D] -> y[T,D];
 * x: float; ids: index; weights: float; gate_up, down: x | f32 | quant; gate_up_bias,
 * down_bias: x | f32; y: x */
#define TRANSOM_MOE_EXPERTS_HASH UINT64_C(0x15c40a40a54fafb3)
enum {
  TRANSOM_MOE_EXPERTS_X,
  TRANSOM_MOE_EXPERTS_IDS,
  TRANSOM_MOE_EXPERTS_WEIGHTS,
  TRANSOM_MOE_EXPERTS_GATE_UP,
  TRANSOM_MOE_EXPERTS_GATE_UP_SCALES,
  TRANSOM_MOE_EXPERTS_GATE_UP_ZEROS,
  TRANSOM_MOE_EXPERTS_GATE_UP_SPEC,
  TRANSOM_MOE_EXPERTS_DOWN,
  TRANSOM_MOE_EXPERTS_DOWN_SCALES,
  TRANSOM_MOE_EXPERTS_DOWN_ZEROS,
  TRANSOM_MOE_EXPERTS_DOWN_SPEC,
  TRANSOM_MOE_EXPERTS_ACTIVATION,
  TRANSOM_MOE_EXPERTS_LIMIT,
  TRANSOM_MOE_EXPERTS_GATE_UP_BIAS,
  TRANSOM_MOE_EXPERTS_DOWN_BIAS,
  TRANSOM_MOE_EXPERTS_WEIGHT_POSITION,
  TRANSOM_MOE_EXPERTS_INTERLEAVED,
  TRANSOM_MOE_EXPERTS_ALPHA,
  TRANSOM_MOE_EXPERTS_N_ARGS
};

/* moe_experts_backward(Tensor dy, Tensor x, Tensor ids, Tensor weights, Weight gate_up, Tensor?
 * gate_up_scales, Tensor? gate_up_zeros, str? gate_up_spec, Weight down, Tensor? down_scales,
 * Tensor? down_zeros, str? down_spec, Tensor? gate_up_bias, Tensor? down_bias, str activation,
 * float? limit, str weight_position, bool interleaved, float alpha); dy[T,D], x[T,D], ids[T,K],
 * weights[T,K], gate_up[E,2*I,D], down[E,D,I], gate_up_bias?[E,2*I], down_bias?[E,D] ->
 * dx[T,D], dweights[T,K], dgate_up_bias[E,2*I], ddown_bias[E,D]; dy: float; x: dy; ids: index;
 * weights: float; gate_up, down: dy | f32 | quant; gate_up_bias, down_bias: dy | f32; dx: dy;
 * dweights: weights; dgate_up_bias, ddown_bias: acc(dy) */
#define TRANSOM_MOE_EXPERTS_BACKWARD_HASH UINT64_C(0xa88129dc07cdb807)
enum {
  TRANSOM_MOE_EXPERTS_BACKWARD_DY,
  TRANSOM_MOE_EXPERTS_BACKWARD_X,
  TRANSOM_MOE_EXPERTS_BACKWARD_IDS,
  TRANSOM_MOE_EXPERTS_BACKWARD_WEIGHTS,
  TRANSOM_MOE_EXPERTS_BACKWARD_GATE_UP,
  TRANSOM_MOE_EXPERTS_BACKWARD_GATE_UP_SCALES,
  TRANSOM_MOE_EXPERTS_BACKWARD_GATE_UP_ZEROS,
  TRANSOM_MOE_EXPERTS_BACKWARD_GATE_UP_SPEC,
  TRANSOM_MOE_EXPERTS_BACKWARD_DOWN,
  TRANSOM_MOE_EXPERTS_BACKWARD_DOWN_SCALES,
  TRANSOM_MOE_EXPERTS_BACKWARD_DOWN_ZEROS,
  TRANSOM_MOE_EXPERTS_BACKWARD_DOWN_SPEC,
  TRANSOM_MOE_EXPERTS_BACKWARD_GATE_UP_BIAS,
  TRANSOM_MOE_EXPERTS_BACKWARD_DOWN_BIAS,
  TRANSOM_MOE_EXPERTS_BACKWARD_ACTIVATION,
  TRANSOM_MOE_EXPERTS_BACKWARD_LIMIT,
  TRANSOM_MOE_EXPERTS_BACKWARD_WEIGHT_POSITION,
  TRANSOM_MOE_EXPERTS_BACKWARD_INTERLEAVED,
  TRANSOM_MOE_EXPERTS_BACKWARD_ALPHA,
  TRANSOM_MOE_EXPERTS_BACKWARD_N_ARGS
};

/* moe_experts_backward_experts(Tensor dy, Tensor x, Tensor ids, Tensor weights, Tensor gate_up,
 * Tensor down, Tensor? gate_up_bias, str activation, float? limit, str weight_position, bool
 * interleaved, float alpha); dy[T,D], x[T,D], ids[T,K], weights[T,K], gate_up[E,2*I,D],
 * down[E,D,I], gate_up_bias?[E,2*I] -> dgate_up[E,2*I,D], ddown[E,D,I]; dy: float; x: dy; ids:
 * index; weights: float; gate_up, down: dy | f32; gate_up_bias: dy | f32; dgate_up: gate_up;
 * ddown: down */
#define TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_HASH UINT64_C(0x17c81c524676ea89)
enum {
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_DY,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_X,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_IDS,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_WEIGHTS,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_GATE_UP,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_DOWN,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_GATE_UP_BIAS,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_ACTIVATION,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_LIMIT,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_WEIGHT_POSITION,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_INTERLEAVED,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_ALPHA,
  TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_N_ARGS
};

/* ngram_hash(Tensor tokens, Tensor multipliers, Tensor moduli, Tensor? offsets, int pad,
 * Tensor? lookback, Tensor? blocked); tokens[B,S], multipliers[n], moduli[n-1,h],
 * offsets?[(n-1)*h], lookback?[B,n-1], blocked?[B,S] -> rows[B,S,(n-1)*h]; tokens: index;
 * multipliers: i64; moduli: index; offsets: index; lookback: index; blocked: bool; rows: i32 */
#define TRANSOM_NGRAM_HASH_HASH UINT64_C(0x8b49c0c95755eeae)
enum {
  TRANSOM_NGRAM_HASH_TOKENS,
  TRANSOM_NGRAM_HASH_MULTIPLIERS,
  TRANSOM_NGRAM_HASH_MODULI,
  TRANSOM_NGRAM_HASH_OFFSETS,
  TRANSOM_NGRAM_HASH_PAD,
  TRANSOM_NGRAM_HASH_LOOKBACK,
  TRANSOM_NGRAM_HASH_BLOCKED,
  TRANSOM_NGRAM_HASH_N_ARGS
};

/* pack_cache_rows(Tensor kv, int row_bytes); kv[B,N,D] -> rows[B,N,row_bytes]; kv: float; rows:
 * u8 */
#define TRANSOM_PACK_CACHE_ROWS_HASH UINT64_C(0xdc993377af8f46ac)
enum {
  TRANSOM_PACK_CACHE_ROWS_KV,
  TRANSOM_PACK_CACHE_ROWS_ROW_BYTES,
  TRANSOM_PACK_CACHE_ROWS_N_ARGS
};

/* quantize_fp8(Tensor weight, int rows, int columns); weight[*B,N,K] -> values[*B,N,K],
 * scales[*B,(N+rows-1)//rows if rows>0 else 0,(K+columns-1)//columns if columns>0 else 0];
 * weight: float; values: u8; scales: f32 */
#define TRANSOM_QUANTIZE_FP8_HASH UINT64_C(0x3e45b235e7ca1064)
enum {
  TRANSOM_QUANTIZE_FP8_WEIGHT,
  TRANSOM_QUANTIZE_FP8_ROWS,
  TRANSOM_QUANTIZE_FP8_COLUMNS,
  TRANSOM_QUANTIZE_FP8_N_ARGS
};

/* quantize_fp8_e8m0(Tensor weight, int rows, int columns); weight[*B,N,K] -> values[*B,N,K],
 * scales[*B,(N+rows-1)//rows if rows>0 else 0,(K+columns-1)//columns if columns>0 else 0];
 * weight: float; values: u8; scales: u8 */
#define TRANSOM_QUANTIZE_FP8_E8M0_HASH UINT64_C(0xe30f41296db30e8d)
enum {
  TRANSOM_QUANTIZE_FP8_E8M0_WEIGHT,
  TRANSOM_QUANTIZE_FP8_E8M0_ROWS,
  TRANSOM_QUANTIZE_FP8_E8M0_COLUMNS,
  TRANSOM_QUANTIZE_FP8_E8M0_N_ARGS
};

/* quantize_int4(Tensor weight, int group); weight[*B,N,K] -> values[*B,N,K//2],
 * scales[*B,N,(K+group-1)//group if group>0 else 0], zeros[*B,N,(K+group-1)//group if group>0
 * else 0]; weight: float; values: u8; scales: f32; zeros: u8 */
#define TRANSOM_QUANTIZE_INT4_HASH UINT64_C(0x73bd5f3a7fc30cde)
enum {
  TRANSOM_QUANTIZE_INT4_WEIGHT,
  TRANSOM_QUANTIZE_INT4_GROUP,
  TRANSOM_QUANTIZE_INT4_N_ARGS
};

/* quantize_int8(Tensor weight, int group); weight[*B,N,K] -> values[*B,N,K],
 * scales[*B,N,(K+group-1)//group if group>0 else 0]; weight: float; values: i8; scales: f32 */
#define TRANSOM_QUANTIZE_INT8_HASH UINT64_C(0x121ebe95e50240c8)
enum {
  TRANSOM_QUANTIZE_INT8_WEIGHT,
  TRANSOM_QUANTIZE_INT8_GROUP,
  TRANSOM_QUANTIZE_INT8_N_ARGS
};

/* quantize_mxfp4(Tensor weight); weight[*B,N,K] -> values[*B,N,K//2], scales[*B,N,(K+31)//32];
 * weight: float; values: u8; scales: u8 */
#define TRANSOM_QUANTIZE_MXFP4_HASH UINT64_C(0x5a8fd18b4e234938)
enum {
  TRANSOM_QUANTIZE_MXFP4_WEIGHT,
  TRANSOM_QUANTIZE_MXFP4_N_ARGS
};

/* route(Tensor logits, int k, str score, Tensor? bias, int groups, int top_groups, bool
 * renormalize, float scale, Tensor? preset, Tensor? mask); logits[T,E], bias?[E], preset?[T,k],
 * mask?[T] -> ids[T,k], weights[T,k]; logits: float; bias: float; preset: index; mask: bool;
 * ids: i32; weights: acc(logits) */
#define TRANSOM_ROUTE_HASH UINT64_C(0x529a79caa0db243f)
enum {
  TRANSOM_ROUTE_LOGITS,
  TRANSOM_ROUTE_K,
  TRANSOM_ROUTE_SCORE,
  TRANSOM_ROUTE_BIAS,
  TRANSOM_ROUTE_GROUPS,
  TRANSOM_ROUTE_TOP_GROUPS,
  TRANSOM_ROUTE_RENORMALIZE,
  TRANSOM_ROUTE_SCALE,
  TRANSOM_ROUTE_PRESET,
  TRANSOM_ROUTE_MASK,
  TRANSOM_ROUTE_N_ARGS
};

/* route_backward(Tensor dweights, Tensor logits, Tensor ids, str score, bool renormalize, float
 * scale); dweights[T,k], logits[T,E], ids[T,k] -> dlogits[T,E]; dweights: acc(logits); logits:
 * float; ids: index; dlogits: logits */
#define TRANSOM_ROUTE_BACKWARD_HASH UINT64_C(0xfea1967647bf3798)
enum {
  TRANSOM_ROUTE_BACKWARD_DWEIGHTS,
  TRANSOM_ROUTE_BACKWARD_LOGITS,
  TRANSOM_ROUTE_BACKWARD_IDS,
  TRANSOM_ROUTE_BACKWARD_SCORE,
  TRANSOM_ROUTE_BACKWARD_RENORMALIZE,
  TRANSOM_ROUTE_BACKWARD_SCALE,
  TRANSOM_ROUTE_BACKWARD_N_ARGS
};

/* short_conv(Tensor v, Tensor weight, int dilation, Tensor? state); v[B,S,C], weight[C,K],
 * state?[B,(K-1)*dilation,C] -> y[B,S,C], new_state[B,(K-1)*dilation,C]; v: float; weight: v |
 * f32; state: v; y: v; new_state: v */
#define TRANSOM_SHORT_CONV_HASH UINT64_C(0xb0c4b1f6cfe74e3d)
enum {
  TRANSOM_SHORT_CONV_V,
  TRANSOM_SHORT_CONV_WEIGHT,
  TRANSOM_SHORT_CONV_DILATION,
  TRANSOM_SHORT_CONV_STATE,
  TRANSOM_SHORT_CONV_N_ARGS
};

/* short_conv_backward(Tensor dy, Tensor dnew_state, Tensor v, Tensor weight, int dilation,
 * Tensor? state); dy[B,S,C], dnew_state[B,(K-1)*dilation,C], v[B,S,C], weight[C,K],
 * state?[B,(K-1)*dilation,C] -> dv[B,S,C], dweight[C,K], dstate[B,(K-1)*dilation,C]; dy: v;
 * dnew_state: v; v: float; weight: v | f32; state: v; dv: v; dweight: acc(v); dstate: v */
#define TRANSOM_SHORT_CONV_BACKWARD_HASH UINT64_C(0xdedc4b60fa989d27)
enum {
  TRANSOM_SHORT_CONV_BACKWARD_DY,
  TRANSOM_SHORT_CONV_BACKWARD_DNEW_STATE,
  TRANSOM_SHORT_CONV_BACKWARD_V,
  TRANSOM_SHORT_CONV_BACKWARD_WEIGHT,
  TRANSOM_SHORT_CONV_BACKWARD_DILATION,
  TRANSOM_SHORT_CONV_BACKWARD_STATE,
  TRANSOM_SHORT_CONV_BACKWARD_N_ARGS
};

/* sinkhorn(Tensor logits, int iterations, float eps); logits[*T,R,R] -> comb[*T,R,R]; logits:
 * float; comb: acc(logits) */
#define TRANSOM_SINKHORN_HASH UINT64_C(0x35059cd275e5f955)
enum {
  TRANSOM_SINKHORN_LOGITS,
  TRANSOM_SINKHORN_ITERATIONS,
  TRANSOM_SINKHORN_EPS,
  TRANSOM_SINKHORN_N_ARGS
};

/* sinkhorn_backward(Tensor dcomb, Tensor logits, int iterations, float eps); dcomb[*T,R,R],
 * logits[*T,R,R] -> dlogits[*T,R,R]; dcomb: acc(logits); logits: float; dlogits: logits */
#define TRANSOM_SINKHORN_BACKWARD_HASH UINT64_C(0x865c07ee29f4df71)
enum {
  TRANSOM_SINKHORN_BACKWARD_DCOMB,
  TRANSOM_SINKHORN_BACKWARD_LOGITS,
  TRANSOM_SINKHORN_BACKWARD_ITERATIONS,
  TRANSOM_SINKHORN_BACKWARD_EPS,
  TRANSOM_SINKHORN_BACKWARD_N_ARGS
};

/* sparse_attention(Tensor q, Tensor kv, Tensor? indices, Tensor? visible, Tensor? local_kv, int
 * window, Tensor? sink, float scale, int v_dim, Tensor? local_valid); q[B,S,H,D], kv[B,N,D],
 * indices?[B,S,L], visible?[B,S], local_kv?[B,M,D], sink?[H], local_valid?[B,M] ->
 * o[B,S,H,v_dim], lse[B,S,H]; q: float; kv: q; indices: index; visible: index; local_kv: q;
 * sink: q | f32; local_valid: bool; o: q; lse: acc(q) */
#define TRANSOM_SPARSE_ATTENTION_HASH UINT64_C(0xb1d555435a863cde)
enum {
  TRANSOM_SPARSE_ATTENTION_Q,
  TRANSOM_SPARSE_ATTENTION_KV,
  TRANSOM_SPARSE_ATTENTION_INDICES,
  TRANSOM_SPARSE_ATTENTION_VISIBLE,
  TRANSOM_SPARSE_ATTENTION_LOCAL_KV,
  TRANSOM_SPARSE_ATTENTION_WINDOW,
  TRANSOM_SPARSE_ATTENTION_SINK,
  TRANSOM_SPARSE_ATTENTION_SCALE,
  TRANSOM_SPARSE_ATTENTION_V_DIM,
  TRANSOM_SPARSE_ATTENTION_LOCAL_VALID,
  TRANSOM_SPARSE_ATTENTION_N_ARGS
};

/* sparse_attention_backward(Tensor do, Tensor dlse, Tensor q, Tensor kv, Tensor? indices,
 * Tensor? visible, Tensor local_kv, Tensor sink, Tensor? local_valid, Tensor o, Tensor lse, int
 * window, float scale); do[B,S,H,v_dim], dlse[B,S,H], q[B,S,H,D], kv[B,N,D], indices?[B,S,L],
 * visible?[B,S], local_kv[B,M,D], sink[H], local_valid?[B,M], o[B,S,H,v_dim], lse[B,S,H] ->
 * dq[B,S,H,D], dkv[B,N,D], dlocal_kv[B,M,D], dsink[H]; do: q; dlse: acc(q); q: float; kv: q;
 * indices: index; visible: index; local_kv: q; sink: q | f32; local_valid: bool; o: q; lse:
 * acc(q); dq: q; dkv: q; dlocal_kv: q; dsink: sink */
#define TRANSOM_SPARSE_ATTENTION_BACKWARD_HASH UINT64_C(0xc8e57a9b7cedda6c)
enum {
  TRANSOM_SPARSE_ATTENTION_BACKWARD_DO,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_DLSE,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_Q,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_KV,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_INDICES,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_VISIBLE,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_LOCAL_KV,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_SINK,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_LOCAL_VALID,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_O,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_LSE,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_WINDOW,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_SCALE,
  TRANSOM_SPARSE_ATTENTION_BACKWARD_N_ARGS
};

/* sparse_attention_rows(Tensor q, Tensor rows, Tensor? indices, Tensor? visible, Tensor?
 * local_kv, int window, Tensor? sink, float scale, int v_dim, Tensor? local_valid);
 * q[B,S,H,512], rows[B,N,R], indices?[B,S,L], visible?[B,S], local_kv?[B,M,512], sink?[H],
 * local_valid?[B,M] -> o[B,S,H,v_dim], lse[B,S,H]; q: float; rows: u8; indices: index; visible:
 * index; local_kv: q; sink: q | f32; local_valid: bool; o: q; lse: acc(q) */
#define TRANSOM_SPARSE_ATTENTION_ROWS_HASH UINT64_C(0xbe04f8e9d5f3770e)
enum {
  TRANSOM_SPARSE_ATTENTION_ROWS_Q,
  TRANSOM_SPARSE_ATTENTION_ROWS_ROWS,
  TRANSOM_SPARSE_ATTENTION_ROWS_INDICES,
  TRANSOM_SPARSE_ATTENTION_ROWS_VISIBLE,
  TRANSOM_SPARSE_ATTENTION_ROWS_LOCAL_KV,
  TRANSOM_SPARSE_ATTENTION_ROWS_WINDOW,
  TRANSOM_SPARSE_ATTENTION_ROWS_SINK,
  TRANSOM_SPARSE_ATTENTION_ROWS_SCALE,
  TRANSOM_SPARSE_ATTENTION_ROWS_V_DIM,
  TRANSOM_SPARSE_ATTENTION_ROWS_LOCAL_VALID,
  TRANSOM_SPARSE_ATTENTION_ROWS_N_ARGS
};

/* unpack_cache_rows(Tensor rows); rows[B,N,R] -> kv[B,N,512]; rows: u8; kv: f32 */
#define TRANSOM_UNPACK_CACHE_ROWS_HASH UINT64_C(0xc1a5b91309ebb197)
enum {
  TRANSOM_UNPACK_CACHE_ROWS_ROWS,
  TRANSOM_UNPACK_CACHE_ROWS_N_ARGS
};

/* Former names of operators: until version 0.2 sources that have them compile, and libraries that
 * have them load. */

/* grouped_gemm_dx(Tensor dy, Weight weight, Tensor? weight_scales, Tensor? weight_zeros, str?
 * weight_spec, Tensor offsets); dy[M,N], weight[E,N,K], offsets[E] -> dx[M,K]; dy: float;
 * weight: dy | f32 | quant; offsets: index; dx: dy */
#define TRANSOM_GROUPED_GEMM_DX_HASH UINT64_C(0x738937d3706d0e88)
enum {
  TRANSOM_GROUPED_GEMM_DX_DY,
  TRANSOM_GROUPED_GEMM_DX_WEIGHT,
  TRANSOM_GROUPED_GEMM_DX_WEIGHT_SCALES,
  TRANSOM_GROUPED_GEMM_DX_WEIGHT_ZEROS,
  TRANSOM_GROUPED_GEMM_DX_WEIGHT_SPEC,
  TRANSOM_GROUPED_GEMM_DX_OFFSETS,
  TRANSOM_GROUPED_GEMM_DX_N_ARGS
};

/* grouped_gemm_dw(Tensor dy, Tensor x, Tensor offsets, Tensor weight); dy[M,N], x[M,K],
 * offsets[E], weight[E,N,K] -> dw[E,N,K]; dy: float; x: dy; offsets: index; weight: dy | f32;
 * dw: weight */
#define TRANSOM_GROUPED_GEMM_DW_HASH UINT64_C(0xc70f5261911756d7)
enum {
  TRANSOM_GROUPED_GEMM_DW_DY,
  TRANSOM_GROUPED_GEMM_DW_X,
  TRANSOM_GROUPED_GEMM_DW_OFFSETS,
  TRANSOM_GROUPED_GEMM_DW_WEIGHT,
  TRANSOM_GROUPED_GEMM_DW_N_ARGS
};

/* hashed_embedding_row_gradient(Tensor dy, Tensor tokens, Tensor multipliers, Tensor moduli,
 * Tensor offsets, int pad, int rows, Tensor? lookback, Tensor? blocked, int[] shard);
 * dy[B,S,(n-1)*h,d], tokens[B,S], multipliers[n], moduli[n-1,h], offsets[(n-1)*h],
 * lookback?[B,n-1], blocked?[B,S] -> ids[B*S*(n-1)*h], gradients[B*S*(n-1)*h,d]; tokens: index;
 * multipliers: i64; moduli: index; offsets: index; lookback: index; blocked: bool; dy: float;
 * ids: i64; gradients: dy */
#define TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_HASH UINT64_C(0x3fd683d4d4ac50f1)
enum {
  TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_DY,
  TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_TOKENS,
  TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_MULTIPLIERS,
  TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_MODULI,
  TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_OFFSETS,
  TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_PAD,
  TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_ROWS,
  TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_LOOKBACK,
  TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_BLOCKED,
  TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_SHARD,
  TRANSOM_HASHED_EMBEDDING_ROW_GRADIENT_N_ARGS
};

/* moe_experts_weight_backward(Tensor dy, Tensor x, Tensor ids, Tensor weights, Tensor gate_up,
 * Tensor down, Tensor? gate_up_bias, str activation, float? limit, str weight_position, bool
 * interleaved, float alpha); dy[T,D], x[T,D], ids[T,K], weights[T,K], gate_up[E,2*I,D],
 * down[E,D,I], gate_up_bias?[E,2*I] -> dgate_up[E,2*I,D], ddown[E,D,I]; dy: float; x: dy; ids:
 * index; weights: float; gate_up, down: dy | f32; gate_up_bias: dy | f32; dgate_up: gate_up;
 * ddown: down */
#define TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_HASH UINT64_C(0x414a45cf281d628d)
enum {
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_DY,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_X,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_IDS,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_WEIGHTS,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_GATE_UP,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_DOWN,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_GATE_UP_BIAS,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_ACTIVATION,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_LIMIT,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_WEIGHT_POSITION,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_INTERLEAVED,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_ALPHA,
  TRANSOM_MOE_EXPERTS_WEIGHT_BACKWARD_N_ARGS
};

#endif /* TRANSOM_OPS_H */
