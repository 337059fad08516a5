"""Engram, compiled by numba."""
