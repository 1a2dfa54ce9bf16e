"""Errors of the decoding ops; messages contain op, argument, expected and found value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases_decode import Inputs, Shape, circuit, draft, make_inputs
from cases_wrong import Change, cast, cut, is_

from lora_ext import ops, reference

SHAPE = Shape("hmm", 3, 4, 2, 5)


def conditional_dist(i: Inputs) -> None:
    ops.circuit_conditional_dist(*circuit(i), i["x"], i["k"])


def sample(i: Inputs) -> None:
    ops.circuit_sample(*circuit(i), i["uniforms"], i["evidence"])


def argmax(i: Inputs) -> None:
    ops.circuit_argmax(*circuit(i), i["evidence"])


def verify(i: Inputs) -> None:
    ops.spec_verify(*i["draft"], i["num_evidence"], i["temperature"])


def with_draft(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda i: {"draft": [change(t) if n == index else t for n, t in enumerate(i["draft"])]}


def less(t: torch.Tensor) -> torch.Tensor:
    return t[:, 1:]


def wide(t: torch.Tensor) -> torch.Tensor:
    return t.double()


def of_evidence(row: int, k: int, token: int) -> Change:
    def change(i: Inputs) -> dict[str, Any]:
        evidence = torch.full((3, 4), -1)
        evidence[row, k] = token
        return {"evidence": evidence}

    return change


CIRCUIT: list[tuple[str, Change]] = [
    (r"kind: expected 'ff', 'cp', 'hmm' or 'btree', found 'HMM'", is_(kind="HMM")),
    (r"leaf: expected one component for kind 'ff', found 2", is_(kind="ff")),
    (r"leaf: expected shape \(B, K, C, V\), found \[4, 2, 5\]", lambda i: {"leaf": i["leaf"][0]}),
    (r"leaf: expected float32, float16, bfloat16 or float64", cast("leaf", dtype=torch.int32)),
    (
        r"leaf: expected at least one position, component and token, found \[3, 4, 2, 0\]",
        lambda i: {"leaf": i["leaf"][..., :0]},
    ),
    (r"prior: expected shape \(B, C\) = \[3, 2\], found \[2, 2\]", cut("prior")),
    (r"trans: expected the transitions of kind 'hmm' over 4 positions, found", is_(trans=None)),
    (r"trans: expected shape \(B, M, C, C\) = \[3, 3, 2, 2\], found \[3, 2, 2", cut("trans", 1)),
    (r"trans: expected the dtype of prior, Float, found Half", cast("trans", dtype=torch.half)),
    (r"prior: expected float32, float16, .*, found Long", cast("prior", "trans", dtype=torch.long)),
]
EVIDENCE: list[tuple[str, Change]] = [
    (r"evidence: expected shape \(B, K\) = \[3, 4\], found \[3, 3\]", cut("evidence", 1)),
    (r"evidence: expected Long, found Int", cast("evidence", dtype=torch.int32)),
    (r"evidence\[1, 0\]: expected .* in \[-1, 5\), found 5", of_evidence(1, 0, 5)),
    (r"evidence\[2, 3\]: expected .* in \[-1, 5\), found -2", of_evidence(2, 3, -2)),
    (
        r"evidence\[1, 2\]: expected -1 after a -1, .* must come first, found 4",
        of_evidence(1, 2, 4),
    ),
]
CONDITIONAL: list[tuple[str, Change]] = [
    (r"x: expected shape \(B, K\) = \[3, 4\], found \[2, 4\]", cut("x")),
    (r"x: expected Long, found Int", cast("x", dtype=torch.int32)),
    (r"x\[0, 1\]: expected .* in \[-1, 5\), found 7", is_(x=torch.tensor([[0, 7, 0, 0]] * 3))),
    (r"k: expected shape \(B,\) = \[3\], found \[2\]", cut("k")),
    (r"k\[2\]: expected .* in \[0, 4\), found 4", is_(k=torch.tensor([0, 3, 4]))),
]
SAMPLE: list[tuple[str, Change]] = [
    (
        r"uniforms: expected shape \(B, K, 2\) = \[3, 4, 2\], found \[3, 4\]",
        lambda i: {"uniforms": i["uniforms"][..., 0]},
    ),
    (r"uniforms: expected Float, found Double", cast("uniforms", dtype=torch.double)),
    (
        r"uniforms: expected .* in \[0, 1\], found nan",
        lambda i: {"uniforms": i["uniforms"] * math.nan},
    ),
]
TEMPERATURE = "temperature: expected a finite number of at least 0"
VERIFY: list[tuple[str, Change]] = [
    (r"target: expected shape \(B, K \+ 1, V\) = \[3, 5, 5\], found \[3, 4", with_draft(0, less)),
    (r"target: expected float64 if and only if leaf is float64, found Double", with_draft(0, wide)),
    (r"tokens: expected shape \(B, K\) = \[3, 4\], found \[3, 3\]", with_draft(1, less)),
    (r"tokens\[0, 0\]: expected .* in \[0, 5\), found -1", with_draft(1, lambda t: t * 0 - 1)),
    (r"conditional: expected Float, found Double", with_draft(2, wide)),
    (
        r"posterior: expected shape \(B, K, C\) = \[3, 4, 2\], found \[3, 4, 1\]",
        with_draft(3, lambda t: t[..., :1]),
    ),
    (r"posterior: expected Float, found Half", with_draft(3, lambda t: t.half())),
    (
        r"leaf: expected shape \(B, K, C, V\), found \[3, 4, 2\]",
        with_draft(4, lambda t: t[..., 0]),
    ),
    (r"uniforms: expected shape \(B, K \+ 1\) = \[3, 5\], found \[3, 4\]", with_draft(5, less)),
    (
        r"num_evidence: expected shape \(B,\) = \[3\], found \[1\]",
        is_(num_evidence=torch.tensor([1])),
    ),
    (
        r"num_evidence\[1\]: expected .* in \[0, 5\), found 5",
        is_(num_evidence=torch.tensor([1, 5, 0])),
    ),
    (f"{TEMPERATURE}, found -1", is_(temperature=-1.0)),
    (f"{TEMPERATURE}, found nan", is_(temperature=math.nan)),
]
NAMES = {
    conditional_dist: "circuit_conditional_dist",
    sample: "circuit_sample",
    argmax: "circuit_argmax",
    verify: "spec_verify",
}
ALL = [
    *((op, m, c) for op in (conditional_dist, sample, argmax) for m, c in CIRCUIT),
    *((op, m, c) for op in (sample, argmax) for m, c in EVIDENCE),
    *((conditional_dist, m, c) for m, c in CONDITIONAL),
    *((sample, m, c) for m, c in SAMPLE),
    *((verify, m, c) for m, c in VERIFY),
]


def inputs() -> Inputs:
    i = make_inputs(SHAPE, torch.float32, seed=1)
    i["draft"] = list(draft(i, reference.circuit_sample(*circuit(i), i["uniforms"])))
    return {**i, "temperature": 1.0}


@pytest.mark.parametrize(
    ("op", "message", "change"), ALL, ids=[f"{NAMES[o]}-{m}" for o, m, _ in ALL]
)
def test_wrong_input_raises(op: Callable[[Inputs], None], message: str, change: Change) -> None:
    i = inputs()
    op(i)
    with pytest.raises(ValueError, match=f"{NAMES[op]}: {message}"):
        op({**i, **change(i)})


def test_tensors_on_two_devices_raise() -> None:
    i = inputs()
    for op, name in ((sample, "uniforms"), (argmax, "prior"), (conditional_dist, "k")):
        with pytest.raises(ValueError, match=f"{NAMES[op]}: expected all tensors on one device"):
            op({**i, name: i[name].to("meta")})


SHAPES_AND_DTYPES = [
    (op, m, c) for op, m, c in ALL if not re.search(r"\\\]:|in \\\[0|-1 behind|at least one", m)
]


@pytest.mark.parametrize(
    ("op", "message", "change"),
    SHAPES_AND_DTYPES,
    ids=[f"{NAMES[o]}-{m}" for o, m, _ in SHAPES_AND_DTYPES],
)
def test_meta_tensors_are_checked_like_real_ones(
    op: Callable[[Inputs], None], message: str, change: Change
) -> None:
    def on_meta(i: Inputs) -> Inputs:
        of_list = [t.to("meta") for t in i["draft"]]
        moved = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in i.items()}
        return {**moved, "draft": of_list}

    i = inputs()
    op(on_meta(i))
    with pytest.raises(ValueError, match=f"{NAMES[op]}: {message.split(':')[0]}: expected"):
        op(on_meta({**i, **change(i)}))


def test_nan_uniforms_raise_and_nan_logits_give_a_token_in_range() -> None:
    i = inputs()
    u = i["draft"][5].clone()
    u[1, 2] = torch.nan
    with pytest.raises(
        ValueError, match=r"spec_verify: uniforms: expected .* in \[0, 1\], found nan"
    ):
        verify({**i, "draft": [*i["draft"][:5], u]})
    target = i["draft"][0].clone()
    target[1] = torch.nan
    clean = ops.spec_verify(*i["draft"])
    accepted, token = ops.spec_verify(target, *i["draft"][1:])
    assert (0 <= token).all() and (token < 5).all() and 0 <= accepted[1] <= 4
    for row in (0, 2):  # Other rows must not change.
        assert accepted[row] == clean[0][row] and token[row] == clean[1][row]


@pytest.mark.slow  # `make test` does not build _emu_check
def test_kernels_check_values_only_in_debug_mode() -> None:
    """Check a token out of range, which has probability 0 unless debug mode is on."""
    from lora_ext import _loader

    try:
        module = _loader.load("_emu_check")
    except ImportError:
        pytest.skip("lora_ext._emu_check is not built (LORA_EXT_EMU=1)")
    i = inputs()
    bad = torch.tensor([[99, -1, -1, -1], [-7, -1, -1, -1], [2, -1, -1, -1]])
    ops_of = torch.ops.lora_ext_emu_check
    tokens, conditional, _ = ops_of.circuit_sample(*circuit(i), i["uniforms"], bad)
    assert (conditional[0] == -torch.inf).all() and tokens[1, 0] >= 0
    got = ops_of.spec_verify(i["draft"][0], bad, *i["draft"][2:], None, 1.0)
    assert got[0][0] == 0 and (got[1] >= 0).all() and (got[1] < 5).all()
    dist = ops_of.circuit_conditional_dist(*circuit(i), bad, torch.tensor([1, 9, -9]))
    assert (dist[0] == -torch.inf).all()
    module.set_debug(True)
    try:
        with pytest.raises(
            ValueError, match=r"evidence\[0, 0\]: expected .* in \[-1, 5\), found 99"
        ):
            ops_of.circuit_sample(*circuit(i), i["uniforms"], bad)
    finally:
        module.set_debug(False)


@pytest.mark.slow  # `make test` does not build _emu_check
def test_window_too_large_for_a_block_raises() -> None:
    from lora_ext import _loader

    try:
        _loader.load("_emu_check")
    except ImportError:
        pytest.skip("lora_ext._emu_check is not built (LORA_EXT_EMU=1)")
    leaf = torch.zeros(1, 28, 2048, 1)
    with pytest.raises(
        ValueError,
        match=r"circuit_argmax: leaf: expected .* 230400 bytes .* found shape \[1, 28, 2048, 1\]",
    ):
        torch.ops.lora_ext_emu_check.circuit_argmax("cp", leaf, None, None)
