/* The arguments of each operator by their numbers in transom_call.args, and the hash of its schema,
 * for our own kernels: transom_ops.h as C++ has it. Made by `python csrc/write_ops_header.py`. */
#pragma once

#include "transom_ops.h"

namespace transom::arguments {

struct block_sparse_attention {
  enum : int { Q, K, V, BLOCK_INDICES, BLOCK_SIZE, CAUSAL, SINK, SCALE };
  static constexpr uint64_t HASH = TRANSOM_BLOCK_SPARSE_ATTENTION_HASH;
};

struct block_sparse_attention_backward {
  enum : int { DO, DLSE, Q, K, V, BLOCK_INDICES, SINK, O, LSE, BLOCK_SIZE, CAUSAL, SCALE };
  static constexpr uint64_t HASH = TRANSOM_BLOCK_SPARSE_ATTENTION_BACKWARD_HASH;
};

struct compress_kv {
  enum : int { KV, GATE, POSITION_BIAS, OVERLAP, STATE_KV, STATE_GATE, PENDING };
  static constexpr uint64_t HASH = TRANSOM_COMPRESS_KV_HASH;
};

struct compress_kv_backward {
  enum : int { KV, GATE, POSITION_BIAS, DENTRIES, DNEXT_KV, DNEXT_GATE, OVERLAP, STATE_KV,
    STATE_GATE, PENDING };
  static constexpr uint64_t HASH = TRANSOM_COMPRESS_KV_BACKWARD_HASH;
};

struct dequantize_fp8 {
  enum : int { VALUES, SCALES, ROWS, COLUMNS };
  static constexpr uint64_t HASH = TRANSOM_DEQUANTIZE_FP8_HASH;
};

struct dequantize_int4 {
  enum : int { VALUES, SCALES, ZEROS, GROUP };
  static constexpr uint64_t HASH = TRANSOM_DEQUANTIZE_INT4_HASH;
};

struct dequantize_int8 {
  enum : int { VALUES, SCALES, GROUP };
  static constexpr uint64_t HASH = TRANSOM_DEQUANTIZE_INT8_HASH;
};

struct dequantize_mxfp4 {
  enum : int { VALUES, SCALES };
  static constexpr uint64_t HASH = TRANSOM_DEQUANTIZE_MXFP4_HASH;
};

struct engram_gate {
  enum : int { X, KEY, VALUE, WEIGHT, EPS, CLAMP, MASK, RESIDUAL };
  static constexpr uint64_t HASH = TRANSOM_ENGRAM_GATE_HASH;
};

struct engram_gate_backward {
  enum : int { DY, X, KEY, VALUE, WEIGHT, EPS, CLAMP, MASK, RESIDUAL };
  static constexpr uint64_t HASH = TRANSOM_ENGRAM_GATE_BACKWARD_HASH;
};

struct gated_delta_rule {
  enum : int { Q, K, V, G, BETA, STATE, SCALE, L2NORM_EPS };
  static constexpr uint64_t HASH = TRANSOM_GATED_DELTA_RULE_HASH;
};

struct gated_delta_rule_backward {
  enum : int { DO, DNEW_STATE, Q, K, V, G, BETA, STATE, SCALE, L2NORM_EPS };
  static constexpr uint64_t HASH = TRANSOM_GATED_DELTA_RULE_BACKWARD_HASH;
};

struct grouped_gemm {
  enum : int { X, WEIGHT, WEIGHT_SCALES, WEIGHT_ZEROS, WEIGHT_SPEC, OFFSETS };
  static constexpr uint64_t HASH = TRANSOM_GROUPED_GEMM_HASH;
};

struct grouped_gemm_backward_weight {
  enum : int { DY, X, OFFSETS, WEIGHT };
  static constexpr uint64_t HASH = TRANSOM_GROUPED_GEMM_BACKWARD_WEIGHT_HASH;
};

struct grouped_gemm_backward_x {
  enum : int { DY, WEIGHT, WEIGHT_SCALES, WEIGHT_ZEROS, WEIGHT_SPEC, OFFSETS };
  static constexpr uint64_t HASH = TRANSOM_GROUPED_GEMM_BACKWARD_X_HASH;
};

struct hashed_embedding {
  enum : int { TOKENS, TABLE, TABLE_SCALES, TABLE_ZEROS, TABLE_SPEC, MULTIPLIERS, MODULI, OFFSETS,
    PAD, LOOKBACK, BLOCKED, SHARD };
  static constexpr uint64_t HASH = TRANSOM_HASHED_EMBEDDING_HASH;
};

struct hashed_embedding_backward {
  enum : int { DY, TOKENS, MULTIPLIERS, MODULI, OFFSETS, PAD, ROWS, LOOKBACK, BLOCKED, SHARD };
  static constexpr uint64_t HASH = TRANSOM_HASHED_EMBEDDING_BACKWARD_HASH;
};

struct hashed_embedding_backward_rows {
  enum : int { DY, TOKENS, MULTIPLIERS, MODULI, OFFSETS, PAD, ROWS, LOOKBACK, BLOCKED, SHARD };
  static constexpr uint64_t HASH = TRANSOM_HASHED_EMBEDDING_BACKWARD_ROWS_HASH;
};

struct hashed_embedding_out {
  enum : int { TOKENS, TABLE, TABLE_SCALES, TABLE_ZEROS, TABLE_SPEC, OUT, MULTIPLIERS, MODULI,
    OFFSETS, PAD, LOOKBACK, BLOCKED, SHARD };
  static constexpr uint64_t HASH = TRANSOM_HASHED_EMBEDDING_OUT_HASH;
};

struct hashed_embedding_pooled {
  enum : int { TOKENS, TABLE, TABLE_SCALES, TABLE_ZEROS, TABLE_SPEC, MULTIPLIERS, MODULI, OFFSETS,
    PAD, LOOKBACK, BLOCKED, SHARD, MEAN };
  static constexpr uint64_t HASH = TRANSOM_HASHED_EMBEDDING_POOLED_HASH;
};

struct lightning_indexer {
  enum : int { Q, K, WEIGHTS, TOP_K, VISIBLE };
  static constexpr uint64_t HASH = TRANSOM_LIGHTNING_INDEXER_HASH;
};

struct lightning_indexer_kl {
  enum : int { Q, K, WEIGHTS, TARGET, INDICES };
  static constexpr uint64_t HASH = TRANSOM_LIGHTNING_INDEXER_KL_HASH;
};

struct lightning_indexer_kl_backward {
  enum : int { Q, K, WEIGHTS, TARGET, INDICES, DLOSS };
  static constexpr uint64_t HASH = TRANSOM_LIGHTNING_INDEXER_KL_BACKWARD_HASH;
};

struct mhc_head {
  enum : int { X, FN, SCALE, BASE, EPS, RMS_EPS };
  static constexpr uint64_t HASH = TRANSOM_MHC_HEAD_HASH;
};

struct mhc_head_backward {
  enum : int { DH, X, FN, SCALE, BASE, EPS, RMS_EPS };
  static constexpr uint64_t HASH = TRANSOM_MHC_HEAD_BACKWARD_HASH;
};

struct mhc_post {
  enum : int { F, X, POST, COMB };
  static constexpr uint64_t HASH = TRANSOM_MHC_POST_HASH;
};

struct mhc_post_backward {
  enum : int { DY, F, X, POST, COMB };
  static constexpr uint64_t HASH = TRANSOM_MHC_POST_BACKWARD_HASH;
};

struct mhc_pre {
  enum : int { X, FN, SCALE, BASE, ITERATIONS, EPS, RMS_EPS, POST_SCALE };
  static constexpr uint64_t HASH = TRANSOM_MHC_PRE_HASH;
};

struct mhc_pre_backward {
  enum : int { DH, DPOST, DCOMB, X, FN, SCALE, BASE, ITERATIONS, EPS, RMS_EPS, POST_SCALE };
  static constexpr uint64_t HASH = TRANSOM_MHC_PRE_BACKWARD_HASH;
};

struct moe_experts {
  enum : int { X, IDS, WEIGHTS, GATE_UP, GATE_UP_SCALES, GATE_UP_ZEROS, GATE_UP_SPEC, DOWN,
    DOWN_SCALES, DOWN_ZEROS, DOWN_SPEC, ACTIVATION, LIMIT, GATE_UP_BIAS, DOWN_BIAS, WEIGHT_POSITION,
    INTERLEAVED, ALPHA };
  static constexpr uint64_t HASH = TRANSOM_MOE_EXPERTS_HASH;
};

struct moe_experts_backward {
  enum : int { DY, X, IDS, WEIGHTS, GATE_UP, GATE_UP_SCALES, GATE_UP_ZEROS, GATE_UP_SPEC, DOWN,
    DOWN_SCALES, DOWN_ZEROS, DOWN_SPEC, GATE_UP_BIAS, DOWN_BIAS, ACTIVATION, LIMIT, WEIGHT_POSITION,
    INTERLEAVED, ALPHA };
  static constexpr uint64_t HASH = TRANSOM_MOE_EXPERTS_BACKWARD_HASH;
};

struct moe_experts_backward_experts {
  enum : int { DY, X, IDS, WEIGHTS, GATE_UP, DOWN, GATE_UP_BIAS, ACTIVATION, LIMIT, WEIGHT_POSITION,
    INTERLEAVED, ALPHA };
  static constexpr uint64_t HASH = TRANSOM_MOE_EXPERTS_BACKWARD_EXPERTS_HASH;
};

struct ngram_hash {
  enum : int { TOKENS, MULTIPLIERS, MODULI, OFFSETS, PAD, LOOKBACK, BLOCKED };
  static constexpr uint64_t HASH = TRANSOM_NGRAM_HASH_HASH;
};

struct pack_cache_rows {
  enum : int { KV, ROW_BYTES };
  static constexpr uint64_t HASH = TRANSOM_PACK_CACHE_ROWS_HASH;
};

struct quantize_fp8 {
  enum : int { WEIGHT, ROWS, COLUMNS };
  static constexpr uint64_t HASH = TRANSOM_QUANTIZE_FP8_HASH;
};

struct quantize_fp8_e8m0 {
  enum : int { WEIGHT, ROWS, COLUMNS };
  static constexpr uint64_t HASH = TRANSOM_QUANTIZE_FP8_E8M0_HASH;
};

struct quantize_int4 {
  enum : int { WEIGHT, GROUP };
  static constexpr uint64_t HASH = TRANSOM_QUANTIZE_INT4_HASH;
};

struct quantize_int8 {
  enum : int { WEIGHT, GROUP };
  static constexpr uint64_t HASH = TRANSOM_QUANTIZE_INT8_HASH;
};

struct quantize_mxfp4 {
  enum : int { WEIGHT };
  static constexpr uint64_t HASH = TRANSOM_QUANTIZE_MXFP4_HASH;
};

struct route {
  enum : int { LOGITS, K, SCORE, BIAS, GROUPS, TOP_GROUPS, RENORMALIZE, SCALE, PRESET, MASK };
  static constexpr uint64_t HASH = TRANSOM_ROUTE_HASH;
};

struct route_backward {
  enum : int { DWEIGHTS, LOGITS, IDS, SCORE, RENORMALIZE, SCALE };
  static constexpr uint64_t HASH = TRANSOM_ROUTE_BACKWARD_HASH;
};

struct short_conv {
  enum : int { V, WEIGHT, DILATION, STATE };
  static constexpr uint64_t HASH = TRANSOM_SHORT_CONV_HASH;
};

struct short_conv_backward {
  enum : int { DY, DNEW_STATE, V, WEIGHT, DILATION, STATE };
  static constexpr uint64_t HASH = TRANSOM_SHORT_CONV_BACKWARD_HASH;
};

struct sinkhorn {
  enum : int { LOGITS, ITERATIONS, EPS };
  static constexpr uint64_t HASH = TRANSOM_SINKHORN_HASH;
};

struct sinkhorn_backward {
  enum : int { DCOMB, LOGITS, ITERATIONS, EPS };
  static constexpr uint64_t HASH = TRANSOM_SINKHORN_BACKWARD_HASH;
};

struct sparse_attention {
  enum : int { Q, KV, INDICES, VISIBLE, LOCAL_KV, WINDOW, SINK, SCALE, V_DIM, LOCAL_VALID };
  static constexpr uint64_t HASH = TRANSOM_SPARSE_ATTENTION_HASH;
};

struct sparse_attention_backward {
  enum : int { DO, DLSE, Q, KV, INDICES, VISIBLE, LOCAL_KV, SINK, LOCAL_VALID, O, LSE, WINDOW, SCALE
    };
  static constexpr uint64_t HASH = TRANSOM_SPARSE_ATTENTION_BACKWARD_HASH;
};

struct sparse_attention_rows {
  enum : int { Q, ROWS, INDICES, VISIBLE, LOCAL_KV, WINDOW, SINK, SCALE, V_DIM, LOCAL_VALID };
  static constexpr uint64_t HASH = TRANSOM_SPARSE_ATTENTION_ROWS_HASH;
};

struct unpack_cache_rows {
  enum : int { ROWS };
  static constexpr uint64_t HASH = TRANSOM_UNPACK_CACHE_ROWS_HASH;
};

}  // namespace transom::arguments
