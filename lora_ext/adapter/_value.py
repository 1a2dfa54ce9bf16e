"""``LoraAdapter``: one adapter as a value, independent of any model."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._checks import require, require_flags

from ._config import AdapterConfig
from ._live import live_adapter
from ._model_index import BaseWeights, LinearSpec, ModelIndex
from ._peft_files import AdapterSource, Factors, check_adapter, open_adapter, write_adapter
from ._peft_tensors import PREFIX, Key, TensorSource, base_name, parse_key, roles_of


@dataclass(frozen=True, eq=False, repr=False)
class LoraAdapter:
    """An immutable adapter: PEFT's configuration, and the factors of each adapted module.

    Attributes:
        config: its fields have PEFT's names; ``to_dict()`` returns ``adapter_config.json``.
        modules: by the module's name in the base model: ``a (r, I)``, ``b (O, r)``, ``scaling`` by
            PEFT's rules, and ``bias``, ``magnitude`` if PEFT stores them.
        base_weights: weights of the base model that PEFT saves with an adapted embedding or head,
            by their names in the file. They share the memory of their source.
        replacements: tensors that replace weights of the base model, by their names in the file:
            whole modules (``modules_to_save``) and trained biases (``bias="all"``,
            ``"lora_only"``).

    Two adapters are equal if they change a model in the same way. The comparison includes the
    values of names, factors, scaling, bias, magnitude and replacements, and ignores dtype, device
    and configuration.
    """

    config: AdapterConfig
    modules: Mapping[str, Factors]
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    replacements: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in ("modules", "base_weights", "replacements"):
            object.__setattr__(self, each, MappingProxyType(dict(getattr(self, each))))

    @classmethod
    def load(cls, source: AdapterSource, strict: bool = True) -> LoraAdapter:
        """Read PEFT's folder, or ``(config, state dict)``, without a model to compare it with.

        Args:
            source: a directory; or a dict of PEFT's fields or ``peft.LoraConfig``, and tensors
                under PEFT's names, which are copied.
            strict: False skips unused tensors and fields.

        Raises:
            TypeError: If ``strict`` is neither True nor False.
            ValueError: If the files are invalid; the message names file, key, expected and found.
            NotImplementedError: If the adapter uses an unsupported feature of PEFT: rows of
                embeddings, bare parameters, initialisations that change the base weight.
        """
        require_flags("LoraAdapter.load", strict=strict)
        with open_adapter(source) as (config, tensors):
            return cls._read(config, tensors, strict, copy=isinstance(source, tuple))

    @classmethod
    def from_model(cls, model: nn.Module, adapter: str = "default") -> LoraAdapter:
        """Copy an adapter from a PEFT model, or from layers of :mod:`lora_ext.nn`.

        Raises:
            ValueError: If the model has no such adapter; its layers differ in a setting that PEFT's
                configuration has only once (``use_dora``, ``lora_bias``).
            NotImplementedError: see :meth:`load`.
        """
        return cls.load(live_adapter(model, adapter, "LoraAdapter.from_model: model"))

    @classmethod
    def of(cls, source: LoraAdapter | AdapterSource) -> LoraAdapter:
        """Return ``source`` itself if it is a `LoraAdapter`, else what :meth:`load` reads from
        it."""
        return source if isinstance(source, LoraAdapter) else cls.load(source)

    def check_names(self, where: str, names: Iterable[str]) -> None:
        """Raise unless every name is a module of the adapter.

        Raises:
            ValueError: names the first unknown one, after the prefix ``where``.
        """
        for name in names:
            if name not in self.modules:
                found = f"{name!r:.200}, which it lacks"
                raise ValueError(f"{where}: expected modules of the adapter, found {found}")

    def with_modules(
        self,
        modules: Mapping[str, Factors],
        base_weights: Mapping[str, Tensor] | None = None,
        **changes: Any,
    ) -> LoraAdapter:
        """Return this adapter with other factors; its configuration names the modules in full.

        Args:
            modules: factors by module name. A scale that PEFT's configuration cannot express
                changes by one unit in the last place of float64.
            base_weights: default is this adapter's, without those of modules that are removed.
            changes: new values of fields of the configuration.

        The trained bias of a base layer that is no longer adapted is removed with
        ``bias="lora_only"``, and kept with ``bias="all"``, which means every layer.
        """
        gone = tuple(f"{name}.base_layer." for name in self.modules if name not in modules)
        if base_weights is None:
            base_weights = {
                key: weight
                for key, weight in self.base_weights.items()
                if not key.removeprefix(PREFIX).startswith(gone)
            }
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
        """Write a folder that PEFT loads, with no missing and no unexpected key.

        Args:
            folder: created if it does not exist. Either both of its files are written, or neither.

        Raises:
            ValueError: If the configuration gives other modules, ranks or scales than ``modules``.
            OSError: If the folder cannot be written; previous files stay intact.
        """
        config = self.config
        if config.target_modules is None:  # PEFT would choose by the model's type
            config = dataclasses.replace(config, target_modules=tuple(sorted(self.modules)))
        state = self.state_dict()
        with open_adapter((config, state)) as (_, tensors):
            # Unused tensors were skipped or rejected when this adapter was loaded.
            meant = self._read(config, tensors, strict=False, copy=False)
        for name, factors in self.modules.items():
            configured, found = meant.modules[name].scaling, factors.scaling
            expected = f"{configured}, as in the configuration"
            require(found == configured, f"LoraAdapter.save: {name}", "scaling", expected, found)
        write_adapter(folder, config, state)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all tensors under PEFT's names in a file."""
        tensors: dict[str, Tensor] = {}
        for name, factors in self.modules.items():
            for part, role in roles_of(factors.embedding).items():
                value = getattr(factors, part)
                if value is not None:
                    tensors[Key(name, role, None).in_file] = value
        return {**tensors, **self.base_weights, **self.replacements}

    @classmethod
    def _read(
        cls, config: AdapterConfig, tensors: TensorSource, strict: bool, copy: bool
    ) -> LoraAdapter:
        index = _implied_index(config, tensors)
        checked = check_adapter(config, tensors, index, sys.maxsize, strict)
        modules = {spec.name: f for spec, f in checked.modules()}
        beside: dict[str, Tensor] = {}
        replacements: dict[str, Tensor] = {}
        for key in tensors.infos:
            name = base_name(key)
            if parse_key(key) is None and name in index.weights:
                in_file = PREFIX + key.removeprefix(PREFIX)
                (replacements if _replaces(config, name) else beside)[in_file] = tensors.read(key)
        if copy:
            for name, factors in modules.items():
                values: list[Any] = [t.clone() if isinstance(t, Tensor) else t for t in factors]
                modules[name] = Factors(*values)
            replacements = {key: value.clone() for key, value in replacements.items()}
        return cls(config, modules, beside, replacements)

    def __eq__(self, other: object) -> bool:
        """Return whether both adapters change a model in the same way."""
        if not isinstance(other, LoraAdapter):
            return NotImplemented
        if self.modules.keys() != other.modules.keys():
            return False
        if self.replacements.keys() != other.replacements.keys():
            return False
        same = all(
            all(map(same_values, factors, other.modules[name]))
            for name, factors in self.modules.items()
        )
        return same and all(
            same_values(value, other.replacements[key]) for key, value in self.replacements.items()
        )

    def __repr__(self) -> str:
        """Show the number of modules, their ranks and the source."""
        ranks = sorted({factors.a.shape[0] for factors in self.modules.values()})
        return f"LoraAdapter({len(self.modules)} modules, ranks {ranks}, {self.config.where})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the mappings as dicts, since a `MappingProxyType` cannot be pickled."""
        parts = (self.modules, self.base_weights, self.replacements)
        return LoraAdapter, (self.config, *map(dict, parts))


def same_values(left: Any, right: Any) -> bool:
    """Return whether two values are equal: shape and values of tensors, on any device."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and bool((left == right.to(left.device)).all())
    return bool(left == right)  # one of them may be None


# -------------------------------------------------------------------------------------------------
# Without a model, the module names and shapes are inferred from the tensors.


class _Unknown(BaseWeights):
    """Base weights if no model is given: every weight or bias in a file is accepted as one."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(nn.Module())
        self._config = config

    def __contains__(self, name: str) -> bool:
        return name.endswith((".weight", ".bias")) or _replaces(self._config, name)

    def check_header(self, tensors: TensorSource, key: str, name: str) -> None:
        dtype = tensors.infos[key].dtype
        known = not isinstance(dtype, str)
        require(known, f"{tensors.where}: {key}", "dtype", "one that torch has", dtype)

    def check(self, tensors: TensorSource, key: str, name: str) -> None:
        pass


def _replaces(config: AdapterConfig, name: str) -> bool:
    """Return whether PEFT replaces the base model's tensor of that name by this one."""
    if config.base_bias != "none" and name.endswith("bias"):
        return True
    return config.saves_whole(name)


def _implied_index(config: AdapterConfig, tensors: TensorSource) -> ModelIndex:
    """Return an index of the modules with factors: in_features from A, out_features from B."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, info in tensors.infos.items():
        parsed = parse_key(key)
        if parsed is not None:
            is_factor = parsed.role.endswith(("A.weight", "B.weight", "embedding_A", "embedding_B"))
            holds = len(info.shape) > 1 or not is_factor
            require(holds, tensors.where, key, "a matrix", info.shape)
            shapes.setdefault(parsed.module, {})[parsed.role] = info.shape
    linear: dict[str, LinearSpec] = {}
    embedding: dict[str, LinearSpec] = {}
    for name, found in shapes.items():
        is_embedding = not found.keys().isdisjoint(("embedding_A", "embedding_B"))
        role_a, role_b, *_ = roles_of(is_embedding).values()
        rank, inputs, *kernel = found.get(role_a, (0, 0))
        out, columns, *_ = found.get(role_b, (0, 0))
        groups = rank // columns if kernel and columns and rank % columns == 0 else 1
        (embedding if is_embedding else linear)[name] = LinearSpec(
            name, inputs, out, torch.float32, torch.device("cpu"), tuple(kernel), groups
        )
    return ModelIndex(linear, embedding, {}, None, None, _Unknown(config), shared=False)
