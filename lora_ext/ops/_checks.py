"""Checks in Python, in the words of the C++ ones: ``<op>: <argument>: expected ..., found ...``.

Fake kernels make them, so that meta tensors are refused where real ones are, and a compiled model
where it is traced.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

#: What every op that computes takes, if not all in every place.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def require(holds: bool, op: str, argument: str, expected: object, found: object) -> None:
    """Raise ValueError unless ``holds``."""
    if not holds:
        raise ValueError(f"{op}: {argument}: expected {expected}, found {found}")


def require_flags(where: str, **flags: object) -> None:
    """Raise TypeError where one is neither True nor False, of Python, numpy or torch: any other
    would count as one of them, and "no" as True."""
    for argument, found in flags.items():
        of_an_array = str(getattr(found, "dtype", "")) in ("bool", "torch.bool")
        if not (isinstance(found, bool) or (of_an_array and not getattr(found, "shape", ()))):
            raise TypeError(f"{where}: {argument}: expected True or False, found {found!r:.200}")


def require_dim(op: str, argument: str, t: Tensor, letters: str) -> None:
    """Refuse a tensor that has not as many dimensions as there are letters, as in ``(B, K)``."""
    dims = len(letters.strip("(,)").split(","))
    require(t.dim() == dims, op, argument, f"shape {letters}", list(t.shape))


def require_shape(op: str, argument: str, t: Tensor, letters: str, shape: Sequence[int]) -> None:
    """Refuse a tensor of another shape; ``letters`` are those of the sizes."""
    holds = t.dim() == len(shape) and all(a == b for a, b in zip(t.shape, shape, strict=True))
    require(holds, op, argument, f"shape {letters} = {list(shape)}", list(t.shape))


def require_dtype(op: str, argument: str, t: Tensor, *dtypes: torch.dtype) -> None:
    """Refuse a tensor whose dtype is none of these."""
    require(t.dtype in dtypes, op, argument, " or ".join(map(str, dtypes)), t.dtype)
