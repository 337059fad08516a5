"""Mixture of experts, compiled by numba."""
