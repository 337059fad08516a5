"""csrc/cpu/mhc/mhc_pre.cpp: products and squares of a block of tokens, piece by piece."""

from transom.backends.native import register

register("mhc_pre")
