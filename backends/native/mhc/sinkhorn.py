"""csrc/cpu/mhc/sinkhorn.cpp: a token in each place of a vector, through all steps."""

from transom.backends.native import register

register("sinkhorn")
