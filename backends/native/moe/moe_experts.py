"""csrc/cpu/moe/moe_experts.cpp: sorted by expert, activation in the thread's tile, ordered sum."""

from transom.backends.native import register

register("moe_experts")
