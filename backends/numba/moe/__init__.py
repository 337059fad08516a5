"""Mixture of experts, compiled by numba.

The gradients of grouped_gemm and moe_experts are left to the composites: they multiply whole
experts, which torch does in a third to a half of the time of tiles that read a weight down its
columns (measured of grouped_gemm_backward_x).
"""
