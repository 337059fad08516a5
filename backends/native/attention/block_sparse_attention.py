"""csrc/cpu/attention/block_sparse_attention*.cpp: pieces of a list, by key head."""

from transom.backends.native import register

register("block_sparse_attention")
register("block_sparse_attention_backward")
