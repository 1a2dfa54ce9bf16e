"""Hidden states of a vision transformer, the teacher of the distillation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lora_ext._checks import choice, require
from lora_ext.layers import decoder_layers

from ._states import block_states
from .config import Pairing


class TeacherStates(NamedTuple):
    """Hidden states of a teacher for the images of a batch, in the order of the images.

    ``M`` is the number of patches of all images, ``d_v`` the width of the teacher.
    """

    states: list[Tensor]  # one (M, d_v) per block, without class token and registers
    grids: list[tuple[int, int]]  # numbers of rows and columns of patches of each image


@torch.no_grad()
def teacher_states(
    teacher: nn.Module,
    images: Sequence[Tensor] | Sequence[Sequence[Tensor]],
    n_blocks: int,
    pairing: Pairing = "output",
) -> TeacherStates:
    """Compute the states of a vision transformer's first blocks for :func:`block_distill_loss`.

    Images of the same size are processed in one forward. Hooks collect the states, since the last
    ``hidden_states`` of a transformers model are after its final norm.

    Args:
        teacher: transformers vision model (such as ViT, CLIP or AIMv2) in evaluation mode.
        images: ``(3, H, W)`` tensors, preprocessed for the teacher, or one list of them per sample.
        n_blocks: number of blocks whose states are collected.
        pairing: "output" collects the outputs of the blocks; "released" their inputs, as in the
            released code.

    Returns:
        :class:`TeacherStates`.

    Raises:
        ValueError: If the teacher has fewer blocks, is in training mode or drops patches; if the
            sides of an image are not multiples of the patch size; or if ``pairing`` is unknown.
    """
    where = "teacher_states"
    mode = "one in training mode; call teacher.eval()"
    choice(where, "pairing", pairing, get_args(Pairing))
    require(not teacher.training, where, "teacher", "a model in evaluation mode", mode)
    blocks = list(decoder_layers(teacher))
    fits = len(blocks) >= n_blocks
    require(fits, where, "teacher", f"at least n_blocks = {n_blocks} blocks", len(blocks))
    flat: list[Tensor] = []
    for one in images:
        flat += [one] if isinstance(one, Tensor) else one
    config: Any = teacher.config
    patch = int(getattr(config, "vision_config", config).patch_size)
    expected = f"shape (3, H, W) with multiples of the patch size {patch}"
    for image in flat:
        fits = image.dim() == 3 and not (image.shape[1] % patch or image.shape[2] % patch)
        require(fits, where, "images", expected, tuple(image.shape))
    grids = [(image.shape[1] // patch, image.shape[2] // patch) for image in flat]
    states: list[list[Tensor]] = [[torch.empty(0)] * len(flat) for _ in range(n_blocks)]
    resizes = "interpolate_pos_encoding" in inspect.signature(teacher.forward).parameters
    options = {"interpolate_pos_encoding": True} if resizes else {}
    for grid in dict.fromkeys(grids):
        own = [i for i, other in enumerate(grids) if other == grid]
        with block_states(blocks[:n_blocks], pairing) as found:
            teacher(torch.stack([flat[i] for i in own]), **options)
        for of_block, hidden in zip(states, found, strict=True):
            count, patches = hidden.shape[1], grid[0] * grid[1]
            expected = f"blocks that keep all {patches} patches of an image"
            require(count >= patches, where, "teacher", expected, f"{count} tokens")
            first = count - patches  # The patches follow the class token and registers.
            for i, tokens in zip(own, hidden[:, first:], strict=True):
                of_block[i] = tokens
    if not flat:
        return TeacherStates([torch.empty(0, int(config.hidden_size))] * n_blocks, [])
    return TeacherStates([torch.cat(of_block) for of_block in states], grids)
