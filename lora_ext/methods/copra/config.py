"""Settings of progressive layer dropping, with the paper's symbols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lora_ext._checks import check_fields, choice, require, within

Shape = Literal["linear", "sine", "exponential", "constant"]
Sync = Literal["seed", "touch", "tensor"]


@dataclass(frozen=True)
class CopraConfig:
    """Settings of CopRA: the schedule of layer dropping and the treatment of inactive layers.

    At each training step, some groups of layers are active; the adapters of all other groups are
    off.

    Attributes:
        p0: Probability that a group of layers is active at the first step.
        p1: Probability at the end of the ramp and afterwards.
        ramp_ratio: rho, the fraction of the training during which the probability rises.
        ramp: Shape of the rise from p0 to p1: "linear"; "sine", fast at first; "exponential", slow
            at first; "constant", p0 until the end of the ramp; or a function that maps the
            completed fraction of the ramp, in [0, 1], to the completed fraction of the rise.
        group_by: Rule that divides the layers into groups. "block": the layers of a block form a
            group, and each layer outside all blocks is a group; "module": each layer is a group; an
            int: number of consecutive layers in a group.
        min_active: Smallest number of groups that are active at a step.
        seed: Seed of all masks.
        sync: Treatment of inactive layers. "seed": these layers are skipped, and their parameters
            get no gradient. "touch": the layers are skipped, but their parameters get gradients of
            zero, for data-parallel training that waits for every parameter. "tensor": the layers
            are computed and multiplied by zero, so that a compiled graph is never recompiled.

    Raises:
        ValueError: If a field is out of range.

    Source: arXiv 2410.22911; the defaults of p0, p1 and rho are those of the callback in the
    repository of the authors' follow-up, zwebzone/coto.
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
