"""The numba backend: what the kit cannot know of threads, processes, the cache and its numbers."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import transom

REASON = transom.backends()["numba"]
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def module(name):
    return importlib.import_module(f"transom.backends.numba.{name}")


def drawn(seed):
    g = torch.Generator().manual_seed(seed)
    return tuple(functools.partial(f, generator=g) for f in (torch.randn, torch.randint))


def streams(dtype, T=70):
    randn, _ = drawn(1)
    x, fn = randn(T, 4, 300).to(dtype), randn(24, 1200) / 35
    return x, fn, randn(3), randn(24)


def post(dtype, T=70):
    randn, _ = drawn(2)
    return randn(T, 1100).to(dtype), randn(T, 4, 1100).to(dtype), randn(T, 4), randn(T, 4, 4)


def experts(dtype, T=70):
    randn, randint = drawn(3)
    ids = randint(-1, 6, (T, 3))
    gate_up, down = randn(6, 100, 70).to(dtype) / 8, randn(6, 70, 50).to(dtype) / 7
    return randn(T, 70).to(dtype), ids, randn(T, 3), gate_up, down


def gemm(dtype, M=70):
    randn, _ = drawn(4)
    return randn(M, 300).to(dtype), randn(4, 61, 300).to(dtype), torch.tensor([3, 3, 60, M])


def hashed(n=3, h=2):
    randn, randint = drawn(5)
    rows = 11 + 2 * torch.arange((n - 1) * h)
    multipliers = 2 * randint(0, 2**40, (n,)) + 1
    return randint(0, 999, (2, 40)), multipliers, rows.view(n - 1, h), torch.cumsum(rows, 0) - rows


def lookup(dtype):
    tokens, multipliers, moduli, offsets = hashed()
    table = drawn(6)[0](int(moduli.sum()), 40).to(dtype)
    return (tokens, table), dict(multipliers=multipliers, moduli=moduli, offsets=offsets, pad=2)


def attention(dtype, S=40):
    randn, randint = drawn(7)
    q, kv, local = randn(1, S, 5, 48).to(dtype), randn(1, 90, 48).to(dtype), randn(1, S, 48)
    some = dict(visible=torch.arange(S)[None] * 2, local_kv=local.to(dtype), window=9)
    return (q, kv, randint(-1, 90, (1, S, 30))), some


def blocks(dtype, S=40):
    randn, randint = drawn(8)
    q, k, v = randn(1, S, 6, 32).to(dtype), randn(1, 90, 2, 32), randn(1, 90, 2, 24)
    return q, k.to(dtype), v.to(dtype), randint(-1, 12, (1, S, 2, 4))


def indexer(dtype, S=20):
    randn, randint = drawn(9)
    q, k = (randint(-2, 3, (1, n, *d)).to(dtype) for n, d in ((S, (5, 16)), (700, (16,))))
    return (q, k, randn(1, S, 5), 50), dict(visible=torch.full((1, S), 700))


def gate(dtype, T=30):
    randn, _ = drawn(10)
    return *(randn(T, 4, 300).to(dtype) for _ in range(2)), randn(T, 300).to(dtype), randn(4, 300)


def pooled(dtype):
    randn, _ = drawn(11)
    return randn(1, 50, 600).to(dtype), randn(1, 50, 600).to(dtype), randn(4, 600)


MHC = dict(iterations=5, eps=1e-6, rms_eps=1e-6)
CALLS = {
    "ngram_hash": lambda d: ((*hashed()[:3],), dict(pad=2)),
    "hashed_embedding": lookup,
    "route": lambda d: ((drawn(12)[0](70, 90).to(d), 6), dict(score="sqrtsoftplus")),
    "sinkhorn": lambda d: ((drawn(13)[0](70, 4, 4).to(d),), dict(iterations=5, eps=1e-6)),
    "mhc_pre": lambda d: (streams(d), MHC | dict(post_scale=2.0)),
    "mhc_post": lambda d: (post(d), {}),
    "mhc_head": lambda d: (
        (streams(d)[0], streams(d)[1][:4], torch.ones(1), torch.zeros(4)),
        dict(eps=1e-6, rms_eps=1e-6),
    ),
    "engram_gate": lambda d: (gate(d), dict(eps=1e-6)),
    "short_conv": lambda d: ((drawn(14)[0](2, 40, 70).to(d), torch.ones(70, 4)), dict(dilation=3)),
    "compress_kv": lambda d: (pooled(d), dict(overlap=True)),
    "grouped_gemm": lambda d: (gemm(d), {}),
    "moe_experts": lambda d: (experts(d), {}),
    "lightning_indexer": indexer,
    "sparse_attention": attention,
    "block_sparse_attention": lambda d: (blocks(d), dict(block_size=8, causal=True)),
}


def looked_up(d):
    randn, _ = drawn(19)
    (tokens, _), numbers = lookup(d)
    return (randn(2, 40, 4, 40).to(d), tokens), numbers | dict(rows=56)


def compressed(d):
    randn, _ = drawn(20)
    kept = randn(1, 8, 600), randn(1, 8, 600)
    return (*pooled(d), randn(1, 12, 300).to(d), *kept), dict(overlap=True)


def gates(d):
    randn, _ = drawn(21)
    (logits, k), numbers = CALLS["route"](d)
    ids = transom.route(logits, k, **numbers)[0]
    return (randn(70, k), logits, ids), numbers


def convolved(d):
    randn, _ = drawn(22)
    v, dy, kept = randn(2, 40, 300).to(d), randn(2, 40, 300).to(d), randn(2, 9, 300).to(d)
    return (dy, kept, v, randn(300, 4)), dict(dilation=3)


def attended(d):
    (q, kv, indices), some = attention(d)
    o, lse = transom.sparse_attention(q, kv, indices, **some, return_lse=True)
    randn, _ = drawn(28)
    given = randn(o.shape).to(d), randn(lse.shape), q, kv, indices, some["visible"]
    numbers = dict(window=some["window"], scale=48**-0.5)
    return (*given, some["local_kv"], randn(5), None, o, lse), numbers


def cached(dtype, row_bytes=584, S=12):
    randn, randint = drawn(29)
    rows = operator("pack_cache_rows")(randn(1, 90, 512) / 8, row_bytes=row_bytes)
    q, local = randn(1, S, 5, 512).to(dtype), randn(1, S, 512).to(dtype)
    some = dict(visible=torch.arange(S)[None] * 8, local_kv=local, window=5)
    return (q, rows, randint(-1, 90, (1, S, 30))), some | dict(scale=512**-0.5, v_dim=512)


def divergence(dtype, S=20):
    randn, randint = drawn(30)
    (q, k, weights, _), _ = indexer(dtype, S)
    q, k = randn(q.shape).to(dtype), randn(k.shape).to(dtype)
    target = randn(1, S, 90).abs() * (randn(1, S, 90) > -1)
    indices = randint(-2, 720, (1, S, 90))
    return (q, k, weights, target / target.sum(2, keepdim=True), indices), {}


def blocks_gradient(d):
    q, k, v, lists = blocks(d)
    how = dict(block_size=8, causal=True)
    o, lse = transom.block_sparse_attention(q, k, v, lists, **how, return_lse=True)
    randn, _ = drawn(31)
    given = randn(o.shape).to(d), randn(lse.shape), q, k, v, lists, randn(6), o, lse
    return given, how | dict(scale=32**-0.5)


def mixed(d):
    randn, _ = drawn(23)
    return randn(70, 300).to(d), randn(70, 4), randn(70, 4, 4)


CALLS |= {
    "block_sparse_attention_backward": blocks_gradient,
    "sparse_attention_rows": cached,
    "lightning_indexer_kl": divergence,
    "lightning_indexer_kl_backward": lambda d: ((*divergence(d)[0], drawn(32)[0](1, 20)), {}),
    "sparse_attention_backward": attended,
    "hashed_embedding_pooled": lookup,
    "hashed_embedding_backward": looked_up,
    "hashed_embedding_backward_rows": looked_up,
    "route_backward": gates,
    "sinkhorn_backward": lambda d: (
        (drawn(24)[0](70, 4, 4), drawn(13)[0](70, 4, 4).to(d)),
        dict(iterations=5, eps=1e-6),
    ),
    "mhc_pre_backward": lambda d: ((*mixed(d), *streams(d)), MHC | dict(post_scale=2.0)),
    "mhc_post_backward": lambda d: ((drawn(25)[0](70, 4, 1100).to(d), *post(d)), {}),
    "mhc_head_backward": lambda d: (
        (mixed(d)[0], *CALLS["mhc_head"](d)[0]),
        dict(eps=1e-6, rms_eps=1e-6),
    ),
    "engram_gate_backward": lambda d: ((drawn(26)[0](30, 4, 300).to(d), *gate(d)), dict(eps=1e-6)),
    "short_conv_backward": convolved,
    "compress_kv_backward": compressed,
}
EVERY = pytest.mark.parametrize("op", CALLS)


def operator(name):
    return getattr(transom, name, None) or transom.ops()[name]


def tensors(value):
    """The tensors of a result, those of a state included."""
    if isinstance(value, tuple):
        return [t for part in value for t in tensors(part)]
    return [value.kv, value.gate] if hasattr(value, "nbytes") and hasattr(value, "kv") else [value]


def run(op, dtype=torch.float32, impl="numba", call=None):
    args, kwargs = call or CALLS[op](dtype)
    with transom.use(**{op: impl}), transom.record() as calls:
        out = operator(op)(*args, **kwargs)
    assert [c.impl for c in calls if c.op == op] == [impl]
    return tensors(out)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def fresh(code, **environment):
    """What a fresh process prints; it is given this file's calls."""
    head = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
    head += "import os, torch, transom, test_numba as t\n"
    done = subprocess.run(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def threads(monkeypatch):
    """Sets torch's number of threads for the test, and lets the smallest calls use them."""
    monkeypatch.setattr(module("_pool"), "GRAIN", 1)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Selection --------------------------------------------------------------------------------------


def test_it_is_chosen_where_there_is_no_native_library():
    out = fresh(
        """
        for op in t.CALLS:
            args, kwargs = t.CALLS[op](torch.float32)
            print(transom.explain(op, *args, **kwargs).chosen)
        """,
        TRANSOM_NATIVE_LEVEL="none",
    )
    assert out.split() == ["numba"] * len(CALLS)


def test_it_is_found_without_importing_numba():
    out = fresh("print(transom.backends()['numba'], 'numba' in sys.modules)")
    assert out.split() == ["None", "False"]


def test_without_numba_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert importlib.import_module("transom.backends.numba").probe() == (
        "numba is not installed; expected numba >= 0.60; pip install transom[numba]"
    )


# Threads and processes --------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_at_any_number_of_threads(threads, op, dtype):
    threads(1)
    one = run(op, dtype)
    for n in (2, 5):
        threads(n)
        assert same(run(op, dtype), one)


@EVERY
def test_several_threads_may_call_at_once(threads, op):
    threads(2)
    want = run(op)
    args, kwargs = CALLS[op](torch.float32)

    def call(_):
        return tensors(operator(op)(*args, **kwargs))

    with transom.use(**{op: "numba"}), ThreadPoolExecutor(4) as pool:
        assert all(same(found, want) for found in pool.map(call, range(16)))


def test_threads_may_compile_at_once(tmp_path):
    out = fresh(
        """
        (x,), numbers = t.CALLS["sinkhorn"](torch.float32)
        with transom.use("numba"), t.ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda _: transom.sinkhorn(x, **numbers), range(4)))
        print(all(torch.equal(f, found[0]) for f in found))
        """,
        TRANSOM_CACHE=str(tmp_path),
    )
    assert out.split() == ["True"]


def test_a_forked_child_computes_the_same():
    out = fresh(
        """
        t.module("_pool").GRAIN = 1
        torch.set_num_threads(2)
        call = t.CALLS["moe_experts"](torch.float32)  # torch's own large operations hang in a child
        want = t.run("moe_experts", call=call)
        child = os.fork()
        if child == 0:
            os._exit(0 if t.same(t.run("moe_experts", call=call), want) else 1)
        print(os.waitpid(child, 0)[1])
        """
    )
    assert out.split() == ["0"]


def test_the_threads_are_those_of_torch():
    out = fresh(
        """
        t.module("_pool").GRAIN = 1
        torch.set_num_threads(3)
        before = len(os.listdir("/proc/self/task"))
        t.run("sinkhorn")
        print(len(os.listdir("/proc/self/task")) - before)
        big = torch.randn(400, 400); big @ big; torch.randn(1 << 20).sin()
        print(len(os.listdir("/proc/self/task")) - before)
        """
    )
    assert out.split() == ["2", "2"]


# The cache --------------------------------------------------------------------------------------

COUNTS = """
t.run("sinkhorn")
stats = t.module("mhc.sinkhorn")._run.stats
print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
"""


def test_machine_code_is_kept_for_later_processes(tmp_path):
    assert fresh(COUNTS, TRANSOM_CACHE=str(tmp_path), NUMBA_CACHE_DIR="").split() == ["0", "1"]
    assert fresh(COUNTS, TRANSOM_CACHE=str(tmp_path), NUMBA_CACHE_DIR="").split() == ["1", "0"]


def test_without_a_folder_to_write_each_process_compiles(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    shown = fresh(
        """
        import warnings
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            t.run("sinkhorn")
        print(*[w.message for w in seen])
        """,
        TRANSOM_CACHE=str(file),
        NUMBA_CACHE_DIR="",
    )
    assert shown.count("are compiled anew in each process") == 1
    assert "cannot be written" in shown and "set TRANSOM_CACHE to a folder of yours" in shown


# What a result may not depend on ----------------------------------------------------------------


@pytest.mark.parametrize(
    "op", ["mhc_pre", "mhc_post", "mhc_head", "sinkhorn", "route", "engram_gate"]
)
def test_a_token_has_the_same_bits_alone_and_among_others(op):
    args, kwargs = CALLS[op](torch.bfloat16)
    count = args[0].shape[0]
    together = run(op, torch.bfloat16)
    for t in (0, 17, count - 1):
        alone = [
            a[t : t + 1] if isinstance(a, torch.Tensor) and a.shape[:1] == (count,) else a
            for a in args
        ]
        with transom.use(**{op: "numba"}):
            found = tensors(getattr(transom, op)(*alone, **kwargs))
        assert same(found, [y[t : t + 1] for y in together])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_deterministic_algorithms_a_token_of_experts_too(dtype):
    x, ids, weights, *stacks = experts(dtype)
    torch.use_deterministic_algorithms(True)
    try:
        with transom.use("numba"):
            together = transom.moe_experts(x, ids, weights, *stacks)
            for t in (0, 17, 69):
                one = slice(t, t + 1)
                alone = transom.moe_experts(x[one], ids[one], weights[one], *stacks)
                assert torch.equal(alone[0], together[t])
    finally:
        torch.use_deterministic_algorithms(False)


def test_pieces_of_the_tokens_give_the_same_bits(monkeypatch):
    torch.use_deterministic_algorithms(True)
    try:
        want = run("moe_experts")
        monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.05")
        assert same(run("moe_experts"), want)
        monkeypatch.delenv("TRANSOM_WORKSPACE_MB")
        want = run("grouped_gemm", torch.bfloat16)
        monkeypatch.setenv("TRANSOM_WORKSPACE_MB", "0.05")
        assert same(run("grouped_gemm", torch.bfloat16), want)
    finally:
        torch.use_deterministic_algorithms(False)


def close(op, got, args, kwargs, limit):
    with transom.use(**{op: "reference"}):
        want = tensors(operator(op)(*args, **kwargs))
    for a, b in zip(got, want, strict=True):
        top = max(1.0, float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()))
        torch.testing.assert_close(a, b, rtol=0, atol=limit * top, equal_nan=True)


def checked(op, *args, limit=2e-5, **kwargs):
    with transom.use(**{op: "numba"}):
        got = tensors(operator(op)(*args, **kwargs))
    close(op, got, args, kwargs, limit)
    return got


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "mxfp4"])
@pytest.mark.parametrize("rows", [1, 5, 40, 300])
def test_quantised_weights_in_both_ways_of_multiplying(format, rows):
    randn, _ = drawn(15)
    weight = transom.quantize(randn(2, 50, 96), format)
    x, offsets = randn(rows + 1, 96), torch.tensor([1, rows + 1])
    checked("grouped_gemm", x, weight, offsets)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 32, 33, 64, 257])
def test_every_number_of_rows_and_columns_near_a_tile(count):
    randn, _ = drawn(16)
    x, weight = randn(count, 40), randn(1, count, 40)
    checked("grouped_gemm", x, weight, torch.tensor([count]))
    checked("grouped_gemm", x[:, :1], weight[:, :, :1], torch.tensor([count]))


def test_a_transposed_weight_is_read_where_it_stands():
    x, weight, offsets = gemm(torch.bfloat16)
    stored = weight.transpose(1, 2).contiguous().transpose(1, 2)
    with transom.use("numba"):
        assert torch.equal(
            transom.grouped_gemm(x, stored, offsets), transom.grouped_gemm(x, weight, offsets)
        )


@pytest.mark.parametrize("length", [1023, 1024, 1025, 2500])
def test_lists_that_are_cut_into_parts(length):
    randn, randint = drawn(17)
    q, kv = randn(1, 2, 3, 40), randn(1, 3000, 40)
    indices = randint(-1, 3000, (1, 2, length))
    near = randn(1, 300, 40)
    checked("sparse_attention", q, kv, indices, local_kv=near, window=200, return_lse=True)
    checked("sparse_attention", q, kv, None, return_lse=True, visible=torch.tensor([[0, length]]))


def test_gradients_over_lists_that_are_cut_into_parts(monkeypatch):
    monkeypatch.setattr(module("attention._sparse_attention_backward"), "HELD", 1 << 20)
    randn, randint = drawn(27)
    q, kv, near = randn(2, 6, 3, 40), randn(2, 1500, 40), randn(2, 20, 40)
    visible, some = randint(0, 1501, (2, 6)), dict(local_kv=near, window=5, v_dim=24)
    o, lse = transom.sparse_attention(q, kv, visible=visible, **some, return_lse=True)
    sinks = torch.full((3,), -torch.inf)
    given = randn(2, 6, 3, 24), randn(2, 6, 3), q, kv, None, visible, near, sinks, None, o, lse
    checked("sparse_attention_backward", *given, window=5, scale=40**-0.5)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_queries_that_share_a_list(monkeypatch, causal):
    chosen = module("attention._block_sparse_attention_backward")
    for name, value in (("MOST", 16), ("SPLIT", 24), ("HELD", 1 << 15)):
        monkeypatch.setattr(chosen, name, value)
    q, k, v, _ = (t.expand(2, *t.shape[1:]) for t in blocks(torch.float32, 45))
    randn, randint = drawn(33)
    lists = randint(-1, 12, (2, 6, 2, 5))
    how = dict(block_size=8, causal=causal, scale=32**-0.5)
    o, lse = transom.block_sparse_attention(q, k, v, lists, **how, return_lse=True)
    given = randn(o.shape), randn(lse.shape), q, k, v, lists, randn(6), o, lse
    checked("block_sparse_attention_backward", *given, **how)


def test_the_gradient_of_a_key_that_is_not_finite_is_that_of_who_sees_it():
    q, k, v, _ = blocks(torch.float32, 16)
    k, v, lists = k[:, :16].clone(), v[:, :16], torch.tensor([[[[0, 1]] * 2] * 2])
    how = dict(block_size=8, causal=True)
    o, lse = transom.block_sparse_attention(q, k, v, lists, **how, return_lse=True)
    k[:, 13] = float("nan")
    given = torch.ones_like(o), torch.zeros_like(lse), q, k, v, lists, torch.zeros(6), o, lse
    with transom.use("numba"):
        dq, *_ = operator("block_sparse_attention_backward")(*given, **how, scale=0.2)
    assert dq[:, :13].isfinite().all() and dq[:, 13:].isnan().all()


@pytest.mark.parametrize("row_bytes", [584, 288])
def test_packed_rows_are_read_by_their_strides(row_bytes):
    (q, rows, indices), some = cached(torch.float32, row_bytes)
    wide = torch.full((1, 90, 600), 255, dtype=torch.uint8)
    wide[..., 3 : 3 + row_bytes] = rows
    checked("sparse_attention_rows", q, wide[..., 3 : 3 + row_bytes], indices, **some)


def test_rows_behind_no_index_are_never_read():
    (q, kv, indices), some = attention(torch.float32)
    kept = torch.zeros(90, dtype=torch.bool)
    kept[indices[(indices >= 0) & (indices < some["visible"][..., None])]] = True
    clean, dirty = kv.clone(), kv.clone()
    clean[:, ~kept], dirty[:, ~kept] = 0, float("nan")
    with transom.use("numba"):
        a = transom.sparse_attention(q, clean, indices, **some)
        assert torch.equal(transom.sparse_attention(q, dirty, indices, **some), a)


def test_a_token_that_some_queries_of_a_block_do_not_see_is_theirs_alone():
    q, k, v, _ = blocks(torch.float32, 16)
    k, v = k[:, :16].clone(), v[:, :16].clone()
    v[:, 11], k[:, 13] = float("nan"), float("inf")
    lists = torch.tensor([[[[0, 1]] * 2] * 2])
    with transom.use("numba"):
        o = transom.block_sparse_attention(q, k, v, lists, block_size=8, causal=True)
    assert o[:, :11].isfinite().all() and o[:, 11:].isnan().all()


def test_equal_keys_are_selected_by_the_lowest_index():
    q, k = torch.ones(1, 1, 1, 8), torch.ones(1, 5000, 8)
    k[0, 4000:] = 2
    weights, visible = torch.ones(1, 1, 1), torch.tensor([[4500]])
    with transom.use("numba"):
        (found,) = transom.lightning_indexer(q, k, weights, 600, visible=visible)[0]
    assert found.tolist() == [*range(100), *range(4000, 4500)]


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "topk_softmax"])
@pytest.mark.parametrize("E", [5, 64, 97])
def test_equal_logits_are_chosen_in_order(score, E):
    logits = torch.full((3, E), 0.37)
    with transom.use("numba"):
        ids, weights = transom.route(logits, 5, score=score)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 3 and (weights == weights[0, 0]).all()


# What it declines -------------------------------------------------------------------------------


@EVERY
def test_float64_is_declined_with_a_sentence(op):
    args, kwargs = CALLS[op](torch.float64)
    if op == "ngram_hash":
        pytest.skip("has no float input")
    if op == "hashed_embedding":  # copies rows of any dtype
        assert run(op, torch.float64)[0].dtype == torch.float64
        return
    args = [
        a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    ]
    reasons = transom.explain(op, *args, **kwargs).rejected["numba"]
    assert "is float64; supported: float32, bfloat16, float16" in reasons[0]


def test_what_it_cannot_read_in_place_is_declined_with_a_sentence():
    (q, kv, indices), some = attention(torch.float32)
    apart = torch.empty(*kv.shape[:2], 2 * kv.shape[2])[..., ::2].copy_(kv)
    (shown,) = transom.explain("sparse_attention", q, apart, indices, **some).rejected["numba"]
    assert shown.startswith("kv is not last dim of stride 1; supported: a last dim of stride 1")
    weight = transom.quantize(drawn(18)[0](2, 50, 64), "int8")
    parts = weight.values.transpose(0, 1).contiguous().transpose(0, 1)
    strided = transom.QuantizedWeight("int8", parts, weight.scales)
    (shown,) = transom.explain(
        "grouped_gemm", torch.ones(3, 64), strided, torch.tensor([1, 3])
    ).rejected["numba"]
    assert shown.startswith("weight holds parts that are not contiguous; supported: contiguous")
