"""Sparse attention: the indexer, the compressor, attention over selected entries."""
