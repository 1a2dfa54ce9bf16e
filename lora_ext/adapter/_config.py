"""Parsing of untrusted ``adapter_config.json`` files, and a check that several files name the same
base model."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from lora_ext._checks import WrongKind, integer, number, require
from lora_ext.kinds import Kind, kind_of, refusal, variants
from lora_ext.layers import FREE, LoraConfig, checked_names, matches_suffix

from ._model_index import ModelIndex

#: Initialisations of this package that PEFT does not support.
OWN_INITS = frozenset(FREE) - {"gaussian", "orthogonal"}
# Field that stores one of OWN_INITS in a file. An unknown value of init_lora_weights makes PEFT
# raise before it loads the tensors, whereas an unknown field only makes it warn.
_INIT_FIELD = "lora_ext_init"

# Fields that every kind of adapter has and that are kept in `raw` but not parsed. Except for
# peft_type, which is checked, they record the adapter's origin.
_IGNORED = frozenset(
    "auto_mapping base_model_name_or_path inference_mode peft_type peft_version revision "
    "runtime_config".split()
)
# Values of init_lora_weights that every version of PEFT accepts and that need neither data nor the
# base weight.
_PLAIN_INITS = (True, False, "gaussian")
_INIT_SETTINGS = ("corda_config", "eva_config", "loftq_config", "lora_ga_config")
# Initialisations that subtract the new adapter from the base weight, which all adapters share.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields that every kind of adapter has and that are parsed. They select the adapted modules.
_OF_MODULES = frozenset(
    "target_modules exclude_modules layers_to_transform layers_pattern task_type bias "
    "modules_to_save".split()
)
# Fields of LoRA that are parsed; `to_dict` returns the parsed values.
_READ = (
    _OF_MODULES
    | frozenset(
        "fan_in_fan_out target_parameters alora_invocation_tokens trainable_token_indices".split()
    )
    | kind_of("LORA").fields.union(*(kind.fields for kind in variants("LORA")))
)
_VARIANTS = [kind.when for kind in variants("LORA")]
_REFUSED_BESIDE = {
    "target_parameters": dict.fromkeys(
        ("lora_dropout", *_VARIANTS, "lora_bias", "fan_in_fan_out", "velora_config"),
        "neither PEFT nor this package supports it on experts",
    ),
    # These features would also change tokens before the invocation. Other rows share the keys and
    # values of these tokens.
    "alora_invocation_tokens": {
        **dict.fromkeys(_VARIANTS, "PEFT refuses it too"),
        "modules_to_save": "a replaced module processes every token",
        "trainable_token_indices": "replaced rows of the embedding apply to every token",
        "target_parameters": "adapters on experts cannot be applied to a part of the tokens",
    },
}
_TRAINED_BIASES = ("all", "lora_only")

# Folder of a model in the Hub's cache: models--org--name/snapshots/<revision>.
_CACHED = re.compile(r"models--(?:.+--)?(.+)")
# Suffix in the name of a quantised copy of a model. Adapters are often trained on such a copy.
_STORED = re.compile(r"[-_.](unsloth[-_.])?(bnb[-_.][48]bit|awq|gptq|fp8)$")

Value = TypeVar("Value", int, float)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(LoraConfig):
    """A parsed ``adapter_config.json``. ``where`` is the name of the file in error messages."""

    target_modules: str | Iterable[str] | None = None
    modules_to_save: str | Iterable[str] | None = None  # modules that are replaced as a whole
    target_parameters: Iterable[str] | None = None  # suffixes of names of routed experts
    # Ids of tokens that get new rows in the input embedding, or lists of ids by embedding name.
    trainable_token_indices: Iterable[int] | Mapping[str, Iterable[int]] | None = None
    base_bias: str = "none"  # trained biases of the base model: "none", "all" or "lora_only"
    unknown: tuple[str, ...] = ()  # names of unknown fields, except those with false values
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)  # all fields as read

    def __post_init__(self) -> None:
        super().__post_init__()
        names = checked_names(self.where, "modules_to_save", self.modules_to_save)
        names = (names,) if isinstance(names, str) else names
        object.__setattr__(self, "modules_to_save", names or None)
        names = checked_names(self.where, "target_parameters", self.target_parameters)
        listed = not isinstance(names, str)
        require(listed, self.where, "target_parameters", "a list of strings", f"{names!r:.200}")
        object.__setattr__(self, "target_parameters", tuple(sorted(names or ())))
        field = "trainable_token_indices"
        object.__setattr__(self, field, _token_rows(self.where, field, getattr(self, field)))

    @classmethod
    def parse(cls, raw: Any, where: str) -> AdapterConfig:
        """Create a configuration from a JSON object or a ``peft.LoraConfig``; check every field.

        ``where`` is the prefix of error messages. NotImplementedError is raised for a feature of
        PEFT that is not supported here.
        """
        if hasattr(raw, "to_dict"):
            raw = raw.to_dict()
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where}: expected a JSON object, found {type(raw).__name__}")
        name: Any = getattr(raw.get("peft_type"), "value", raw.get("peft_type"))
        named = isinstance(name, str) and name
        require(named, where, "peft_type", "a kind of adapter, such as 'LORA'", f"{name!r:.200}")
        try:
            kind = kind_of(name, raw)
        except NotImplementedError:
            found = f"{name!r:.200}: {refusal(name)}"
            raise NotImplementedError(
                f"{where}: peft_type is not supported, found {found}"
            ) from None
        for name, reason in _refusals(kind, raw):
            raise NotImplementedError(f"{where}: {name} is not supported{reason}")
        lora, init = kind.name == "LORA", raw.get("init_lora_weights")
        if lora and isinstance(init, str) and init.lower() in OWN_INITS:
            raw = {**raw, "init_lora_weights": True, _INIT_FIELD: init.lower()}
        fields = _READ if lora else _OF_MODULES  # the remaining fields are only kept in `raw`
        read = {key: raw[key] for key in fields & raw.keys()}
        if lora and read.get("bias") in _TRAINED_BIASES:
            read["base_bias"] = read.pop("bias")
        known = {*fields, *_IGNORED, *kind.fields, *kind.ignores, *kind.refuses}
        unknown = tuple(str(key) for key in raw if key not in known and raw[key])
        config = cls(where=where, unknown=unknown, raw=dict(raw), **read)
        config.of_modules(())  # checks the fields
        return config

    @property
    def peft_type(self) -> str:
        """PEFT's name of the adapter's kind, such as "LORA"."""
        name = self.raw.get("peft_type", "LORA")
        return getattr(name, "value", name)

    @cached_property
    def kind(self) -> Kind:
        """Kind of the adapter."""
        return kind_of(self.peft_type, self._fields)

    @cached_property
    def _fields(self) -> dict[str, Any]:
        return self.to_dict()

    def of_modules(self, names: Iterable[str]) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
        """Return the configuration of each module, in which values of matching patterns replace the
        defaults, and the keys of patterns that match no module."""
        names, fields, unused = tuple(sorted(names)), self._fields, []
        own: dict[str, dict[str, Any]] = {name: {} for name in names}
        for pattern, key in self.kind.patterns.items():
            table: Any = fields.get(pattern) or {}
            fits = isinstance(table, Mapping) and all(isinstance(each, str) for each in table)
            require(fits, self.where, pattern, "an object", f"{table!r:.200}")
            values, missed = self._patterned(pattern, table, fields.get(key, 0), names)
            for name, value in zip(names, values, strict=True):
                own[name][key] = value
            unused += missed
        for each in own.values() if own else [{}]:
            for key in self.kind.counts:
                integer(self.where, key, each.get(key, fields.get(key)), 1)
            for key in self.kind.numbers:
                number(self.where, key, each.get(key, fields.get(key)))
        return {name: ChainMap(each, fields) for name, each in own.items()}, unused

    @property
    def base_model(self) -> Any:
        """Value of ``base_model_name_or_path``, unchecked."""
        return self.raw.get("base_model_name_or_path")

    def saves_whole(self, weight: str) -> bool:
        """Return whether a weight of the base model belongs to a module of ``modules_to_save``.

        As in PEFT, an entry matches the end of a module's name: ``head`` matches ``lm_head``.
        """
        ends = tuple(self.modules_to_save or ())
        return any(owner.endswith(ends) for owner in _owners(weight)) if ends else False

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by PEFT's names: the parsed values, and the other fields as read.

        For ``init_lora_weights``, True replaces a value that needs data or that some versions of
        PEFT do not support; this has no effect on factors that are loaded. The fields of kinds
        other than LoRA are returned as read.
        """
        if self.peft_type != "LORA":
            return {**self.raw, "peft_type": self.peft_type}
        parsed = {key: value for key, value in super().to_dict().items() if key in _READ}
        saved = self.modules_to_save
        if self.alora_invocation_tokens is None and "alora_invocation_tokens" not in self.raw:
            del parsed["alora_invocation_tokens"]  # older versions of PEFT do not have this field
        parsed |= {"bias": self.base_bias, "modules_to_save": saved and list(saved)}
        raw = dict(self.raw)
        if raw.get("init_lora_weights", True) not in _PLAIN_INITS:
            raw = {key: value for key, value in raw.items() if key not in _INIT_SETTINGS}
            raw["init_lora_weights"] = True
        return {**raw, "peft_type": "LORA", **parsed}

    def fitted(
        self,
        ranks: Mapping[str, int],
        scalings: Mapping[str, float],
        others: Iterable[str] = (),
        **changes: Any,
    ) -> AdapterConfig:
        """Return a copy of this configuration with other modules, ranks and scales.

        Args:
            ranks: ranks by full name of a module. Exactly these modules are adapted.
            scalings: scales by full name of a module. The :meth:`ranks_and_scales` of the copy
                returns them; a scale that no alpha gives exactly differs in the last bit.
            others: names of modules in the model that must not be adapted, even if they end with a
                name in ``ranks``.
            changes: new values of other fields, including ``use_rslora``.
        """
        names = tuple(sorted(ranks))
        if self.peft_type != "LORA":  # factors of other kinds are saved as a LoRA adapter
            kept = ("base_model_name_or_path", "task_type", "fan_in_fan_out", "modules_to_save")
            raw = {key: self.raw[key] for key in kept if key in self.raw}
            self = AdapterConfig.parse({"peft_type": "LORA", **raw}, self.where)
        rslora = changes.setdefault("use_rslora", self.use_rslora)
        alphas = {name: alpha_of(scalings[name], ranks[name], rslora) for name in names}
        if names:
            changes["r"], changes["rank_pattern"] = patterns(ranks)
            changes["lora_alpha"], changes["alpha_pattern"] = patterns(alphas)
        changes |= {"target_modules": names, "layers_to_transform": None, "layers_pattern": None}
        config = dataclasses.replace(self, **changes)
        if config.targeted({*names, *others}, ()) != set(names):
            config = dataclasses.replace(config, exclude_modules=longer_than(names))
        return config

    def targets(self, index: ModelIndex) -> set[str] | None:
        """Return the names of the modules and expert parameters that PEFT would adapt, or None if
        the configuration does not specify them."""
        parameters = self.targeted_parameters(index) & index.experts.keys()
        if self.target_modules is None:
            return parameters or None
        head = self.head_of(index.output_head, index.classifier)
        found = self.targeted(
            (*index.modules, *index.unsupported), (name for name in index.linear if name != head)
        )
        saved = tuple(self.modules_to_save or ())
        if saved:
            # PEFT does not adapt a module in modules_to_save. Unlike in `saves_whole`, entries
            # match whole parts of names here: ``head`` does not match ``lm_head``.
            found = {
                name
                for name in found
                if not any(matches_suffix(owner, saved) for owner in (*_owners(name), name))
            }
        for name in sorted(found & index.unsupported.keys()):
            other = f"{name!r}, a {index.unsupported[name]}"
            raise NotImplementedError(
                f"{self.where}: target_modules: expected only Linear, Conv1D and plain Embedding "
                f"modules, found {other}"
            )
        return found | parameters

    def targeted_parameters(self, index: ModelIndex) -> set[str]:
        """Return the full names of the expert parameters that PEFT would adapt; raise if an entry
        of ``target_parameters`` matches no parameter."""
        wanted = tuple(self.target_parameters or ())
        known = [name for names in index.parameters.values() for name in names]
        other = [each for each in wanted if not any(matches_suffix(n, (each,)) for n in known)]
        expected = f"names of matrices of routed experts (the model has {known[:2] or 'none'})"
        found = f"{other!r:.200}"
        require(not other, self.where, "target_parameters", expected, found, NotImplementedError)
        return {name for name in known if matches_suffix(name, wanted)}

    def ranks_and_scales(
        self, names: Iterable[str]
    ) -> tuple[dict[str, tuple[int, float]], list[str]]:
        """Return the rank and scale of each LoRA module, and the keys of ``rank_pattern`` and
        ``alpha_pattern`` that match no module."""
        found, unused = self.ranks_and_alphas(names)
        root = math.sqrt if self.use_rslora else float
        return {name: (r, alpha / root(r)) for name, (r, alpha) in found.items()}, unused


def _refusals(kind: Kind, raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each field in ``raw`` that this package does not support, with the reason."""
    for name, reason in kind.refused(raw).items():
        yield name, f": {reason}"
    for name in kind.saves:
        if not raw.get(name, True):
            remedy = f"load it in PEFT and save it with {name}=True, or use PEFT's save_as_lora"
            yield f"{name}=False", f": the file has only the seed of its random tensors; {remedy}"
    for other, table in _REFUSED_BESIDE.items():
        for name, reason in table.items() if raw.get(other) else ():
            if raw.get(name):
                value = f"={raw[name]!r:.40}" if other == "target_parameters" else ""
                yield f"{name}{value}", f" together with {other}: {reason}"
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        remedy = "save it with PEFT's path_initial_model_for_weight_conversion instead"
        yield f"init_lora_weights={init[:40]!r}", f": it changes the base weight; {remedy}"


def _token_rows(where: str, argument: str, given: Any) -> Any:
    """Return ``trainable_token_indices`` as a tuple of tokens, or as a dict of such tuples by name;
    raise if a token is repeated."""
    if not given:
        return None
    if isinstance(given, Mapping):
        named = all(isinstance(name, str) and name for name in given)
        require(named, where, argument, "lists of tokens by embedding name", f"{given!r:.200}")
        found = {name: _token_rows(where, argument, rows) for name, rows in given.items() if rows}
        return found or None
    listed = isinstance(given, list | tuple)
    require(listed, where, argument, "a list of tokens", f"{given!r:.200}", WrongKind)
    tokens = tuple(integer(where, argument, token, 0) for token in given)
    require(len(set(tokens)) == len(tokens), where, argument, "distinct tokens", f"{given!r:.200}")
    return tokens


def _owners(name: str) -> list[str]:
    """Return the names of the enclosing modules: ``a`` and ``a.b`` for ``a.b.weight``."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def alpha_of(scaling: float, rank: int, rslora: bool) -> float:
    """Return the ``lora_alpha`` that results in ``scaling`` or, if no float does, in the nearest
    scale."""
    root = math.sqrt(rank) if rslora else rank
    alpha = scaling * root
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    alpha = next((each for each in near if each / root == scaling), alpha)
    return int(alpha) if alpha.is_integer() else alpha


def patterns(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """Split values, given by module name, into PEFT's default value and its pattern field, such as
    ``rank_pattern``.

    Returns:
        the most frequent value, and a dict from patterns of module names to the other values.
    """
    common = Counter(values.values()).most_common(1)[0][0]

    def pattern(name: str) -> str:
        # PEFT also applies a pattern that does not begin with "^" to names that end with it.
        ends = any(other.endswith(f".{name}") for other in values)
        return f"^{re.escape(name)}" if ends else name

    return common, {pattern(name): v for name, v in values.items() if v != common}


def longer_than(names: Iterable[str]) -> str:
    """Return a regular expression for PEFT's ``exclude_modules``. It matches every longer name that
    ends with one of ``names``, and possibly other names, but none of ``names``."""
    names = sorted(names)
    first = "|".join(sorted({re.escape(name.partition(".")[0]) for name in names}))
    longer = rf".+\.(?:{first})(?:\..*)?"
    own = "|".join(re.escape(name) for name in names if re.fullmatch(longer, name))
    return rf"(?!(?:{own})$){longer}" if own else longer


# -------------------------------------------------------------------------------------------------
# Comparison of base models by name.


class BaseModels:
    """Comparison of the base models of adapters, by ``base_model_name_or_path``.

    Every name is compared with the first one. Adapters without a name are not compared.
    """

    def __init__(self, expected: Any = None):
        self._first: str | None = None
        self._met: set[str | None] = set()
        self.meet("", expected, 1)

    def meet(self, where: str, name: Any, stacklevel: int) -> None:
        """Warn if ``name`` differs from the first name, once for each different name.

        ``where`` is the prefix of the warning. ``stacklevel`` is counted from the caller of this
        method.
        """
        short = _short(name)
        if short is None or short in self._met:
            return
        self._met.add(short)
        if self._first is None:
            self._first = name
            return
        gone = next(filter(_is_gone, (name, self._first)), None)
        meaning = "the results are meaningless unless both are names of the same model"
        if gone is not None:
            meaning = (
                f"there is no folder {gone!r:.200} here; if it was moved or copied to the other "
                "path, ignore this warning; otherwise the adapters belong to two base models"
            )
        warnings.warn(
            f"{where}: expected adapters of one base model, found base_model_name_or_path "
            f"{self._first!r:.200} and {name!r:.200}: {meaning}",
            stacklevel=stacklevel + 1,
        )


def model_name(model: Any) -> Any:
    """Return the name that PEFT stores as ``base_model_name_or_path``; None without a name."""
    return getattr(model, "name_or_path", None)


def _is_gone(name: str) -> bool:
    """Return whether a name is the absolute path of a folder that does not exist.

    The result is False for a path inside the Hub's cache, since it contains the model's name.
    """
    cached = any(_CACHED.fullmatch(part) for part in re.split(r"[/\\]", name))
    return os.path.isabs(name) and not cached and not os.path.isdir(name)


def _short(name: Any) -> str | None:
    """Return the last component of a path or Hub name in lower case, without the suffix of a
    quantised copy; None if there is no name."""
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else []
    parts = [part for part in parts if part not in ("", ".", "..")]
    if not parts:
        return None
    cached = next((found for part in parts if (found := _CACHED.fullmatch(part))), None)
    return _STORED.sub("", (cached[1] if cached else parts[-1]).casefold())
