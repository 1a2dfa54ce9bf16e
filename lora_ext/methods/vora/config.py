"""Settings of Vision as LoRA, under the paper's symbols."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lora_ext._checks import check_fields, require, within

from ._embed import PosMode
from .layers import Route
from .splice import PLACEHOLDER

Pairing = Literal["output", "released"]

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
        sizes = ("n_blocks", "rank", "image_size", "patch", "embed_dim")
        table = {
            **dict.fromkeys(sizes, within(1)),
            "target_modules": _names,
            "distill_weight": within(0),
        }
        check_fields(self, table)
        expected = f"a multiple of the patch {self.patch}"
        fits = self.image_size % self.patch == 0
        require(fits, "VoraConfig", "image_size", expected, self.image_size)


def _names(where: str, name: str, given: Any) -> tuple[str, ...]:
    names = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    ok = bool(names) and all(isinstance(each, str) and each for each in names)
    require(ok, where, name, "at least one name of linear layers", repr(given))
    return names  # a list may be given
