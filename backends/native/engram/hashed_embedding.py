"""csrc/cpu/engram/hashed_embedding*.cpp: hash and gather in one, rows asked for ahead."""

from transom.backends.native import register

register("hashed_embedding")
register("hashed_embedding_out")
