"""Views of base layers' weights, which are read as matrices and written in the layer's layout.

The operations of adapters on a base weight (merging, decomposing initialisations, norms) use
a matrix ``(O, I)``, with ``O`` output and ``I`` input features. This module defines how each kind
of layer stores this matrix, and how PEFT stores the factors of adapters for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require

from ._dense import is_quantised, readable_weight
from ._packed_only import PackedOnlyLinear

#: Object that stores a factor in PEFT: a module with a ``weight``, or the parameter itself.
Factor = nn.Module | nn.Parameter


class BaseWeight:
    """Abstract view of the weight of a base layer."""

    #: Names of the layer's dictionaries that contain A and B by adapter name.
    stores = ("lora_A", "lora_B")
    #: Type of these dictionaries.
    store_kind: type[nn.Module] = nn.ModuleDict
    #: Initialisation scheme that ``init_lora_weights=True`` selects.
    default_scheme = "init_a"
    #: True if an adapter may have a bias.
    takes_bias = True

    def __init__(self, layer: nn.Module):
        self.layer: Any = layer

    @property
    def weight(self) -> Tensor:
        """Weight in the layout of the layer."""
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        """Bias ``(O,)``, or None."""
        return getattr(self.layer, "bias", None)

    @property
    def features(self) -> tuple[int, int]:
        """Numbers of input and output features, ``(I, O)``."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """Return the weight as ``(O, I)``; raise ValueError if it cannot be read."""
        return self.as_matrix(self.weight)

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Convert a tensor from the layout of the layer to ``(O, I)``."""
        raise NotImplementedError

    def as_stored(self, matrix: Tensor) -> Tensor:
        """Convert a matrix ``(O, I)`` to the layout of the layer."""
        raise NotImplementedError

    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Write a weight in the layout of the layer, and the bias unless it is None.

        The values are written in place, so that tied weights and captured graphs use them.
        """
        with torch.no_grad():
            if isinstance(self.layer, PackedOnlyLinear):
                self.layer.write_weight(weight)
            else:
                self.weight.copy_(weight)
            if bias is not None and self.bias is not None:
                self.bias.copy_(bias)

    def check_writable(self, purpose: str) -> None:
        """Raise ValueError if the weight is quantised, or the weight or bias is not a parameter or
        buffer of the layer.

        A weight that is computed from other parameters would be overwritten by the next forward.
        ``purpose`` is the start of the message.
        """
        found = f"a {type(self.layer).__name__} with a quantised weight"
        plain = isinstance(self.layer, PackedOnlyLinear) or not is_quantised(self.layer)
        require(plain, purpose, "base_layer", "a plain weight", found)
        kept = {id(t) for t in (*self.layer.parameters(), *self.layer.buffers())}
        weight = None if isinstance(self.layer, PackedOnlyLinear) else self.weight
        for name, tensor in (("weight", weight), ("bias", self.bias)):
            if tensor is not None and id(tensor) not in kept:
                raise ValueError(
                    f"{purpose}: base_layer.{name}: expected a parameter or buffer to change, "
                    f"found one that {type(self.layer).__name__} computes from other tensors; "
                    "remove its parametrization (weight_norm, spectral_norm, ...) first"
                )

    def place(self) -> tuple[torch.device, torch.dtype]:
        """Return the default device and dtype for adapters of the layer."""
        if isinstance(self.layer, PackedOnlyLinear):
            return torch.device("cpu"), self.layer.dtype
        own = (*self.layer.parameters(recurse=False), *self.layer.buffers(recurse=False))
        whole = all(t.is_floating_point() and t.element_size() > 1 for t in own)
        for tensor in (*own, *self.layer.parameters()):  # if quantised, its floats may be scales
            return tensor.device, tensor.dtype if whole else torch.float32
        return torch.device("cpu"), torch.float32

    # Factors and magnitudes

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B for rank r, which can be flattened to (r, I) and (O, r)."""
        in_features, out_features = self.features
        return (r, in_features), (out_features, r)

    def factors(self, a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Factor, Factor]:
        """Return A and B as objects to store in the dictionaries that :attr:`stores` names."""
        raise NotImplementedError

    def magnitude(self, norm: Tensor) -> Tensor:
        """Return the magnitude ``norm (O,)`` in the shape that PEFT stores for the layer."""
        return norm


class LinearWeight(BaseWeight):
    """View of the weight of a layer that computes ``x W^T``, such as ``nn.Linear`` or ``Conv1D``.

    Args:
        layer: layer with attributes for its sizes, or with a matrix as its weight.
        fan_in_fan_out: whether the weight is stored as ``(I, O)``; always True for ``Conv1D``.
    """

    def __init__(self, layer: nn.Module, fan_in_fan_out: bool = False):
        super().__init__(layer)
        self._in_features, self._out_features, self.fan_in_fan_out = _sizes(layer, fan_in_fan_out)

    @property
    def features(self) -> tuple[int, int]:
        return self._in_features, self._out_features

    def matrix(self) -> Tensor:
        return readable_weight(self.layer, "LoraLinear", self.fan_in_fan_out)[0]

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t() if self.fan_in_fan_out else weight

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.t() if self.fan_in_fan_out else matrix

    def factors(self, a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Factor, Factor]:
        # Modules are created on meta, where they do not draw initial values.
        lora_a = nn.Linear(a.shape[1], a.shape[0], bias=False, device="meta")
        lora_b = nn.Linear(b.shape[1], b.shape[0], bias is not None, device="meta")
        return _filled(lora_a, a, None), _filled(lora_b, b, bias)


class ConvWeight(BaseWeight):
    """View of a convolution's weight ``(O, C, *kernel)`` as a matrix that multiplies patches."""

    @property
    def features(self) -> tuple[int, int]:
        return self.weight[0].numel(), self.weight.shape[0]

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.weight.shape)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        out_features, *patch = self.weight.shape
        return (r, *patch), (out_features, r, *(1 for _ in patch[1:]))

    def factors(self, a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Factor, Factor]:
        kind, kernel = type(self.layer), tuple(self.layer.kernel_size)
        # Modules are created on meta, where they do not draw initial values.
        lora_a = kind(a.shape[1], a.shape[0], kernel, kernel, bias=False, device="meta")
        lora_b = kind(b.shape[1], b.shape[0], 1, bias=bias is not None, device="meta")
        return _filled(lora_a, a, None), _filled(lora_b, b, bias)

    def magnitude(self, norm: Tensor) -> Tensor:
        return norm.view(1, -1, *(1 for _ in self.weight.shape[2:]))


class EmbeddingWeight(BaseWeight):
    """View of an embedding's weight: transposed, it multiplies one-hot vectors of the tokens."""

    stores = ("lora_embedding_A", "lora_embedding_B")
    store_kind = nn.ParameterDict
    default_scheme = "init_b_unit"
    takes_bias = False

    @property
    def features(self) -> tuple[int, int]:
        return self.layer.num_embeddings, self.layer.embedding_dim

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def as_stored(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def factors(self, a: Tensor, b: Tensor, bias: Tensor | None) -> tuple[Factor, Factor]:
        return nn.Parameter(a), nn.Parameter(b)


def _filled(module: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    module.weight = nn.Parameter(weight)
    if bias is not None:
        module.bias = nn.Parameter(bias)
    return module


def _sizes(layer: nn.Module, fan_in_fan_out: bool) -> tuple[int, int, bool]:
    """Return the input and output features, and whether the weight is stored as ``(I, O)``."""
    named = ("in_features", "out_features", fan_in_fan_out), ("nx", "nf", True)
    for inner, outer, transposed in named:
        sizes = getattr(layer, inner, None), getattr(layer, outer, None)
        if all(isinstance(size, int) for size in sizes):
            return *sizes, transposed  # pyright: ignore[reportReturnType]
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        out_features, in_features = weight.shape[::-1] if fan_in_fan_out else weight.shape
        return in_features, out_features, fan_in_fan_out
    expected = "in_features and out_features, nx and nf, or a matrix as weight"
    raise ValueError(f"LoraLinear: base_layer: expected {expected}, found {type(layer).__name__}")
