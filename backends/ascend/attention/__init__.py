"""Sparse attention, compiled by numba."""
