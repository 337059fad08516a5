"""QuantizedWeight: what it holds, how it is read, how it moves and travels."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from transom import weights
from transom.weights import (
    QuantizedWeight,
    codes,
    fn_from_fnuz,
    fnuz_from_fn,
    gather_rows,
    logical_shape,
    quantized_weight,
    weight_args,
    weight_from,
    weight_tile,
)

KINDS = {
    "int8": ("int8", None, "f32"),
    "int8 groups": ("int8", 24, "f32"),
    "int4": ("int4", 32, "f32"),
    "fp8": ("fp8", (16, 16), "f32"),
    "fp8 e8m0": ("fp8", (4, 32), "e8m0"),
    "fp8 one scale": ("fp8", (0, 0), "f32"),
    "mxfp4": ("mxfp4", None, "e8m0"),
}


def make(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> QuantizedWeight:
    """A weight of random codes and scales; its blocks do not divide `shape` in general."""
    format, group, scale_format = KINDS[kind]
    rows, columns = weights.checked_group(format, group)
    *lead, n, k = shape
    grid = (*lead, weights.grid_size(n, rows), weights.grid_size(k, columns))
    stored = (*lead, n, k // 2) if format in ("int4", "mxfp4") else shape
    if format == "int8":
        values = torch.from_numpy(rng.integers(-127, 128, stored).astype(np.int8))
    else:
        found = rng.integers(0, 256, stored)
        if format == "fp8":
            found[(found & 0x7F) == 0x7F] = 0
        values = torch.from_numpy(found.astype(np.uint8))
    if scale_format == "e8m0":
        scales = torch.from_numpy(rng.integers(110, 130, grid).astype(np.uint8))
    else:
        scales = torch.from_numpy(rng.uniform(0.01, 1, grid).astype(np.float32))
    zeros = torch.from_numpy(rng.integers(0, 17, grid).astype(np.uint8))
    return QuantizedWeight(format, values, scales, zeros if format == "int4" else None, group=group)


def expected(w: QuantizedWeight) -> np.ndarray:
    """The logical weight in float64, element by element of the definition."""
    values, scales = w.values.numpy(), w.scales.numpy()
    if w.format in ("int4", "mxfp4"):
        values = np.stack((values & 15, values >> 4), -1).reshape(w.shape)
    if w.format == "int8":
        plain = values.astype(np.float64)
    elif w.format == "int4":
        plain = values.astype(np.float64)
    elif w.format == "fp8":
        plain = torch.from_numpy(values).view(torch.float8_e4m3fn).double().numpy()
    else:
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        plain = np.where(values & 8, -1, 1) * table[values & 7]
    scale = 2.0 ** (scales.astype(np.float64) - 127) if w.scale_format == "e8m0" else scales
    out = np.empty(w.shape)
    rows, columns = (g or 10**6 for g in w.group)
    for place in np.ndindex(*w.shape):
        *lead, n, k = place
        at = (*lead, n // rows, k // columns)
        zero = int(w.zeros[at]) if w.zeros is not None else 0
        out[place] = (plain[place] - zero) * scale[at]
    return out


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("shape", [(3, 34, 70), (2, 1, 3, 32), (1, 2)])
def test_dequantize_is_code_times_scale(rng, kind, shape):
    w = make(rng, kind, shape)
    assert w.shape == shape and w.ndim == len(shape)
    # One rounding of a product in float32, none in float64.
    np.testing.assert_array_equal(w.dequantize(torch.float64).numpy(), expected(w))
    np.testing.assert_array_equal(w.dequantize().numpy(), expected(w).astype(np.float32))
    half = w.dequantize(torch.bfloat16)
    assert torch.equal(half, w.dequantize().to(torch.bfloat16))


@pytest.mark.parametrize("shape", [(0, 8, 64), (2, 0, 64), (2, 8, 0)])
def test_empty_weights_dequantize_to_nothing(rng, kind, shape):
    assert make(rng, kind, shape).dequantize().shape == shape


def test_edge_16_a_transposed_payload_dequantises_to_contiguous_memory(rng):
    values = torch.from_numpy(rng.integers(-127, 128, (8, 6)).astype(np.int8)).T
    w = QuantizedWeight("int8", values, torch.ones(6, 1))
    assert (
        w.values.data_ptr() == values.data_ptr()
        and w.dequantize().is_contiguous()
        and not w.is_contiguous()
    )
    assert torch.equal(w.dequantize(), values.float())


def test_dequantize_in_tiles_changes_no_bit(rng, kind, monkeypatch):
    w = make(rng, kind, (3, 37, 66))
    whole = w.dequantize()
    monkeypatch.setattr(quantized_weight, "TILE_ELEMENTS", 500)
    assert torch.equal(w.dequantize(), whole)


def test_edge_13_a_tile_is_the_slice_of_the_whole(rng, kind):
    """Block grids are ceilings (2880/128); a tile may begin and end inside a block."""
    w = make(rng, kind, (3, 37, 66))
    whole = w.dequantize()
    for start, stop in [(0, 37), (5, 6), (15, 33), (36, 37), (4, 4)]:
        tile = weight_tile(w, 1, start, stop, torch.float32)
        assert torch.equal(tile, whole[1, start:stop])
        assert torch.equal(weight_tile(w.select(1), None, start, stop, torch.float32), tile)
        assert torch.equal(weight_tile(whole, 1, start, stop, torch.float32), tile)
    assert weight_tile(w, 0, 0, 3, torch.float16).dtype == torch.float16


def test_a_tile_reads_nothing_outside_itself(rng):
    """NaN scales and codes in other rows and experts cannot reach it."""
    w = make(rng, "fp8", (3, 64, 48))
    clean = weight_tile(w, 1, 16, 32, torch.float32).clone()
    w.scales[0] = w.scales[2] = float("nan")
    w.scales[1, 0] = w.scales[1, 2:] = float("nan")
    assert torch.equal(weight_tile(w, 1, 16, 32, torch.float32), clean)


def test_gathered_rows_are_rows_of_the_whole(rng, kind):
    w = make(rng, kind, (37, 66))
    index = torch.tensor([36, 0, 17, 17, 4])
    assert torch.equal(gather_rows(w, index, torch.float32), w.dequantize()[index])
    assert gather_rows(w, index[:0], torch.bfloat16).shape == (0, 66)


# Through a torch schema


def test_taking_apart_and_putting_together_keeps_everything(rng, kind):
    w = make(rng, kind, (2, 6, 64))
    again = weight_from(*weight_args(w))
    assert isinstance(again, QuantizedWeight)
    assert again.values is w.values and again.spec == w.spec and repr(again) == repr(w)
    assert torch.equal(copy.deepcopy(again).dequantize(), w.dequantize())
    assert set(again.state_dict()) == set(w.state_dict())
    assert logical_shape(w.values.shape, w.spec) == tuple(w.shape)


def test_a_tensor_passes_as_itself():
    t = torch.zeros(2, 3)
    assert weight_from(*weight_args(t)) is t and weight_args(t)[1:] == (None, None, "")
    assert logical_shape(t.shape, "") == (2, 3)


class Uses(nn.Module):
    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tile = weight_tile(self.weight, 1, 2, 6, x.dtype)
        return x @ tile.T + self.weight.shape[1] + (self.weight.format == "fp8")


def test_fullgraph_compile_traces_tiles_and_attributes(rng, kind):
    module, x = Uses(make(rng, kind, (2, 8, 64))), torch.ones(3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


# Moving and travelling


class Block(nn.Module):
    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.weight = weight


def test_a_quantised_weight_takes_the_place_of_a_parameter(rng, kind):
    module, w = nn.Linear(64, 6, bias=False), make(rng, kind, (6, 64))
    weights.replace_weight(module, "weight", w)
    assert module.weight is w and not list(module.parameters())
    assert "weight.values" in module.state_dict()
    weights.replace_weight(module, "weight", nn.Parameter(torch.zeros(6, 64)))
    assert [*module.state_dict()] == ["weight"]
    with pytest.raises(AttributeError, match="^replace_weight: Linear has no 'wight'; expected"):
        weights.replace_weight(module, "wight", w)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_casting_a_model_leaves_codes_and_scales(rng, kind, cast):
    block = Block(make(rng, kind, (6, 64)))
    before = {n: t.clone() for n, t in block.weight.state_dict().items()}
    block = block.to(torch.bfloat16) if cast == "to" else getattr(block, cast)()
    assert block.norm.weight.dtype != torch.float32
    for name, tensor in block.weight.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_moving_devices_moves_every_part(rng, kind):
    block = Block(make(rng, kind, (6, 64))).to("meta", torch.float16)
    assert block.weight.device.type == "meta"
    assert {t.device.type for t in block.weight.buffers()} == {"meta"}
    assert block.weight.scales.dtype in (torch.float32, torch.uint8)
    back = block.to_empty(device="cpu").weight
    assert back.values.device.type == "cpu" and back.shape == (6, 64)


def test_state_dict_through_safetensors_keeps_every_bit(rng, kind, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    block, other = Block(make(rng, kind, (6, 64))), Block(make(rng, kind, (6, 64)))
    safetensors.save_file(block.state_dict(), tmp_path / "w.safetensors")
    other.load_state_dict(safetensors.load_file(tmp_path / "w.safetensors"))
    assert torch.equal(other.weight.dequantize(), block.weight.dequantize())


def test_state_dict_through_torch_save_and_assign(rng, kind):
    block = Block(make(rng, kind, (6, 64)))
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = Block(make(rng, kind, (6, 64)).to("meta"))
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert torch.equal(other.weight.dequantize(), block.weight.dequantize())


def test_loading_another_format_raises_one_line_before_writing(rng):
    mine, theirs = Block(make(rng, "int4", (6, 64))), Block(make(rng, "mxfp4", (6, 64)))
    before = mine.weight.values.clone()
    with pytest.raises(ValueError) as error:
        mine.load_state_dict(theirs.state_dict())
    assert str(error.value) == (
        "load_state_dict: weight was saved as mxfp4:1x32; this model holds int4:1x32; "
        "quantise the model in the same format before loading"
    )
    assert torch.equal(mine.weight.values, before)


def test_edge_17_float_scales_cannot_load_into_e8m0_or_the_reverse(rng):
    e8m0, f32 = make(rng, "fp8 e8m0", (8, 64)), make(rng, "fp8 e8m0", (8, 64))
    f32 = QuantizedWeight("fp8", f32.values, f32.scales.float(), group=(4, 32))
    with pytest.raises(TypeError, match="scales are float32; fp8 expects E8M0 bytes"):
        e8m0.load_state_dict(f32.state_dict())
    with pytest.raises(TypeError, match="scales are uint8; fp8 expects float32"):
        f32.load_state_dict(e8m0.state_dict())


def test_loading_another_shape_raises(rng):
    with pytest.raises(ValueError, match=r"the weight.values is int8 \[6, 64\]; expected int8 \[5"):
        make(rng, "int8", (5, 64)).load_state_dict(make(rng, "int8", (6, 64)).state_dict())


# Checkpoint tensors


def test_checkpoint_dtypes_are_viewed_not_converted(rng):
    w = make(rng, "fp8 e8m0", (8, 64))
    typed = QuantizedWeight(
        "fp8",
        w.values.view(torch.float8_e4m3fn),
        w.scales.view(torch.float8_e8m0fnu),
        group=(4, 32),
    )
    assert typed.values.data_ptr() == w.values.data_ptr()
    assert torch.equal(typed.dequantize(), w.dequantize())
    half = make(rng, "int8", (4, 8))
    widened = QuantizedWeight("int8", half.values, half.scales.to(torch.bfloat16))
    assert torch.equal(widened.scales, half.scales.to(torch.bfloat16).float())


def test_edge_17_float_scales_where_e8m0_is_expected_raise(rng):
    values = torch.zeros(4, 16, dtype=torch.uint8)
    with pytest.raises(TypeError, match="scales are float32; mxfp4 expects E8M0 bytes"):
        QuantizedWeight("mxfp4", values, torch.ones(4, 1))
    with pytest.raises(TypeError, match="scales are uint8; int4 expects float32"):
        QuantizedWeight("int4", values, torch.ones(4, 1, dtype=torch.uint8), values[:, :1])
    with pytest.raises(TypeError, match="scales are float32; fp8 expects E8M0 bytes"):
        QuantizedWeight("fp8", values, torch.ones(1, 1), scale_format="e8m0")
    with pytest.raises(TypeError, match="scales are uint8; fp8 expects float32$"):
        QuantizedWeight("fp8", values, torch.ones(1, 1, dtype=torch.uint8), scale_format="f32")
    with pytest.raises(TypeError, match="scales are int32; .*unpack the four E8M0 bytes"):
        QuantizedWeight("fp8", values, torch.ones(1, 1, dtype=torch.int32))


@pytest.mark.parametrize(
    "error, text, build",
    [
        (
            ValueError,
            "format is 'int3'; expected one of int8, int4, fp8, mxfp4",
            lambda v, s: QuantizedWeight("int3", v, s),
        ),
        (
            ValueError,
            r"scales have shape \[1, 1\]; fp8 weight \[200, 300\] in groups of 128x128 "
            r"needs \[2, 3\]",
            lambda v, s: QuantizedWeight("fp8", v, s),
        ),
        (
            ValueError,
            "group is 1x64; mxfp4 has one scale for each 1x32",
            lambda v, s: QuantizedWeight("mxfp4", v, s, group=64),
        ),
        (
            ValueError,
            r"group is \(-2, 4\); expected sizes >= 1, or 0 or -1 for the whole extent",
            lambda v, s: QuantizedWeight("fp8", v, s, group=(-2, 4)),
        ),
        (
            ValueError,
            "zeros are missing; int4 has a zero point for each group",
            lambda v, s: QuantizedWeight("int4", v, s),
        ),
        (ValueError, "zeros are given; fp8 has none", lambda v, s: QuantizedWeight("fp8", v, s, v)),
        (
            TypeError,
            "values are uint8; int8 expects int8",
            lambda v, s: QuantizedWeight("int8", v, s),
        ),
        (
            TypeError,
            "values are float8_e4m3fnuz; fp8 expects .*convert with fn_from_fnuz",
            lambda v, s: QuantizedWeight("fp8", v.view(torch.float8_e4m3fnuz), s),
        ),
        (
            ValueError,
            r"values have shape \[300\]; expected \[..., N, K\]",
            lambda v, s: QuantizedWeight("fp8", v[0], s),
        ),
        (
            ValueError,
            "scales are on meta; values are on cpu",
            lambda v, s: QuantizedWeight("fp8", v[:9, :9], s.to("meta")),
        ),
    ],
)
def test_bad_parts_raise_one_line(error, text, build):
    with pytest.raises(error, match=text) as seen:
        build(torch.zeros(200, 300, dtype=torch.uint8), torch.ones(1, 1))
    assert "\n" not in str(seen.value) and not str(seen.value).endswith(".")


def test_parameters_of_a_loader_become_buffers_without_gradients():
    scales = nn.Parameter(torch.ones(4, 1))
    values = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    w = QuantizedWeight("int8", values, scales)
    assert not list(w.parameters()) and not w.scales.requires_grad
    assert w.scales.data_ptr() == scales.data_ptr()


def test_gpt_oss_blocks_are_taken_without_a_copy(rng):
    blocks = torch.from_numpy(rng.integers(0, 256, (2, 6, 3, 16)).astype(np.uint8))
    scales = torch.from_numpy(rng.integers(110, 130, (2, 6, 3)).astype(np.uint8))
    w = QuantizedWeight.from_mxfp4_blocks(blocks, scales)
    assert w.shape == (2, 6, 96) and w.values.data_ptr() == blocks.data_ptr()
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = torch.cat((table, -table))
    pairs = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), -1)
    factor = torch.exp2(scales.float() - 127)[..., None, None]
    assert torch.equal(w.dequantize(), (pairs * factor).reshape(2, 6, 96))
    with pytest.raises(ValueError, match=r"blocks have shape \[2, 6, 3, 8\]; expected"):
        QuantizedWeight.from_mxfp4_blocks(blocks[..., :8], scales)


def words(nibbles: np.ndarray) -> torch.Tensor:
    """[..., n, 8] of 0..15 -> int32 [..., n], nibble i from position i."""
    shifts = np.left_shift(nibbles.astype(np.uint32), 4 * np.arange(8, dtype=np.uint32))
    return torch.from_numpy(np.bitwise_or.reduce(shifts, -1).view(np.int32))


def test_awq_is_repacked_value_for_value(rng):
    k, n, group = 64, 16, 32
    q, z = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // group, n))
    s = rng.uniform(0.01, 1, (k // group, n)).astype(np.float16)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    packed = [words(part.reshape(part.shape[0], -1, 8)[..., order]) for part in (q, z)]
    w = QuantizedWeight.from_awq(*packed, torch.from_numpy(s))
    exact = (q - np.repeat(z, group, 0)) * np.repeat(s, group, 0).astype(np.float64)
    assert w.spec == "int4:1x32" and w.shape == (n, k)
    np.testing.assert_array_equal(w.dequantize(torch.float64).numpy(), exact.T)
    np.testing.assert_array_equal(w.dequantize().numpy(), exact.T)


GPTQ_WRITERS = {
    "word": (lambda z: words(z) - 0x11111111, {}),
    "nibble": (lambda z: words((z - 1) % 16), {"minus_one": "nibble"}),
    "v2": (words, {"gptq_v2": True}),
}


def gptq(
    rng: np.random.Generator, z: np.ndarray, k: int
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """qweight and scales of a random weight [N, K] of these zero points [groups, N], and its
    values."""
    groups, n = z.shape
    q = rng.integers(0, 16, (k, n))
    s = rng.uniform(0.01, 1, z.shape).astype(np.float16)
    exact = (q - np.repeat(z, k // groups, 0)) * np.repeat(s, k // groups, 0).astype(np.float64)
    return words(q.T.reshape(n, -1, 8)).T, torch.from_numpy(s), exact.T


@pytest.mark.parametrize("writer", GPTQ_WRITERS)
def test_gptq_zero_points_come_back_as_their_writer_had_them(rng, writer):
    stored, reader = GPTQ_WRITERS[writer]
    z = rng.permutation(np.repeat(np.arange(16), 12)).reshape(4, 48)
    z[0, :8], z[1, :8], z[2, 7] = 0, [0, 1, 0, 15, 0, 0, 1, 0], 0
    qweight, scales, exact = gptq(rng, z, 64)
    w = QuantizedWeight.from_gptq(qweight, stored(z.reshape(4, -1, 8)), scales, **reader)
    assert torch.equal(w.zeros, torch.from_numpy(z.T.astype(np.uint8)))
    np.testing.assert_array_equal(w.dequantize().numpy(), exact)


def test_gptq_the_two_ways_of_taking_one_off_agree_unless_a_zero_point_is_0(rng):
    z = rng.integers(1, 16, (4, 16))
    z[:, [7, 15]] = 0  # the highest nibble of a word, which nothing borrows from
    stored = [GPTQ_WRITERS[way][0](z.reshape(4, -1, 8)) for way in ("word", "nibble")]
    assert torch.equal(*stored)


@pytest.mark.parametrize("qzeros", [None, torch.empty(0, dtype=torch.int32)])
def test_gptq_without_zero_points_is_symmetric(rng, qzeros):
    qweight, scales, exact = gptq(rng, np.full((2, 16), 8), 64)
    w = QuantizedWeight.from_gptq(qweight, qzeros, scales)
    np.testing.assert_array_equal(w.dequantize().numpy(), exact)


@pytest.mark.parametrize("index", ["in order", "empty", "zero"])
def test_gptq_an_index_that_reorders_nothing_is_none(rng, index):
    z = rng.integers(0, 16, (2, 16))
    qweight, scales, exact = gptq(rng, z, 64)
    g_idx = {
        "in order": torch.arange(64) // 32,
        "empty": torch.empty(0, dtype=torch.int32),
        "zero": torch.zeros(64, dtype=torch.int32),
    }[index]
    w = QuantizedWeight.from_gptq(
        qweight, words(z.reshape(2, -1, 8)), scales, g_idx=g_idx, gptq_v2=True
    )
    np.testing.assert_array_equal(w.dequantize().numpy(), exact)


@pytest.mark.parametrize("whole", [-1, 0, None, 64])
def test_a_group_of_minus_one_is_the_whole_extent(rng, whole):
    z = rng.integers(0, 16, (1, 16))
    qweight, scales, exact = gptq(rng, z, 64)
    g_idx = torch.zeros(64, dtype=torch.int32)
    w = QuantizedWeight.from_gptq(
        qweight, words(z.reshape(1, -1, 8)), scales, g_idx=g_idx, group=whole, gptq_v2=True
    )
    np.testing.assert_array_equal(w.dequantize().numpy(), exact)
    awq = torch.zeros(64, 2, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
    assert QuantizedWeight.from_awq(*awq, scales, group=whole).dequantize().eq(0).all()
    direct = QuantizedWeight(
        "int4", w.values, w.scales, w.zeros, group=64 if whole is None else whole
    )
    assert torch.equal(direct.dequantize(), w.dequantize())


@pytest.mark.parametrize(
    "change, error, text",
    [
        (
            dict(g_idx=torch.arange(64).flip(0) // 32),
            ValueError,
            "g_idx reorders the input channels",
        ),
        (dict(g_idx=torch.zeros(63)), ValueError, r"g_idx has shape \[63\]; expected \[64\]"),
        (dict(minus_one="byte"), ValueError, "minus_one is 'byte'; expected 'word' or 'nibble'"),
        (
            dict(qzeros=torch.zeros(2, 2, dtype=torch.int64)),
            TypeError,
            r"qzeros is int64 \[2, 2\]; expected int32 words",
        ),
        (
            dict(qzeros=torch.zeros(2, dtype=torch.int32)),
            ValueError,
            r"qzeros is int32 \[2\]; expected at least two dimensions",
        ),
        (dict(scales=torch.zeros(16)), ValueError, r"scales is float32 \[16\]; expected at least"),
    ],
)
def test_gptq_bad_parts_raise_one_line(change, error, text):
    call = dict(
        qweight=torch.zeros(8, 16, dtype=torch.int32),
        qzeros=torch.zeros(2, 2, dtype=torch.int32),
        scales=torch.ones(2, 16),
    )
    with pytest.raises(error, match=f"^from_gptq: {text}"):
        QuantizedWeight.from_gptq(**{**call, **change})


# Codes


def test_every_code_decodes_as_torch_decodes_it():
    every = torch.arange(256, dtype=torch.uint8)
    for mine, dtype in (
        (codes.decode_e4m3, torch.float8_e4m3fn),
        (codes.decode_e8m0, torch.float8_e8m0fnu),
    ):
        exact = every.view(dtype).float()
        torch.testing.assert_close(mine(every), exact, rtol=0, atol=0, equal_nan=True)
    assert codes.decode_e2m1(every[:16]).tolist() == [
        0,
        0.5,
        1,
        1.5,
        2,
        3,
        4,
        6,
        -0.0,
        -0.5,
        -1,
        -1.5,
        -2,
        -3,
        -4,
        -6,
    ]


def test_e4m3_rounds_as_torch_rounds(rng):
    """Every code, every midpoint between codes and its neighbours, and numbers of every size."""
    table = codes.decode_e4m3(torch.arange(127, dtype=torch.uint8))
    middle = (table[1:] + table[:-1]) / 2
    near = [table, middle]
    near += [torch.nextafter(middle, middle.new_tensor(end)) for end in (0.0, 500.0)]
    near += [torch.from_numpy((rng.uniform(-1, 1, 4000) * 448.0).astype(np.float32))]
    near += [torch.from_numpy(np.exp2(rng.uniform(-20, 8.7, 4000)).astype(np.float32))]
    x = torch.cat(near)
    x = torch.cat((x, -x, torch.tensor([float("nan"), -0.0])))
    assert torch.equal(codes.encode_e4m3(x), x.to(torch.float8_e4m3fn).view(torch.uint8))


def test_e4m3_saturates():
    x = torch.tensor([449.0, 480.0, 1e30, float("inf"), -1e30])
    assert codes.encode_e4m3(x).tolist() == [0x7E, 0x7E, 0x7E, 0x7E, 0xFE]


def test_e2m1_ties_go_to_the_even_code():
    """Contracts 6: 0.75, 1.75 and 3.5 go up, where a strict comparison with midpoints goes down."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert codes.decode_e2m1(codes.encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]
    below, above = (torch.nextafter(ties, ties.new_tensor(end)) for end in (0.0, 9.0))
    assert codes.encode_e2m1(below).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert codes.encode_e2m1(-above).tolist() == [9, 10, 11, 12, 13, 14, 15]
    assert codes.encode_e2m1(torch.tensor([7.0, -1e30])).tolist() == [7, 15]


def test_e8m0_is_the_power_of_two_not_below():
    x = torch.tensor([1.0, 1.0000001, 2.0, 3.0, 2.0**-126, 3e38, float("inf"), float("nan")])
    assert codes.encode_e8m0(x).tolist() == [127, 128, 128, 129, 1, 255, 255, 255]


@pytest.mark.parametrize("e8m0", [False, True])
def test_fnuz_conversion_keeps_every_value(e8m0):
    """Contracts 6: the same byte means half the value on MI300; 0x80 is NaN there."""
    every = torch.arange(256, dtype=torch.uint8)
    scale = torch.tensor([100], dtype=torch.uint8) if e8m0 else torch.tensor([0.3])
    decoded = codes.decode_e8m0 if e8m0 else torch.Tensor.float
    values, scales = fnuz_from_fn(every, scale)
    there = values.view(torch.float8_e4m3fnuz).float() * decoded(scales)
    here = codes.decode_e4m3(every) * decoded(scale)
    torch.testing.assert_close(there, here, rtol=0, atol=0, equal_nan=True)

    exact = every[(every & 0x7F) != 0x7F]
    values, scales = fn_from_fnuz(exact, scale)
    there = exact.view(torch.float8_e4m3fnuz).float() * decoded(scale)
    here = codes.decode_e4m3(values) * decoded(scales)
    torch.testing.assert_close(here, there, rtol=0, atol=0, equal_nan=True)


def test_fnuz_bytes_that_cannot_keep_their_bits_are_rounded_to_the_nearest():
    every = torch.arange(256, dtype=torch.uint8)
    values, scales = fn_from_fnuz(every, torch.tensor([0.5]))
    meant = every.view(torch.float8_e4m3fnuz).float()
    assert scales.item() == 0.5
    assert torch.equal(values & 0x7F, meant.to(torch.float8_e4m3fn).view(torch.uint8) & 0x7F)
    here = codes.decode_e4m3(values)
    torch.testing.assert_close(here, meant, rtol=0, atol=2**-10, equal_nan=True)
