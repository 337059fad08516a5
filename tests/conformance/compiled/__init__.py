"""Triton kernels, compiled ahead of time without a device: `transom verify --compile`.

compile.py finds what operators launch and compiles it, figures.py says which launches are compiled
and keeps what compilers said of them, command.py is the command.
"""
