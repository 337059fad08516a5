"""Tasks on the threads of the OpenMP pool that torch has loaded.

`for_each(task, count, threads, args)` inside a kernel calls task(i, thread, *args) for each i below
`count`; `thread` is below `threads` and no two tasks that run at once have the same. Tasks are
handed out by a counter, one by one: what a task computes must not depend on its thread. A task must
not raise.
"""

from __future__ import annotations

import ctypes
import os

import torch
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.extending import intrinsic

_SYMBOL = "transom_numba_parallel"
_WORD = ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()

# libgomp's threads do not survive fork(), and it waits for them forever: a child stays serial.
_forked = False


def _in_child() -> None:
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_in_child)

# libgomp and libomp both have this entry, and torch loads one of them under a name of its own. It
# is looked up by its name and not linked: a second library would be a second pool.
_pool = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
_address = ctypes.cast(_pool or ctypes.CDLL(None).abort, ctypes.c_void_p).value
binding.add_symbol(_SYMBOL, _address)


GRAIN = 1 << 15
"""Elements below which waking another thread costs more than it saves; at::internal::GRAIN_SIZE."""


def threads(elements: int) -> int:
    """How many threads a call that touches so many elements uses: at most torch's number, and 1
    where there is no pool."""
    if _forked or _pool is None:
        return 1
    return max(1, min(torch.get_num_threads(), elements // GRAIN))


@intrinsic
def for_each(typingctx, task, count, threads, args):
    """task(i, thread, *args) for i in 0..count-1, on up to `threads` threads."""
    if not isinstance(task, types.Dispatcher) or not isinstance(args, types.BaseTuple):
        return None
    wanted = (types.int64, types.int64, *args.types)
    inner = task.get_call_type(typingctx, wanted, {})

    def generate(context, builder, signature, values):
        compiled = task.dispatcher.overloads[tuple(inner.args)]
        context.add_linking_libs([compiled.library])
        bare = _without_owner(context, builder, args, values[3])
        given = cgutils.unpack_tuple(builder, bare, len(args.types))
        job = ir.LiteralStructType([_WORD, _WORD, _WORD, *(v.type for v in given)])
        place = cgutils.alloca_once(builder, job)
        zero = ir.Constant(_WORD, 0)
        for i, value in enumerate((zero, zero, values[1], *given)):
            builder.store(value, cgutils.gep_inbounds(builder, place, 0, i))
        body = _body(context, builder.module, job, inner, compiled.fndesc)
        data = builder.bitcast(place, _BYTES)
        many = builder.icmp_signed("<", values[2], values[1])
        used = builder.select(many, values[2], values[1])
        with builder.if_else(builder.icmp_signed("<=", used, ir.Constant(_WORD, 1))) as (one, more):
            with one:
                builder.call(body, [data])
            with more:
                number = ir.IntType(32)
                entry = ir.FunctionType(ir.VoidType(), [body.type, _BYTES, number, number])
                start = cgutils.get_or_insert_function(builder.module, entry, _SYMBOL)
                builder.call(start, [body, data, builder.trunc(used, number), number(0)])
        return context.get_dummy_value()

    return types.void(task, types.int64, types.int64, args), generate


def _without_owner(context, builder, kind, value):
    """The value with arrays that nobody counts references to: the caller holds them while tasks
    run, and a count that all threads write for every slice would cost more than most tasks."""
    if isinstance(kind, types.BaseTuple):
        for i, of in enumerate(kind.types):
            inner = builder.extract_value(value, i)
            value = builder.insert_value(value, _without_owner(context, builder, of, inner), i)
        return value
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        array.parent = cgutils.get_null_value(array.parent.type)
        return array._getvalue()
    return value


def _body(context, module, job, inner, description):
    """What each thread runs: void(void *job), taking tasks from the job's counter."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTES])
    body = ir.Function(module, kind, module.get_unique_name("transom_tasks"))
    body.linkage = "internal"
    builder = ir.IRBuilder(body.append_basic_block("entry"))
    place = builder.bitcast(body.args[0], job.as_pointer())
    following, arrived, count, *rest = (
        cgutils.gep_inbounds(builder, place, 0, i) for i in range(len(job.elements))
    )
    one = ir.Constant(_WORD, 1)
    thread = builder.atomic_rmw("add", arrived, one, "monotonic")
    count, rest = builder.load(count), [builder.load(part) for part in rest]
    again, work, done = (body.append_basic_block(name) for name in ("again", "work", "done"))
    builder.branch(again)
    builder.position_at_end(again)
    i = builder.atomic_rmw("add", following, one, "monotonic")
    builder.cbranch(builder.icmp_signed("<", i, count), work, done)
    builder.position_at_end(work)
    context.call_internal_no_propagate(builder, description, inner, [i, thread, *rest])
    builder.branch(again)
    builder.position_at_end(done)
    builder.ret_void()
    return body
