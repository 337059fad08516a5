"""Attention with a state of fixed size: the gated delta rule."""
