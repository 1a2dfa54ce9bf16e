"""``LoraAdapter``, an immutable adapter that does not belong to a model."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import UserDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require, require_flags
from lora_ext.kinds import Factors

from ._config import AdapterConfig
from ._live import live_adapter
from ._model_index import BaseWeights, LinearSpec, ModelIndex, UnknownSize, unknown_spec
from ._peft_files import AdapterSource, check_adapter, open_adapter, stem_parser, write_adapter
from ._peft_tensors import PREFIX, StateDict, TensorSource, base_name


@dataclass(frozen=True, eq=False, repr=False)
class LoraAdapter:
    """An immutable adapter: PEFT's configuration, and the factors of each adapted module.

    Attributes:
        config: configuration, whose fields have PEFT's names. ``config.to_dict()`` returns the
            content of ``adapter_config.json``.
        modules: factors of each adapted module, by the module's name in the base model:
            ``a (r, I)``, ``b (O, r)`` with rank r, I inputs and O outputs; ``scaling`` by PEFT's
            rules; ``bias`` and ``after`` if PEFT stores them.
        base_weights: weights of the base model that PEFT saves with an adapted embedding or head,
            by name in the file. They share memory with the source of the adapter.
        replacements: tensors that replace weights of the base model, by name in the file: weights
            of whole modules (``modules_to_save``) and trained biases (``bias="all"``,
            ``"lora_only"``).
        parts: tensors of an adapter of a kind other than LoRA, by name in the file. ``modules``
            then contains the factors that were computed from them.

    Two adapters are equal if they change a model in the same way. The comparison includes the
    module names and the values of factors, scaling, bias, scales and replacements. It ignores
    dtype, device and configuration.
    """

    config: AdapterConfig
    modules: Mapping[str, Factors]
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    replacements: Mapping[str, Tensor] = field(default_factory=dict)
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in ("modules", "base_weights", "replacements", "parts"):
            given = getattr(self, each)
            kept = given if isinstance(given, _NoFactors) else MappingProxyType(dict(given))
            object.__setattr__(self, each, kept)

    @property
    def complete(self) -> bool:
        """True if the factors could be computed.

        For some kinds of adapter, the file does not determine the sizes of all modules. This is
        False for such an adapter if it was loaded without its base model.
        """
        return not isinstance(self.modules, _NoFactors)

    @property
    def kind(self) -> str:
        """PEFT's ``peft_type``, such as "LORA" or "VERA"."""
        return self.config.peft_type

    @classmethod
    def load(cls, source: AdapterSource, strict: bool = True) -> LoraAdapter:
        """Read an adapter from a folder of PEFT, or from ``(config, state dict)``.

        Names and shapes are not compared with those of a base model.

        Args:
            source: path of the folder; or the configuration (a dict of PEFT's fields, or a
                ``peft.LoraConfig``) and tensors under PEFT's names, which are copied.
            strict: whether to raise for unused tensors and fields. False skips them.

        Raises:
            TypeError: If ``strict`` is neither True nor False.
            ValueError: If the files are invalid. The message names the file and the key.
            NotImplementedError: If the adapter uses an unsupported feature of PEFT: replaced rows
                of embeddings, factors of bare parameters, or an initialisation that changes the
                base weight.
        """
        require_flags("LoraAdapter.load", strict=strict)
        with open_adapter(source) as (config, tensors):
            return cls._read(config, tensors, strict, copy=isinstance(source, tuple))

    @classmethod
    def from_model(cls, model: nn.Module, adapter: str = "default") -> LoraAdapter:
        """Return a copy of an adapter of a PEFT model, or of a model with lora_ext.nn's layers.

        Raises:
            ValueError: If the model has no such adapter, or if its layers differ in a setting that
                has only one value in PEFT's configuration (such as ``lora_bias``).
            NotImplementedError: If the adapter uses an unsupported feature, as in :meth:`load`.
        """
        return cls.load(live_adapter(model, adapter, "LoraAdapter.from_model: model"))

    @classmethod
    def of(cls, source: LoraAdapter | AdapterSource) -> LoraAdapter:
        """Return ``source`` if it is a ``LoraAdapter``, otherwise ``LoraAdapter.load(source)``."""
        return source if isinstance(source, LoraAdapter) else cls.load(source)

    def check_names(self, where: str, names: Iterable[str]) -> None:
        """Check that every name is a module of the adapter.

        Raises:
            ValueError: If a name is unknown. The message starts with ``where`` and contains the
                first such name.
        """
        for name in names:
            if name not in self.modules:
                expected = f"names of the adapter's {len(self.modules)} modules"
                raise ValueError(f"{where}: expected {expected}, found {name!r:.200}")

    def refuse_scales(self, where: str) -> None:
        """Raise NotImplementedError if an adapter other than LoRA scales outputs or inputs."""
        kind = self.config.kind
        found = f"{kind.rescales}; merge this adapter into the base weight first"
        fits = kind.sums or not self.parts
        require(fits, where, "peft_type", f"no {kind.title}", found, NotImplementedError)

    def with_modules(
        self,
        modules: Mapping[str, Factors],
        base_weights: Mapping[str, Tensor] | None = None,
        **changes: Any,
    ) -> LoraAdapter:
        """Return a copy of this adapter with other factors. The copy's configuration contains the
        full names of the modules.

        Args:
            modules: factors by module name. A scale that PEFT's configuration cannot express
                changes by one unit in the last place of float64.
            base_weights: weights of the base model to save. Default is the weights of this adapter,
                except those of removed modules.
            changes: new values of fields of the configuration.

        If a module is removed and its base layer has a trained bias, this bias is removed with
        ``bias="lora_only"`` and kept with ``bias="all"``, which includes layers without an adapter.
        """
        gone = tuple(f"{name}.base_layer." for name in self.modules if name not in modules)
        if base_weights is None:
            base_weights = {
                key: weight
                for key, weight in self.base_weights.items()
                if not key.removeprefix(PREFIX).startswith(gone)
            }
        self.refuse_scales(self.config.where)
        ranks = {name: factors.a.shape[0] for name, factors in modules.items()}
        scalings = {name: factors.scaling for name, factors in modules.items()}
        config = self.config.fitted(ranks, scalings, self.modules, **changes)
        meant, _ = config.ranks_and_scales(ranks)
        modules = {
            name: f if f.scaling == meant[name][1] else f._replace(scaling=meant[name][1])
            for name, f in modules.items()
        }
        replacements: dict[str, Tensor] = {}
        for key, value in self.replacements.items():
            if key.removeprefix(PREFIX).startswith(gone):  # PEFT no longer wraps that layer
                if config.base_bias != "all":  # the bias was trained as part of an adapted layer
                    continue
                key = PREFIX + base_name(key)
            replacements[key] = value
        return LoraAdapter(config, modules, base_weights, replacements)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that PEFT loads without missing or unexpected keys.

        Args:
            folder: path of the folder, which is created if it does not exist. Either both of its
                files are written, or neither.

        Raises:
            ValueError: If modules, ranks or scales in the configuration differ from ``modules``.
            OSError: If the folder cannot be written. Previous files are not changed.
        """
        config = self.config
        if config.target_modules is None:  # PEFT would choose by the model's type
            config = dataclasses.replace(config, target_modules=tuple(sorted(self.modules)))
        state = self.state_dict()
        # strict=False, since unused tensors were skipped or rejected when the adapter was loaded.
        meant = self._read(config, StateDict(state, "state dict"), strict=False, copy=False)
        for name, factors in () if self.parts else self.modules.items():
            configured, found = meant.modules[name].scaling, factors.scaling
            expected = f"{configured}, as in the configuration"
            require(found == configured, f"LoraAdapter.save: {name}", "scaling", expected, found)
        write_adapter(folder, config, state)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors by their names in PEFT's files."""
        tensors = dict(self.parts)
        for name, factors in () if self.parts else self.modules.items():
            stems = self.config.kind.stems(factors.embedding)
            found = factors.tensors
            tensors |= {f"{PREFIX}{name}.{s}": found[p] for p, s in stems.items() if p in found}
        return {**tensors, **self.base_weights, **self.replacements}

    def with_sizes(self, sizes: Mapping[str, tuple[int, int]]) -> LoraAdapter:
        """Return this adapter with all factors, including those that its file does not determine.
        ``sizes`` maps a module's name to its numbers of inputs and outputs."""
        if self.complete:
            return self
        return self._read(self.config, StateDict(self.state_dict(), ""), False, False, sizes)

    @classmethod
    def _read(
        cls,
        config: AdapterConfig,
        tensors: TensorSource,
        strict: bool,
        copy: bool,
        sizes: Mapping[str, tuple[int, int]] = MappingProxyType({}),
    ) -> LoraAdapter:
        index, split = _implied_index(config, tensors, sizes), stem_parser(config)
        if copy:
            every = {key: tensors.read(key) for key in tensors.infos}
            own = {k: split(k) or _replaces(config, base_name(k)) for k in every}
            copied = {key: t.clone() if own[key] else t for key, t in every.items()}
            tensors = StateDict(copied, tensors.where)
        checked = check_adapter(config, tensors, index, sys.maxsize, strict)
        modules: Mapping[str, Factors]
        try:
            modules = {spec.name: f for spec, f in checked.modules()}
        except UnknownSize as error:
            modules = _NoFactors(checked.keys, f"{config.kind.title}: {error}")
        beside: dict[str, Tensor] = {}
        replacements: dict[str, Tensor] = {}
        for key in tensors.infos:
            name = base_name(key)
            if split(key) is None and name in index.weights:
                in_file = PREFIX + key.removeprefix(PREFIX)
                (replacements if _replaces(config, name) else beside)[in_file] = tensors.read(key)
        groups = (checked.shared, *checked.keys.values()) if config.peft_type != "LORA" else ()
        parts = {key: tensors.read(key) for keys in groups for key in keys.values()}
        return cls(config, modules, beside, replacements, parts)

    def __eq__(self, other: object) -> bool:
        """Return whether both adapters change a model in the same way."""
        if not isinstance(other, LoraAdapter):
            return NotImplemented
        if self.modules.keys() != other.modules.keys():
            return False
        if not (self.complete and other.complete):
            fields = [dict(a.config.to_dict()) for a in (self, other)]
            return fields[0] == fields[1] and _same_tensors(self.parts, other.parts)
        same = all(
            all(map(same_values, factors, other.modules[name]))
            for name, factors in self.modules.items()
        )
        return same and _same_tensors(self.replacements, other.replacements)

    def __repr__(self) -> str:
        """Return a text with the number of modules, their ranks and the source."""
        factors = self.modules.values() if self.complete else ()
        ranks = sorted({f.a.shape[0] for f in factors}) if self.complete else "unknown"
        kind = "" if self.kind == "LORA" else f"{self.kind}, "
        found = f"{len(self.modules)} modules, ranks {ranks}, {self.config.where}"
        return f"LoraAdapter({kind}{found})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments for copying and pickling. Mappings become dicts, since a
        ``MappingProxyType`` cannot be pickled."""
        if self.parts:
            state = StateDict(self.state_dict(), "state dict")
            return LoraAdapter._read, (self.config, state, False, False)
        parts = (self.modules, self.base_weights, self.replacements)
        return LoraAdapter, (self.config, *map(dict, parts))


def same_values(left: Any, right: Any) -> bool:
    """Return whether two values are equal. Tensors must have equal shapes and values, and may be on
    different devices."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and bool((left == right.to(left.device)).all())
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(same_values, left, right))
    return bool(left == right)  # a number, a bool or None


def _same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    same = left.keys() == right.keys()
    return same and all(same_values(value, right[key]) for key, value in left.items())


# -------------------------------------------------------------------------------------------------
# Without a model, the module names and shapes are inferred from the tensors.


class _NoFactors(UserDict[str, Any]):
    """Modules of an adapter whose file lacks their sizes; reading a module raises UnknownSize."""

    def __init__(self, names: Iterable[str], why: str):
        super().__init__(dict.fromkeys(names))
        self.why = why

    def __getitem__(self, name: str) -> Factors:
        raise UnknownSize(f"{name}: {self.why}")


class _Unknown(BaseWeights):
    """Replacement for the weights of a base model if no model is given.

    It accepts every weight or bias in a file as a weight of the base model.
    """

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(nn.Module())
        self._config = config

    def __contains__(self, name: str) -> bool:
        return name.endswith((".weight", ".bias")) or _replaces(self._config, name)

    def check_header(self, tensors: TensorSource, key: str, name: str) -> None:
        dtype = tensors.infos[key].dtype
        known = not isinstance(dtype, str)
        require(known, f"{tensors.where}: {key}", "dtype", "a dtype of torch", dtype)

    def check(self, tensors: TensorSource, key: str, name: str) -> None:
        pass


def _replaces(config: AdapterConfig, name: str) -> bool:
    """Return whether the adapter's tensor ``name`` replaces that of the base model."""
    if config.base_bias != "none" and name.endswith("bias"):
        return True
    return config.saves_whole(name)


def _implied_index(
    config: AdapterConfig, tensors: TensorSource, sizes: Mapping[str, tuple[int, int]]
) -> ModelIndex:
    """Return an index of the modules that have factors in ``tensors``.

    The shape of LoRA's A defines the number of inputs, and the shape of B the number of outputs.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    split = stem_parser(config)
    of_layer, of_embedding = (config.kind.stems(embedding) for embedding in (False, True))
    matrices = {stems[part] for stems in (of_layer, of_embedding) for part in "ab" if part in stems}
    for key, info in tensors.infos.items():
        parsed = split(key)
        if parsed is not None:
            module, stem = parsed
            holds = len(info.shape) > 1 or stem not in matrices
            require(holds, tensors.where, key, "a matrix", info.shape)
            shapes.setdefault(module, {})[stem] = info.shape
    index = ModelIndex(_Unknown(config), shared=False)
    shapes.pop("", None)
    for name, found in shapes.items():
        if not of_layer:
            index.linear[name] = unknown_spec(name, sizes.get(name))
            continue
        is_embedding = not found.keys().isdisjoint((of_embedding["a"], of_embedding["b"]))
        stems = of_embedding if is_embedding else of_layer
        rank, inputs, *kernel = found.get(stems["a"], (0, 0))
        out, columns, *_ = found.get(stems["b"], (0, 0))
        groups = rank // columns if kernel and columns and rank % columns == 0 else 1
        own = name, inputs, out, torch.float32, torch.device("cpu"), tuple(kernel), groups
        found = index.embedding if is_embedding else index.linear
        found[name] = LinearSpec(*own, embedding=is_embedding)
    return index
