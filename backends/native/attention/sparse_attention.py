"""csrc/cpu/attention/sparse_attention.cpp: pieces of gathered keys, all heads of a query at once."""

from transom.backends.native import register

register("sparse_attention")
