"""``LoraAdapter``: one adapter as a value, apart from any model."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from .base_weights import BaseWeights
from .config import AdapterConfig
from .live import live_adapter
from .model_index import LinearSpec, ModelIndex
from .peft_files import (
    AdapterSource,
    Factors,
    open_adapter,
    read_factors,
    write_adapter,
)
from .peft_keys import MAGNITUDE, PREFIX, Key, factor_roles, parse_key
from .tensor_files import TensorSource


@dataclass(frozen=True, eq=False, repr=False)
class LoraAdapter:
    """PEFT's configuration and, for each adapted module, its factors. Nothing of it changes.

    Attributes:
        config: its fields have PEFT's names; ``to_dict()`` is ``adapter_config.json``.
        modules: by the module's name in the base model: ``a (r, I)``, ``b (O, r)``, ``scaling`` by
            PEFT's rules, and ``bias``, ``magnitude`` where PEFT keeps them.
        base_weights: weights of the base model that PEFT saves beside an adapted embedding or head,
            under their names in the file. They share the memory of what they were read from.
        saved_modules: what replaces parts of the base model (``modules_to_save``), likewise.

    Two adapters are equal that change a model in the same way: names, factors, scaling, bias and
    magnitude count, compared by value, and neither dtype nor device nor configuration.
    """

    config: AdapterConfig
    modules: Mapping[str, Factors]
    base_weights: Mapping[str, Tensor] = field(default_factory=dict)
    saved_modules: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for each in ("modules", "base_weights", "saved_modules"):
            object.__setattr__(self, each, MappingProxyType(dict(getattr(self, each))))

    @classmethod
    def load(cls, source: AdapterSource, strict: bool = True) -> LoraAdapter:
        """Read PEFT's folder, or ``(config, state dict)``, without a model to compare it with.

        Args:
            source: a directory; or a dict of PEFT's fields or ``peft.LoraConfig``, and tensors
                under PEFT's names, which are copied.
            strict: False skips tensors and fields that nothing uses.

        Raises:
            ValueError: naming file, key, expected and found.
            NotImplementedError: what is legal in PEFT and not here, convolutions for one.
        """
        with open_adapter(source) as (config, tensors):
            return cls._read(config, tensors, strict, copy=isinstance(source, tuple))

    @classmethod
    def from_model(cls, model: nn.Module, adapter: str = "default") -> LoraAdapter:
        """Copy an adapter out of a PEFT model, or out of layers of :mod:`lora_ext.nn`.

        Raises:
            ValueError: the model has no such adapter; its layers differ in what PEFT's
                configuration has but once (``use_dora``, ``lora_bias``).
            NotImplementedError: what is legal in PEFT and not here, convolutions for one.
        """
        return cls.load(live_adapter(model, adapter, "LoraAdapter.from_model: model"))

    @classmethod
    def of(cls, source: LoraAdapter | AdapterSource) -> LoraAdapter:
        """A value as it is, and anything else as :meth:`load` reads it."""
        return source if isinstance(source, LoraAdapter) else cls.load(source)

    def with_modules(
        self,
        modules: Mapping[str, Factors],
        base_weights: Mapping[str, Tensor] | None = None,
        **changes: Any,
    ) -> LoraAdapter:
        """This adapter with other factors, and a configuration that names their modules in full.

        Args:
            modules: by the module's name. A scale that PEFT's configuration cannot say moves by
                one unit in the last place of float64.
            base_weights: default is those of this adapter that lie beside ``modules``.
            changes: of fields of the configuration.
        """
        if base_weights is None:
            gone = tuple(f"{name}.base_layer." for name in self.modules if name not in modules)
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
        return LoraAdapter(config, modules, base_weights, self.saved_modules)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write a folder that PEFT loads, with no missing and no unexpected key.

        Args:
            folder: made if it is not there. Each of its two files appears whole or not at all.

        Raises:
            ValueError: the configuration means other modules, ranks or scales than ``modules`` has.
        """
        config = self.config
        if config.target_modules is None:  # PEFT would choose by the kind of model
            config = dataclasses.replace(config, target_modules=tuple(sorted(self.modules)))
        state = self.state_dict()
        with open_adapter((config, state)) as (_, tensors):
            meant = self._read(config, tensors, strict=True, copy=False)
        for name, factors in self.modules.items():
            expected = meant.modules[name].scaling
            if factors.scaling != expected:
                raise ValueError(
                    f"LoraAdapter.save: {name}: scaling: expected {expected}, which the "
                    f"configuration says, found {factors.scaling}"
                )
        write_adapter(folder, config, state)

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors under the names that PEFT gives them in a file."""
        tensors: dict[str, Tensor] = {}
        for name, factors in self.modules.items():
            role_a, role_b = factor_roles(factors.embedding)
            parts = {
                role_a: factors.a,
                role_b: factors.b,
                "B.bias": factors.bias,
                MAGNITUDE: factors.magnitude,
            }
            for role, value in parts.items():
                if value is not None:
                    tensors[Key(name, role, None).in_file] = value
        return {**tensors, **self.base_weights, **self.saved_modules}

    @classmethod
    def _read(
        cls, config: AdapterConfig, tensors: TensorSource, strict: bool, copy: bool
    ) -> LoraAdapter:
        index = _implied_index(tensors)
        convert = _copied if copy else _as_read
        config, modules, _ = read_factors(config, tensors, index, sys.maxsize, strict, convert)
        beside = {key: tensors.read(key) for key in tensors.infos if _is_base_weight(key)}
        return cls(config, modules, beside)

    def __eq__(self, other: object) -> bool:
        """Whether both change a model in the same way."""
        if not isinstance(other, LoraAdapter):
            return NotImplemented
        return self.modules.keys() == other.modules.keys() and all(
            _same(factors, other.modules[name]) for name, factors in self.modules.items()
        )

    def __repr__(self) -> str:
        """Modules and ranks at a glance."""
        ranks = sorted({factors.a.shape[0] for factors in self.modules.values()})
        return f"LoraAdapter({len(self.modules)} modules, ranks {ranks}, {self.config.where})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made of plain dicts: a read-only view cannot be pickled."""
        parts = (self.modules, self.base_weights, self.saved_modules)
        return LoraAdapter, (self.config, *map(dict, parts))


def _same(first: Factors, second: Factors) -> bool:
    if (first.scaling, first.embedding) != (second.scaling, second.embedding):
        return False
    return all(
        left is right
        if left is None or right is None
        else left.shape == right.shape and bool((left == right.to(left.device)).all())
        for left, right in (
            (first.a, second.a),
            (first.b, second.b),
            (first.bias, second.bias),
            (first.magnitude, second.magnitude),
        )
    )


def _as_read(_: LinearSpec, factors: Factors) -> Factors:
    return factors


def _copied(_: LinearSpec, factors: Factors) -> Factors:
    a, b, _scaling, bias, magnitude, _embedding = factors
    return factors._replace(
        a=a.clone(),
        b=b.clone(),
        bias=None if bias is None else bias.clone(),
        magnitude=None if magnitude is None else magnitude.clone(),
    )


# -------------------------------------------------------------------------------------------------
# Without a model, the tensors themselves say which modules there are.


class _Unknown(BaseWeights):
    """The weights of a base model that nobody has named: whatever a file holds may be one."""

    def __init__(self) -> None:
        super().__init__(nn.Module())

    def __contains__(self, name: str) -> bool:
        return _is_base_weight(name)

    def check_header(self, tensors: TensorSource, key: str, name: str) -> None:
        pass

    def check(self, tensors: TensorSource, key: str, name: str) -> None:
        pass


def _is_base_weight(key: str) -> bool:
    return parse_key(key) is None and key.endswith((".weight", ".bias"))


def _implied_index(tensors: TensorSource) -> ModelIndex:
    """The modules of a model that the factors fit: as many inputs as A has, outputs as B has."""
    sizes: dict[str, dict[str, int]] = {}
    embeddings: set[str] = set()
    for key, info in tensors.infos.items():
        parsed = parse_key(key)
        if parsed is None:
            continue
        size = sizes.setdefault(parsed.module, {})
        for is_embedding in (False, True):
            role_a, role_b = factor_roles(is_embedding)
            if parsed.role not in (role_a, role_b):
                continue
            if len(info.shape) > 2:
                raise NotImplementedError(
                    f"{tensors.where}: {key}: expected a matrix, found shape {info.shape}: "
                    "adapters on convolutions are not supported"
                )
            if len(info.shape) < 2:
                raise ValueError(f"{tensors.where}: {key}: expected a matrix, found {info.shape}")
            if is_embedding:
                embeddings.add(parsed.module)
            size["in" if parsed.role == role_a else "out"] = info.shape[parsed.role == role_a]
    specs = {
        name: LinearSpec(
            name, size.get("in", 0), size.get("out", 0), torch.float32, torch.device("cpu")
        )
        for name, size in sizes.items()
    }
    return ModelIndex(
        linear={n: spec for n, spec in specs.items() if n not in embeddings},
        embedding={n: spec for n, spec in specs.items() if n in embeddings},
        unsupported={},
        output_head=None,
        classifier=None,
        weights=_Unknown(),
    )
