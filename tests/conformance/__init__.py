"""The conformance kit: what an implementation must show, generated from the operators'
declarations.

    python -m transom.conformance [--transom-impl NAME] [--transom-device TYPE]
        [--transom-ops a,b] [--transom-examples N] [any option of pytest]

Level 1, requirements: what it accepts runs, what it refuses has a sentence. Level 2, numbers:
against the NumPy float64 reference under one tolerance model (transom.tolerance), over shapes,
dtypes, strides, offsets. Level 3, manners: guard regions intact, inputs unchanged, repeatable bits.
Level 4, torch: opcheck, gradients against finite differences of the reference, compile. Every case
asserts through record() that the implementation under test is the one that ran.
"""
