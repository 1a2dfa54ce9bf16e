"""``adapter_config.json``: a :class:`lora_ext.nn.LoraConfig` out of an untrusted file, and whether
several of them name one base model."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from lora_ext._checks import WrongKind, integer, require
from lora_ext.layers import FREE, LoraConfig, checked_names, matches_suffix

from ._model_index import ModelIndex

#: Schemes of this package that PEFT does not know.
OWN_INITS = frozenset(FREE) - {"gaussian", "orthogonal"}
# Where a file keeps one of them. PEFT refuses an unknown init_lora_weights before it loads what was
# trained; of an unknown field it says that it is ignored.
_INIT_FIELD = "lora_ext_init"

# Read by nobody here: training only, or a record of where the adapter came from.
_IGNORED = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config inference_mode "
    "loftq_config lora_dropout lora_ga_config megatron_config megatron_core "
    "peft_type peft_version qalora_group_size revision runtime_config "
    f"velora_config {_INIT_FIELD}".split()
)
# Each changes what the adapter computes. A value that means "off" (None, False, empty) is fine.
_REFUSED = {
    "ensure_weight_tying": "it adapts the output head that shares the embedding's weight as well",
    "layer_replication": "it changes the base model's layers",
    "use_qalora": "QALoRA pools the input before lora_A",
    "use_bdlora": "BD-LoRA stores block-diagonal factors",
    "arrow_config": "Arrow routes between adapters per token",
    "kasa_config": "KaSA truncates the base weight and adds a diagonal between the factors",
    "monteclora_config": "MonteCLoRA samples its factors",
}
# What every PEFT knows, and what needs no data and no base weight to begin with.
_PLAIN_INITS = (True, False, "gaussian")
_INIT_SETTINGS = ("corda_config", "eva_config", "loftq_config", "lora_ga_config")
# Initialisations that subtract something from the base weight, which every other adapter shares.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The fields that decide which modules have which rank and scale.
_READ = frozenset(
    "r lora_alpha rank_pattern alpha_pattern use_rslora use_dora fan_in_fan_out bias lora_bias "
    "target_modules exclude_modules layers_to_transform layers_pattern task_type "
    "modules_to_save target_parameters alora_invocation_tokens trainable_token_indices".split()
)
_REFUSED_BESIDE = {
    "target_parameters": dict.fromkeys(
        "lora_dropout use_dora lora_bias fan_in_fan_out velora_config".split(),
        "adapters on experts have none, nor does PEFT have it",
    ),
    # What would reach the tokens before an activated adapter's start, whose keys others share.
    "alora_invocation_tokens": {
        "use_dora": "PEFT refuses it too",
        "modules_to_save": "a replaced module serves every token",
        "trainable_token_indices": "rows of the embedding serve every token",
        "target_parameters": "adapters on experts have no rows of single tokens",
    },
}
_TRAINED_BIASES = ("all", "lora_only")

# The Hub's cache, whose last component is a revision: models--org--name/snapshots/<revision>.
_CACHED = re.compile(r"models--(?:.+--)?(.+)")
# Another storage of the same weights, on which adapters are often trained.
_STORED = re.compile(r"[-_.](unsloth[-_.])?(bnb[-_.][48]bit|awq|gptq|fp8)$")

Value = TypeVar("Value", int, float)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(LoraConfig):
    """The parsed config. ``where`` names the file in errors."""

    target_modules: str | Iterable[str] | None = None
    modules_to_save: str | Iterable[str] | None = None  # whole modules, in place of the base's
    target_parameters: Iterable[str] | None = None  # of routed experts, by the ends of their names
    # Rows of the input embedding in place of the base's: tokens, or by the end of its name.
    trainable_token_indices: Iterable[int] | Mapping[str, Iterable[int]] | None = None
    base_bias: str = "none"  # which biases of the base model were trained: "all", "lora_only"
    unknown: tuple[str, ...] = ()  # fields we have never heard of that are switched on
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False)  # all fields, as read

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
        """Check every field of a JSON object or a ``peft.LoraConfig``; ``where`` opens what errors
        say. What is not supported here is a NotImplementedError."""
        if hasattr(raw, "to_dict"):
            raw = raw.to_dict()
        if not isinstance(raw, Mapping):
            raise ValueError(f"{where}: expected a JSON object, found {type(raw).__name__}")
        kind = getattr(raw.get("peft_type"), "value", raw.get("peft_type"))
        require(kind == "LORA", where, "peft_type", "'LORA'", f"{kind!r:.200}")
        for name, reason in _refusals(raw):
            raise NotImplementedError(f"{where}: {name} is not supported{reason}")
        init = raw.get("init_lora_weights")
        if isinstance(init, str) and init.lower() in OWN_INITS:
            raw = {**raw, "init_lora_weights": True, _INIT_FIELD: init.lower()}
        known = _READ | _IGNORED | _REFUSED.keys() | {"init_lora_weights"}
        unknown = tuple(str(key) for key in raw if key not in known and raw[key])
        read = {key: raw[key] for key in _READ & raw.keys()}
        if read.get("bias") in _TRAINED_BIASES:
            read["base_bias"] = read.pop("bias")
        return cls(where=where, unknown=unknown, raw=dict(raw), **read)

    @property
    def base_model(self) -> Any:
        """``base_model_name_or_path`` as it was read: a record that nobody has checked."""
        return self.raw.get("base_model_name_or_path")

    def saves_whole(self, weight: str) -> bool:
        """Whether this weight of the base model lies in a module of ``modules_to_save``.

        PEFT's rule: the end of a module's name, whether or not a dot comes before it.
        """
        ends = tuple(self.modules_to_save or ())
        return any(owner.endswith(ends) for owner in _owners(weight)) if ends else False

    def to_dict(self) -> dict[str, Any]:
        """PEFT's fields: those that are parsed, and the others as they were read.

        How the factors began no longer matters: an initialisation that not every PEFT knows, or
        that wants data, becomes True.
        """
        parsed = {key: value for key, value in super().to_dict().items() if key in _READ}
        saved = self.modules_to_save
        if self.alora_invocation_tokens is None and "alora_invocation_tokens" not in self.raw:
            del parsed["alora_invocation_tokens"]  # which not every PEFT knows
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
        """This configuration for other modules, each named in full, with these ranks and scales.

        Args:
            ranks: by name; all the modules that are to be adapted.
            scalings: likewise. :meth:`ranks_and_scales` gives them back, save for the last bit of
                one that no alpha gives exactly.
            others: modules of the model, as far as they are known, that must not be adapted though
                their names may end like those of ``ranks``.
            changes: of other fields. ``use_rslora`` is obeyed.
        """
        names = tuple(sorted(ranks))
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
        """The modules and expert parameters that PEFT would adapt, or None: the config leaves it to
        the tensors."""
        parameters = self.targeted_parameters(index) & index.experts.keys()
        if self.target_modules is None:
            return parameters or None
        head = self.head_of(index.output_head, index.classifier)
        found = self.targeted(
            (*index.modules, *index.unsupported), (name for name in index.linear if name != head)
        )
        saved = tuple(self.modules_to_save or ())
        if saved:  # PEFT's other rule: it puts no factors on what it saves whole
            found = {
                name
                for name in found
                if not any(matches_suffix(owner, saved) for owner in (*_owners(name), name))
            }
        for name in sorted(found & index.unsupported.keys()):
            other = f"{name!r}, a {index.unsupported[name]}"
            raise NotImplementedError(
                f"{self.where}: target_modules: expected Linear, Conv1D and plain Embedding "
                f"modules alone, found {other}"
            )
        return found | parameters

    def targeted_parameters(self, index: ModelIndex) -> set[str]:
        """The expert parameters that PEFT would adapt, in full; an entry that means none is
        refused."""
        wanted = tuple(self.target_parameters or ())
        known = [name for names in index.parameters.values() for name in names]
        other = [each for each in wanted if not any(matches_suffix(n, (each,)) for n in known)]
        expected = f"matrices of routed experts alone, as {known[:2] or 'this model has none'}"
        found = f"{other!r:.200}"
        require(not other, self.where, "target_parameters", expected, found, NotImplementedError)
        return {name for name in known if matches_suffix(name, wanted)}

    def ranks_and_scales(
        self, names: Iterable[str]
    ) -> tuple[dict[str, tuple[int, float]], list[str]]:
        """Per module, rank and scale; and the pattern keys that match none of the modules."""
        found, unused = self.ranks_and_alphas(names)
        root = math.sqrt if self.use_rslora else float
        return {name: (r, alpha / root(r)) for name, (r, alpha) in found.items()}, unused


def _refusals(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each field that PEFT knows and this package does not support, and the reason."""
    for name, reason in _REFUSED.items():
        if raw.get(name):
            yield name, f": {reason}"
    for other, table in _REFUSED_BESIDE.items():
        for name, reason in table.items() if raw.get(other) else ():
            if raw.get(name):
                value = f"={raw[name]!r:.40}" if other == "target_parameters" else ""
                yield f"{name}{value}", f" beside {other}: {reason}"
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        remedy = "save it with PEFT's path_initial_model_for_weight_conversion instead"
        yield f"init_lora_weights={init[:40]!r}", f": it changes the base weight; {remedy}"


def _token_rows(where: str, argument: str, given: Any) -> Any:
    """Return ``trainable_token_indices``, by name if they are, as tuples of different tokens."""
    if not given:
        return None
    if isinstance(given, Mapping):
        named = all(isinstance(name, str) and name for name in given)
        require(named, where, argument, "names with lists of tokens", f"{given!r:.200}")
        found = {name: _token_rows(where, argument, rows) for name, rows in given.items() if rows}
        return found or None
    listed = isinstance(given, list | tuple)
    require(listed, where, argument, "a list of tokens", f"{given!r:.200}", WrongKind)
    tokens = tuple(integer(where, argument, token, 0) for token in given)
    require(len(set(tokens)) == len(tokens), where, argument, "each token once", f"{given!r:.200}")
    return tokens


def _owners(name: str) -> list[str]:
    """The modules around: ``a`` and ``a.b`` of ``a.b.weight``."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def alpha_of(scaling: float, rank: int, rslora: bool) -> float:
    """The ``lora_alpha`` whose scale is ``scaling``, or its neighbour where none has it exactly."""
    root = math.sqrt(rank) if rslora else rank
    alpha = scaling * root
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    alpha = next((each for each in near if each / root == scaling), alpha)
    return int(alpha) if alpha.is_integer() else alpha


def patterns(values: Mapping[str, Value]) -> tuple[Value, dict[str, Value]]:
    """The most frequent value, and PEFT's pattern for each name that has another."""
    common = Counter(values.values()).most_common(1)[0][0]

    def pattern(name: str) -> str:
        # PEFT matches a pattern with the end of a name.
        ends = any(other.endswith(f".{name}") for other in values)
        return f"^{re.escape(name)}" if ends else name

    return common, {pattern(name): v for name, v in values.items() if v != common}


def longer_than(names: Iterable[str]) -> str:
    """A regular expression for every longer name that ends with one of ``names`` and is none."""
    names = sorted(names)
    first = "|".join(sorted({re.escape(name.partition(".")[0]) for name in names}))
    longer = rf".+\.(?:{first})(?:\..*)?"
    own = "|".join(re.escape(name) for name in names if re.fullmatch(longer, name))
    return rf"(?!(?:{own})$){longer}" if own else longer


# -------------------------------------------------------------------------------------------------
# Base models, as far as names tell


class BaseModels:
    """The base models of adapters that come together, by ``base_model_name_or_path``.

    The first name is what the others are compared with; a name that is unknown says nothing.
    """

    def __init__(self, expected: Any = None):
        self._first: str | None = None
        self._met: set[str | None] = set()
        self.meet("", expected, 1)

    def meet(self, where: str, name: Any, stacklevel: int) -> None:
        """Warn if ``name`` is another model than the first, once for each; ``stacklevel`` is that
        of the caller of this function."""
        short = _short(name)
        if short is None or short in self._met:
            return
        self._met.add(short)
        if self._first is None:
            self._first = name
            return
        gone = next(filter(_is_gone, (name, self._first)), None)
        meaning = "the results mean nothing unless both are names of one model"
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
    """What PEFT would write into ``base_model_name_or_path``; None where the model has no name."""
    return getattr(model, "name_or_path", None)


def _is_gone(name: str) -> bool:
    """Return whether a name is the absolute path of a folder that does not exist.

    A path in the Hub's cache contains the name of its model, so it does not count.
    """
    cached = any(_CACHED.fullmatch(part) for part in re.split(r"[/\\]", name))
    return os.path.isabs(name) and not cached and not os.path.isdir(name)


def _short(name: Any) -> str | None:
    """What a folder and a name on the Hub share: the last component; None where that is nothing."""
    parts = re.split(r"[/\\]", name) if isinstance(name, str) else []
    parts = [part for part in parts if part not in ("", ".", "..")]
    if not parts:
        return None
    cached = next((found for part in parts if (found := _CACHED.fullmatch(part))), None)
    return _STORED.sub("", (cached[1] if cached else parts[-1]).casefold())
