"""Checks of a circuit's parameters for fake kernels, those of ``csrc/ops/circuit_args.cpp``."""

from torch import Tensor

from lora_ext.ops._checks import FLOATS, require, require_dtype, require_shape
from lora_ext.reference.circuit import KINDS, num_transitions


def check_circuit(
    op: str, kind: str, leaf: Tensor, name: str, prior: Tensor | None, trans: Tensor | None
) -> None:
    """Refuse a kind that does not exist, and parameters that do not fit to ``leaf (B, K, C, ...)``.

    Raises:
        ValueError: naming the argument.
    """
    require(kind in KINDS, op, "kind", "'ff', 'cp', 'hmm' or 'btree'", repr(kind))
    require_dtype(op, name, leaf, *FLOATS)
    rows, n_token, components = leaf.shape[:3]
    require(kind != "ff" or components == 1, op, name, "one component for kind 'ff'", components)
    matrices = num_transitions(kind, n_token)
    what = f"the transitions of kind '{kind}' over {n_token} positions"
    require(matrices <= 0 or trans is not None, op, "trans", what, None)
    if prior is not None:
        require_dtype(op, "prior", prior, *FLOATS)
        require_shape(op, "prior", prior, "(B, C)", (rows, components))
    if trans is not None:
        require_dtype(op, "trans", trans, *(FLOATS if prior is None else (prior.dtype,)))
        shape = rows, max(matrices, 0), components, components
        require_shape(op, "trans", trans, "(B, M, C, C)", shape)
