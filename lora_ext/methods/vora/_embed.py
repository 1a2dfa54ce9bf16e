"""Vision embedding: one token per patch of an image that :func:`smart_resize` has resized.

``C`` is the width of the embedding, ``d`` that of the language model, ``p`` the side of a patch and
``N = (H / p) (W / p)`` the number of patches of an image ``(3, H, W)``:

    patches (N, 3 p p), row by row -> linear to C -> RMSNorm -> + position -> linear to d, no bias

Source: arXiv 2503.20680; parameter names and the position rule "released" are from the repository
Hon-Wong/VoRA, which uses the embedding of AIMv2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext._checks import choice, require
from lora_ext._torch import linear

PosMode = Literal["interp", "released"]
MIN_PIXELS, MAX_PIXELS = 3136, 784000  # 56 x 56; 4000 patches of 14 x 14
MAX_RATIO = 200  # largest ratio of the longer side to the shorter one


class RMSNorm(nn.Module):
    """Root-mean-square norm ``weight * x / rms(x)``.

    The quotient is computed in float32 (float64 for float64), rounded to the dtype of ``x`` and
    then multiplied by the weight.

    Args:
        width: size of the last dimension.
        eps: number added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x (..., width)`` divided by its root mean square, times the weight."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight

    def extra_repr(self) -> str:
        """Return the width and eps for ``print``."""
        return f"{self.weight.numel()}, eps={self.eps}"


class VisionPatchEmbed(nn.Module):
    """Embedding that converts an image to one token per patch.

    The sides of an image must be multiples of the patch size. Images of different sizes are
    processed as one matrix of patches, without padding.

    Args:
        hidden_size: d, width of the language model.
        embed_dim: C, width of the embedding.
        patch: p, side of a patch in pixels.
        image_size: side in pixels of a square image; ``pos_embed`` has one row per patch of this
            image.
        pos_mode: position embeddings of images of other sizes. "interp": ``pos_embed``,
            interpolated (bilinear, ``align_corners=False``). "released": for N patches, the first N
            rows, or the interpolation if there are fewer. In an image whose width is not
            ``image_size``, patches then get the positions of other rows and columns; the released
            checkpoints were trained in this way.
        eps: eps of the norm.

    Attributes:
        patchifier: ``proj``, the convolution with weight ``(C, 3, p, p)``, and ``norm``.
        pos_embed: table of positions, ``(1, (image_size / p) ** 2, C)``, initially zero.
        out_proj: linear layer from C to d.

    Raises:
        ValueError: If a size is below 1, the image size is not a multiple of the patch size, or
            ``pos_mode`` is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        embed_dim: int = 1536,
        patch: int = 14,
        image_size: int = 448,
        pos_mode: PosMode = "interp",
        eps: float = 1e-5,
    ):
        super().__init__()
        where = "VisionPatchEmbed"
        sizes = {"hidden_size": hidden_size, "embed_dim": embed_dim}
        for name, size in {**sizes, "patch": patch, "image_size": image_size}.items():
            require(size >= 1, where, name, "at least 1", size)
        whole = image_size % patch == 0
        require(whole, where, "image_size", f"a multiple of the patch size {patch}", image_size)
        choice(where, "pos_mode", pos_mode, get_args(PosMode))
        self.patch, self.side, self.pos_mode = patch, image_size // patch, pos_mode
        self.patchifier = nn.ModuleDict(
            {"proj": nn.Conv2d(3, embed_dim, patch, patch), "norm": RMSNorm(embed_dim, eps)}
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2, embed_dim))
        self.out_proj = nn.Linear(embed_dim, hidden_size, bias=False)

    @overload
    def forward(self, images: Tensor) -> Tensor: ...
    @overload
    def forward(self, images: Sequence[Tensor]) -> list[Tensor]: ...
    def forward(self, images: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Compute one token per patch; the patches of an image are in row-major order.

        Args:
            images: floating-point ``(B, 3, H, W)``, or a list of ``(3, H, W)`` of any sizes.

        Returns:
            ``(B, N, d)``, or a list of ``(N_i, d)``, in the dtype of the parameters.

        Raises:
            ValueError: If a shape is wrong or a side is not a multiple of the patch size.
            TypeError: If an image has an integer dtype, which means that it is not normalised.
        """
        batch = isinstance(images, Tensor)
        expected = "shape (B, 3, H, W), or a list of (3, H, W)"
        for given in [images] if batch else images:
            found = tuple(given.shape)
            require(len(found) == 3 + batch, "VisionPatchEmbed", "images", expected, found)
        parts = [images] if batch else [image[None] for image in images]
        grids = [self.grid(part) for part in parts]
        if not parts:
            return []
        patches = [self._patches(p, *grid) for p, grid in zip(parts, grids, strict=True)]
        table = {grid: self.positions(*grid) for grid in dict.fromkeys(grids)}
        positions = [table[grid].repeat(len(p), 1) for p, grid in zip(parts, grids, strict=True)]
        proj, norm = self.patchifier["proj"], self.patchifier["norm"]
        assert isinstance(proj, nn.Conv2d)
        tokens = norm(linear(torch.cat(patches), proj.weight.flatten(1), proj.bias))
        tokens = self.out_proj(tokens + torch.cat(positions))  # (sum of N, d)
        counts = [rows * columns for rows, columns in grids]
        if batch:
            return tokens.view(len(images), counts[0], tokens.shape[-1])
        return list(tokens.split(counts))

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Return the numbers of rows and columns of patches of an image ``(..., 3, H, W)``. Raise
        the errors of :meth:`forward`."""
        where = "VisionPatchEmbed"
        real = image.is_floating_point()
        fits = image.dim() >= 3 and image.shape[-3] == 3
        require(fits, where, "images", "three channels, (3, H, W)", tuple(image.shape))
        require(real, where, "images", "a floating-point dtype", image.dtype, TypeError)
        height, width = image.shape[-2:]
        whole = height * width > 0 and not (height % self.patch or width % self.patch)
        expected = f"sides that are multiples of the patch size {self.patch}"
        require(whole, where, "images", expected, f"{height} x {width}")
        return height // self.patch, width // self.patch

    def positions(self, rows: int, columns: int) -> Tensor:
        """Return the position embeddings of a grid of patches, ``(rows * columns, C)``.

        For the grid of ``image_size``, this is ``pos_embed[0]``; for other grids, see ``pos_mode``.
        """
        table, count = self.pos_embed[0], rows * columns
        if (rows, columns) == (self.side, self.side):
            return table
        if self.pos_mode == "released" and count <= len(table):
            return table[:count]
        return resample_grid(table, (self.side, self.side), (rows, columns))

    def _patches(self, images: Tensor, rows: int, columns: int) -> Tensor:
        # (B, 3, H, W) to (B * rows * columns, 3 p p)
        cut = images.reshape(len(images), 3, rows, self.patch, columns, self.patch)
        cut = cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * self.patch**2)
        return cut.to(self.pos_embed.dtype)


def resample_grid(tokens: Tensor, grid: tuple[int, int], target: tuple[int, int]) -> Tensor:
    """Interpolate tokens ``(h * w, C)`` from ``grid = (h, w)`` to the grid ``target``.

    The interpolation is bilinear, with ``align_corners=False``. The dtype does not change. If the
    grids are equal, the result is ``tokens`` itself.
    """
    if grid == target:
        return tokens
    image = tokens.T.reshape(1, -1, *grid)
    image = image.to(torch.promote_types(tokens.dtype, torch.float32))
    resampled = F.interpolate(image, size=target, mode="bilinear", align_corners=False)
    return resampled[0].flatten(1).T.to(tokens.dtype)


def smart_resize(
    height: int,
    width: int,
    factor: int = 14,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """Return the nearest size with sides that are multiples of ``factor`` and an area within
    bounds.

    Each side is rounded to the nearest multiple of ``factor``, ties to the even multiple. If the
    area is then above ``max_pixels``, the sides are ``floor(side / beta / factor) * factor`` with
    ``beta = sqrt(height * width / max_pixels)``. If the area is below ``min_pixels``, the sides are
    ``ceil(side * beta / factor) * factor`` with ``beta = sqrt(min_pixels / (height * width))``.

    Args:
        height: height of the image in pixels.
        width: width of the image in pixels.
        factor: side of a patch in pixels.
        min_pixels: lower bound of the area.
        max_pixels: upper bound of the area.

    Returns:
        ``(height, width)``.

    Raises:
        ValueError: If ``factor`` is below 1, the bounds are invalid, a side is below ``factor``,
            the ratio of the sides is above 200, or ``max_pixels`` is too small for one row of
            patches with this ratio.

    Source: repository Hon-Wong/VoRA, as in Qwen2-VL.
    """
    where = "smart_resize"
    sides = (height, width)
    found = f"{height} x {width}"
    require(factor >= 1, where, "factor", "at least 1", factor)
    expected = f"above 0 and at most max_pixels = {max_pixels}"
    require(0 < min_pixels <= max_pixels, where, "min_pixels", expected, min_pixels)
    for name, side in zip(("height", "width"), sides, strict=True):
        require(side >= factor, where, name, f"at least factor = {factor}", side)
    fits = max(sides) <= MAX_RATIO * min(sides)
    require(fits, where, "height, width", f"a ratio of at most {MAX_RATIO}", found)
    resized = [round(side / factor) * factor for side in sides]
    if math.prod(resized) > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        resized = [math.floor(side / beta / factor) * factor for side in sides]
    elif math.prod(resized) < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        resized = [math.ceil(side * beta / factor) * factor for side in sides]
    expected = f"enough for one row of patches of side {factor} in an image of {found}"
    require(all(resized), where, "max_pixels", expected, max_pixels)
    return resized[0], resized[1]
