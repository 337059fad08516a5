"""csrc/cpu/moe/moe_experts.cpp: gate and up, activation, down, sum; and the gradients."""

from transom.backends.native import register

register("moe_experts")
register("moe_experts_backward")
register("moe_experts_weight_backward")
