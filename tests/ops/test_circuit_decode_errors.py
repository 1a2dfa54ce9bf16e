"""What the decoding ops refuse, and in which words: op, argument, expected, found."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases_decode import Inputs, Shape, circuit, draft, make_inputs

from lora_ext import ops, reference

SHAPE = Shape("hmm", 3, 4, 2, 5)
Change = Callable[[Inputs], dict[str, Any]]


def conditional_dist(i: Inputs) -> None:
    ops.circuit_conditional_dist(*circuit(i), i["x"], i["k"])


def sample(i: Inputs) -> None:
    ops.circuit_sample(*circuit(i), i["uniforms"], i["evidence"])


def argmax(i: Inputs) -> None:
    ops.circuit_argmax(*circuit(i), i["evidence"])


def verify(i: Inputs) -> None:
    ops.spec_verify(*i["draft"], i["num_evidence"], i["temperature"])


def with_draft(index: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda i: {
        "draft": [change(t) if n == index else t for n, t in enumerate(i["draft"])],
    }


def of_evidence(row: int, k: int, token: int) -> Change:
    def change(i: Inputs) -> dict[str, Any]:
        evidence = torch.full((3, 4), -1)
        evidence[row, k] = token
        return {"evidence": evidence}

    return change


def is_(**named: Any) -> Change:
    return lambda i: named


CIRCUIT: list[tuple[str, Change]] = [
    (r"kind must be 'ff', 'cp', 'hmm' or 'btree', got 'HMM'", is_(kind="HMM")),
    (r"kind 'ff' has one component, got 2", is_(kind="ff")),
    (r"leaf must have shape \(B, K, C, V\), got \[4, 2, 5\]", lambda i: {"leaf": i["leaf"][0]}),
    (r"leaf must be float32, float16, bfloat16 or float64", lambda i: {"leaf": i["leaf"].int()}),
    (
        r"leaf must have at least one position, component and token, got shape \[3, 4, 2, 0\]",
        lambda i: {"leaf": i["leaf"][..., :0]},
    ),
    (
        r"prior must have shape \(B, C\) = \[3, 2\], got \[2, 2\]",
        lambda i: {"prior": i["prior"][1:]},
    ),
    (r"trans is required for kind 'hmm' over 4 positions, got None", is_(trans=None)),
    (
        r"trans must have shape \(B, M, C, C\) = \[3, 3, 2, 2\], got \[3, 2, 2, 2\]",
        lambda i: {"trans": i["trans"][:, 1:]},
    ),
    (
        r"trans must have the dtype of prior, Float, got Half",
        lambda i: {"trans": i["trans"].half()},
    ),
    (
        r"prior must be float32, float16, .* got Long",
        lambda i: {
            "prior": i["prior"].nan_to_num(0).long(),
            "trans": i["trans"].nan_to_num(0).long(),
        },
    ),
]
EVIDENCE: list[tuple[str, Change]] = [
    (
        r"evidence must have shape \(B, K\) = \[3, 4\], got \[3, 3\]",
        lambda i: {"evidence": i["evidence"][:, 1:]},
    ),
    (r"evidence must be Long, got Int", lambda i: {"evidence": i["evidence"].int()}),
    (r"evidence\[1, 0\] must be in \[-1, 5\), got 5", of_evidence(1, 0, 5)),
    (r"evidence\[2, 3\] must be in \[-1, 5\), got -2", of_evidence(2, 3, -2)),
    (
        r"evidence must come first in its row, got token 4 at \[1, 2\] behind a -1",
        of_evidence(1, 2, 4),
    ),
]
OWN: list[tuple[Callable[[Inputs], None], str, Change]] = [
    (
        conditional_dist,
        r"x must have shape \(B, K\) = \[3, 4\], got \[2, 4\]",
        lambda i: {"x": i["x"][1:]},
    ),
    (conditional_dist, r"x must be Long, got Int", lambda i: {"x": i["x"].int()}),
    (
        conditional_dist,
        r"x\[0, 1\] must be in \[-1, 5\), got 7",
        lambda i: {"x": torch.tensor([[0, 7, 0, 0]] * 3)},
    ),
    (conditional_dist, r"k must have shape \(B,\) = \[3\], got \[2\]", lambda i: {"k": i["k"][1:]}),
    (conditional_dist, r"k\[2\] must be in \[0, 4\), got 4", is_(k=torch.tensor([0, 3, 4]))),
    (
        sample,
        r"uniforms must have shape \(B, K, 2\) = \[3, 4, 2\], got \[3, 4\]",
        lambda i: {"uniforms": i["uniforms"][..., 0]},
    ),
    (sample, r"uniforms must be Float, got Double", lambda i: {"uniforms": i["uniforms"].double()}),
    (
        sample,
        r"uniforms must be in \[0, 1\], got nan",
        lambda i: {"uniforms": i["uniforms"] * math.nan},
    ),
    (
        verify,
        r"leaf must have shape \(B, K, C, V\), got \[3, 4, 2\]",
        with_draft(4, lambda t: t[..., 0]),
    ),
    (
        verify,
        r"target must have shape \(B, K \+ 1, V\) = \[3, 5, 5\], got \[3, 4, 5\]",
        with_draft(0, lambda t: t[:, 1:]),
    ),
    (
        verify,
        r"target must be float64 where leaf is, and only there, got Double",
        with_draft(0, lambda t: t.double()),
    ),
    (
        verify,
        r"tokens must have shape \(B, K\) = \[3, 4\], got \[3, 3\]",
        with_draft(1, lambda t: t[:, 1:]),
    ),
    (verify, r"tokens\[0, 0\] must be in \[0, 5\), got -1", with_draft(1, lambda t: t * 0 - 1)),
    (verify, r"conditional must be Float, got Double", with_draft(2, lambda t: t.double())),
    (
        verify,
        r"posterior must have shape \(B, K, C\) = \[3, 4, 2\], got \[3, 4, 1\]",
        with_draft(3, lambda t: t[..., :1]),
    ),
    (verify, r"posterior must be Float, got Half", with_draft(3, lambda t: t.half())),
    (
        verify,
        r"uniforms must have shape \(B, K \+ 1\) = \[3, 5\], got \[3, 4\]",
        with_draft(5, lambda t: t[:, 1:]),
    ),
    (
        verify,
        r"num_evidence must have shape \(B,\) = \[3\], got \[1\]",
        is_(num_evidence=torch.tensor([1])),
    ),
    (
        verify,
        r"num_evidence\[1\] must be in \[0, 5\), got 5",
        is_(num_evidence=torch.tensor([1, 5, 0])),
    ),
    (verify, r"temperature must be at least 0 and finite, got -1", is_(temperature=-1.0)),
    (verify, r"temperature must be at least 0 and finite, got nan", is_(temperature=float("nan"))),
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
    *OWN,
]


def inputs() -> Inputs:
    i = make_inputs(SHAPE, torch.float32, seed=1)
    i["draft"] = list(draft(i, reference.circuit_sample(*circuit(i), i["uniforms"])))
    return {**i, "temperature": 1.0}


@pytest.mark.parametrize(
    ("op", "message", "change"), ALL, ids=[f"{NAMES[o]}-{m}" for o, m, _ in ALL]
)
def test_wrong_input_is_named(op: Callable[[Inputs], None], message: str, change: Change) -> None:
    i = inputs()
    op(i)
    with pytest.raises(ValueError, match=f"{NAMES[op]}: {message}"):
        op({**i, **change(i)})


def test_tensors_on_two_devices_are_refused() -> None:
    i = inputs()
    for op, name in ((sample, "uniforms"), (argmax, "prior"), (conditional_dist, "k")):
        with pytest.raises(ValueError, match=f"{NAMES[op]}: expected all tensors on one device"):
            op({**i, name: i[name].to("meta")})


def test_kernels_check_values_in_debug_mode_alone() -> None:
    """Without it a token out of range is impossible, and touches no memory."""
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
        with pytest.raises(ValueError, match=r"evidence\[0, 0\] must be in \[-1, 5\), got 99"):
            ops_of.circuit_sample(*circuit(i), i["uniforms"], bad)
    finally:
        module.set_debug(False)


def test_a_window_too_large_for_a_block_is_named() -> None:
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
