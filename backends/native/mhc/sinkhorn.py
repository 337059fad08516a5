"""csrc/cpu/mhc/sinkhorn.cpp, a token in each place of a vector, and sinkhorn_backward.cpp."""

from transom.backends.native import register

register("sinkhorn")
register("sinkhorn_backward")
