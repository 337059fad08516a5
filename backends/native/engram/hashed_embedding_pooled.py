"""csrc/cpu/engram/hashed_embedding_pooled.cpp: hash, gather and sum in one."""

from transom.backends.native import register

register("hashed_embedding_pooled")
