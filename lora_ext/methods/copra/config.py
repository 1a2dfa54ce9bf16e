"""Settings of progressive layer dropping, under the paper's symbols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lora_ext._checks import check_fields, choice, require, within

Shape = Literal["linear", "sine", "exponential", "constant"]
Sync = Literal["seed", "touch", "tensor"]


@dataclass(frozen=True)
class CopraConfig:
    """How many layers train at each step, and what a layer that does not costs.

    Attributes:
        p0: probability of a layer at the first step.
        p1: probability at the end of the ramp and after it.
        ramp_ratio: rho, the part of the training in which the probability rises.
        ramp: "linear"; "sine", fast at first; "exponential", slow at first; "constant", p0 until
            the ramp's end; or a function of the fraction of the ramp that is over, in [0, 1], to
            the fraction of the rise.
        group_by: the layers that share a coin. "block" means those of one block, each layer outside
            all blocks by itself; "module" each layer by itself; a number so many in a row.
        min_active: at least so many groups train at every step.
        seed: of all masks.
        sync: what becomes of the layers that are off. "seed": they are skipped, and their
            parameters get no gradient. "touch": skipped, but with gradients of zero, for data
            parallel training that waits for every parameter. "tensor": computed and multiplied by
            zero, so that a compiled graph is never compiled again.

    Raises:
        ValueError: a value out of range, naming the field.

    Source: arXiv 2410.22911; p0, p1 and rho of the callback in the repository of the authors'
    follow-up, zwebzone/coto.
    """

    p0: float = 0.1
    p1: float = 1.0
    ramp_ratio: float = 0.75
    ramp: Shape | Callable[[float], float] = "linear"
    group_by: str | int = "block"
    min_active: int = 1
    seed: int = 0
    sync: Sync = "seed"

    def __post_init__(self) -> None:
        table = {
            "p0": within(0, 1),
            "p1": within(0, 1),
            "ramp_ratio": within(above=0, maximum=1),
            "ramp": _ramp,
            "min_active": within(0),
        }
        check_fields(self, table)
        require(self.p0 <= self.p1, "CopraConfig", "p0", f"at most p1 = {self.p1}", self.p0)


def _ramp(where: str, name: str, value: Any) -> Any:
    shapes = get_args(Shape)
    words = f"a function or one of {shapes}"
    return value if callable(value) else choice(where, name, value, shapes, expected=words)
