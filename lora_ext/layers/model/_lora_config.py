"""LoraConfig: configuration of an adapter of a model, with the fields and rules of PEFT.

The rules that match names reimplement PEFT's ``tuners_utils.check_target_module_exists`` and
``utils.other.get_pattern_key``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lora_ext._checks import WrongKind, check_fields, flag, integer, number, require, within

from .._init import known_scheme
from .._lora_layer import checked_invocation
from ._patterns import match_names

ALL_LINEAR = "all-linear"
_RANK = within(1, 2**31 - 1, expected="a positive integer")
_ALPHA = within(above=-1e30, below=1e30, expected="a finite number")
_NAMES = ("target_modules", "exclude_modules", "layers_pattern")
_FLAGS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out")
_NOT_IN_FILES = ("where", "preserve_base_output")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Configuration of a LoRA adapter, with the fields of PEFT that this package supports.

    Args:
        r: rank of the factors.
        lora_alpha: numerator of the scale: the update is multiplied by ``lora_alpha / r``.
        lora_dropout: probability of dropping an element of the adapter's input in training.
        target_modules: modules to adapt: a regular expression that matches whole names; or a list
            of names and suffixes of names, such as ``"q_proj"`` for every ``...q_proj``; or
            "all-linear" for every linear layer except the output head (if there is no head and the
            task is "SEQ_CLS", except the classifier). Our choice: the default is "all-linear",
            whereas PEFT's default depends on the architecture.
        exclude_modules: modules to exclude from ``target_modules``: a regular expression or a list
            of names and suffixes.
        layers_to_transform: indices of the blocks to adapt. This restricts only modules that match
            a suffix.
        layers_pattern: part of a module's name before the index of its block, for example
            ``"layers"``; default is the part before the first number.
        rank_pattern: ranks of modules that differ from ``r``. Keys are regular expressions for the
            end of a module's name; the first match is used.
        alpha_pattern: alphas of modules that differ from ``lora_alpha``, with keys as in
            ``rank_pattern``.
        use_rslora: whether the scale is ``lora_alpha / sqrt(r)`` instead.
        use_dora: whether to train a magnitude per output feature as well (DoRA).
        lora_bias: whether B has a bias.
        init_lora_weights: initialisation scheme, see :meth:`lora_ext.nn.LoraLinear.add_adapter`.
        preserve_base_output: whether training starts at the outputs of the base model, see
            ``add_adapter``. True changes the base weight, so this field is not written to files.
        fan_in_fan_out: accepted without effect, because the layout of a weight is detected.
        alora_invocation_tokens: token ids of an activated adapter (aLoRA), which applies to a
            sequence only from the last occurrence of these tokens on. None or an empty sequence
            configures an ordinary adapter.
        bias: must be "none": the biases of the base model stay frozen.
        task_type: PEFT's name of the task, such as "CAUSAL_LM", which is written to files.
        where: start of error messages.

    Raises:
        ValueError: If a field is invalid; the message names the field, the expected value and the
            value found.
        NotImplementedError: If the initialisation scheme is implemented only in PEFT.

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
    alora_invocation_tokens: Iterable[int] | None = None
    bias: str = "none"
    task_type: str | None = None
    preserve_base_output: bool = False
    where: str = field(default="LoraConfig", repr=False, compare=False)

    def __post_init__(self) -> None:
        table: dict[str, Any] = {
            "r": _RANK,
            "lora_alpha": _ALPHA,
            "lora_dropout": within(0, below=1, expected="a probability in [0, 1)"),
            **dict.fromkeys(_NAMES, checked_names),
            "layers_to_transform": _layers,
            "alora_invocation_tokens": checked_invocation,
            "rank_pattern": functools.partial(_table, check=integer, bounds=_RANK),
            "alpha_pattern": functools.partial(_table, check=number, bounds=_ALPHA),
            "task_type": lambda where, name, value: getattr(value, "value", value),
            **dict.fromkeys((*_FLAGS, "preserve_base_output"), _flag),
        }
        check_fields(self, table, self.where)
        known_scheme(self.init_lora_weights)
        layers, pattern = self.layers_to_transform, self.layers_pattern
        listed = not isinstance(self.target_modules, str)
        alone = "None with a target_modules string"
        for ok, name, expected in (
            (self.bias == "none", "bias", "'none' (the base model's biases are shared)"),
            (not (self.use_dora and self.invocation), "use_dora", "false for an activated adapter"),
            (not (self.use_dora and self.lora_bias), "lora_bias", "false with use_dora"),
            (listed or not layers, "layers_to_transform", alone),
            (listed or not pattern, "layers_pattern", alone),
        ):
            require(ok, self.where, name, expected, repr(getattr(self, name)))
        holds = layers is not None or not pattern
        require(holds, self.where, "layers_to_transform", "indices, as layers_pattern is set", None)

    @property
    def invocation(self) -> tuple[int, ...]:
        """Token ids that start an activated adapter; empty for an ordinary adapter."""
        return tuple(self.alora_invocation_tokens or ())

    def check_vocabulary(self, where: str, size: int | None) -> None:
        """Raise ValueError if an invocation token is not in a vocabulary of ``size`` tokens.

        If ``size`` is None, the vocabulary is unknown and nothing is checked.
        """
        if self.invocation and size is not None:
            expected, most = f"token ids below the vocabulary size {size}", max(self.invocation)
            require(most < size, where, "alora_invocation_tokens", expected, most)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields in the format of PEFT's ``adapter_config.json``."""
        found: dict[str, Any] = {"peft_type": "LORA"}
        for each in fields(LoraConfig):
            value = getattr(self, each.name)
            if each.name not in _NOT_IN_FILES:
                found[each.name] = list(value) if isinstance(value, tuple) else value
        return found

    # ---------------------------------------------------------------------------------------------
    # Rules that select modules

    def head_of(self, output_head: str | None, classifier: str | None) -> str | None:
        """Return the name of the layer that "all-linear" excludes.

        This is the output head, or the classifier if the task is "SEQ_CLS" and there is no head.
        """
        return classifier if output_head is None and self.task_type == "SEQ_CLS" else output_head

    def targeted(self, names: Iterable[str], linear: Iterable[str]) -> set[str]:
        """Return the names of the modules that PEFT would adapt.

        Args:
            names: names of all modules that may be adapted.
            linear: names of the modules that "all-linear" selects.

        Raises:
            ValueError: If ``target_modules`` is None, or a pattern is not a regular expression.
        """
        wanted, names = self.target_modules, tuple(names)
        if wanted is None:
            expected = f"names, a regular expression or {ALL_LINEAR!r}"
            raise ValueError(f"{self.where}: target_modules: expected {expected}, found None")
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
        """Look up the rank and alpha of each module in the patterns, as PEFT does.

        Args:
            names: full names of the modules.

        Returns:
            ``(r, lora_alpha)`` by module name, and the keys of patterns that match no name.
        """
        names = tuple(sorted(names))
        ranks, unused_r = self._patterned("rank_pattern", self.rank_pattern, self.r, names)
        own = self.alpha_pattern, self.lora_alpha
        alphas, unused_a = self._patterned("alpha_pattern", *own, names)
        found = {name: (int(r), alpha) for name, r, alpha in zip(names, ranks, alphas, strict=True)}
        return found, unused_r + unused_a

    def _patterned(
        self, where: str, table: Mapping[str, float], default: float, names: tuple[str, ...]
    ) -> tuple[list[float], list[str]]:
        """Return the value of each name in ``table``, and the unused keys of the table.

        The value is that of the first key that matches the name or a suffix of the name; if no key
        matches, it is ``default``.
        """
        keys = tuple(table)
        rows = self._match(where, "match", r"(.*\.)?({})$", keys, names)
        by_key = list(zip(keys, rows, strict=True))
        values = []
        for column, name in enumerate(names):
            hit = next((k for k, row in by_key if row[column] is not None), name)
            values.append(table.get(hit, default))
        missed = [k for k, row in by_key if k not in names and all(m is None for m in row)]
        return values, [f"{where}[{key!r}]" for key in missed]

    def _full_matches(self, where: str, pattern: str, names: tuple[str, ...]) -> set[str]:
        (row,) = self._match(where, "fullmatch", "{}", (pattern,), names)
        return {name for name, m in zip(names, row, strict=True) if m is not None}

    def _in_layers(self, found: set[str]) -> set[str]:
        """Return the names with a block index in ``layers_to_transform``."""
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
    """Return whether ``patterns`` contains a module's name, or a suffix of it after a dot."""
    patterns = patterns if isinstance(patterns, frozenset) else frozenset(patterns)
    parts = name.split(".")
    return any(".".join(parts[i:]) in patterns for i in range(len(parts)))


def checked_names(where: str, argument: str, value: Any) -> str | tuple[str, ...] | None:
    """Return ``value`` as a str, a tuple of str or None; raise WrongKind for other values."""
    if value is None or isinstance(value, str):
        return value
    strings = isinstance(value, list | tuple | set) and all(isinstance(v, str) for v in value)
    expected = "a string or a list of strings"
    require(strings, where, argument, expected, f"{value!r:.200}", WrongKind)
    return tuple(sorted(value)) if isinstance(value, set) else tuple(value)


def _flag(where: str, name: str, value: Any) -> bool:
    return value is not None and flag(where, name, value, expected="true or false")


def _table(where: str, name: str, value: Any, check: Any, bounds: Any) -> dict[str, Any]:
    value = value or {}
    named = isinstance(value, Mapping) and all(isinstance(k, str) for k in value)
    expected = "an object that maps name patterns to numbers"
    require(named, where, name, expected, f"{value!r:.200}", WrongKind)
    return {k: check(where, f"{name}[{k!r:.100}]", v, **bounds) for k, v in value.items()}


def _layers(where: str, name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    values = tuple(value) if isinstance(value, list | tuple | set) else (value,)
    expected = "an integer or a list of integers"
    return tuple(integer(where, name, v, expected=expected) for v in values)
