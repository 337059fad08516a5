"""csrc/cpu/mhc/mhc_head.cpp, one pass over the streams, and mhc_head_backward.cpp, two."""

from transom.backends.native import register

register("mhc_head")
register("mhc_head_backward")
