"""csrc/cpu/attention/sparse_attention_rows.cpp: as sparse_attention; rows decoded as gathered."""

from transom.backends.native import register

register("sparse_attention_rows")
