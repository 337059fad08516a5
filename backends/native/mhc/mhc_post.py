"""csrc/cpu/mhc/mhc_post.cpp and mhc_post_backward.cpp: one pass over the streams each."""

from transom.backends.native import register

register("mhc_post")
register("mhc_post_backward")
