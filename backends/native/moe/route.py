"""csrc/cpu/moe/route.cpp, a token in L1, and route_backward.cpp, the chosen logits only."""

from transom.backends.native import register

register("route")
register("route_backward")
