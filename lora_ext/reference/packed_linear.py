"""Products with packed weights, one formula per function."""

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack_weight(
    weight: Tensor, bits: int | None = None, group: int = 64, minimum: bool = False
) -> Tensor:
    """Copy a weight ``(O, I)`` into panels of 32 output features, ``(panels, I, 32)``.

    For bfloat16, the panels contain pairs of input features: ``(panels, ceil(I / 2), 32, 2)``, or
    ``(panels, ceil(I / 2), 64)`` if ``I`` is odd. For 8 and 4 bits, see :func:`pack_codes`.
    """
    if bits is not None:
        return pack_codes(*quantise(weight, bits, group, minimum))
    together = 2 if weight.dtype == torch.bfloat16 else 1
    padded = pad(weight, (0, -weight.shape[1] % together, 0, -weight.shape[0] % 32))
    panels = padded.view(padded.shape[0] // 32, 32, padded.shape[1] // together, together)
    packed = panels.transpose(1, 2).contiguous()  # (panels, steps, 32, together)
    return packed.flatten(2) if weight.shape[1] % together or together == 1 else packed


def quantise(
    weight: Tensor, bits: int, group: int, minimum: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round a weight ``(O, I)`` to codes of 8 or 4 bits, with a float16 scale for each group.

    Returns:
        Codes ``(O, I / group, group)``: int8, or uint8 for 4 bits. Scales and, with ``minimum``,
        minima ``(O, I / group)`` float16; otherwise None. A weight is ``scale * code`` (8 bits),
        ``scale * (code - 8)`` (4 bits), or ``scale * code + minimum``. With 4 bits and no minimum,
        the value of the largest magnitude has code 0, as in GGUF's Q4_0. If all values are
        multiples of the largest magnitude / 7, however, the scale is this quotient.
    """
    w = weight.float().reshape(len(weight), weight.shape[1] // group, group)
    first, last = (0, 15) if minimum else (-127, 127) if bits == 8 else (-8, 7)
    least, most = w.amin(2), w.amax(2)  # (O, groups)
    low = least.half() if minimum else None
    if low is not None:
        wanted = (most - low.float()).clamp(min=0) / 15
    elif bits == 8:
        wanted = w.abs().amax(2) / 127
    else:
        wanted = torch.where(-least > most, least, most) / -8 + 0.0
        seventh = (w.abs().amax(2) / 7).half().float()
        steps = w / seventh[..., None]
        whole = ((steps - steps.round().clamp(-7, 7)).abs() <= 1 / 64).all(2)  # False for zeros
        wanted = torch.where(whole, seventh, wanted)
    scale = wanted.half()
    # Round the scale up if float16 has so few bits for it that the largest code would be clamped.
    size = max(-first, last)
    cut = scale.float().abs() * (size + 0.5) < wanted.abs() * size
    scale = (scale.view(torch.int16) + cut).view(torch.float16)
    steps = (w - (0 if low is None else low.float()[..., None])) / scale.float()[..., None]
    codes = torch.where(scale[..., None] != 0, steps.round().clamp(first, last), 0)
    if bits == 8:
        return codes.to(torch.int8), scale, low
    return (codes if minimum else codes + 8).to(torch.uint8), scale, low


def pack_codes(codes: Tensor, scale: Tensor, minimum: Tensor | None = None) -> Tensor:
    """Lay out the result of :func:`quantise` in blocks of 32 output features and one group.

    Returns:
        ``(ceil(O / 32), I / group, bytes)`` uint8, for 4 bits ``(..., 2, bytes / 2)``. A block has
        the codes, the scales and the minima. Four adjacent bytes contain codes of one output: those
        of 4 input features or, for 4 bits, of 8, with the first 4 in the low halves of the bytes
        and the rest in the high halves.
    """
    rows, groups, group = codes.shape
    padded = pad(codes, (0, 0, 0, 0, 0, -rows % 32)).view(torch.uint8)
    together = 4 if codes.dtype == torch.int8 else 8
    panels = padded.view(len(padded) // 32, 32, groups, group // together, together)
    panels = panels.permute(0, 2, 3, 1, 4)  # (panels, groups, steps, 32, together)
    if together == 8:
        panels = panels[..., :4] | panels[..., 4:] << 4
    parts = [panels.flatten(2)]
    for each in (scale, minimum):
        if each is not None:
            columns = pad(each, (0, 0, 0, -rows % 32)).view(len(panels), 32, groups).transpose(1, 2)
            # `contiguous` would return an empty tensor with its old strides, which view rejects.
            parts.append(columns.clone(memory_format=torch.contiguous_format).view(torch.uint8))
    packed = torch.cat(parts, 2)
    return packed if together == 4 else packed.view(*packed.shape[:2], 2, packed.shape[2] // 2)


def unpack_weight(
    packed: Tensor, out_features: int, in_features: int, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Unpack a weight ``(O, I)`` of 8 or 4 bits; values are rounded to float32, then ``dtype``."""
    bits, packed = (8 if packed.dim() == 3 else 4), packed.flatten(2)
    panels, groups, _ = packed.shape
    group = in_features // max(groups, 1)
    words = packed[..., : 4 * group * bits].view(panels, groups, group * bits // 32, 32, 4)
    codes = words.view(torch.int8) if bits == 8 else torch.cat([words & 15, words >> 4], 4)
    codes = codes.permute(0, 3, 1, 2, 4).flatten(3)  # (panels, 32, groups, group)
    ends = packed[..., 4 * group * bits :].contiguous().view(torch.float16)
    ends = ends.view(panels, groups, ends.shape[2] // 32, 32)
    scale, *minimum = ends.permute(2, 0, 3, 1).double()[..., None]  # (panels, 32, groups, 1)
    base = minimum[0] if minimum else 0 if bits == 8 else -8 * scale
    return (scale * codes + base).float().flatten(2).flatten(0, 1)[:out_features].to(dtype)


def packed_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, int8: bool = False
) -> Tensor:
    """Compute ``x @ weight.T + bias`` in float64, ``(T, O)``.

    With ``int8``, each row of ``x`` is rounded to multiples of its largest magnitude / 127.
    """
    if packed.dtype == torch.uint8:
        weight = unpack_weight(packed, out_features, x.shape[1])
    else:
        panels = packed.view(*packed.shape[:2], 32, 2 if packed.dtype == torch.bfloat16 else 1)
        weight = panels.transpose(1, 2).flatten(2).flatten(0, 1)  # (32 * panels, I or I + 1)
    if int8:
        scale = x.float().abs().amax(1, keepdim=True) / 127
        x = torch.where(scale > 0, (x.float() / scale).round().clamp(-127, 127) * scale.double(), 0)
    y = x.double() @ weight[:out_features, : x.shape[1]].double().t()
    return y if bias is None else y + bias.double()
