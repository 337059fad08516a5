"""What the simulated device does as a device of torch; each function is one claim. test_sim.py runs
those that it is given by name, in one process each time."""

from __future__ import annotations

import copy
import ctypes
import gc
import io
import os
import pickle
import signal
import sys
import warnings

import torch

import transom

FROM_DEVICE = 2
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def tensors_come_back_as_they_went() -> None:
    here = X.to("sim")
    assert here.is_sim and here.device == torch.device("sim", 0)
    assert torch.equal(here.cpu(), X)
    assert torch.equal(here.t()[1:3].cpu(), X.t()[1:3])
    here[:, 1] = torch.zeros(6, device="sim")
    assert here[:, 1].tolist() == [0.0] * 6 and here[0, 0].item() == X[0, 0].item()
    for dtype in (torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn):
        assert torch.equal(X.to(dtype).to("sim").cpu().float(), X.to(dtype).float())


def the_host_dies_of_a_device_address() -> None:
    here = X.to("sim")
    torch.sim.synchronize()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(here.data_ptr(), 4)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV


def copies_and_files_hold_the_values() -> None:
    here = X.to("sim")
    module = torch.nn.Linear(4, 2).to("sim")
    assert torch.equal(copy.deepcopy(module).weight.cpu(), module.weight.cpu())
    back = pickle.loads(pickle.dumps(here))
    assert back.is_sim and torch.equal(back.cpu(), X)
    file = io.BytesIO()
    torch.save({"x": here, "row": here[1]}, file)
    for where, device in ((None, "sim"), ("cpu", "cpu")):
        file.seek(0)
        loaded = torch.load(file, map_location=where)
        assert loaded["x"].device.type == device and torch.equal(loaded["x"].cpu(), X)
        assert torch.equal(loaded["row"].cpu(), X[1])


def new_and_freed_memory_is_poisoned() -> None:
    fresh = torch.empty(8, dtype=torch.uint8, device="sim")
    assert fresh.tolist() == [0xCD] * 8
    fresh.fill_(7)
    address, host = fresh.data_ptr(), torch.zeros(8, dtype=torch.uint8)
    services = sys.modules["transom_sim.library"].services()
    services.copy(host.data_ptr(), address, 8, FROM_DEVICE)
    assert host.tolist() == [7] * 8
    del fresh
    gc.collect()
    services.copy(host.data_ptr(), address, 8, FROM_DEVICE)
    assert host.tolist() == [0xCD] * 8


def memory_is_given_back_and_runs_out_in_words() -> None:
    before = torch.sim.memory_allocated()
    for _ in range(100):
        torch.empty(1 << 20, dtype=torch.uint8, device="sim")
    assert torch.sim.memory_allocated() == before
    try:
        torch.empty(1 << 40, dtype=torch.uint8, device="sim")
    except torch.OutOfMemoryError as error:
        assert "the device has 4096 MiB" in str(error), error
    else:
        raise AssertionError("a TiB was found")


def nothing_runs_before_somebody_waits() -> None:
    a, b = torch.sim.Stream(), torch.sim.Stream()
    with torch.sim.stream(a):
        here = torch.empty(4, device="sim")
        here.fill_(1)
    assert not a.query()
    with torch.sim.stream(b):  # reads what the other stream has not written yet
        assert here.tolist() != [1.0] * 4
    b.wait_stream(a)
    with torch.sim.stream(b):
        assert here.tolist() == [1.0] * 4
    event = a.record_event()
    assert event.query() and a.query()
    with torch.sim.stream(a):
        here.fill_(2)
        event.record()
    assert not event.query()
    event.synchronize()
    assert event.query()


def memory_of_a_stream_is_not_reused_too_early() -> None:
    stream = torch.sim.Stream()
    with torch.sim.stream(stream):
        here = torch.empty(4, device="sim")
        address = here.data_ptr()
        here.fill_(1)
        kept = here.clone()  # still to be read from `here`
        del here
    other = torch.empty(4, device="sim")
    assert other.data_ptr() != address
    stream.synchronize()
    assert kept.tolist() == [1.0] * 4


def operators_of_torch_go_round_by_the_cpu_and_are_counted() -> None:
    here = X.to("sim")
    before = torch.sim.fallbacks().get("aten::mm", 0)
    assert torch.equal((here @ here.t()).cpu(), X @ X.t())
    assert torch.sim.fallbacks()["aten::mm"] == before + 1
    assert here.clone().add_(1).sub(here).cpu().allclose(torch.ones(6, 4))
    assert torch.equal(torch.add(here, here, out=torch.empty(0, device="sim")).cpu(), 2 * X)
    values, places = here.topk(2)
    assert values.is_sim and places.is_sim
    os.environ["TRANSOM_SIM_FALLBACK"] = "error"
    try:
        here + here
    except NotImplementedError as error:
        assert "aten::add has no kernel on 'sim'" in str(error)
    else:
        raise AssertionError("it fell back")
    os.environ["TRANSOM_SIM_FALLBACK"] = "warn"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        here.erf(), here.erf()
    assert [str(w.message) for w in found] == ["aten::erf runs on the CPU for device 'sim'"]
    del os.environ["TRANSOM_SIM_FALLBACK"]


def what_does_not_fit_the_chip_is_refused_with_the_sizes() -> None:
    q, kv = torch.randn(1, 1, 2, 1280, device="sim"), torch.randn(1, 3, 1280, device="sim")
    told = str(transom.explain("sparse_attention", q, kv, scale=1.0, v_dim=1280))
    sizes = "D = 1280, v_dim = 1280: 16 heads with their sums and 16 keys"
    assert f"sim: {sizes}: 246976 bytes on the chip; the vector buffer has 196608" in told, told
    weight = transom.quantize(torch.randn(2, 8, 32), "int8").to("sim")
    x, offsets = torch.randn(3, 32, device="sim"), torch.tensor([1, 3], device="sim")
    told = str(transom.explain("grouped_gemm", x, weight, offsets))
    assert "sim: weight is int8:" in told and "call .dequantize()" in told, told
    told = str(transom.explain("grouped_gemm", x.double(), x.double()[None], offsets[1:]))
    assert "sim: x is float64; supported: float32, float16, bfloat16" in told, told


def packed_weights_give_the_same_bits_with_less_to_move() -> None:
    weight = torch.nn.Parameter(torch.randn(2, 48, 80).bfloat16().to("sim"), requires_grad=False)
    x, offsets = torch.randn(2, 80).bfloat16().to("sim"), torch.tensor([1, 2], device="sim")
    results, cycles = [], []
    for _ in range(3):  # the second call finds the weight unchanged, and has it packed
        before = torch.sim.counters()
        results.append(transom.grouped_gemm(x, weight, offsets).cpu())
        cycles.append(torch.sim.counters()["cycles"] - before["cycles"])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert cycles[2] < cycles[0]


def cycles_follow_the_cost_model() -> None:
    x, weight = torch.randn(128, 64).to("sim"), torch.randn(1, 128, 64).to("sim")
    offsets = torch.tensor([128], device="sim")
    before = torch.sim.counters()
    transom.grouped_gemm(x, weight, offsets)
    after = torch.sim.counters()
    spent = {name: after[name] - before[name] for name in after}
    assert spent["tiles"] == 8 * 8 * 4 and spent["commands"] == 1
    assert spent["bytes"] == 4 * (128 * 64 + 128 * 64 + 128 * 128)
    assert spent["cycles"] == 500 + max(16 * spent["tiles"], spent["bytes"] // 64)


def main() -> None:
    for name in sys.argv[1:]:
        globals()[name]()
        print(name)


if __name__ == "__main__":
    main()
