"""csrc/cpu/attention/compress_kv*.cpp: the gates of an entry in L1, every sum in one order."""

from transom.backends.native import register

register("compress_kv")
register("compress_kv_backward")
