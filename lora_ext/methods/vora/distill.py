"""Block-wise distillation: blocks of the language model learn to predict the teacher's states.

``h_i`` are the outputs of block i on the vision tokens and ``u_i`` those of the teacher's block;
``d`` and ``d_v`` are the widths of the two models:

    head_i = RMSNorm(d) -> linear to d_v, no bias
    l_i = mean over the vision tokens of the batch (1 - cos(head_i(h_i), u_i))
    loss = mean over the blocks of l_i

Source: arXiv 2503.20680; heads and the mean over tokens as in the repository Hon-Wong/VoRA.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext._checks import choice, require
from lora_ext.layers import decoder_layers

from ._embed import RMSNorm, resample_grid
from ._states import block_states
from .config import Pairing

Grid = tuple[int, int]


class DistillHeads(nn.ModuleList):
    """Heads for the distillation, one per block: a norm and a projection to the teacher's width.

    The heads are not needed after training.

    Args:
        n_blocks: number of heads.
        hidden_size: d, width of the language model.
        teacher_width: d_v, width of the teacher.
        eps: eps of the norms.

    Raises:
        ValueError: If a number is below 1.
    """

    def __init__(self, n_blocks: int, hidden_size: int, teacher_width: int, eps: float = 1e-5):
        sizes = {"n_blocks": n_blocks, "hidden_size": hidden_size, "teacher_width": teacher_width}
        for name, size in sizes.items():
            require(size >= 1, "DistillHeads", name, "at least 1", size)
        super().__init__()
        for _ in range(n_blocks):
            linear = nn.Linear(hidden_size, teacher_width, bias=False)
            self.append(nn.Sequential(RMSNorm(hidden_size, eps), linear))

    def forward(self, hiddens: Sequence[Tensor]) -> list[Tensor]:
        """Project each block's hidden states to the teacher's width.

        Args:
            hiddens: ``n_blocks`` tensors ``(M, d)``, the hidden states of the batch's M vision
                tokens.

        Returns:
            ``n_blocks`` tensors ``(M, d_v)``.

        Raises:
            ValueError: If the number of tensors is not ``n_blocks``.
        """
        _check_count("DistillHeads", "hiddens", hiddens, len(self))
        return [head(hidden) for head, hidden in zip(self, hiddens, strict=True)]


def block_distill_loss(
    heads: DistillHeads | None,
    hiddens: Sequence[Tensor],
    teachers: Sequence[Tensor] | None,
    student_grids: Sequence[Grid] | None = None,
    teacher_grids: Sequence[Grid] | None = None,
) -> Tensor:
    """Compute the mean of ``1 - cos(projected state, teacher's state)`` over all tokens and blocks.

    Args:
        heads: heads that project the hidden states to the teacher's width; None if the hidden
            states have this width already.
        hiddens: one ``(M, d)`` per block: the block's outputs on the M vision tokens of the batch,
            in the order of samples and images.
        teachers: one ``(M', d_v)`` per block of the teacher, without a class token; these states
            get no gradient. None for a batch without images.
        student_grids: numbers of rows and columns ``(h, w)`` of each image's tokens in ``hiddens``.
        teacher_grids: the same numbers for ``teachers``. If the two grids of an image differ, the
            teacher's states are interpolated to the student's grid. If one of the two arguments is
            None, M' must be M.

    Returns:
        Scalar in float32 (float64 for float64). Without images the loss is 0, and every head and
        hidden state gets a gradient of zeros, which data-parallel training needs.

    Raises:
        ValueError: If the numbers of blocks, tokens, channels or grids disagree.
    """
    blocks = max(1, len(hiddens)) if heads is None else len(heads)
    _check_count("block_distill_loss", "hiddens", hiddens, blocks)
    tokens = [len(hidden) for hidden in hiddens]
    alike = len(set(tokens)) == 1
    require(
        alike, "block_distill_loss", "hiddens", "the same number of tokens in each block", tokens
    )
    predictions = list(hiddens) if heads is None else heads(hiddens)
    predictions = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in predictions]
    if teachers is None:
        teachers = () if tokens[0] else predictions
    _check_count("block_distill_loss", "teachers", teachers, blocks)
    where = "block_distill_loss"
    count = tokens[0]
    pairs: list[tuple[Grid, Grid]] | None = None  # (teacher's, student's) grid of each image
    if student_grids is not None and teacher_grids is not None:
        images, found = len(student_grids), len(teacher_grids)
        expected = f"one grid for each of the student's {images} images"
        require(images == found, where, "teacher_grids", expected, found)
        total = sum(h * w for h, w in student_grids)
        expected = f"grids with {count} tokens in total"
        require(total == count, where, "student_grids", expected, [*student_grids])
        pairs = [*zip(teacher_grids, student_grids, strict=True)]
    cosines: list[Tensor] = []
    for p, u in zip(predictions, teachers, strict=True):
        fits = u.dim() == 2 and u.shape[1] == p.shape[1]
        require(fits, where, "teachers", f"shape (M, {p.shape[1]})", tuple(u.shape))
        u = u.detach().to(p)
        if pairs is not None:
            found = [grid for grid, _ in pairs]
            sizes = [h * w for h, w in found]
            expected = f"grids with {len(u)} tokens in total"
            require(sum(sizes) == len(u), where, "teacher_grids", expected, found)
            parts = zip(u.split(sizes), pairs, strict=True)
            u = torch.cat([u[:0], *(resample_grid(image, *pair) for image, pair in parts)])
        expected = f"{count} tokens, as in hiddens, unless both grids are given"
        require(len(u) == count, where, "teachers", expected, len(u))
        cosines.append(F.cosine_similarity(p, u, dim=-1, eps=1e-8))  # (M,)
    if count == 0:  # A mean over no tokens would be NaN.
        return torch.stack([p.sum() for p in predictions]).sum()
    return (1 - torch.stack(cosines)).mean()


def _check_count(where: str, name: str, tensors: Sequence[Tensor], blocks: int) -> None:
    require(len(tensors) == blocks, where, name, f"{blocks} tensors, one per block", len(tensors))


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
    """Compute the hidden states of a teacher's first blocks, for :func:`block_distill_loss`.

    Images of the same size are processed in one forward. Hooks collect the states, since the last
    ``hidden_states`` of a transformers model are those after the final norm.

    Args:
        teacher: transformers vision model (such as ViT, CLIP or AIMv2) in evaluation mode.
        images: ``(3, H, W)`` tensors, preprocessed for the teacher, or one list of such tensors per
            sample.
        n_blocks: number of blocks whose states are collected.
        pairing: "output" collects the outputs of the blocks; "released" their inputs, as in the
            released code.

    Returns:
        :class:`TeacherStates`.

    Raises:
        ValueError: If the teacher has fewer than ``n_blocks`` blocks, is in training mode or drops
            patches; if a side of an image is not a multiple of the patch size; or if ``pairing`` is
            unknown.
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
