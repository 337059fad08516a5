"""Hyper-connections, compiled by numba."""
