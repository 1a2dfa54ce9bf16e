"""Errors of the circuit ops; messages contain op, argument, expected and found value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases_circuit import Inputs, Window, circuit_inputs
from cases_wrong import Change, cast, cut, is_

from lora_ext import ops

HMM, FF = Window("hmm", 2, 4, 3, 5), Window("ff", 2, 4, 1, 5)


def scan(i: Inputs) -> torch.Tensor:
    return ops.circuit_scan(*(i[k] for k in ("kind", "leaf", "prior", "trans", "x"))).prefix


def with_token(i: Inputs, token: int) -> dict[str, Any]:
    x = i["x"].clone()
    x[1, 2] = token
    return {"x": x}


TRANS = r"expected shape \(B, M, C, C\)"
WRONG: list[tuple[str, Change]] = [
    (r"kind: expected 'ff', 'cp', 'hmm' or 'btree', found 'tree'", lambda i: {"kind": "tree"}),
    (r".*: expected one component for kind 'ff', found 3", lambda i: {"kind": "ff"}),
    (
        r"leaf: expected shape \(B, K, C, V\), found \[2, 4, 3\]",
        lambda i: {"leaf": i["leaf"][..., 0]},
    ),
    (r"leaf: expected float32, float16, bfloat16 or float64", lambda i: {"leaf": i["leaf"].int()}),
    (r"leaf: expected at least one position", lambda i: {"leaf": i["leaf"][..., :0]}),
    (r"leaf: expected at least one position", lambda i: {"leaf": i["leaf"][:, :0]}),
    (r"x: expected Long, found Int", lambda i: {"x": i["x"].int()}),
    (r"x: expected shape \(B, K\) = \[2, 4\], found \[2, 3\]", lambda i: {"x": i["x"][:, 1:]}),
    (r"x\[1, 2\]: expected .* in \[-1, 5\), found 5", lambda i: with_token(i, 5)),
    (r"x\[1, 2\]: expected .* in \[-1, 5\), found -2", lambda i: with_token(i, -2)),
    (r"prior: expected shape \(B, C\) = \[2, 3\], found \[2, 2\]", cut("prior", 1)),
    (r"trans: expected the dtype of prior, Float, found Half", cast("trans", dtype=torch.half)),
    (r"prior: expected float32, float16, bfloat16 or", cast("prior", "trans", dtype=torch.int32)),
    (r"trans: expected the transitions of kind 'hmm' over 4 positions, found", is_(trans=None)),
    (rf"trans: {TRANS} = \[2, 3, 3, 3\], found \[2, 2, 3, 3\]", cut("trans", 1)),
    (rf"trans: {TRANS} = \[2, 0, 3, 3\], found \[2, 3, 3, 3\]", is_(kind="cp")),
    (r"e: expected shape \(B, K, C\), found \[2, 4, 3, 5\]", lambda i: {"x": None}),
]


@pytest.mark.parametrize(("message", "change"), WRONG, ids=[m for m, _ in WRONG])
@pytest.mark.parametrize("grad", [False, True])
def test_wrong_input_raises(message: str, change: Change, grad: bool) -> None:
    i = circuit_inputs(HMM, torch.float32, seed=1)
    changed = {**i, **change(i)}
    if grad and changed["leaf"].is_floating_point():
        changed["leaf"] = changed["leaf"].clone().requires_grad_()
    with pytest.raises(ValueError, match="(circuit_leaf|circuit_scan): .*" + message):
        scan(changed)


def test_wrong_gradients_raise() -> None:
    i = circuit_inputs(HMM, torch.float32, seed=2)
    e, norm = torch.ops.lora_ext.circuit_leaf(i["leaf"], i["x"])
    leaf_backward = torch.ops.lora_ext.circuit_leaf_backward
    for de, n, message in [
        (e[1:], norm, r"de: expected shape \(B, K, C\) = \[2, 4, 3\], found \[1, 4, 3\]"),
        (e.double(), norm, r"de: expected Float, found Double"),
        (e, norm[0], r"norm: expected shape \(2, B, K, C\) = \[2, 2, 4, 3\]"),
    ]:
        with pytest.raises(ValueError, match=f"circuit_leaf_backward: {message}"):
            leaf_backward(de, i["leaf"], i["x"], n)
    prefix, _, _, states = torch.ops.lora_ext.circuit_scan("hmm", e, i["prior"], i["trans"], True)
    for dprefix, s, message in [
        (prefix[1:], states, r"dprefix: expected shape \(B, K\) = \[2, 4\], found \[1, 4\]"),
        (prefix.double(), states, "dprefix: expected the dtype of e, Float, found Double"),
        (prefix, states[:, 1:], "states: expected shape of the states of circuit_scan"),
    ]:
        with pytest.raises(ValueError, match=f"circuit_scan_backward: {message}"):
            torch.ops.lora_ext.circuit_scan_backward(
                dprefix, None, "hmm", e, i["prior"], i["trans"], s, True, True
            )


def test_emission_gather_errors_name_their_arguments() -> None:
    h, emit, x = torch.ones(2, 6), torch.ones(4, 3, 5, 6), torch.zeros(2, 4, dtype=torch.long)
    for args, message in [
        ((h[0], emit, x), r"h: expected shape \(B, D\), found \[6\]"),
        ((h, emit[0], x), r"emit: expected shape \(K, C, V, D\), found \[3, 5, 6\]"),
        ((h, emit.half(), x), "emit: expected the dtype of h, Float, found Half"),
        ((h[:, 1:], emit, x), r"h\.shape\[1\]: expected emit\.shape\[3\] = 6, found 5"),
        ((h, emit[:, :, :0], x), "emit: expected at least one position"),
        ((h, emit, x[:, 1:]), r"x: expected shape \(B, K\) = \[2, 4\], found \[2, 3\]"),
        ((h, emit, x + 5), r"x\[0, 0\]: expected .* in \[-1, 5\), found 5"),
    ]:
        with pytest.raises(ValueError, match=f"emission_gather: {message}"):
            ops.emission_gather(*args)


def test_tensors_on_two_devices_raise() -> None:
    i = circuit_inputs(HMM, torch.float32, seed=3)
    with pytest.raises(ValueError, match="circuit_scan: expected all tensors on one device"):
        scan({**i, "prior": i["prior"].to("meta")})
    with pytest.raises(ValueError, match="circuit_leaf: expected all tensors on one device"):
        scan({**i, "x": i["x"].to("meta")})


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("kind", lambda i: {"kind": "tree"}),
        ("(e|leaf)", lambda i: {"leaf": i["leaf"][0]}),
        ("(e|leaf)", lambda i: {"leaf": i["leaf"].int()}),
        ("x", lambda i: {"x": i["x"][:, 1:]}),
        ("x", lambda i: {"x": i["x"].int()}),
        ("prior", lambda i: {"prior": i["prior"][:, 1:]}),
        ("trans", lambda i: {"trans": i["trans"][:, 1:]}),
        ("trans", lambda i: {"trans": i["trans"].half()}),
        ("trans", lambda i: {"trans": None}),
        ("(e|leaf)", lambda i: {"kind": "ff"}),
    ],
)
def test_meta_tensors_are_checked_like_real_ones(argument: str, change: Change) -> None:
    i = circuit_inputs(HMM, torch.float32, seed=3)
    messages = []
    for device in ("cpu", "meta"):
        on = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in i.items()}
        scan(on)
        with pytest.raises(ValueError, match=rf"circuit_(leaf|scan): {argument}: expected") as e:
            scan({**on, **change(on)})
        messages.append(str(e.value).split(":")[:2])
    assert messages[0] == messages[1]


def test_ff_needs_no_prior_or_transitions() -> None:
    i = circuit_inputs(FF, torch.float32, seed=4)
    given = scan({**i, "prior": torch.full((2, 1), 3.0), "trans": torch.ones(2, 0, 1, 1)})
    assert torch.equal(scan(i), given)
