"""Quantised weights: int8, int4, fp8 E4M3 and mxfp4."""
