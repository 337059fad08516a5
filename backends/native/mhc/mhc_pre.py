"""csrc/cpu/mhc/mhc_pre.cpp: one pass over the streams with fn and Sinkhorn; its gradient, two."""

from transom.backends.native import register

register("mhc_pre")
register("mhc_pre_backward")
