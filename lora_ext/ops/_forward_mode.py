"""No op of ours has a forward mode."""

from torch import Tensor
from torch.autograd import forward_ad

from lora_ext.ops._compiling import compiles


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """Raise where a tensor carries a tangent, of ``torch.func.jvp`` too.

    Backwards registered in Python need this: where no gradient is wanted, torch calls the op
    below autograd and would drop the tangent. Those in C++ look for themselves.
    """
    if compiles():
        return
    for t in tensors:
        # torch leaves its arguments without types.
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:  # pyright: ignore[reportUnknownMemberType]
            raise NotImplementedError(f"{op} has no forward-mode derivative")
