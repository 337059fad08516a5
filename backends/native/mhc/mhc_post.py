"""csrc/cpu/mhc/mhc_post.cpp: one pass over the streams."""

from transom.backends.native import register

register("mhc_post")
