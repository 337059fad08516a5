"""Engram: hashed n-gram embeddings and their gate."""
