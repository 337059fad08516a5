"""csrc/cpu/attention/lightning_indexer.cpp: scores from L1 into the list of the best."""

from transom.backends.native import register

register("lightning_indexer")
