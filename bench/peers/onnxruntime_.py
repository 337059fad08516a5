"""onnxruntime's MoE operator (domain com.microsoft), one node with the weights as inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..cases import PLAIN, Case
from ..measure import Candidate, Function

Values = Mapping[str, Any]


def probe() -> str | None:
    """onnx is needed to write the graph down."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"{error}; it needs onnx and onnxruntime"
    return None


def candidates(case: Case, values: Values) -> list[Candidate]:
    """Experts in float32: its CPU kernel has no other dtype for plain weights."""
    if case.op != "moe_experts" or case.format != PLAIN or case.dtype != "f32":
        return []
    # gate and up rows take turns in its layout: a copy, unless they do so already
    held = 0.0 if values["interleaved"] else float(values["gate_up"].nbytes)
    return [Candidate("onnxruntime MoE", "onnxruntime", _prepare, "MLAS; routes inside", held)]


def _graph(v: Values) -> bytes:
    from onnx import TensorProto, helper

    oai = v["activation"] == "swiglu_oai"
    names = ["x", "router", "gate_up", "gate_up_bias", "down", "down_bias"]
    shapes = {n: list(v[n].shape) for n in names if v.get(n) is not None}
    shapes["router"] = [v["x"].shape[0], v["gate_up"].shape[0]]
    node = helper.make_node(
        "MoE",
        [n if n in shapes else "" for n in names],
        ["y"],
        domain="com.microsoft",
        k=v["ids"].shape[1],
        normalize_routing_weights=1,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=v["alpha"] if oai else 1.0,
        activation_beta=1.0 if oai else 0.0,
        swiglu_limit=v["limit"] or 1e30,
    )
    kinds = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, list(v["x"].shape))
    graph = helper.make_graph([node], "experts", kinds, [y])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def _prepare(v: Values) -> Function:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # its threads must sleep while others are timed
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(_graph(v), options, ["CPUExecutionProvider"])
    half = v["gate_up"].shape[1] // 2
    gate_up = v["gate_up"]
    if not v["interleaved"]:
        gate_up = torch.stack((gate_up[:, :half], gate_up[:, half:]), 2).flatten(1, 2)
    constant = {"gate_up": gate_up, "down": v["down"]}
    for name in ("gate_up_bias", "down_bias"):
        if v[name] is not None:
            constant[name] = v[name]
    held = {n: onnxruntime.OrtValue.ortvalue_from_numpy(t.numpy()) for n, t in constant.items()}
    experts = v["gate_up"].shape[0]

    def call(v: Values) -> Tensor:
        y = torch.empty_like(v["x"])
        # its softmax over these gives the routing weights back
        router = torch.full((v["x"].shape[0], experts), -1e4)
        router.scatter_(1, v["ids"], v["weights"].log())
        binding = session.io_binding()
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for name, tensor in (("x", v["x"]), ("router", router)):
            binding.bind_cpu_input(name, tensor.numpy())
        binding.bind_output("y", "cpu", 0, "float32", list(y.shape), y.data_ptr())
        session.run_with_iobinding(binding)
        return y

    return call
