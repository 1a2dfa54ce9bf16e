"""What the circuit ops refuse, and in which words: op, argument, expected, found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases_circuit import Inputs, Window, circuit_inputs

from lora_ext import ops

HMM, FF = Window("hmm", 2, 4, 3, 5), Window("ff", 2, 4, 1, 5)
Change = Callable[[Inputs], dict[str, Any]]


def scan(i: Inputs) -> torch.Tensor:
    return ops.circuit_scan(*(i[k] for k in ("kind", "leaf", "prior", "trans", "x"))).prefix


def with_token(i: Inputs, token: int) -> dict[str, Any]:
    x = i["x"].clone()
    x[1, 2] = token
    return {"x": x}


WRONG: list[tuple[str, Change]] = [
    (r"kind must be 'ff', 'cp', 'hmm' or 'btree', got 'tree'", lambda i: {"kind": "tree"}),
    (r"kind 'ff' has one component, got 3", lambda i: {"kind": "ff"}),
    (
        r"leaf must have shape \(B, K, C, V\), got \[2, 4, 3\]",
        lambda i: {"leaf": i["leaf"][..., 0]},
    ),
    (r"leaf must be float32, float16, bfloat16 or float64", lambda i: {"leaf": i["leaf"].int()}),
    (r"leaf must have at least one position", lambda i: {"leaf": i["leaf"][..., :0]}),
    (r"leaf must have at least one position", lambda i: {"leaf": i["leaf"][:, :0]}),
    (r"x must be int64, got Int", lambda i: {"x": i["x"].int()}),
    (r"x must have shape \(B, K\) = \(2, 4\), got \[2, 3\]", lambda i: {"x": i["x"][:, 1:]}),
    (r"x\[1, 2\] must be in \[-1, 5\), got 5", lambda i: with_token(i, 5)),
    (r"x\[1, 2\] must be in \[-1, 5\), got -2", lambda i: with_token(i, -2)),
    (
        r"prior must have shape \(B, C\) = \[2, 3\], got \[2, 2\]",
        lambda i: {"prior": i["prior"][:, 1:]},
    ),
    (
        r"trans must have the dtype of prior, Float, got Half",
        lambda i: {"trans": i["trans"].half()},
    ),
    (
        r"prior must be float32, float16, bfloat16 or float64",
        lambda i: {"prior": i["prior"].int(), "trans": i["trans"].int()},
    ),
    (r"trans is required for kind 'hmm' over 4 positions, got None", lambda i: {"trans": None}),
    (
        r"trans must have shape \(B, M, C, C\) = \[2, 3, 3, 3\], got \[2, 2, 3, 3\]",
        lambda i: {"trans": i["trans"][:, 1:]},
    ),
    (
        r"trans must have shape \(B, M, C, C\) = \[2, 0, 3, 3\], got \[2, 3, 3, 3\]",
        lambda i: {"kind": "cp"},
    ),
    (r"e must have shape \(B, K, C\), got \[2, 4, 3, 5\]", lambda i: {"x": None}),
]


@pytest.mark.parametrize(("message", "change"), WRONG, ids=[m for m, _ in WRONG])
@pytest.mark.parametrize("grad", [False, True])
def test_wrong_input_is_named(message: str, change: Change, grad: bool) -> None:
    i = circuit_inputs(HMM, torch.float32, seed=1)
    changed = {**i, **change(i)}
    if grad and changed["leaf"].is_floating_point():
        changed["leaf"] = changed["leaf"].clone().requires_grad_()
    with pytest.raises(ValueError, match="(circuit_leaf|circuit_scan): .*" + message):
        scan(changed)


def test_wrong_gradients_are_named() -> None:
    i = circuit_inputs(HMM, torch.float32, seed=2)
    e, norm = torch.ops.lora_ext.circuit_leaf(i["leaf"], i["x"])
    leaf_backward = torch.ops.lora_ext.circuit_leaf_backward
    for de, n, message in [
        (e[1:], norm, r"de must have shape \(B, K, C\) = \[2, 4, 3\] and be Float on cpu"),
        (e.double(), norm, r"de must have .*, got Double of shape \[2, 4, 3\]"),
        (e, norm[0], r"norm must have shape \(2, B, K, C\) = \[2, 2, 4, 3\]"),
    ]:
        with pytest.raises(ValueError, match=f"circuit_leaf_backward: {message}"):
            leaf_backward(de, i["leaf"], i["x"], n)
    prefix, _, _, states = torch.ops.lora_ext.circuit_scan("hmm", e, i["prior"], i["trans"], True)
    for dprefix, s, message in [
        (prefix[1:], states, r"dprefix must have shape \(B, K\) = \(2, 4\), got \[1, 4\]"),
        (prefix.double(), states, "dprefix must have the dtype of e, Float, got Double"),
        (prefix, states[:, 1:], r"states must be those of circuit_scan\(save=True\)"),
    ]:
        with pytest.raises(ValueError, match=f"circuit_scan_backward: {message}"):
            torch.ops.lora_ext.circuit_scan_backward(
                dprefix, None, "hmm", e, i["prior"], i["trans"], s, True, True
            )


def test_emission_gather_names_its_arguments() -> None:
    h, emit, x = torch.ones(2, 6), torch.ones(4, 3, 5, 6), torch.zeros(2, 4, dtype=torch.long)
    for args, message in [
        ((h[0], emit, x), r"h must have shape \(B, D\), got \[6\]"),
        ((h, emit[0], x), r"emit must have shape \(K, C, V, D\), got \[3, 5, 6\]"),
        ((h, emit.half(), x), "emit must have the dtype of h, Float, got Half"),
        ((h[:, 1:], emit, x), r"h\.shape\[1\] must equal emit\.shape\[3\] = 6, got 5"),
        ((h, emit[:, :, :0], x), "emit must have at least one position"),
        ((h, emit, x[:, 1:]), r"x must have shape \(B, K\) = \(2, 4\), got \[2, 3\]"),
        ((h, emit, x + 5), r"x\[0, 0\] must be in \[-1, 5\), got 5"),
    ]:
        with pytest.raises(ValueError, match=f"emission_gather: {message}"):
            ops.emission_gather(*args)


def test_tensors_on_two_devices_are_refused() -> None:
    i = circuit_inputs(HMM, torch.float32, seed=3)
    with pytest.raises(ValueError, match="circuit_scan: expected all tensors on one device"):
        scan({**i, "prior": i["prior"].to("meta")})
    with pytest.raises(ValueError, match="circuit_leaf: expected all tensors on one device"):
        scan({**i, "x": i["x"].to("meta")})


def test_ff_needs_neither_prior_nor_transitions() -> None:
    i = circuit_inputs(FF, torch.float32, seed=4)
    given = scan({**i, "prior": torch.full((2, 1), 3.0), "trans": torch.ones(2, 0, 1, 1)})
    assert torch.equal(scan(i), given)
