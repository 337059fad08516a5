"""The rotation of the patched attention of DeepSeek-V4 against Hugging Face's own."""

from __future__ import annotations

import pytest
import torch

hf = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")

from transom.models.deepseek_v4 import _Rotation  # noqa: E402
from transom.models.linear import ends  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("shape, dim", [((2, 3, 4, 16), 2), ((2, 1, 3, 16), 1)], ids=str)
def test_it_turns_as_the_original_and_leaves_its_input(shape, dim, back, dtype) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(shape).to(dtype), torch.randn(2, 3, 4)
    before, cos, sin = x.clone(), angles.cos().to(dtype), angles.sin().to(dtype)
    want = hf.apply_rotary_pos_emb(x, cos, -sin if back else sin, unsqueeze_dim=dim)
    turn = _Rotation(cos, sin, {})
    with torch.no_grad():
        got = [turn(x, dim, back=back) for _ in range(2)]
    assert torch.equal(x, before)
    for each in got:
        # Sums of two products, in float32 and rounded once: the last bit may differ.
        torch.testing.assert_close(each, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert torch.equal(each[..., :-8], x[..., :-8])


def test_angles_of_another_call_are_not_taken() -> None:
    kept: dict = {}
    x = torch.randn(1, 3, 2, 8)
    with torch.no_grad():
        for _ in range(20):  # each pair of angles may lie where the one before lay
            angles = torch.randn(1, 3, 2)
            cos, sin = angles.cos(), angles.sin()
            want = hf.apply_rotary_pos_emb(x, cos, sin, unsqueeze_dim=2)
            torch.testing.assert_close(_Rotation(cos, sin, kept)(x, 2), want)
            del angles, cos, sin


def test_a_gradient_passes() -> None:
    x = torch.randn(1, 3, 2, 8, requires_grad=True)
    angles = torch.randn(1, 3, 2)
    _Rotation(angles.cos(), angles.sin(), {})(x, 2).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())  # turning keeps lengths


def test_ends_made_for_inference_serve_a_gradient() -> None:
    with torch.inference_mode():
        made = ends(3, 7)
    assert not made.is_inference() and made.tolist() == [7, 14, 21]
