"""A matrix product's innermost tile, in vectors: the one piece that is written for LLVM directly.

    c[i, n] (+)= sum_k a[i, k] * b[k, n]        n < LANES, i < rows <= ROWS

Each element's sum runs over k in order, whatever the tile: how a product is cut into tiles changes
no result.
"""

from __future__ import annotations

from llvmlite import ir
from numba.core import cgutils, types
from numba.core import config as numba_config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

_asked = numba_config.CPU_FEATURES
_FEATURES = (get_host_cpu_features() if _asked is None else _asked).split(",")
# c's vectors and two of b must fit the registers: 32 of 512 bits (AVX-512), 16 of 256 (AVX2), 32 of
# 128 (NEON), 16 of 128 (SSE).
_WIDTH = 16 if "+avx512f" in _FEATURES else 8 if "+avx2" in _FEATURES else 4
ROWS = 8 if "+avx512f" in _FEATURES or "+neon" in _FEATURES else 6
LANES = 2 * _WIDTH


@intrinsic
def product(typingctx, a, a_at, a_row, a_step, b, b_at, b_row, c, c_at, c_row, rows, size, add):
    """One tile: a[a_at + i*a_row + k*a_step], b[b_at + k*b_row + n], c[c_at + i*c_row + n].

    a, b, c are C arrays of float32, addressed as if flat; size is the number of k; add: c is added
    to, else overwritten. No check of bounds: LANES elements of b and c are touched in each row.
    """
    word = types.int64
    return types.void(a, word, word, word, b, word, word, c, word, word, word, word, add), _generate


def _generate(context, builder, signature, values):
    def start(n):
        array = context.make_array(signature.args[n])(context, builder, values[n])
        return builder.gep(array.data, [values[n + 1]])

    a, b, c = start(0), start(4), start(7)
    a_row, a_step, b_row, c_row, rows, size, add = (values[n] for n in (2, 3, 6, 9, 10, 11, 12))
    word, number = ir.IntType(64), ir.FloatType()
    vector = ir.VectorType(number, _WIDTH)
    fused = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{_WIDTH}f32"
    )
    last = builder.sub(rows, word(1))
    places = []
    for i in range(ROWS):  # a tile short of rows repeats its last one
        row = builder.select(builder.icmp_signed("<", word(i), last), word(i), last)
        places.append(builder.gep(a, [builder.mul(row, a_row)]))

    def load(place):
        return builder.load(builder.bitcast(place, vector.as_pointer()), align=4)

    before = builder.block
    loop, after = (builder.append_basic_block(name) for name in ("product", "product_end"))
    builder.cbranch(builder.icmp_signed(">", size, word(0)), loop, after)

    builder.position_at_end(loop)
    k = builder.phi(word)
    k.add_incoming(word(0), before)
    zero = ir.Constant(vector, [0.0] * _WIDTH)
    sums = [builder.phi(vector) for _ in range(2 * ROWS)]
    for s in sums:
        s.add_incoming(zero, before)
    line = builder.gep(b, [builder.mul(k, b_row)])
    left, right = load(line), load(builder.gep(line, [word(_WIDTH)]))
    step, following = builder.mul(k, a_step), []
    mask = ir.Constant(ir.VectorType(ir.IntType(32), _WIDTH), [0] * _WIDTH)
    for i in range(ROWS):
        x = builder.load(builder.gep(places[i], [step]))
        one = builder.insert_element(ir.Constant(vector, ir.Undefined), x, ir.IntType(32)(0))
        every = builder.shuffle_vector(one, one, mask)
        following.append(builder.call(fused, [every, left, sums[2 * i]]))
        following.append(builder.call(fused, [every, right, sums[2 * i + 1]]))
    again = builder.add(k, word(1))
    k.add_incoming(again, loop)
    for s, new in zip(sums, following, strict=True):
        s.add_incoming(new, loop)
    builder.cbranch(builder.icmp_signed("<", again, size), loop, after)

    builder.position_at_end(after)
    totals = []
    for new in following:
        total = builder.phi(vector)
        total.add_incoming(zero, before)
        total.add_incoming(new, loop)
        totals.append(total)
    for i in range(ROWS):
        with builder.if_then(builder.icmp_signed("<", word(i), rows)):
            place = builder.gep(c, [builder.mul(word(i), c_row)])
            for half in range(2):
                target = builder.gep(place, [word(half * _WIDTH)])
                total = totals[2 * i + half]
                held = builder.select(add, load(target), zero)
                builder.store(
                    builder.fadd(total, held), builder.bitcast(target, vector.as_pointer()), align=4
                )
    return context.get_dummy_value()
