"""Attention on sparse keys, and the indexer that selects them."""
