"""Memory of large outputs is used again once they have ended, and never before."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import transom
from transom.abi import output_memory

SIZE = output_memory.LEAST
pytestmark = pytest.mark.skipif(
    output_memory._limit() == 0, reason="the system takes no pages back (no MADV_FREE)"
)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(output_memory, "_free", [])
    monkeypatch.setattr(output_memory, "_shared", [])


def output(size=SIZE):
    return output_memory.empty((2, size // 8), torch.float32)


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
    both = output(), output()
    assert place in [x.data_ptr() for x in both]


def test_an_output_is_what_torch_would_make():
    x = output_memory.empty((3, 5, SIZE), torch.bfloat16)
    assert x.shape == (3, 5, SIZE) and x.dtype == torch.bfloat16
    assert x.is_contiguous() and x.data_ptr() % 64 == 0 and not x.requires_grad


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.resize_(4, SIZE),
        lambda x: x.untyped_storage().resize_(0),
        lambda x: torch.add(torch.ones(4, SIZE), 1, out=x),
        lambda x: x.set_(torch.zeros(3)),
        lambda x: x.share_memory_(),
    ],
    ids=["larger", "freed", "out=", "another storage", "shared"],
)
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_an_output_is_an_ordinary_tensor(change):
    x = output()
    assert x.untyped_storage().nbytes() == SIZE // 8 * 8
    change(x)
    others = [output().fill_(3.0) for _ in range(3)]
    del x
    others += [output().fill_(5.0) for _ in range(3)]
    assert all(bool((y == y[0, 0]).all()) for y in others)
    assert len({y.data_ptr() for y in others}) == 6


def test_what_was_saved_for_a_gradient_keeps_it():
    x = output().fill_(2.0)
    w = torch.ones(x.shape, requires_grad=True)
    y = (x * w).sum()
    del x
    others = [output().fill_(7.0) for _ in range(2)]
    y.backward()
    assert others and bool((w.grad == 2.0).all())


def test_a_much_smaller_output_does_not_take_it():
    x = output(8 * SIZE)
    place = x.data_ptr()
    del x
    assert output(SIZE).data_ptr() != place


def test_no_more_is_kept_than_the_limit(monkeypatch):
    monkeypatch.setattr(output_memory, "_limit", lambda: 2 * SIZE)
    some = [output() for _ in range(5)]
    del some
    assert sum(b.bytes for b in output_memory._free) == 2 * SIZE
    large = output(4 * SIZE)
    del large
    assert sum(b.bytes for b in output_memory._free) <= 2 * SIZE


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
        output_memory._limit.__wrapped__()


def test_nothing_is_kept_if_that_is_wanted(monkeypatch):
    monkeypatch.setenv("TRANSOM_KEPT_MB", "0")
    monkeypatch.setattr(output_memory, "_limit", output_memory._limit.__wrapped__)
    assert not output_memory.worth((1 << 30,), torch.float32)
