"""Sparse attention in C++."""
