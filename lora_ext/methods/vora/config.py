"""Settings of Vision as LoRA, with the paper's symbols."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from lora_ext._checks import check_fields, require, within

from ._embed import PosMode
from .layers import Route
from .splice import PLACEHOLDER

Pairing = Literal["output", "released"]

#: Linear layers of a block of Llama and similar models: attention and gated MLP.
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class VoraConfig:
    """Settings of the layers, the vision embedding and the distillation.

    Attributes:
        n_blocks: N_vit, number of adapted blocks, counted from the first; in the paper, the number
            of the teacher's blocks.
        rank: r, rank of the adapters.
        scale: scale of the adapters' updates; the paper has no alpha.
        target_modules: names of linear layers in these blocks, or ends of their names.
        route: "all": the adapters apply to every token and can be merged, as in the paper; "vision"
            (Partial LoRA): the adapters apply only to vision tokens, so that outputs for text are
            equal to those of the base model, bit for bit.
        image_size: side in pixels of a square image for which there are position embeddings.
        patch: p, side of a patch in pixels.
        embed_dim: C, width of the vision embedding.
        pos_mode: position embeddings of images of other sizes: "interp", or "released" for the
            authors' checkpoints (see :class:`VisionPatchEmbed`).
        bidirectional: whether the tokens of an image attend to each other in both directions.
        pairing: hidden states that the distillation compares. "output": the outputs of a block and
            of the teacher's block, as in the paper; "released": the inputs of both blocks, as in
            the authors' code.
        distill_weight: lambda, weight of the distillation loss in the total loss.
        placeholder: id in ``input_ids`` that represents an image.

    Raises:
        ValueError: If a field is out of range.

    Source: arXiv 2503.20680; embedding and defaults are from the repository Hon-Wong/VoRA.
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
        expected = f"a multiple of the patch size {self.patch}"
        fits = self.image_size % self.patch == 0
        require(fits, "VoraConfig", "image_size", expected, self.image_size)


def _names(where: str, name: str, given: Any) -> tuple[str, ...]:
    names = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    ok = bool(names) and all(isinstance(each, str) and each for each in names)
    require(ok, where, name, "at least one name of a linear layer", repr(given))
    return names
