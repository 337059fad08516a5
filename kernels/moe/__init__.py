"""Mixture of experts: routing, grouped matrix products, the expert block."""
