"""csrc/cpu/attention/sparse_attention*.cpp: gathered pieces of keys, all heads at once."""

from transom.backends.native import register

register("sparse_attention")
register("sparse_attention_backward")
