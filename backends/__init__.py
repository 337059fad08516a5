"""How operators are computed: one folder a backend, the same relative paths as kernels/.

A backend's __init__ has DEVICES (the torch device types it serves) and probe() -> None, or the
sentence why it cannot be used on this machine. Its modules are imported when a call first needs
them.
"""
