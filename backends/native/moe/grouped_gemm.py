"""csrc/cpu/moe/grouped_gemm.cpp: rows times weights as stored, float32 sums, no packing."""

from transom.backends.native import register

register("grouped_gemm")
