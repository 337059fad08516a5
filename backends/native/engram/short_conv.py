"""csrc/cpu/engram/short_conv*.cpp: some channels of some rows a task, taps from the cache."""

from transom.backends.native import register

register("short_conv")
register("short_conv_backward")
