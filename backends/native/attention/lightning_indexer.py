"""csrc/cpu/attention/lightning_indexer*.cpp: scores from L1 into the list of the best; the loss."""

from transom.backends.native import register

register("lightning_indexer")
register("lightning_indexer_kl")
register("lightning_indexer_kl_backward")
