"""The Triton kernels on Ascend, as far as that goes without a device.

What `transom verify --target ascend` runs:

L1  the vendor's frontend (triton-ascend) lowers each kernel, with the arguments and tiles of a call
L2  what it made is run on this processor, every tensor between unreadable pages, and the operator's
    result is compared with its reference
L3  the vendor's compiler (ascendnpu-ir) takes it through its pipeline for a chip, up to the memory
    plan; the closed last step, which makes the binary, is not part of it
L4  what the adapter passes to the vendor's own operators binds to their schemas, and its numbers
    hold when those operators are played by references (tests/ascend)

No binary runs on a device. The tools live in an environment of their own and in child processes, a
compile each: they may crash, and they bring a package called triton that is not Triton's.
"""
