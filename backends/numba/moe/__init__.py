"""Mixture of experts, compiled by numba.

The gradients of grouped_gemm and moe_experts are left to the composites: they multiply whole
experts, which torch does twice as fast as tiles that read a weight down its columns.
"""
