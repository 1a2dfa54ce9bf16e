"""Errors of the chunked vocabulary losses and their messages."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_ext import ops


def _refusals() -> list[tuple[str, Callable[[], object]]]:
    h, w, b = torch.zeros(3, 4), torch.zeros(6, 4), torch.zeros(6)
    y, kl, ce = torch.zeros(3, dtype=torch.int64), ops.chunked_kl, ops.chunked_cross_entropy
    wide = torch.zeros(3, 5)
    return [
        (r"hidden: expected shape \(N, d\), found \[3\]", lambda: ce(h[:, 0], w, b, y)),
        (r"hidden: expected torch.float32 or .*, found torch.int64", lambda: ce(h.long(), w, b, y)),
        (r"weight: expected shape \(V, d\) = \[6, 5\], found \[6, 4\]", lambda: ce(wide, w, b, y)),
        (r"weight: expected at least one row", lambda: ce(h, w[:0], None, y)),
        (r"bias: expected shape \(V,\) = \[6\], found \[5\]", lambda: ce(h, w, b[:5], y)),
        (r"labels: expected shape \(N,\) = \[3\], found \[2\]", lambda: ce(h, w, b, y[:2])),
        (r"labels: expected torch.int64, found torch.int32", lambda: ce(h, w, b, y.int())),
        (r"chunk: expected at least 1, found 0", lambda: ce(h, w, b, y, chunk=0)),
        (r"softcap: expected None or .*, found 0", lambda: ce(h, w, b, y, softcap=0.0)),
        (r"softcap: expected None or .*, found inf", lambda: ce(h, w, b, y, softcap=math.inf)),
        (r"tau: expected a number above 0, found inf", lambda: kl([h, h], w, b, tau=math.inf)),
        (r"hiddens: expected at least the teacher's hidden state", lambda: kl([], w, b)),
        (r"hiddens\[1\]: expected shape \(N, d\) = \[3, 4\]", lambda: kl([h, wide], w, b)),
        (r"hiddens\[1\]: expected torch.float32, found", lambda: kl([h, h.double()], w, b)),
        (r"tau: expected a number above 0, found -1", lambda: kl([h, h], w, b, tau=-1.0)),
        (r"tau: expected a number above 0, found inf", lambda: kl([h, h], w, b, tau=math.inf)),
        (r"chunk: expected at least 1, found -2", lambda: kl([h, h], w, b, chunk=-2)),
        (r"mask: expected shape \(N,\) = \[3\], found \[3, 4\]", lambda: kl([h], w, b, mask=h > 0)),
        (r"mask: expected torch.bool, found torch.int64", lambda: kl([h], w, b, mask=y)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("message", "call"), _refusals(), ids=lambda x: x if isinstance(x, str) else ""
)
def test_errors_name_the_argument(message: str, call: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=rf"chunked_(cross_entropy|kl): {message}"):
        call()


def test_tensors_on_two_devices_raise() -> None:
    meta = torch.zeros(6, 4, device="meta")
    with pytest.raises(ValueError, match=r"weight|expected all tensors on one device"):
        ops.chunked_cross_entropy(torch.zeros(3, 4), meta, None, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"chunked_kl: hiddens\[1\]: expected a tensor on cpu, "):
        ops.chunked_kl([torch.zeros(6, 4), meta], torch.zeros(5, 4), None)


def test_forward_mode_raises() -> None:
    weight, labels = torch.randn(6, 4), torch.tensor([0, 5, 2])

    def loss(h: Tensor) -> Tensor:
        return ops.chunked_cross_entropy(h, weight, None, labels)

    hidden = torch.randn(3, 4)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (hidden,), (hidden,))
