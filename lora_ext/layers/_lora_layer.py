"""Base class of layers with trainable adapters: adapter names, settings, switches and merging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._checks import FLOATS, WrongKind, choice, integer, number, require, require_flags
from lora_ext.rows import LayerNames, Rows, layer_names

from ._init import FREE, decompose, init_lora_, known_scheme
from ._lora_forward import LoraFactors, dropout_now, lora_forward
from ._magnitude import Magnitude, scaled_forward
from ._participants import Participants
from .base._dense import BaseLayer, DenseParameters, is_plain
from .base._modules import CONV1D
from .base._weight import BaseWeight

#: Attributes of a layer that are dictionaries with the adapters' names as keys.
_BY_ADAPTER = (
    "r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias", "init_lora_weights",
    "adapter_active", "alora_invocation_tokens", "dropout_seed",
)  # fmt: skip


class LoraLayer(Participants):
    """Abstract layer with a base layer and named adapters; parameters and settings as in PEFT.

    A subclass defines ``forward`` and :attr:`base_weight`, which reads and writes the weight and
    the factors in the layout of the layer.
    """

    base_layer: nn.Module
    lora_alpha: dict[str, float]
    use_rslora: dict[str, bool]
    use_dora: dict[str, bool]
    #: Scheme of the initial values of each adapter, as passed by the caller.
    init_lora_weights: dict[str, bool | str]
    #: Dropout seed of each adapter with a fixed seed: one int64 on the device of the layer's input.
    #: For other adapters, each forward draws a seed.
    dropout_seed: dict[str, Tensor]

    #: True if the layer supports activated adapters (aLoRA).
    takes_invocation = False

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, r: int, fan_in_fan_out: bool, **options: Any
    ):
        super().__init__()
        self.base_layer = base_layer
        refuse_float8(type(self).__name__, self)
        self.fan_in_fan_out = fan_in_fan_out
        self.in_features, self.out_features = self.base_weight.features
        for setting in _BY_ADAPTER:
            setattr(self, setting, {})
        self.off_in_training: frozenset[str] = frozenset()
        self.disable_adapters = False
        self.lora_dropout = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ModuleDict()
        self._active: list[str] = []
        self._before_init: tuple[str, Tensor] | None = None  # (adapter, old base weight)
        self.training = base_layer.training
        for name in self.base_weight.stores:
            setattr(self, name, self.base_weight.store_kind())
        layer_names.add(self)
        self.add_adapter(adapter_name, r, **options)
        self.set_adapter(adapter_name)

    @property
    def pool(self) -> LayerNames:
        """Registry in which ``adapters`` blocks look up the names of this layer."""
        return layer_names

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register a copied or unpickled layer for ``adapters`` blocks."""
        super().__setstate__(state)
        layer_names.add(self)

    # ---------------------------------------------------------------------------------------------
    # Adapters

    @property
    def active_adapters(self) -> list[str]:
        """Names of the default adapters, whose updates are summed."""
        return list(self._active)

    @property
    def base_changed_by(self) -> str | None:
        """Name of the adapter that changed the base weight when it was initialised, or None."""
        return None if self._before_init is None else self._before_init[0]

    def get_base_layer(self) -> nn.Module:
        """Return the wrapped layer, as in PEFT."""
        return self.base_layer

    def add_adapter(
        self,
        adapter_name: str,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str = True,
        use_rslora: bool = False,
        use_dora: bool = False,
        lora_bias: bool = False,
        *,
        preserve_base_output: bool = False,
        adapter_dtype: torch.dtype | None = None,
        alora_invocation_tokens: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Add an adapter. It is neither active nor trained until :meth:`set_adapter` is called.

        Args:
            adapter_name: name of the adapter, without dots because it becomes part of parameter
                names.
            r: rank of the factors.
            lora_alpha: numerator of the scale: the update is multiplied by ``lora_alpha / r``.
            lora_dropout: probability of dropping an element of the adapter's input in training.
            init_lora_weights: initialisation scheme: a scheme of :func:`init_lora_`, or one that
                moves part of the base weight into the adapter ("pissa", "pissa_niter_<K>",
                "olora"). Only one adapter of a layer may change the base weight;
                :meth:`restore_base_weight` undoes this change.
            use_rslora: whether the scale is ``lora_alpha / sqrt(r)`` instead.
            use_dora: whether to train a magnitude per output feature as well (DoRA).
            lora_bias: whether B has a bias.
            preserve_base_output: whether to subtract the adapter's initial update from the base
                weight, so that training starts at the outputs of the base model. For schemes with a
                nonzero initial update: "init_ab" or False.
            adapter_dtype: dtype of the adapter's parameters; default is the dtype of the base
                weight, or float32 if the base weight is quantised.
            alora_invocation_tokens: token ids of an activated adapter (aLoRA), which applies to a
                sequence only from the last occurrence of these tokens on. Such a layer needs the
                token ids of each batch: ``lora_ext.adapters(names, input_ids=...)``. None or an
                empty sequence adds an ordinary adapter.
            generator: CPU generator for the initial values, which are drawn on the CPU and then
                copied to the device of the base weight.

        Raises:
            ValueError: If the name is invalid or exists already; r, alpha or dropout is out of
                range; the scheme is unknown; DoRA is combined with a bias or with invocation
                tokens; DoRA or a decomposing scheme is used and the base weight cannot be read;
                the base weight must be changed, but is computed from other parameters; or
                ``adapter_dtype`` is not float16, bfloat16, float32 or float64.
            NotImplementedError: If invocation tokens are given and the layer is not linear.
            TypeError: If r is not an int, or a flag is neither True nor False.

        After any error the layer is unchanged.
        """
        flags = {"use_rslora": use_rslora, "use_dora": use_dora, "lora_bias": lora_bias}
        require_flags("add_adapter", **flags, preserve_base_output=preserve_base_output)
        self._check_name(adapter_name)
        scaling = _checked_scaling(r, lora_alpha, lora_dropout, use_rslora)
        invocation = self._checked_invocation(alora_invocation_tokens, use_dora)
        self._check_bias(lora_bias, use_dora)
        base, scheme = self.base_weight, self._check_scheme(init_lora_weights, preserve_base_output)
        device, dtype = base.place()
        dtype = choice("add_adapter", "adapter_dtype", adapter_dtype or dtype, FLOATS)
        factors = _new_factors(base, r, scaling, scheme, generator)
        a, b = (factor.to(device, dtype) for factor in factors)
        bias = torch.zeros(self.out_features, device=device, dtype=dtype) if lora_bias else None
        flat_a, flat_b = a.flatten(1), b.flatten(1)
        changed = magnitude = None
        if device.type != "meta" and (scheme not in FREE or preserve_base_output):
            base.check_writable(f"init_lora_weights={init_lora_weights!r}")
            changed = base.matrix().detach().clone()
            ops.lora_merge_(changed, flat_a, flat_b, scaling, sign=-1)
        if use_dora:
            weight = base.matrix() if changed is None else changed
            norm = ops.lora_dora_norm(weight, flat_a, flat_b, scaling)
            magnitude = Magnitude(base.magnitude(norm.to(dtype)))
        # All checks are done: the code below does not raise, so an error leaves the layer
        # unchanged.
        if changed is not None:
            self._before_init = (adapter_name, base.weight.detach().clone())
            base.write(base.as_stored(changed), None)
        settings: dict[str, Any] = {**flags, "r": r, "lora_alpha": lora_alpha, "scaling": scaling}
        settings |= {"init_lora_weights": init_lora_weights, "adapter_active": True}
        if invocation:
            settings["alora_invocation_tokens"] = invocation
        for setting, value in settings.items():
            getattr(self, setting)[adapter_name] = value
        dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.lora_dropout[adapter_name] = dropout
        for store, factor in zip(self._stores(), base.factors(a, b, bias), strict=True):
            store[adapter_name] = factor
        if magnitude is not None:
            self.lora_magnitude_vector[adapter_name] = magnitude
        self._freeze(adapter_name)

    def _freeze(self, adapter_name: str) -> None:
        """Set the layer's training mode on the modules of all adapters, and freeze one adapter."""
        for store in (self.lora_dropout, self.lora_magnitude_vector, *self._stores()):
            store.train(self.training)
        for parameter in self._parameters_of(adapter_name):
            parameter.requires_grad_(False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter and restore the base weight if its initialisation changed it.

        Raises:
            ValueError: If the layer does not have the adapter, or the adapter is merged.
        """
        self._check_known([adapter_name])
        if adapter_name in self.merged_adapters:
            found = f"{adapter_name!r} is merged into the base weight"
            raise ValueError(f"delete_adapter: {found}; unmerge it first")
        if self._before_init is not None and self._before_init[0] == adapter_name:
            self.restore_base_weight()
        stores: list[Any] = [getattr(self, setting) for setting in _BY_ADAPTER]
        for store in (*stores, self.lora_dropout, self.lora_magnitude_vector, *self._stores()):
            if adapter_name in store:
                del store[adapter_name]
        self.off_in_training -= {adapter_name}
        if adapter_name in self._active:
            self._active.remove(adapter_name)

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Set the active adapters; afterwards only their parameters require gradients.

        Args:
            adapter_names: one name, or several names; the updates of several adapters are summed.
            inference_mode: whether to freeze the active adapters, too.

        Raises:
            ValueError: If the layer does not have one of the adapters.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known(names)
        self._active = names
        for name in self.adapter_names:
            for parameter in self._parameters_of(name):
                parameter.requires_grad_(name in names and not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off, as in PEFT. Adapters that are off are also frozen."""
        self.disable_adapters = not enabled
        self.set_adapter(self._active, inference_mode=not enabled)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Set the scale of an adapter's update to ``scale`` times its original value."""
        self._check_known([adapter_name])
        r, alpha = self.r[adapter_name], self.lora_alpha[adapter_name]
        self.scaling[adapter_name] = scale * _scaling(r, alpha, self.use_rslora[adapter_name])

    def reset_lora_parameters(
        self,
        adapter_name: str,
        init_lora_weights: bool | str = True,
        generator: torch.Generator | None = None,
    ) -> None:
        """Reset an adapter to new initial values, drawn on the adapter's device.

        Args:
            adapter_name: name of the adapter.
            init_lora_weights: scheme of :func:`init_lora_`; True selects the default of the layer.
            generator: random generator on the device of the adapter.

        Raises:
            ValueError: If the layer does not have the adapter, or the scheme changes the base
                weight; only :meth:`add_adapter` accepts such schemes.
        """
        self._check_known([adapter_name])
        a, b, bias = self._raw_factors(adapter_name)
        scheme = self.base_weight.default_scheme if init_lora_weights is True else init_lora_weights
        init_lora_(a, b, scheme, generator=generator)
        if bias is not None:
            nn.init.zeros_(bias)
        self.init_lora_weights[adapter_name] = init_lora_weights

    def restore_base_weight(self) -> None:
        """Restore, bit for bit, the base weight that an adapter's initialisation has changed.

        Such initialisations are "pissa", "olora" and ``preserve_base_output``. The parameters of
        the adapter do not change.

        Raises:
            ValueError: If no initialisation has changed the weight, or adapters are merged.
        """
        if self._before_init is None:
            raise ValueError("restore_base_weight: no initialisation has changed the base weight")
        if self.merged:
            found = f"{self.merged_adapters} are merged"
            raise ValueError(f"restore_base_weight: {found}; unmerge them first")
        self.base_weight.check_writable("restore_base_weight")
        self.base_weight.write(self._before_init[1], None)
        self._before_init = None

    # ---------------------------------------------------------------------------------------------
    # Checks

    def _check_name(self, name: str) -> None:
        where = type(self).__name__
        fits = isinstance(name, str) and name and "." not in name and name != "__base__"
        expected = 'a name without dots that is not "__base__"'
        require(fits, where, "adapter_name", expected, repr(name))
        free = not hasattr(nn.ModuleDict(), name)
        expected = "a name that is not an attribute of nn.ModuleDict"
        require(free, where, "adapter_name", expected, repr(name))
        if name in self.r:
            remedy = "pass another adapter_name, or delete or unwrap the existing adapter"
            raise ValueError(f"{where}: adapter {name!r} exists already; {remedy}")

    def _check_bias(self, lora_bias: bool, use_dora: bool) -> None:
        takes = self.base_weight.takes_bias
        if lora_bias and (use_dora or not takes):
            where = "a DoRA adapter" if takes else f"a {type(self).__name__}"
            raise ValueError(f"lora_bias: expected False for {where}, as in PEFT, found True")

    def _checked_invocation(self, tokens: Sequence[int] | None, dora: bool) -> tuple[int, ...]:
        where, name = "add_adapter", "alora_invocation_tokens"
        tokens = checked_invocation(where, name, tokens) or ()
        fits = not tokens or self.takes_invocation
        found = f"a {type(self).__name__}: only linear layers support activated adapters"
        require(fits, where, name, "a LoraLinear", found, NotImplementedError)
        require(not (tokens and dora), where, "use_dora", "False for an activated adapter", True)
        return tokens

    def _check_scheme(self, scheme: bool | str, preserve_base_output: bool) -> str:
        name = known_scheme(self.base_weight.default_scheme if scheme is True else scheme)
        if name in FREE and not preserve_base_output:
            return name  # does not change the base weight
        if name not in FREE and preserve_base_output:
            raise ValueError(
                f"init_lora_weights: {scheme!r} already preserves the output; expected "
                "preserve_base_output=False"
            )
        if self.base_changed_by is not None:
            raise ValueError(
                f"init_lora_weights: the initialisation of {self.base_changed_by!r} has changed "
                "the base weight; delete this adapter or call restore_base_weight() first"
            )
        if self._merged:
            raise ValueError(
                f"init_lora_weights: {scheme!r} changes the base weight, into which "
                f"{self.merged_adapters} are merged; unmerge them first"
            )
        return name

    def extra_repr(self) -> str:
        """Return a string with the names and ranks of the adapters."""
        return ", ".join(f"{name}: r={r}" for name, r in self.r.items())

    # ---------------------------------------------------------------------------------------------
    # One adapter

    def factors(self, adapter_name: str) -> LoraFactors:
        """Return the parameters of an adapter for :func:`lora_forward`, without copying them."""
        a, b, bias = self._raw_factors(adapter_name)
        scaling, seed = self.scaling[adapter_name], self.dropout_seed.get(adapter_name)
        dropout: Any = self._modules["lora_dropout"]._modules[adapter_name]  # pyright: ignore[reportOptionalMemberAccess]
        return LoraFactors(a, b, scaling, dropout_now(dropout), bias, seed)

    def _adapted(
        self, x: Tensor, base: BaseLayer, names: Sequence[str], rows: Rows | None
    ) -> Tensor:
        """Return ``base(x)`` plus the updates of the adapters ``names``; ``x`` is ``(..., I)``."""
        factors = [self.factors(name) for name in names]
        for i, name in enumerate(names):
            if self.use_dora[name]:
                factors[i] = factors[i]._replace(magnitude=self._magnitude(name).flatten())
        if all(f.magnitude is None for f in factors):
            return lora_forward(x, base, factors, rows)

        def dense() -> DenseParameters:
            return self.base_weight.matrix(), self.bias

        return scaled_forward(x, base, dense, factors, rows)


def _scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def _checked_scaling(r: int, alpha: float, dropout: float, use_rslora: bool) -> float:
    where = "add_adapter"
    integer(where, "r", r, 1, expected=("an int", "a positive rank"))
    number(where, "lora_alpha", alpha)
    number(where, "lora_dropout", dropout, 0, below=1, expected="a probability in [0, 1)")
    return _scaling(r, alpha, use_rslora)


def _new_factors(
    base: BaseWeight, r: int, scaling: float, scheme: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return initial factors A and B in float32, on the CPU.

    If the base layer is on the meta device, the factors are, too. The same seed gives the same
    values as in PEFT, which also draws them on the CPU.
    """
    memory = "meta" if base.place()[0].type == "meta" else "cpu"
    a, b = (torch.zeros(shape, device=memory) for shape in base.factor_shapes(r))
    if memory == "cpu" and scheme in FREE:
        init_lora_(a, b, scheme, generator=generator)
    elif memory == "cpu":
        parts = decompose(base.matrix(), r, scaling, scheme)
        a, b = parts[0].reshape(a.shape), parts[1].reshape(b.shape)
    return a, b


def refuse_float8(where: str, layer: Any) -> None:
    """Raise ValueError if an adapter of a layer, or the weight of a plain base layer, is float8.

    Neither torch nor the ops can compute with such a parameter. A quantised base layer, or one with
    hooks, may store it, since it converts the values in its forward.
    """
    base = layer.get_base_layer()
    plain = type(base).__module__.startswith(("torch.nn.", CONV1D[1])) and is_plain(base)
    for name, parameter in layer.named_parameters():
        if parameter.is_floating_point() and (plain or not name.startswith("base_layer.")):
            choice(where, name, parameter.dtype, FLOATS)


def checked_invocation(where: str, name: str, value: Any) -> tuple[int, ...] | None:
    """Return invocation tokens as a tuple, or None; raise ValueError if they are invalid."""
    if value is None:
        return None
    expected = "None or a list of token ids (non-negative integers)"
    listed = isinstance(value, list | tuple)
    require(listed, where, name, expected, f"{value!r:.200}", WrongKind)
    return tuple(integer(where, name, each, 0, expected=expected) for each in value)
