"""csrc/cpu/moe/grouped_gemm.cpp: rows times weights as stored, and both gradients."""

from transom.backends.native import register

register("grouped_gemm")
register("grouped_gemm_dx")
register("grouped_gemm_dw")
