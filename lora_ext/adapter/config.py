"""``adapter_config.json``: the fields that decide which modules have which rank and scale.

The rules are those of PEFT's ``tuners_utils.check_target_module_exists`` and
``utils.other.get_pattern_key``, written anew.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .model_index import ModelIndex, matches_suffix
from .patterns import match_names

# Read by nobody here: training only, or a record of where the adapter came from.
_IGNORED = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config inference_mode "
    "loftq_config lora_dropout lora_ga_config megatron_config megatron_core "
    "peft_type peft_version qalora_group_size revision runtime_config task_type "
    "velora_config".split()
)
# Each changes what the adapter computes. A value that means "off" (None, False, empty) is fine.
_REFUSED = {
    "modules_to_save": "it replaces whole modules of the base model",
    "trainable_token_indices": "it replaces rows of the embedding",
    "ensure_weight_tying": "it adapts the output head that shares the embedding's weight as well",
    "target_parameters": "it adapts bare parameters, not Linear modules",
    "layer_replication": "it changes the base model's layers",
    "alora_invocation_tokens": "activated LoRA switches on in the middle of a sequence",
    "use_qalora": "QALoRA pools the input before lora_A",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "arrow_config": "Arrow routes between adapters per token",
    "kasa_config": "KaSA truncates the base weight and adds a diagonal between the factors",
    "monteclora_config": "MonteCLoRA samples its factors",
}
# Initialisations that subtract something from the base weight, which every other adapter shares.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_READ = frozenset(
    "r lora_alpha rank_pattern alpha_pattern use_rslora use_dora fan_in_fan_out bias lora_bias "
    "target_modules exclude_modules layers_to_transform layers_pattern init_lora_weights".split()
)


@dataclass(frozen=True)
class AdapterConfig:
    """The parsed config. ``where`` names the file in errors."""

    where: str
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...] | None
    layers_to_transform: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    task_type: str | None
    unknown: tuple[str, ...]  # fields we have never heard of that are switched on
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)  # all fields, as read

    @classmethod
    def parse(cls, raw: Any, where: str) -> AdapterConfig:
        """Check every field and its type.

        Args:
            raw: the JSON object, or a ``peft.LoraConfig``.
            where: for error messages.

        Raises:
            ValueError: a field is missing or malformed.
            NotImplementedError: the adapter needs something that the pool cannot apply.
        """
        if hasattr(raw, "to_dict"):
            raw = raw.to_dict()
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where}: expected a JSON object, found {type(raw).__name__}")
        fields = _Fields(raw, where)
        kind = getattr(raw.get("peft_type"), "value", raw.get("peft_type"))
        if kind != "LORA":
            raise fields.error("peft_type", "'LORA'", kind)
        for name, reason in _REFUSED.items():
            if raw.get(name):
                raise NotImplementedError(f"{where}: {name} is not supported: {reason}")
        init = raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
            raise NotImplementedError(
                f"{where}: init_lora_weights={init[:40]!r} changes the base weight; save the "
                "adapter with PEFT's path_initial_model_for_weight_conversion to make it an "
                "ordinary one"
            )
        bias = raw.get("bias", "none")
        if bias != "none":
            raise fields.error("bias", "'none' (the base model's biases are shared)", bias)
        fields.flag(
            "fan_in_fan_out"
        )  # says how the base weight is stored; lora_A and lora_B do not change
        layers = raw.get("layers_to_transform")
        config = cls(
            where=where,
            r=fields.rank("r", raw.get("r", 8)),
            lora_alpha=fields.number("lora_alpha", raw.get("lora_alpha", 8)),
            rank_pattern=fields.table("rank_pattern", fields.rank),
            alpha_pattern=fields.table("alpha_pattern", fields.number),
            use_rslora=fields.flag("use_rslora"),
            use_dora=fields.flag("use_dora"),
            lora_bias=fields.flag("lora_bias"),
            target_modules=fields.names("target_modules"),
            exclude_modules=fields.names("exclude_modules"),
            layers_to_transform=fields.layer_numbers(layers),
            layers_pattern=_as_tuple(fields.names("layers_pattern")),
            task_type=getattr(raw.get("task_type"), "value", raw.get("task_type")),
            unknown=tuple(
                str(k) for k in raw if k not in _READ | _IGNORED | _REFUSED.keys() and raw[k]
            ),
            raw=dict(raw),
        )
        if config.use_dora and config.lora_bias:
            raise fields.error("lora_bias", "false beside use_dora, as PEFT does", True)
        if isinstance(config.target_modules, str) and (layers is not None or config.layers_pattern):
            raise fields.error(
                "layers_to_transform", "none of it beside a target_modules string", layers
            )
        if config.layers_pattern and layers is None:
            raise fields.error("layers_pattern", "layers_to_transform beside it", None)
        return config

    def to_dict(self) -> dict[str, Any]:
        """PEFT's fields: those that are parsed, and the others as they were read."""
        parsed = {
            "r": self.r,
            "lora_alpha": _short(self.lora_alpha),
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": {k: _short(v) for k, v in self.alpha_pattern.items()},
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "lora_bias": self.lora_bias,
            "target_modules": _as_list(self.target_modules),
            "exclude_modules": _as_list(self.exclude_modules),
            "layers_to_transform": _as_list(self.layers_to_transform or None),
            "layers_pattern": _as_list(self.layers_pattern or None),
            "task_type": self.task_type,
        }
        return {**self.raw, "peft_type": "LORA", **parsed}

    def targets(self, index: ModelIndex) -> set[str] | None:
        """The modules that PEFT would adapt, or None: the config leaves it to the tensors."""
        wanted = self.target_modules
        if wanted is None:
            return None
        candidates = (*index.modules, *index.unsupported)
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            head = index.output_head
            if head is None and self.task_type == "SEQ_CLS":
                head = index.classifier
            found = {name for name in index.linear if name != head}
        elif isinstance(wanted, str):
            found = self._full_matches("target_modules", wanted, candidates)
        else:
            exact = {name for name in candidates if name in wanted}
            suffix = {name for name in candidates if matches_suffix(name, wanted)} - exact
            found = exact | (self._in_layers(suffix) if self.layers_to_transform else suffix)
        if isinstance(self.exclude_modules, str):
            found -= self._full_matches("exclude_modules", self.exclude_modules, candidates)
        elif self.exclude_modules:
            found = {name for name in found if not matches_suffix(name, self.exclude_modules)}
        for name in sorted(found & index.unsupported.keys()):
            raise NotImplementedError(
                f"{self.where}: target_modules names {name!r}, a {index.unsupported[name]}; "
                "only Linear, Conv1D and plain Embedding modules are supported"
            )
        return found

    def ranks_and_scales(
        self, names: Iterable[str]
    ) -> tuple[dict[str, tuple[int, float]], list[str]]:
        """Per module, rank and scale; and the pattern keys that match none of the modules."""
        names = tuple(sorted(names))
        ranks, unused_r = self._patterned("rank_pattern", self.rank_pattern, self.r, names)
        alphas, unused_a = self._patterned(
            "alpha_pattern", self.alpha_pattern, self.lora_alpha, names
        )
        root = math.sqrt if self.use_rslora else float
        return {
            name: (int(r), alpha / root(r))
            for name, r, alpha in zip(names, ranks, alphas, strict=True)
        }, unused_r + unused_a

    def _patterned(
        self, field: str, table: Mapping[str, float], default: float, names: tuple[str, ...]
    ) -> tuple[list[float], list[str]]:
        """The first pattern that matches the name, or its end after a dot, wins."""
        keys = tuple(table)
        rows = self._match(field, "match", r"(.*\.)?({})$", keys, names)
        values = []
        for column, name in enumerate(names):
            hit = next(
                (k for k, row in zip(keys, rows, strict=True) if row[column] is not None), name
            )
            values.append(table.get(hit, default))
        unused = [
            f"{field}[{k!r}]"
            for k, row in zip(keys, rows, strict=True)
            if k not in names and all(m is None for m in row)
        ]
        return values, unused

    def _full_matches(self, field: str, pattern: str, names: tuple[str, ...]) -> set[str]:
        (row,) = self._match(field, "fullmatch", "{}", (pattern,), names)
        return {name for name, m in zip(names, row, strict=True) if m is not None}

    def _in_layers(self, found: set[str]) -> set[str]:
        """Keep the names whose first numbered segment is one of ``layers_to_transform``."""
        names = tuple(sorted(found))
        if self.layers_pattern:
            template = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
            rows = self._match("layers_pattern", "match", template, self.layers_pattern, names)
        else:
            rows = match_names("match", r".*?\.[^.]*\.(?P<idx>\d+)\.", ("",), names)
        kept = set()
        for column, name in enumerate(names):
            layer = next((row[column] for row in rows if row[column] is not None), None)
            if layer and int(layer) in self.layers_to_transform:
                kept.add(name)
        return kept

    def _match(
        self, field: str, method: str, template: str, keys: tuple[str, ...], names: tuple[str, ...]
    ) -> tuple[tuple[str | None, ...], ...]:
        try:
            return match_names(method, template, keys, names)
        except ValueError as error:
            raise ValueError(f"{self.where}: {field}: {error}") from None


class _Fields:
    """Typed access to an untrusted mapping."""

    def __init__(self, raw: Mapping[str, Any], where: str):
        self.raw, self.where = raw, where

    def error(self, field: str, expected: str, found: Any) -> ValueError:
        return ValueError(f"{self.where}: {field}: expected {expected}, found {found!r:.200}")

    def rank(self, field: str, value: Any) -> int:
        if type(value) is not int or not 0 < value < 2**31:
            raise self.error(field, "a positive integer", value)
        return value

    def number(self, field: str, value: Any) -> float:
        # Compared before conversion: float() of a huge integer raises OverflowError.
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise self.error(field, "a finite number", value)
        return float(value)

    def flag(self, field: str) -> bool:
        value = self.raw.get(field, False)
        if not (value is None or isinstance(value, bool)):
            raise self.error(field, "true or false", value)
        return bool(value)

    def table(self, field: str, check: Any) -> dict[str, Any]:
        value = self.raw.get(field) or {}
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise self.error(field, "an object from name patterns to numbers", value)
        return {k: check(f"{field}[{k!r:.100}]", v) for k, v in value.items()}

    def names(self, field: str) -> str | tuple[str, ...] | None:
        value = self.raw.get(field)
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list | tuple | set) or not all(isinstance(v, str) for v in value):
            raise self.error(field, "a string or a list of strings", value)
        return tuple(value)

    def layer_numbers(self, value: Any) -> tuple[int, ...]:
        if value is None:
            return ()
        numbers = list(value) if isinstance(value, list | tuple | set) else [value]
        if not all(type(n) is int for n in numbers):
            raise self.error("layers_to_transform", "an integer or a list of integers", value)
        return tuple(numbers)


def _short(number: float) -> float:
    """A whole number as an int, which is how people write it."""
    return int(number) if number == int(number) else number


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) and value else tuple(value or ())
