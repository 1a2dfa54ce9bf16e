"""``Kind``, the description of an adapter type, and the registry of all kinds.

Shape letters: r rank, I inputs and O outputs of a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_ext._checks import WrongKind, instance, require


class Part(NamedTuple):
    """Expected shape and dtype of a tensor that an adapter's file contains for a module."""

    shape: tuple[int | None, ...]  # None for a size that is not checked
    dtype: torch.dtype | None = None  # None for float16, bfloat16, float32 and float64
    optional: bool = False


class After(NamedTuple):
    """Scales of a module's outputs."""

    scale: Tensor  # (O,)
    of_bias: bool = False  # whether the bias of the base layer is scaled, too


class Factors(NamedTuple):
    """Factors of one module. They add ``scaling * (b @ a @ x + bias)`` to the output for x.

    For a convolution, the factors are kernels: ``a`` has the shape ``(r, I, *k)`` with the kernel
    size k, and ``b`` has the shape ``(O, r / groups, 1, ...)``. The scale of ``after`` has the
    shape ``(1, O, 1, ...)``. For a parameter of E experts, ``a`` is ``(E * r, I)`` with the rows
    grouped by expert, and ``b`` is ``(O, r * E)`` with the columns grouped by rank.
    """

    a: Tensor  # (r, I); for an embedding, I is the number of tokens
    b: Tensor  # (O, r)
    scaling: float
    bias: Tensor | None = None  # (O,)
    # Factors that multiply the output of base layer plus adapter. If `Kind.needs_weight`, these are
    # parameters (such as magnitudes) from which `Kind.after` computes the factors, given the base
    # weight.
    after: After | None = None
    embedding: bool = False
    before: Tensor | None = None  # (I,), scales of the inputs

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field, without fields that are None."""
        after = None if self.after is None else self.after.scale
        found = {"a": self.a, "b": self.b, "bias": self.bias, "after": after, "before": self.before}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def sums(self) -> bool:
        """True if the adapter only adds to the output, so that updates can be summed."""
        return self.after is None and self.before is None


#: Mapping from PEFT's configuration fields to their values for one module.
Config: TypeAlias = Any
#: Tensors of a module, and tensors that all modules share, by stem.
Tensors = Mapping[str, Tensor]


class Kind:
    """An adapter type. Subclasses override attributes and methods; instances have no state.

    A stem is the name of a tensor in a file without the module's name, such as ``lora_A.weight``.

    Attributes:
        name: PEFT's ``peft_type``.
        title: name in error messages; default is ``name``.
        rescales: noun in error messages for the tensor that rescales outputs or inputs.
        when: configuration field that selects this kind among the kinds with the same name if the
            field's value is true; empty for the kind that is used otherwise.
        shared: stems of tensors that all modules share. PEFT stores them as ``base_model.<stem>``,
            or ``base_model.<stem>.<key>`` for a dict of tensors.
        reads: configuration fields that change what the adapter computes, except those in
            ``counts``, ``numbers``, ``patterns`` and ``saves``.
        ignores: fields that have an effect only in training.
        refuses: fields that are not supported unless their value is false, with the reasons. A key
            ``field=value`` stands for one value of a field.
        saves: fields that must be true. If they are false, the file contains the seed of its random
            tensors instead of the tensors.
        patterns: mapping from a field with values for single modules to the field that it
            overrides. The configuration that a method receives has the values of the module.
        counts: fields that must be positive integers.
        numbers: fields that must be finite numbers.
        needs_weight: whether :meth:`after` reads the base weight.
        vector: if ``needs_weight``, stem of the tensor ``(O,)`` that :meth:`after` reads.
    """

    name = ""
    title = ""
    rescales = "scales of outputs or inputs"
    when = ""
    shared: tuple[str, ...] = ()
    reads: frozenset[str] = frozenset()
    ignores: frozenset[str] = frozenset({"init_weights", "fan_in_fan_out"})
    refuses: Mapping[str, str] = MappingProxyType({})
    patterns: Mapping[str, str] = MappingProxyType({})
    counts: tuple[str, ...] = ()
    numbers: tuple[str, ...] = ()
    saves: tuple[str, ...] = ()
    needs_weight = False
    vector = ""

    def __init_subclass__(cls) -> None:
        cls.title = cls.__dict__.get("title", cls.name)

    def parts(self, config: Config, spec: Any) -> Mapping[str, Part]:
        """Return the expected shape and dtype of a module's tensors by stem.

        Stems in :attr:`shared` may be omitted.
        """
        raise NotImplementedError

    def stems(self, embedding: bool) -> dict[str, str]:
        """Return the stem of each field of :class:`Factors` that a file stores as one tensor."""
        return {}

    def factors(self, parts: Tensors, config: Config, spec: Any, weight: Any = None) -> Factors:
        """Return the factors of a module, differentiable in ``parts``.

        Args:
            parts: tensors of the module and shared tensors, by stem.
            config: configuration of the adapter.
            spec: object with the module's ``name``, ``in_features``, ``out_features`` and
                ``dtype``, and with ``order``: names of all adapted modules in the model's order.
            weight: base weight ``(O, I)``, or None if it is not known.
        """
        raise NotImplementedError

    def update(self, x: Tensor, parts: Tensors, config: Config) -> Tensor | None:
        """Return what the adapter adds to the output for ``x`` ``(..., I)`` in training.

        None means that the caller uses the factors. An override can avoid the gradients of large
        factors.
        """
        return None

    def after(self, parts: Tensors, factors: Factors, weight: Any) -> After | None:
        """Return the scales of the outputs, or None if the module has none."""
        return None

    def before(self, parts: Tensors) -> Tensor | None:
        """Return the scales of the inputs ``(I,)``, or None if the module has none."""
        return None

    @property
    def sums(self) -> bool:
        """True if the adapter only adds to the output, so that updates can be summed."""
        return type(self).after is Kind.after and type(self).before is Kind.before

    @property
    def fields(self) -> frozenset[str]:
        """All configuration fields that change what the adapter computes."""
        return self.reads.union(self.counts, self.numbers, self.patterns, self.saves)

    def refused(self, config: Config) -> dict[str, str]:
        """Return the unsupported fields that a configuration sets, with the reasons."""
        found: dict[str, str] = {}
        for name, reason in self.refuses.items():
            field, _, value = name.partition("=")
            if config.get(field) == value if value else config.get(field):
                found[name] = reason
        return found

    def read(self, parts: Tensors, config: Config, spec: Any) -> Factors:
        """Return the factors of a module, including the scales of its outputs and inputs."""
        factors = self.factors(parts, config, spec)
        if self.sums:
            return factors
        if self.needs_weight:
            after = After(parts[self.vector])
        else:
            after = self.after(parts, factors, None)
        return factors._replace(after=after, before=self.before(parts))


_kinds: dict[tuple[str, str], Kind] = {}


def register_kind(kind: Kind) -> None:
    """Add a kind, or replace the kind of the same name."""
    instance("register_kind", "kind", kind, Kind)
    named = isinstance(kind.name, str) and kind.name != ""
    require(named, "register_kind", "kind", "a kind with a name", f"{kind.name!r:.200}")
    _kinds[kind.name, kind.when] = kind


def kind_of(name: str, config: Config | None = None) -> Kind:
    """Return the kind of a ``peft_type``.

    Args:
        name: PEFT's ``peft_type``, such as "VERA".
        config: configuration of the adapter, for names that several kinds have (:attr:`Kind.when`).

    Raises:
        TypeError: If ``name`` is not a str.
        NotImplementedError: If there is no such kind.
    """
    require(isinstance(name, str), "kind_of", "name", "a str", f"{name!r:.200}", WrongKind)
    for kind in variants(name):
        if config is not None and config.get(kind.when):
            return kind
    known = sorted({each for each, _ in _kinds})
    found = (name, "") in _kinds
    require(found, "kind_of", "name", f"one of {known}", f"{name!r:.200}", NotImplementedError)
    return _kinds[name, ""]


def variants(name: str) -> list[Kind]:
    """Return the kinds with this name that a configuration field selects (:attr:`Kind.when`)."""
    return [kind for (each, when), kind in _kinds.items() if each == name and when]


# -------------------------------------------------------------------------------------------------
# Types of PEFT that cannot be read as factors, with the reasons.

_FULL = "its update has no low rank"
_ROTATES = "it rotates the base weight, so it must read that weight"
_CONVERTS = "; PEFT's save_as_lora writes an approximation as LORA"

_REFUSED = {
    "RANDLORA": f"{_FULL}, by design{_CONVERTS}",
    "HIRA": f"it multiplies the base weight by B A element by element{_CONVERTS}",
    "C3A": f"{_FULL}{_CONVERTS}",
    "FOURIERFT": f"{_FULL}{_CONVERTS}",
    "WAVEFT": f"{_FULL}{_CONVERTS}",
    "SHIRA": f"{_FULL}: it changes scattered entries{_CONVERTS}",
    "SUPERTUNING": _FULL,
    "OFT": _ROTATES,
    "BOFT": _ROTATES,
    "HRA": _ROTATES,
    "ROAD": "it rotates the outputs",
    "LILY": "its update depends on the mean over the batch",
    "POLY": "it mixes several A and several B separately, with weights per task",
    "PSOFT": f"it needs the base weight{_CONVERTS}",
}


def refusal(name: str) -> str:
    """Return why a ``peft_type`` is not supported."""
    return _REFUSED.get(name, "no kind of this name is registered (lora_ext.kinds.register_kind)")
