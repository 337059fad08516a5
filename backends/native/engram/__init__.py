"""Engram in C++: hash, row gather, gate and short convolution."""
