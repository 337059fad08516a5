"""csrc/cpu/engram/hashed_embedding*.cpp: hash and gather in one, rows asked for ahead; gradients
summed row by row."""

from transom.backends.native import register

register("hashed_embedding")
register("hashed_embedding_out")
register("hashed_embedding_backward")
register("hashed_embedding_row_gradient")
