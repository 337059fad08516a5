"""Memory of large outputs is used again once they have ended, and never before."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import transom
from transom.abi import kept_memory

SIZE = kept_memory.LEAST
pytestmark = pytest.mark.skipif(
    kept_memory._limit() == 0, reason="the system takes no pages back (no MADV_FREE)"
)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(kept_memory, "_kept", [])


def output(size=SIZE):
    return kept_memory.empty((2, size // 8), torch.float32)


def test_the_memory_of_an_ended_output_is_used_again():
    x = output()
    x.fill_(1.0)
    place = x.data_ptr()
    del x
    assert output().data_ptr() == place


@pytest.mark.parametrize(
    "part", [lambda x: x[1, 5:7], lambda x: x.numpy(), lambda x: x.untyped_storage()]
)
def test_what_still_shares_the_memory_keeps_it(part):
    x = output()
    place, rest = x.data_ptr(), part(x)
    del x
    assert output().data_ptr() != place
    del rest
    assert any(output(SIZE).data_ptr() == place for _ in range(2))


def test_an_output_is_what_torch_would_make():
    x = kept_memory.empty((3, 5, SIZE), torch.bfloat16)
    assert x.shape == (3, 5, SIZE) and x.dtype == torch.bfloat16
    assert x.is_contiguous() and x.data_ptr() % 64 == 0 and not x.requires_grad


def test_an_output_begins_with_a_huge_page():
    assert output().data_ptr() % kept_memory.PAGE == 0


def test_a_much_smaller_output_does_not_take_it():
    x = output(8 * SIZE)
    place = x.data_ptr()
    del x
    assert output(SIZE).data_ptr() != place


def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(kept_memory, "_limit", lambda: 2 * SIZE)
    some = [output() for _ in range(5)]
    del some
    assert sum(b.bytes for b in kept_memory._kept) == 2 * SIZE
    large = output(4 * SIZE)
    del large
    assert sum(b.bytes for b in kept_memory._kept) <= 2 * SIZE


def test_many_threads_never_hold_the_same_memory():
    wrong = []

    def work(number):
        for _ in range(50):
            x = output()
            x[0, ::4096] = number
            if not bool((x[0, ::4096] == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork()")
def test_a_forked_child_does_not_write_into_its_parents_memory():
    x = output()
    x.fill_(1.0)
    child = os.fork()
    if child == 0:
        x.numpy()[:] = 2.0  # by numpy: torch's threads do not survive a fork
        del x
        output().numpy()[:] = 3.0
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert bool((x == 1.0).all())


@pytest.mark.usefixtures("by")
def test_calls_of_plugins_use_it(build):
    transom.CPlugin(build())
    x, w = torch.randn(1024, 8), torch.randn(1, 1024, 8)
    offsets = torch.tensor([0, 1024])[1:]
    with transom.use(grouped_gemm="toy"):
        first = transom.grouped_gemm(x, w, offsets)
        want, place = first.clone(), first.data_ptr()
        del first
        second = transom.grouped_gemm(x, w, offsets)
    assert second.data_ptr() == place
    assert torch.equal(second, want)


@pytest.mark.parametrize("text", ["-1", "much", "inf", "nan"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, text):
    monkeypatch.setenv("TRANSOM_KEPT_MB", text)
    with pytest.raises(ValueError, match="TRANSOM_KEPT_MB: value is .*; expected MiB >= 0"):
        kept_memory._limit.__wrapped__()


def test_nothing_is_kept_if_that_is_wanted(monkeypatch):
    monkeypatch.setenv("TRANSOM_KEPT_MB", "0")
    monkeypatch.setattr(kept_memory, "_limit", kept_memory._limit.__wrapped__)
    assert not kept_memory.worth(1 << 40)
