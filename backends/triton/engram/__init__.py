"""Engram: hashes of n-grams, lookups in large tables, the gate, the short convolution."""
