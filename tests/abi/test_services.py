"""Services of a plugin in C: packed forms of weights, a device's memory."""

from __future__ import annotations

import ctypes
import gc

import pytest
import torch

import transom
from transom.abi import services


@pytest.fixture
def call(build, by):
    """A function: the form that a call of packs.c was given (None: none), and how many it made."""
    transom.CPlugin(build(file="packs.c"))
    x, offsets = torch.ones(6, 32), torch.tensor([2, 2, 5])

    def seen(weight, gradient=False):
        with transom.use(grouped_gemm="packs"), torch.set_grad_enabled(gradient):
            y = transom.grouped_gemm(x, weight, offsets[: weight.shape[0]]).flatten()
        form, made = y[0].item(), int(y[1])
        return None if form == -1 else form, made

    return seen


def weight(value=3.0, experts=3):
    return torch.nn.Parameter(torch.full((experts, 5, 32), value))


def test_a_weight_is_packed_when_it_comes_again(call):
    w = weight()
    assert [call(w) for _ in range(3)] == [(None, 0), (6.0, 1), (6.0, 1)]


def test_a_weight_of_one_call_is_not_packed(call):
    w = weight()
    assert [call(w.detach()) for _ in range(4)] == [(None, 0)] * 4


def test_a_weight_that_the_library_packs_in_no_bytes_is_used_as_it_is(call):
    w = weight(experts=1)
    assert [call(w) for _ in range(3)] == [(None, 0)] * 3


def test_a_quantised_weight_is_packed(call):
    w = transom.quantize(torch.ones(3, 5, 32), "int8")
    scale = w.scales.flatten()[0].item()
    assert [call(w) for _ in range(2)] == [(None, 0), (pytest.approx(2 * scale), 1)]
    w.scales.mul_(2)
    assert [call(w)[0] for _ in range(2)] == [None, pytest.approx(4 * scale)]


@torch.no_grad()
def other_storage(w):
    w.data = torch.full_like(w, 5.0)


@torch.no_grad()
def in_place(w):
    w.fill_(5.0)


def loaded(w):
    module = torch.nn.Module()
    module.w = w
    module.load_state_dict({"w": torch.full_like(w, 5.0)})


@pytest.mark.parametrize("change", [other_storage, in_place, loaded])
def test_a_changed_weight_loses_its_packed_form(call, change):
    w = weight()
    assert [call(w)[0] for _ in range(2)] == [None, 6.0]
    change(w)
    assert [call(w)[0] for _ in range(3)] == [None, 10.0, 10.0]


def test_another_storage_at_the_address_of_the_last_is_another_weight(call):
    w = weight()
    call(w), call(w)
    with torch.no_grad():
        for value in (5.0, 7.0, 9.0, 11.0):
            w.data = torch.full_like(w, value)
            assert call(w)[0] in (None, 2 * value)


def test_a_differentiated_call_drops_the_packed_form(call):
    """Training may change weights behind the version counter, as sharded parameters do."""
    w = weight()
    assert [call(w)[0] for _ in range(2)] == [None, 6.0]
    assert call(w, gradient=True)[0] is None
    assert [call(w)[0] for _ in range(2)] == [None, 6.0]


def test_a_weight_without_a_version_is_not_packed(call):
    with torch.inference_mode():
        w = torch.full((3, 5, 32), 3.0)
    assert [call(w)[0] for _ in range(3)] == [None] * 3


def test_a_packed_form_goes_with_its_weight(call):
    packed = transom.grouped_gemm.impls["packs"].function.packed
    w = weight()
    call(w), call(w)
    assert len(packed._seen) == 1
    del w
    gc.collect()
    assert not packed._seen


def test_packing_that_fails_is_an_error_of_the_call(build, by):
    transom.CPlugin(build("PACK_FAILS", file="packs.c"))
    x, offsets, w = torch.ones(6, 32), torch.tensor([2, 2, 5]), weight()
    with transom.use(grouped_gemm="packs"), torch.no_grad():
        transom.grouped_gemm(x, w, offsets)
        with pytest.raises(transom.NotSupported, match="cannot pack this"):
            transom.grouped_gemm(x, w, offsets)


def test_a_device_is_served(build):
    device = transom.CPlugin(build(file="packs.c")).services
    text, back = ctypes.create_string_buffer(b"over and back", 14), ctypes.create_string_buffer(14)
    address = device.allocate(14)
    assert address % 64 == 0
    device.copy(address, ctypes.addressof(text), 14, services.TO_DEVICE)
    device.copy(ctypes.addressof(back), address, 14, services.FROM_DEVICE)
    device.release(address)
    assert back.value == b"over and back"
    assert (device.stream(0), device.stream(2)) == (40, 42)


def test_a_service_that_fails_or_is_missing_says_so(build):
    device = transom.CPlugin(build(file="packs.c")).services
    with pytest.raises(MemoryError, match="^plugin packs: device 0 has 1 MiB$"):
        device.allocate(1 << 30)
    with pytest.raises(transom.PluginError, match="copy failed with code 4: direction is 3"):
        device.copy(0, 0, 0, services.WITHIN_DEVICE)
    assert device.has("copy") and not device.has("synchronize")
    with pytest.raises(transom.PluginError, match="^plugin packs: has no service synchronize$"):
        device.synchronize()


def test_a_library_without_services_has_none(build):
    assert transom.CPlugin(build()).services is None
