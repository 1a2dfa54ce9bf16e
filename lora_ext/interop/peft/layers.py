"""``from_peft``: PEFT's LoRA layers, run by lora_ext's kernels.

Nothing is copied and nothing is replaced: the layers keep their parameters, buffers and names, and
only their class changes, to a subclass whose ``forward`` is ours. All that PEFT does with a layer
(checkpoints, ``set_adapter``, merging, deleting) is PEFT's own code, on PEFT's own objects. A call
that our kernels do not cover goes to PEFT's ``forward``: one with an adapter of a rarer variant or
with a learned scaling, for example, or one that PEFT refuses.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from peft.tuners.lora import LoraLayer, LoraModel, dora
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._torch import compiles
from lora_ext.layers import (
    LoraFactors,
    dense_parameters,
    dora_forward,
    forward_of_the_rest,
    is_plain,
    lora_forward,
)
from lora_ext.rows import Assignment, NamedRows, layouts, several_processes, together
from lora_ext.serving import refuse_singular

from . import quantised as peft_quantised
from .adapters import (
    by_reason,
    check_values,
    refuse_names_of_a_reference,
    refuse_turned,
    turned_layers,
    warn_of_frozen,
    warn_of_other_bases,
)
from .processes import no_gradients_without_rows, refuse_layers_of_peft, taking_part
from .quantised import full_name

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Report:
    """Names of modules with LoRA adapters."""

    taken: tuple[str, ...]  # lora_ext runs these
    left: dict[str, str] = field(default_factory=dict)  # PEFT runs these, for the reason given


def take_over(model: Model) -> Model:
    """:func:`lora_ext.from_peft`, where peft is known to be there."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"from_peft: model: expected a torch.nn.Module, found a {type(model).__name__}"
        )
    if not any(isinstance(m, LoraLayer) for m in model.modules()):
        raise ValueError("from_peft: model: expected layers with LoRA adapters, found none")
    check_values(model)
    warn_of_other_bases(model)
    _swap(model, _fused_class)
    layouts.tell(model)
    for module in model.modules():
        if isinstance(module, FusedLoraModel):
            module.turned = turned_layers(module)
    found = report(model)
    if not found.taken:
        warnings.warn(
            "from_peft: model: expected layers that lora_ext can run, found none; PEFT runs "
            f"{by_reason(found.left)}",
            stacklevel=3,  # the caller of lora_ext.from_peft
        )
    return model


def to_peft(model: Model) -> Model:
    """Undo :func:`lora_ext.from_peft`: every layer is PEFT's own again."""
    _swap(model, lambda kind: getattr(kind, "of_peft", kind))
    block: Any
    for block in model.modules():
        for told in ("tokens_first", "turned") if isinstance(block, LoraLayer | LoraModel) else ():
            block.__dict__.pop(told, None)
        checkpoint = getattr(block, "_gradient_checkpointing_func", None)
        if isinstance(checkpoint, _KeepsNames):
            block._gradient_checkpointing_func = checkpoint.checkpoint
        for key in [k for k, hook in block._forward_pre_hooks.items() if hook is _remind]:
            del block._forward_pre_hooks[key], block._forward_pre_hooks_with_kwargs[key]
    return model


def _fused_class(kind: type) -> type:
    from .experts import FusedExperts  # it builds on this module

    plain = {PeftLinear: FusedLinear, ParamWrapper: FusedExperts, LoraModel: FusedLoraModel}
    return plain.get(kind) or peft_quantised.fused_class(kind)


def _swap(model: nn.Module, other: Callable[[type], type]) -> None:
    never_called = _never_called(model)
    module: Any
    for module in model.modules():
        if module not in never_called:
            module.__class__ = other(type(module))


def _never_called(model: nn.Module) -> set[nn.Module]:
    """Output projections of ``nn.MultiheadAttention``, which takes their weight instead."""
    return {m.out_proj for m in model.modules() if isinstance(m, nn.MultiheadAttention)}


def report(model: nn.Module) -> Report:
    """Which LoRA layers of ``model`` lora_ext runs, and which PEFT still does."""
    taken: list[str] = []
    left: dict[str, str] = {}
    never_called = _never_called(model)
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and module in never_called:
            left[name] = "nn.MultiheadAttention reads its weight and never calls it"
        elif isinstance(module, Fused):
            reasons = {module.uncovered(adapter) for adapter in module.lora_A} - {None}
            if reasons:
                left[name] = "; ".join(sorted(str(r) for r in reasons))
            else:
                taken.append(name)
        elif isinstance(module, LoraLayer):
            kind = type(module)
            left[name] = (
                "from_peft has not seen it yet"
                if _fused_class(kind) is not kind
                else f"only {peft_quantised.COVERED} are covered, found {full_name(kind)}"
            )
    return Report(tuple(taken), left)


def uncovered(module: Any, adapter: str) -> str | None:
    """Why an adapter of a fused layer is left to PEFT's forward."""
    variant = module.lora_variant.get(adapter)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"adapter {adapter!r} is a {type(variant).__name__}"
    if variant is not None and dense_parameters(module.base_layer) is None:
        return f"adapter {adapter!r} uses DoRA on a {type(module.base_layer).__name__}"
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    if not (type(a) is type(b) is nn.Linear and is_plain(a) and is_plain(b) and a.bias is None):
        return f"adapter {adapter!r} has factors that are no plain Linear, or that are watched"
    scaling = module.scaling[adapter]
    if isinstance(scaling, Tensor):
        if scaling.numel() != 1 or scaling.requires_grad:
            return f"adapter {adapter!r} has a scaling of several values, or one that is learned"
    elif not isinstance(scaling, int | float):
        return f"adapter {adapter!r} has a {type(scaling).__name__} for a scaling"
    dropout = module.lora_dropout[adapter]
    if type(dropout) not in (nn.Dropout, nn.Identity) or not is_plain(dropout):
        return f"adapter {adapter!r} has a {type(dropout).__name__} for a dropout, or a watched one"
    if getattr(dropout, "p", 0.0) >= 1.0:
        return f"adapter {adapter!r} has dropout 1"
    return None


# -------------------------------------------------------------------------------------------------
# Rows


def _fit(names: Assignment, leading: torch.Size, tokens_first: bool) -> bool:
    """Whether there is one name for each sequence."""
    return leading[1:2] == names.shape if tokens_first else leading[:1] == names.shape


# A batch's names come as a list through PEFT's hooks, to every layer anew; the last one is kept.
_last: ContextVar[tuple[tuple[str, ...], Assignment] | None]
_last = ContextVar("lora_ext.peft_names", default=None)
# What the forward was given: for checkpoints, which hand it on to their recomputation.
_current: ContextVar[Assignment | None] = ContextVar("lora_ext.peft_current", default=None)
# What a checkpointed block was given in the forward, while it is recomputed in the backward.
_recomputed: ContextVar[Assignment | None] = ContextVar("lora_ext.peft_recomputed", default=None)


# Layers whose last forward had names that no checkpoint of ours keeps: recomputed without any, they
# would train other adapters.
_named: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _names(names: Sequence[str]) -> Assignment:
    if isinstance(names, NamedRows):
        return names.assignment
    given, last = tuple(names), _last.get()
    if last is None or last[0] != given:
        last = given, Assignment.of_entries(given, (len(given),))
        _last.set(last)
    return last[1]


class Fused(PeftLinear if TYPE_CHECKING else object):
    """What a layer of PEFT's becomes: the updates and their gradients fused, with the base product
    where that is a plain one. A mixin in front of the class :attr:`of_peft`."""

    asks_what_is_off = True
    #: Whether the first dimension of the input counts tokens, the second sequences.
    tokens_first = False
    of_peft: ClassVar[Any]
    uncovered = uncovered

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; ``adapter_names``, one per sequence, may also be given in training, and may
        name DoRA adapters.

        Args:
            x: ``(..., I)``.

        Returns:
            ``(..., O)``.

        Raises:
            ValueError: PEFT's own: names of another number than sequences, or merged adapters.
            RuntimeError: a foreign checkpoint recomputes the layer and has lost the names.
        """
        names = kwargs.get("adapter_names")
        given = self._rows_of(names)
        if args or len(kwargs) > (names is not None) or self._disable_adapters or self.merged:
            return self._forward_of_peft(x, *args, **kwargs)
        present, rows, trained = taking_part(self, given)
        # PEFT raises where they do not fit.
        fits = given is None or _fit(given, x.shape[:-1], self.tokens_first)
        left = [why for why in map(self.uncovered, present) if why is not None]
        if not fits or left:
            if fits and trained:
                raise no_gradients_without_rows("; ".join(left))
            if given is not None:
                kwargs["adapter_names"] = given.spelled()
                if self.tokens_first and x.dim() > 2:  # PEFT's forward takes sequences first
                    turned = self._forward_of_peft(x.transpose(0, 1), **kwargs)
                    return turned.transpose(0, 1).contiguous()  # some models view it
            return self._forward_of_peft(x, *args, **kwargs)
        if not present:
            return self.base_layer(x)
        of_rows = None
        if rows is not None:
            of_rows = rows.among(present, x.shape[:-1], x.device, self.tokens_first)
            of_rows = together(of_rows, trained)
        factors = [self._factors(name) for name in present]
        if not any(name in self.lora_variant for name in present):
            return lora_forward(x, self.base_layer, factors, of_rows)
        dense = dense_parameters(self.base_layer)
        assert dense is not None  # uncovered lets no other base pass
        magnitudes = [self._magnitude(name) for name in present]
        in_use = [of_rows is None or i in of_rows.used for i in range(len(present))]
        norms = [
            None if m is None or not used else self._norm(name, dense[0], f)
            for name, f, m, used in zip(present, factors, magnitudes, in_use, strict=True)
        ]
        return dora_forward(x, self.base_layer, dense, factors, magnitudes, of_rows, norms)

    def _forward_of_peft(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return forward_of_the_rest(self.of_peft.forward, self, x, *args, **kwargs)

    def _rows_of(self, names: Sequence[str] | None) -> Assignment | None:
        if compiles():
            return None if names is None else Assignment.of_entries(names, (len(names),))
        if names is not None:
            if self.training and _recomputed.get() is None:
                _named.add(self)
            return _names(names)
        rows = _recomputed.get()
        if rows is None and self in _named:
            if torch._C._current_graph_task_id() != -1:  # inside a backward
                raise RuntimeError(
                    "from_peft: adapter_names: expected transformers' own gradient checkpointing, "
                    "found another, which recomputes a layer whose forward had adapter_names and "
                    "has lost them; pass no names, or do not checkpoint these layers"
                )
            _named.discard(self)
        return rows

    def _factors(self, name: str) -> LoraFactors:
        dropout = self.lora_dropout[name]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        return LoraFactors(a.weight, b.weight, self.scaling[name], p, b.bias)

    def _magnitude(self, name: str) -> Tensor | None:
        found: Any = self.lora_magnitude_vector
        return found[name].weight if name in self.lora_variant else None

    def _norm(self, name: str, weight: Tensor, factors: LoraFactors) -> Tensor:
        layer: Any = self.lora_magnitude_vector
        return _cached_norm(layer[name], weight, factors, adapter_name=name)


class FusedLinear(Fused, PeftLinear):
    """PEFT's ``lora.Linear``, fused."""

    of_peft = PeftLinear


@dora.cache_decorator("weight-norm")
def _cached_norm(_: Any, weight: Tensor, factors: LoraFactors, *, adapter_name: str) -> Tensor:
    """The norm of a DoRA adapter, which PEFT keeps in its layer ``_`` under ``DoraCaching``."""
    return ops.lora_dora_norm(weight, factors.a, factors.b, factors.scaling)


# -------------------------------------------------------------------------------------------------
# adapter_names in training


class FusedLoraModel(LoraModel):
    """PEFT's ``LoraModel`` that also takes ``adapter_names`` in training."""

    of_peft = LoraModel
    #: Layers that PEFT runs and that see tokens first.
    turned: tuple[str, ...] = ()

    def generate_batch(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The model's own, which would swallow the names."""
        if adapter_names is not None:
            raise NotImplementedError(
                "generate_batch: expected no adapter_names on a PEFT model, whose requests all "
                "have the active adapter, found some; lora_ext.attach serves one per request"
            )
        refuse_singular("generate_batch", kwargs)
        return self.model.generate_batch(*args, **kwargs)

    def _is_fused(self, name: str) -> bool:
        return isinstance(self.model.get_submodule(name), Fused)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        refuse_singular("from_peft", kwargs)
        names = kwargs.get("adapter_names")
        if names is not None:
            refuse_turned(names, self.turned)
        if names is not None and self.training:
            refuse_names_of_a_reference(self.active_adapters, _names(names))
        hooks = super()._enable_peft_forward_hooks(*args, **kwargs)
        training = self.training
        self.training = training and names is None  # PEFT refuses names in training, nothing else
        try:
            hooks.__enter__()
        finally:
            self.training = training
        token = None
        try:
            if names is not None and training:
                warn_of_frozen(self.model, _names(names))
                if several_processes() and torch.is_grad_enabled():
                    # A fused layer looks itself: FSDP2 lays its parameters whole only then.
                    left = report(self.model).left.items()
                    others = {n: why for n, why in left if not self._is_fused(n)}
                    refuse_layers_of_peft(self.model, others)
                _let_checkpoints_keep_names(self.model)
                token = _current.set(_names(names))
            yield
        finally:
            if token is not None:
                _current.reset(token)
            # PEFT's context does not see an exception: it would leave its hooks on the layers.
            hooks.__exit__(None, None, None)


# ``repr``, ``get_layer_status``, ``get_model_status`` and model cards show these names, as PEFT has
# them. Pickle finds the classes by their qualified names, which stay.
FusedLinear.__name__ = PeftLinear.__name__
FusedLoraModel.__name__ = LoraModel.__name__


class _KeepsNames:
    """A checkpoint function that also keeps the names of its forward for the recomputation.

    By then the forward is over and its hooks are gone. It stays where it was put, as another
    thread may be inside it; without names it is the function it wraps.
    """

    def __init__(self, checkpoint: Callable[..., Any]):
        self.checkpoint = checkpoint

    def __call__(self, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        rows = _current.get()
        if rows is None:
            return self.checkpoint(run, *args, **options)

        def run_with_names(*inner: Any, **kwargs: Any) -> Any:
            token = _recomputed.set(rows)
            try:
                return run(*inner, **kwargs)
            finally:
                _recomputed.reset(token)

        return self.checkpoint(run_with_names, *args, **options)


def _let_checkpoints_keep_names(model: nn.Module) -> None:
    block: Any
    for block in model.modules():
        checkpoint = getattr(block, "_gradient_checkpointing_func", None)
        if checkpoint is None or not getattr(block, "gradient_checkpointing", False):
            continue
        if not isinstance(checkpoint, _KeepsNames):
            block._gradient_checkpointing_func = _KeepsNames(checkpoint)
        for layer in block.modules():
            if isinstance(layer, Fused) or _remind in layer._forward_pre_hooks.values():
                continue
            if isinstance(layer, LoraLayer | AuxiliaryTrainingWrapper):  # PEFT's own
                nn.Module.register_forward_pre_hook(layer, _remind, with_kwargs=True)  # pyright: ignore[reportArgumentType]


def _remind(_layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a layer of PEFT's own the names that a recomputation has no hook for."""
    names = None if compiles() else _recomputed.get()
    return args, kwargs if names is None else {**kwargs, "adapter_names": names.spelled()}
