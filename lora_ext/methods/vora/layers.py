"""VoraLinear: a linear layer with an adapter for all tokens or for vision tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora_ext._checks import choice, integer, require
from lora_ext._torch import compiles
from lora_ext.layers import LoraLinear, linear_size
from lora_ext.rows import (
    Assignment,
    Names,
    Rows,
    _context,
    constant,
    everywhere,
    group,
    layer_names,
    rows_of,
)

from ._modalities import modality, traced_vision_rows, vision_block, vision_rows

#: Tokens that the adapter applies to.
Route = Literal["all", "vision"]


class UnmergeableRouteError(RuntimeError):
    """Raised if a merge would apply an adapter for vision tokens to all tokens."""


class VoraLinear(LoraLinear):
    """Layer of Vision as LoRA, ``y = base(x) + scale * m * (x A^T) B^T``.

    It is a :class:`LoraLinear` with an adapter that applies to all tokens (route "all", m = 1) or
    only to the vision tokens of a :func:`modality` block (route "vision", m = 1 for vision tokens
    and m = 0 for all other tokens). Outside such a block, route "vision" treats all tokens as text:
    the output is bitwise that of the base layer.

    All features of :class:`LoraLinear` are available. With route "vision", text tokens may use
    other adapters: either a second active adapter, or adapters that an :func:`lora_ext.adapters`
    block selects per sequence. One call of the op computes all tokens of a batch: vision tokens,
    text tokens, and tokens without an adapter.

    Shape letters: ``I`` input features, ``O`` output features.

    Args:
        base_layer: ``nn.Linear``, transformers' ``Conv1D``, or a quantised layer with
            ``in_features`` and ``out_features``. The module itself is used, with its bias if it has
            one; no bias is added.
        rank: rank of the adapter: A is ``(rank, I)``, Kaiming-uniform, and B ``(O, rank)``, zero.
        route: "all" or "vision".
        scale: scale of the update; LoRA's alpha is ``rank * scale``.
        adapter_name: name of the adapter, without dots.
        adapter_dtype: dtype of the factors; default is the base weight's, or float32 if it is
            quantised.
        generator: random generator of the initial values.

    Raises:
        ValueError: If the rank is below 1 or the route is unknown.
        TypeError: If the base layer is not a linear layer.

    Sources: "Vision as LoRA" (arXiv 2503.20680), route "all"; InternLM-XComposer2's Partial LoRA,
    route "vision". The authors' layer adds a random bias if the base layer has no bias; this layer
    does not.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        route: Route = "all",
        scale: float = 1.0,
        adapter_name: str = "default",
        **options: Any,
    ):
        where = "VoraLinear"
        fits = isinstance(base_layer, nn.Module) and linear_size(base_layer) is not None
        expected = "nn.Linear, Conv1D or a quantised linear layer"
        require(fits, where, "base_layer", expected, type(base_layer).__name__, TypeError)
        integer(where, "rank", rank, 1)
        choice(where, "route", route, get_args(Route))
        super().__init__(base_layer, adapter_name, rank, lora_alpha=rank * scale, **options)
        self.scaling[adapter_name] = float(scale)  # `rank * scale / rank` may have rounding errors.
        self.adapter_name = adapter_name
        self.route: Route = route
        # True while the base layer has a bias only because merge() added one for the adapter.
        self._added_bias = False

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: int,
        route: Route = "all",
        scale: float = 1.0,
        adapter_name: str = "default",
        *,
        adapter_dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> VoraLinear:
        """Create the layer around ``linear``; the other arguments are those of the class."""
        options = {"adapter_dtype": adapter_dtype, "generator": generator}
        return cls(linear, rank, route, scale, adapter_name, **options)

    @property
    def A(self) -> Tensor:
        """Factor A ``(rank, I)``: the parameter, not a copy."""
        return self._raw_factors(self.adapter_name)[0]

    @property
    def B(self) -> Tensor:
        """Factor B ``(O, rank)``: the parameter, not a copy."""
        return self._raw_factors(self.adapter_name)[1]

    @property
    def scale(self) -> float:
        """Scale of the update ``B A``."""
        return self.scaling[self.adapter_name]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  (a mask comes second here)
        self, x: Tensor, token_mask: Tensor | None = None, adapter_ids: Tensor | Names = None
    ) -> Tensor:
        """Compute the output ``(..., O)`` for ``x (..., I)``, in the dtype of ``base_layer(x)``.

        Args:
            x: floating-point input.
            token_mask: mask of the vision tokens, of shape ``x.shape[:-1]``, as in
                :func:`modality`. The mask replaces that of a surrounding block. Route "all" ignores
                masks.
            adapter_ids: adapter of each row, as in :class:`LoraLinear`; these ids replace masks and
                blocks.

        Raises:
            ValueError: If the mask is invalid, does not match ``x`` or is passed with
                ``adapter_ids``, or if ids or names do not match ``x``.
        """
        if token_mask is None or self.route == "all":
            return super().forward(x, adapter_ids)
        require(adapter_ids is None, "VoraLinear", "token_mask", "None with adapter_ids", "a mask")
        with modality(token_mask):
            return super().forward(x)

    # ---------------------------------------------------------------------------------------------
    # Merging

    def merge(  # pyright: ignore[reportIncompatibleMethodOverride]  (force comes first here)
        self,
        force: bool = False,
        *,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        keep_copy: bool = True,
    ) -> nn.Module:
        """Merge the adapter into the base layer's weight: ``round(W + scale B A)``.

        Args:
            force: whether to merge route "vision" too, which changes the outputs for text tokens.
            safe_merge: as in :meth:`LoraLinear.merge`.
            adapter_names: names of the adapters to merge; default is the adapter of this layer.
            keep_copy: whether to keep the old weight, so that :meth:`unmerge` restores every bit,
                as in :meth:`LoraLinear.merge`.

        Returns:
            ``base_layer``. An extra bias is merged too, even if the base layer has no bias.

        Raises:
            UnmergeableRouteError: If the route is "vision" without ``force``.
            RuntimeError: If the adapter is merged already.
            NotImplementedError: If the base weight is quantised.
            ValueError: As for :meth:`LoraLinear.merge`.

        The layer is unchanged after an error.
        """
        names = [self.adapter_name] if adapter_names is None else list(adapter_names)
        self.check_merge(force, names)
        base: Any = self.base_layer
        adds_bias = base.bias is None and any(self.lora_bias[name] for name in names)
        if adds_bias:
            weight = base.weight
            zeros = torch.zeros(self.out_features, dtype=weight.dtype, device=weight.device)
            base.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)
        try:
            super().merge(safe_merge, names, keep_copy=keep_copy)
        except BaseException:
            if adds_bias:
                base.bias = None
            raise
        self._added_bias = self._added_bias or adds_bias
        return self.base_layer

    def check_merge(self, force: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Raise the error of :meth:`merge` if the route, a name, an earlier merge or a quantised
        weight does not allow a merge. Nothing is changed."""
        names = [self.adapter_name] if adapter_names is None else list(adapter_names)
        self._check_known(names)
        found = "'vision'; force=True merges it for all tokens, which changes the outputs for text"
        fits = self.route == "all" or force
        require(fits, "merge", "route", "'all'", found, UnmergeableRouteError)
        name = self.adapter_name
        if name in names and name in self.merged_adapters:
            expected = "an adapter that is not merged"
            raise RuntimeError(f"merge: expected {expected}, found {name!r} merged already")
        fits = not _is_quantised(self.base_layer)
        expected = "a floating-point weight"
        found = f"a quantised weight in {type(self.base_layer).__name__}"
        require(fits, "merge", "base_layer", expected, found, NotImplementedError)

    def unmerge(self) -> None:
        """Remove the adapter from the base weight, which is bitwise restored."""
        super().unmerge()
        if self._added_bias:
            base: Any = self.base_layer
            base.bias = None
            self._added_bias = False

    def set_extra_bias(self, bias: Tensor | None) -> None:
        """Set the adapter's bias ``(O,)``, which is added without scaling; None removes it.

        The authors' checkpoints contain such a bias for layers whose base layer has none.
        """
        value = None
        if bias is not None:
            unscaled = bias.to(self.B) / self.scale  # The layer scales the update and its bias.
            value = nn.Parameter(unscaled, requires_grad=self.B.requires_grad)
        lora_b: Any = self.lora_B[self.adapter_name]
        lora_b.bias = value
        self.lora_bias[self.adapter_name] = bias is not None

    @property
    def has_extra_bias(self) -> bool:
        """True if the adapter has a bias, set by :meth:`set_extra_bias`."""
        return self.lora_bias[self.adapter_name]

    @property
    def extra_bias(self) -> Tensor | None:
        """Bias ``(O,)`` that the adapter adds to the output, detached, or None."""
        bias = self._raw_factors(self.adapter_name)[2]
        return None if bias is None else bias.detach() * self.scale

    # ---------------------------------------------------------------------------------------------
    # Rows of the adapters

    def _rows(
        self, leading: torch.Size, device: torch.device, adapter_ids: Tensor | Names | Assignment
    ) -> Rows | None:
        named = super()._rows(leading, device, adapter_ids)
        if self.route == "all" or self.merged or adapter_ids is not None:
            return named
        own = self.adapter_names.index(self.adapter_name)
        sees = self.adapter_name in self._active and self._is_on(self.adapter_name)
        block = None
        if compiles():
            vision = traced_vision_rows(leading, device) if sees else None
        else:
            block = vision_block() if sees else None
            vision = None if block is None else vision_rows(block, leading, device)
        text = self._default_position() if named is None else None
        if text == -1:
            if vision is None:
                return everywhere(-1, leading.numel(), device)
            return vision._replace(used=vision.used and (own,))
        if text is not None:
            named = everywhere(text, leading.numel(), device)
        assert named is not None
        if vision is None:
            return named
        if block is None:
            return _overlaid(vision, named, own, len(self.r))
        # All layers use the same rows. The rows are computed again if an inner block changes the
        # names.
        names = _context.current(layer_names.handle)
        key = (self.adapter_names, own, named.used, leading, names and names.assignment)
        kept = block.assignment.kept
        return kept.get(key, device, _overlaid, vision, named, own, len(self.r))

    def _default_position(self) -> int:
        """Return the index of the adapter for rows without a name, or -1 if no adapter applies to
        them. With route "vision", these rows are text tokens."""
        if self.route == "all":
            return super()._default_position()
        active = [n for n in self._active if self._is_on(n) and n != self.adapter_name]
        words = "at most one active adapter for text"
        require(len(active) <= 1, "VoraLinear", "set_adapter", words, active, NotImplementedError)
        return self.adapter_names.index(active[0]) if active else -1

    def extra_repr(self) -> str:
        """Return the adapters with their ranks and the route for ``print``."""
        return f"{super().extra_repr()}, route={self.route}"


def _overlaid(vision: Rows, text: Rows, own: int, num_adapters: int) -> Rows:
    """Return rows with the adapter ``own`` for vision tokens and the adapters of ``text`` for all
    other tokens."""
    table = constant([*text.used, -1], torch.int32, text.ids.device)
    ids, weights = table[text.ids.long()], text.weights  # Id -1 reads the last entry.
    sees = vision.ids >= 0  # (T,)
    if ids.dim() > 1:  # (T, K): a vision token has one adapter, in the first column
        sees = sees[:, None]
        ids[:, 1:].masked_fill_(sees, -1)
        ids[:, :1].masked_fill_(sees, own)
        weights = None if weights is None else weights.masked_fill(sees, 1)
    else:
        ids = ids.masked_fill(sees, own)
    rows = rows_of(ids, num_adapters) if compiles() else group(ids, num_adapters)
    return rows._replace(weights=weights)


def _is_quantised(base_layer: nn.Module) -> bool:
    """Return whether a linear layer has no floating-point weight that an update can be added to."""
    weight = getattr(base_layer, "weight", None)
    if not isinstance(weight, Tensor) or type(weight) not in (nn.Parameter, Tensor):
        return True
    return not weight.is_floating_point() or weight.element_size() < 2
