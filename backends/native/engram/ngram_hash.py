"""csrc/cpu/engram/ngram_hash.cpp: a reciprocal for each modulus, a column in each place of a
vector."""

from transom.backends.native import register

register("ngram_hash")
