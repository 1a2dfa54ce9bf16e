"""Settings of Vision as LoRA, under the paper's symbols."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lora_ext.nn.vora_linear import ROUTES, Route

from .embed import POS_MODES, PosMode
from .splice import PLACEHOLDER

Pairing = Literal["output", "released"]
PAIRINGS: tuple[Pairing, ...] = get_args(Pairing)

#: The linear layers of a block of Llama and its kin: attention and gated MLP.
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class VoraConfig:
    """Which layers see, what an image becomes, and how the blocks are distilled.

    Attributes:
        n_blocks: N_vit, the first blocks of the language model, as many as the teacher has.
        rank: r of the adapters.
        scale: of their updates; the paper has no alpha.
        target_modules: names of linear layers, or ends of their names, within these blocks.
        route: "all": the adapters serve every token, and can be merged, as the paper does; "vision"
            (Partial LoRA): vision tokens alone, so that text is the base model's, bit for bit.
        image_size: side of the square image that the table of positions is made for.
        patch: p, side of a patch.
        embed_dim: C, width of the vision embedding.
        pos_mode: positions of other grids than that square's: "interp", or "released" for the
            authors' checkpoints (:class:`VisionPatchEmbed`).
        bidirectional: the tokens of an image attend to each other in both directions.
        pairing: which hidden states are distilled. "output": a block's output with the output of
            the teacher's block, as the paper says; "released": their inputs, as the authors' code
            does.
        distill_weight: lambda, of the distillation beside the loss of the language model.
        placeholder: the id in ``input_ids`` that stands for an image.

    Raises:
        ValueError: a value out of range, naming the field.

    Source: arXiv 2503.20680; embedding and defaults of the repository Hon-Wong/VoRA.
    """

    n_blocks: int
    rank: int = 1024
    scale: float = 1.0
    target_modules: tuple[str, ...] = LINEAR_LAYERS
    route: Route = "all"
    image_size: int = 448
    patch: int = 14
    embed_dim: int = 1536
    pos_mode: PosMode = "interp"
    bidirectional: bool = True
    pairing: Pairing = "output"
    distill_weight: float = 1.0
    placeholder: int = PLACEHOLDER

    def __post_init__(self) -> None:
        for name in ("n_blocks", "rank", "patch", "image_size", "embed_dim"):
            value = getattr(self, name)
            self._check(_is_int(value) and value >= 1, name, "an int, at least 1")
        for ok, name, expected in (
            (_is_number(self.scale), "scale", "a finite number"),
            (self.route in ROUTES, "route", f"one of {ROUTES}"),
            (
                self.image_size % self.patch == 0,
                "image_size",
                f"a multiple of the patch {self.patch}",
            ),
            (self.pos_mode in POS_MODES, "pos_mode", f"one of {POS_MODES}"),
            (isinstance(self.bidirectional, bool), "bidirectional", "a bool"),
            (self.pairing in PAIRINGS, "pairing", f"one of {PAIRINGS}"),
            (
                _is_number(self.distill_weight) and self.distill_weight >= 0,
                "distill_weight",
                "a number, at least 0",
            ),
            (_is_int(self.placeholder), "placeholder", "an int"),
        ):
            self._check(ok, name, expected)
        given: Any = self.target_modules
        names = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
        ok = bool(names) and all(isinstance(name, str) and name for name in names)
        self._check(ok, "target_modules", "at least one name of linear layers")
        object.__setattr__(self, "target_modules", names)  # a list may be given

    def _check(self, ok: bool, name: str, expected: str) -> None:
        if not ok:
            found = getattr(self, name)
            raise ValueError(f"VoraConfig: {name}: expected {expected}, found {found!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
