"""Hyper-connections in C++."""
