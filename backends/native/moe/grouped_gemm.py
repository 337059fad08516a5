"""csrc/cpu/moe/grouped_gemm.cpp: rows times weights as stored, float32 sums along k."""

from transom.backends.native import register

register("grouped_gemm")
