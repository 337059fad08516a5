"""A mixture-of-experts layer: router, routed experts, shared expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..kernels._same_bits import multiply
from ..kernels.moe.moe_experts import moe_experts
from ..kernels.moe.route import route
from .expected import expect, expect_bool, expect_for_each

if TYPE_CHECKING:
    from ..op import Weight


class MoE(nn.Module):
    """y = sum over k chosen experts of w_e * expert_e(x), plus the shared expert of x.

    hidden, inner   width of x; of each routed expert
    experts, top_k  routed experts, and how many each token goes to
    score           of a router logit: "softmax", "sigmoid", "sqrtsoftplus", "topk_softmax" (see
                    `transom.route`, also for groups, top_groups, renormalize and scale)
    selection_bias  a float32 buffer [experts] that moves the selection, not the weights: no
                    gradient, kept in float32 when the module is cast; `balance` moves it by the
                    load
    router_bias     a parameter [experts] added to the logits (gpt-oss)
    token_experts   [vocabulary, top_k] expert ids: hash routing, the token's id chooses; the router
                    gives the weights
    shared_inner    width of an expert that sees every token; 0: none.  Several shared experts are
                    one of their widths' sum
    shared_gate     the shared expert's output is weighted by sigmoid(x @ shared_gate) (Qwen2-MoE)
    activation      with limit, alpha, weight_position, interleaved: of all experts, as in
                    `transom.moe_experts`
    biases          routed experts have biases on both products (gpt-oss)

    Weights are gate_up [experts, 2*inner, hidden] and down [experts, hidden, inner], shared_gate_up
    and shared_down with a leading 1.  Each may be replaced by a QuantizedWeight of its shape:
    `replace_weight(layer, "down", quantize(layer.down, "mxfp4"))`.

    *Source:* DeepSeek-V3, arXiv 2412.19437, 2.1.2; DeepSeek-V4, arXiv 2606.19348; op contracts 4
    and 5.
    """

    selection_bias: Tensor | None
    token_experts: Tensor | None
    gate_up: Weight
    down: Weight
    shared_gate_up: Weight | None
    shared_down: Weight | None

    def __init__(
        self,
        hidden: int,
        inner: int,
        experts: int,
        top_k: int,
        *,
        score: str = "softmax",
        groups: int = 1,
        top_groups: int = 1,
        renormalize: bool = True,
        scale: float = 1.0,
        selection_bias: bool = False,
        router_bias: bool = False,
        token_experts: Tensor | None = None,
        shared_inner: int = 0,
        shared_gate: bool = False,
        activation: str = "silu",
        limit: float | None = None,
        alpha: float = 1.702,
        weight_position: str = "after",
        interleaved: bool = False,
        biases: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if shared_gate and not shared_inner:
            raise ValueError(
                "MoE: shared_gate is True; shared_inner is 0; expected a shared expert to gate"
            )
        self.hidden, self.experts, self.top_k = hidden, experts, top_k
        self.score, self.groups, self.top_groups = score, groups, top_groups
        self.renormalize, self.scale = renormalize, scale
        self.activation, self.limit, self.alpha = activation, limit, alpha
        self.weight_position, self.interleaved = weight_position, interleaved

        def matrix(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.router = matrix(experts, hidden)
        self.router_bias = matrix(experts) if router_bias else None
        self.gate_up = matrix(experts, 2 * inner, hidden)
        self.down = matrix(experts, hidden, inner)
        self.gate_up_bias = matrix(experts, 2 * inner) if biases else None
        self.down_bias = matrix(experts, hidden) if biases else None
        self.shared_gate_up = matrix(1, 2 * shared_inner, hidden) if shared_inner > 0 else None
        self.shared_down = matrix(1, hidden, shared_inner) if shared_inner > 0 else None
        self.shared_gate = matrix(1, hidden) if shared_gate else None
        bias = torch.zeros(experts, device=device, dtype=torch.float32) if selection_bias else None
        self.register_buffer("selection_bias", bias)
        self.register_buffer("token_experts", self._checked_table(token_experts, device))
        self.reset_parameters()

    def _checked_table(
        self, table: Tensor | None, device: torch.device | str | None
    ) -> Tensor | None:
        if table is None:
            return None
        if table.ndim != 2 or table.shape[1] != self.top_k:
            raise ValueError(
                f"MoE: token_experts has shape {list(table.shape)}; "
                f"expected [vocabulary, top_k = {self.top_k}]"
            )
        if not table.is_meta and table.numel():
            low, high = int(table.min()), int(table.max())
            if low < -1 or high >= self.experts:
                raise ValueError(
                    f"MoE: token_experts holds {low if low < -1 else high}; "
                    f"must be in -1..experts-1 = -1..{self.experts - 1}"
                )
        return table.to(device=device, dtype=torch.int32)

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(fan-in) for every matrix, zero for every bias."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                bound = max(1, parameter.shape[-1]) ** -0.5
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        x: Tensor,
        *,
        tokens: Tensor | None = None,
        preset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The layer's output, of the shape and dtype of x[..., hidden].

        tokens  [...] ids of the tokens, for hash routing; negative: no token, treated as masked
        preset  [..., top_k] expert ids chosen elsewhere (routing replay); -1: none
        mask    [...] bool, False for padding: such a token goes to no routed expert (the shared one
                still sees it)

        Raises ValueError if hash routing is given no tokens, or tokens beyond its table (checked on
        CPUs).
        """
        ids, weights = self.routing(x, tokens=tokens, preset=preset, mask=mask)
        flat = x.reshape(ids.shape[0], self.hidden)
        y = moe_experts(
            flat,
            ids,
            weights,
            self.gate_up,
            self.down,
            activation=self.activation,
            limit=self.limit,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            weight_position=self.weight_position,
            interleaved=self.interleaved,
            alpha=self.alpha,
        )
        if self.shared_gate_up is not None and self.shared_down is not None:
            y = y + self._shared(flat, self.shared_gate_up, self.shared_down)
        return y.view(x.shape)

    def routing(
        self,
        x: Tensor,
        *,
        tokens: Tensor | None = None,
        preset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Experts and weights of every token: ids[T,top_k] int32, weights[T,top_k], as
        `transom.route` gives them.

        Arguments as in `forward`, T the product of the leading dims of x.  Logits are float32
        (float64 for float64) whatever the dtypes of x and the router: rounding to bfloat16 flips
        near-tied experts.
        """
        lead = self._checked(x, tokens, preset, mask)
        flat = x.reshape(lead, self.hidden)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        logits = multiply(flat.to(wide), self.router.to(wide).t())
        if self.router_bias is not None:
            logits = logits + self.router_bias.to(wide)
        if preset is not None:
            preset = preset.reshape(-1, self.top_k)
        elif self.token_experts is not None:
            preset = self._by_token(self.token_experts, tokens)
        return route(
            logits,
            self.top_k,
            score=self.score,
            bias=self.selection_bias,
            groups=self.groups,
            top_groups=self.top_groups,
            renormalize=self.renormalize,
            scale=self.scale,
            preset=preset,
            mask=None if mask is None else mask.reshape(-1),
        )

    def _checked(
        self, x: Tensor, tokens: Tensor | None, preset: Tensor | None, mask: Tensor | None
    ) -> int:
        """How many tokens there are; ValueError for what does not fit x or the layer."""
        expect("MoE", "x", x, "... hidden", hidden=self.hidden)
        lead = x.shape[:-1]
        expect_for_each("MoE", "tokens", tokens, lead)
        expect_for_each("MoE", "preset", preset, lead, self.top_k)
        expect_for_each("MoE", "mask", mask, lead)
        expect_bool("MoE", "mask", mask)
        return lead.numel()

    def _by_token(self, table: Tensor, tokens: Tensor | None) -> Tensor:
        if tokens is None:
            raise ValueError("MoE: tokens is None; hash routing expects the id of every token")
        flat = tokens.reshape(-1)
        if flat.device.type == "cpu" and not torch.compiler.is_compiling() and flat.numel():
            if (last := int(flat.max())) >= table.shape[0]:
                raise ValueError(
                    f"MoE: tokens holds {last}; token_experts has {table.shape[0]} rows"
                )
        inside = (flat >= 0) & (flat < table.shape[0])
        chosen = table[flat.clamp(0, table.shape[0] - 1).long()]
        return torch.where(inside[:, None], chosen, -1)

    def _shared(self, flat: Tensor, gate_up: Weight, down: Weight) -> Tensor:
        ids = torch.zeros(flat.shape[0], 1, dtype=torch.int32, device=flat.device)
        weights = torch.ones(flat.shape[0], 1, dtype=torch.float32, device=flat.device)
        if self.shared_gate is not None:
            weights = torch.sigmoid(flat.to(weights.dtype) @ self.shared_gate.to(weights.dtype).t())
        return moe_experts(
            flat,
            ids,
            weights,
            gate_up,
            down,
            activation=self.activation,
            limit=self.limit,
            weight_position=self.weight_position,
            interleaved=self.interleaved,
            alpha=self.alpha,
        )

    @torch.no_grad()
    def balance(self, ids: Tensor, rate: float) -> None:
        """selection_bias += rate * sign(mean load - load), the load counted from ids [..., top_k]
        (-1 skipped).

        Call it with the ids of `routing` after a training step.  Raises ValueError without a
        selection bias. *Source:* DeepSeek-V3, arXiv 2412.19437, 2.1.2 (auxiliary-loss-free
        balancing).
        """
        if self.selection_bias is None:
            raise ValueError(
                "MoE: balance was called; the layer has no selection_bias; construct it with one"
            )
        used = ids[ids >= 0].long()
        load = torch.bincount(used, minlength=self.experts).to(torch.float32)
        self.selection_bias += rate * torch.sign(load.mean() - load)

    def extra_repr(self) -> str:
        """The line that `print(model)` shows."""
        how = "token table" if self.token_experts is not None else self.score
        return f"hidden={self.hidden}, experts={self.experts}, top_k={self.top_k}, routed by {how}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoE:
        # Casting a model to bfloat16 must not round the bias: near-tied experts would flip (op
        # contracts 11).
        before = self.selection_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        after = self.selection_bias
        if before is not None and after is not None and after.dtype != before.dtype:
            self.selection_bias = (
                after.to(before.dtype) if before.is_meta else before.to(after.device)
            )
        return self
