"""Mixture of experts in C++."""
