"""LoraConfig: which modules of a model get which adapter, in PEFT's words and by PEFT's rules.

The rules are those of PEFT's ``tuners_utils.check_target_module_exists`` and
``utils.other.get_pattern_key``, written anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .init import known_scheme
from .patterns import match_names

ALL_LINEAR = "all-linear"
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
_NOT_IN_FILES = ("where", "preserve_base_output")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """PEFT's configuration of a LoRA adapter, as far as this package has what it asks for.

    Args:
        r: the rank.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: the probability of dropping an input of the adapter, in training.
        target_modules: which modules are adapted: a regular expression for whole names; or names
            and suffixes of names, ``"q_proj"`` for every ``...q_proj``; or "all-linear" for every
            linear layer but the output head (of a "SEQ_CLS" task without one, but the classifier).
            Our choice: "all-linear" is the default; PEFT looks one up by architecture.
        exclude_modules: which of them are not, in the same words.
        layers_to_transform: of the modules that a suffix matched, only those in blocks of these
            indices.
        layers_pattern: what comes before the index in a name, ``"layers"``; default is whatever
            precedes the first number.
        rank_pattern, alpha_pattern: other ranks and alphas, by regular expressions for the end of a
            name; the first that matches counts.
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        use_dora: train a magnitude per output as well.
        lora_bias: a bias beside B.
        init_lora_weights: see :meth:`lora_ext.nn.LoraLinear.add_adapter`.
        preserve_base_output: of that method too; it changes the base weight, so no file has it.
        fan_in_fan_out: accepted and without effect: a layer is known to store ``(I, O)`` or not to.
        bias: "none": the base model's biases stay frozen.
        task_type: what PEFT calls the task, "CAUSAL_LM" say; goes into files.
        where: what errors speak of.

    Raises:
        ValueError: a field that is malformed or out of range, naming it, what was expected and what
            was found. NotImplementedError: an initialisation that PEFT has and this package has
            not.

    Sources: LoRA (Hu et al. 2021); rsLoRA (Kalajdzievski 2023); DoRA (Liu et al. 2024); PEFT.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Iterable[str] | None = ALL_LINEAR
    exclude_modules: str | Iterable[str] | None = None
    layers_to_transform: int | Iterable[int] | None = None
    layers_pattern: str | Iterable[str] | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    fan_in_fan_out: bool = False
    bias: str = "none"
    task_type: str | None = None
    preserve_base_output: bool = False
    where: str = field(default="LoraConfig", repr=False, compare=False)

    def __post_init__(self) -> None:
        check = _Checks(self.where)
        checked = {
            "r": check.rank("r", self.r),
            "lora_alpha": check.number("lora_alpha", self.lora_alpha),
            "lora_dropout": check.probability("lora_dropout", self.lora_dropout),
            "target_modules": check.names("target_modules", self.target_modules),
            "exclude_modules": check.names("exclude_modules", self.exclude_modules),
            "layers_to_transform": check.layers("layers_to_transform", self.layers_to_transform),
            "layers_pattern": check.names("layers_pattern", self.layers_pattern),
            "rank_pattern": check.table("rank_pattern", self.rank_pattern, check.rank),
            "alpha_pattern": check.table("alpha_pattern", self.alpha_pattern, check.number),
            "task_type": getattr(self.task_type, "value", self.task_type),
        }
        for name in (*_FLAGS, "preserve_base_output"):
            checked[name] = check.flag(name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        known_scheme(self.init_lora_weights)
        if self.bias != "none":
            raise check.error("bias", "'none' (the base model's biases are shared)", self.bias)
        if self.use_dora and self.lora_bias:
            raise check.error("lora_bias", "false beside use_dora, as PEFT does", True)
        layers, pattern = self.layers_to_transform, self.layers_pattern
        if isinstance(self.target_modules, str):
            for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
                if value not in (None, "", ()):
                    raise check.error(name, "none of it beside a target_modules string", value)
        if pattern and layers is None:
            raise check.error("layers_pattern", "layers_to_transform beside it", None)

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT's ``adapter_config.json`` has them."""
        found: dict[str, Any] = {"peft_type": "LORA"}
        for each in fields(LoraConfig):
            value = getattr(self, each.name)
            if each.name not in _NOT_IN_FILES:
                found[each.name] = list(value) if isinstance(value, tuple) else value
        return found

    # ---------------------------------------------------------------------------------------------
    # Rules

    def targeted(self, names: Iterable[str], linear: Iterable[str]) -> set[str]:
        """The modules that PEFT would adapt.

        Args:
            names: all modules that may be. linear: what "all-linear" stands for.

        Raises:
            ValueError: ``target_modules`` is None, or a pattern is no regular expression.
        """
        wanted, names = self.target_modules, tuple(names)
        if wanted is None:
            raise _Checks(self.where).error(
                "target_modules", f"names, a regular expression or {ALL_LINEAR!r}", None
            )
        if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
            found = set(linear)
        elif isinstance(wanted, str):
            found = self._full_matches("target_modules", wanted, names)
        else:
            exact = {name for name in names if name in wanted}
            suffix = {name for name in names if matches_suffix(name, wanted)} - exact
            found = exact | (self._in_layers(suffix) if self.layers_to_transform else suffix)
        if isinstance(self.exclude_modules, str):
            found -= self._full_matches("exclude_modules", self.exclude_modules, names)
        elif self.exclude_modules:
            excluded = self.exclude_modules
            found = {name for name in found if not matches_suffix(name, excluded)}
        return found

    def ranks_and_alphas(
        self, names: Iterable[str]
    ) -> tuple[dict[str, tuple[int, float]], list[str]]:
        """Rank and alpha of each module, and the pattern keys that match none of them."""
        names = tuple(sorted(names))
        ranks, unused_r = self._patterned("rank_pattern", self.rank_pattern, self.r, names)
        alphas, unused_a = self._patterned(
            "alpha_pattern", self.alpha_pattern, self.lora_alpha, names
        )
        found = {name: (int(r), alpha) for name, r, alpha in zip(names, ranks, alphas, strict=True)}
        return found, unused_r + unused_a

    def _patterned(
        self, where: str, table: Mapping[str, float], default: float, names: tuple[str, ...]
    ) -> tuple[list[float], list[str]]:
        """The first pattern that matches the name, or its end after a dot, wins."""
        keys = tuple(table)
        rows = self._match(where, "match", r"(.*\.)?({})$", keys, names)
        values = []
        for column, name in enumerate(names):
            hit = next(
                (k for k, row in zip(keys, rows, strict=True) if row[column] is not None), name
            )
            values.append(table.get(hit, default))
        unused = [
            f"{where}[{k!r}]"
            for k, row in zip(keys, rows, strict=True)
            if k not in names and all(m is None for m in row)
        ]
        return values, unused

    def _full_matches(self, where: str, pattern: str, names: tuple[str, ...]) -> set[str]:
        (row,) = self._match(where, "fullmatch", "{}", (pattern,), names)
        return {name for name, m in zip(names, row, strict=True) if m is not None}

    def _in_layers(self, found: set[str]) -> set[str]:
        """Keep the names whose first numbered segment is one of ``layers_to_transform``."""
        names, pattern = tuple(sorted(found)), self.layers_pattern
        if pattern:
            keys = (pattern,) if isinstance(pattern, str) else tuple(pattern)
            template = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
            rows = self._match("layers_pattern", "match", template, keys, names)
        else:
            rows = match_names("match", r".*?\.[^.]*\.(?P<idx>\d+)\.", ("",), names)
        kept = set()
        for column, name in enumerate(names):
            layer = next((row[column] for row in rows if row[column] is not None), None)
            if layer and int(layer) in self.layers_to_transform:  # pyright: ignore[reportOperatorIssue]
                kept.add(name)
        return kept

    def _match(
        self, where: str, method: str, template: str, keys: tuple[str, ...], names: tuple[str, ...]
    ) -> tuple[tuple[str | None, ...], ...]:
        try:
            return match_names(method, template, keys, names)
        except ValueError as error:
            raise ValueError(f"{self.where}: {where}: {error}") from None


def matches_suffix(name: str, patterns: Iterable[str]) -> bool:
    """PEFT's rule for lists: the whole name, or everything after one of its dots."""
    patterns = patterns if isinstance(patterns, frozenset) else frozenset(patterns)
    parts = name.split(".")
    return any(".".join(parts[i:]) in patterns for i in range(len(parts)))


def checked_names(where: str, field: str, value: Any) -> str | tuple[str, ...] | None:
    """A field that holds a string, a list of strings or nothing.

    Raises:
        ValueError: it holds something else.
    """
    return _Checks(where).names(field, value)


class _Checks:
    """The types of fields, which may come from an untrusted file."""

    def __init__(self, where: str):
        self.where = where

    def error(self, name: str, expected: str, found: Any) -> ValueError:
        return ValueError(f"{self.where}: {name}: expected {expected}, found {found!r:.200}")

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or not 0 < value < 2**31:
            raise self.error(name, "a positive integer", value)
        return value

    def number(self, name: str, value: Any) -> float:
        # Compared as it is: float() of a huge integer raises OverflowError.
        if type(value) not in (int, float) or not abs(value) < 1e30:
            raise self.error(name, "a finite number", value)
        return value

    def probability(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise self.error(name, "a probability in [0, 1)", value)
        return value

    def flag(self, name: str, value: Any) -> bool:
        if not (value is None or isinstance(value, bool)):
            raise self.error(name, "true or false", value)
        return bool(value)

    def table(self, name: str, value: Any, check: Any) -> dict[str, Any]:
        value = value or {}
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise self.error(name, "an object from name patterns to numbers", value)
        return {k: check(f"{name}[{k!r:.100}]", v) for k, v in value.items()}

    def names(self, name: str, value: Any) -> str | tuple[str, ...] | None:
        if value is None or isinstance(value, str):
            return value
        if not isinstance(value, list | tuple | set) or not all(isinstance(v, str) for v in value):
            raise self.error(name, "a string or a list of strings", value)
        return tuple(sorted(value)) if isinstance(value, set) else tuple(value)

    def layers(self, name: str, value: Any) -> tuple[int, ...] | None:
        if value is None:
            return None
        numbers = tuple(value) if isinstance(value, list | tuple | set) else (value,)
        if not all(type(n) is int for n in numbers):
            raise self.error(name, "an integer or a list of integers", value)
        return numbers
