"""csrc/cpu/engram/engram_gate*.cpp: one pass over the streams for the statistics, one for the
output."""

from transom.backends.native import register

register("engram_gate")
register("engram_gate_backward")
