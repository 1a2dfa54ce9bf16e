"""Functions that read PEFT's adapter files, one module at a time, and write them.

Shape letters: r rank, I inputs and O outputs of a module.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext._files import read_json, write_files
from lora_ext.kinds import Factors, variants

from ._config import AdapterConfig
from ._model_index import (
    ROUTED,
    LinearSpec,
    ModelIndex,
    check_header,
    in_routed_experts,
    unknown_spec,
)
from ._peft_tensors import (
    PREFIX,
    StateDict,
    TensorSource,
    adapter_directory,
    base_name,
    open_tensors,
    parse_key,
    wrapped_names,
)
from ._replaced import Replaced, find_replaced, find_rows

# Path of a directory, or (config, state dict).
AdapterSource = str | os.PathLike[str] | tuple[Any, Mapping[str, Tensor]]

CONFIG = "adapter config"  # prefix of error messages about a config that is not in a file
_SHARED = "base_model."  # prefix of tensors that all modules share
_MAX_JSON_BYTES = 4 << 20


@dataclass(frozen=True)
class CheckedAdapter:
    """Adapter whose names, shapes and dtypes fit the base model; no factor has been read yet."""

    config: AdapterConfig
    leftover: tuple[str, ...]  # unused keys, fields and patterns; empty if strict
    tensors: TensorSource  # the open file or state dict
    index: ModelIndex  # modules of the base model
    specs: dict[str, LinearSpec]  # adapted modules
    keys: dict[str, dict[str, str]]  # adapted module -> stem, such as lora_A.weight -> key
    shared: dict[str, str]  # stem of a tensor that all modules share -> key
    fields: dict[str, Mapping[str, Any]]  # adapted module -> its configuration
    whole: dict[str, dict[str, str]]  # replaced module -> "weight" or "bias" -> key
    rows: dict[str, str]  # module with some replaced rows -> key
    tokens: tuple[int, ...]  # indices of the replaced rows

    def modules(self) -> Iterator[tuple[LinearSpec, Factors]]:
        """Yield each adapted module with its factors, reading one module at a time.

        Raises:
            NotImplementedError: If a module that is never called has a nonzero B.
        """
        for spec, factors in self.factors(self.tensors.read):
            reader = self.index.bypassed.get(spec.name)
            if reader is not None and factors.b.any():
                where = self.where_is(spec.name, "b")
                raise NotImplementedError(
                    f"{where}: expected zeros, found a value of {factors.b.abs().max().item():.6g}"
                    f", which would have no effect: {reader} reads the weight of this module and "
                    "never calls it"
                )
            yield spec, factors

    def factors(self, read: Callable[[str], Tensor]) -> Iterator[tuple[LinearSpec, Factors]]:
        """Yield each adapted module with its factors. ``read`` returns the tensor of a key."""
        shared = {stem: read(key) for stem, key in self.shared.items()}
        for module, keys in self.keys.items():
            spec, where = self.specs[module], f"{self.tensors.where}: {module}"
            parts = shared | {stem: read(key) for stem, key in keys.items()}
            try:
                factors = self.config.kind.read(parts, self.fields[module], spec)
            except KeyError as error:
                missing = error.args[0]
                raise ValueError(f"{where}: {missing}: expected a tensor, found none") from None
            except NotImplementedError:
                raise
            except (IndexError, TypeError, RuntimeError) as error:  # raised by torch
                expected = f"expected fields and tensors of one {self.config.kind.title} adapter"
                raise ValueError(f"{where}: {expected}; torch raised {error!r}") from error
            if self.config.peft_type != "LORA":
                a, b = tuple(factors.a.shape), tuple(factors.b.shape)
                fits = len(a) == len(b) == 2 and a[0] == b[1]
                fits = fits and spec.in_features == a[1] and spec.out_features == b[0]
                expected = f"factors of {spec.in_features} inputs and {spec.out_features} outputs"
                require(fits, where, "shapes", expected, f"A {a} and B {b}")
            yield spec, factors

    def replaced(self) -> Iterator[tuple[LinearSpec, Replaced]]:
        """Yield each replaced module with its tensors, reading one module at a time."""
        for module, keys in self.whole.items():
            whole = {role: self.tensors.read(key) for role, key in keys.items()}
            yield self.index.modules[module], Replaced(**whole)
        for module, key in self.rows.items():
            rows = Replaced(self.tensors.read(key), rows=torch.tensor(self.tokens))
            yield self.index.modules[module], rows

    def where_is(self, module: str, part: str) -> str:
        """Return a text for error messages: the file, and the key of a module's factor ``part``.

        For kinds other than LoRA, whose factors have no key, module and part replace the key.
        """
        stem = self.config.kind.stems(self.index.specs[module].embedding).get(part, "")
        return f"{self.tensors.where}: {self.keys[module].get(stem, f'{module}: {part}')}"


@contextlib.contextmanager
def read_adapter(
    source: AdapterSource, index: ModelIndex, max_rank: int, strict: bool
) -> Iterator[CheckedAdapter]:
    """Open and check an untrusted adapter. The file is closed at the end of the ``with`` block.

    Args:
        source: path of a directory with ``adapter_config.json`` and ``adapter_model.safetensors``
            (or ``.bin``), or ``(config, state_dict)`` with a dict or a ``peft.LoraConfig``.
        index: modules of the base model.
        max_rank: largest rank that is accepted.
        strict: whether to raise for unused keys, config fields and patterns. If False, they are
            listed in ``leftover``.

    Raises:
        ValueError: If the adapter is invalid. The message names the file and the key.
        NotImplementedError: If the adapter uses an unsupported feature of PEFT, such as
            convolutions.
    """
    with open_adapter(source) as (config, tensors):
        yield check_adapter(config, tensors, index, max_rank, strict)


@contextlib.contextmanager
def open_adapter(source: AdapterSource) -> Iterator[tuple[AdapterConfig, TensorSource]]:
    """Open an adapter for a ``with`` block, and yield its config and the source of its tensors.

    Tensors of a safetensors file are read only when requested; a ``.bin`` file is read at once.
    Error messages name the file, or the config or state dict that was passed.
    """
    if isinstance(source, tuple):
        raw, state = source
        config = raw if isinstance(raw, AdapterConfig) else AdapterConfig.parse(raw, CONFIG)
        tensors: TensorSource = StateDict(state, "state dict")
    else:
        directory = adapter_directory(source)
        path = directory / "adapter_config.json"
        config = AdapterConfig.parse(read_json(path, _MAX_JSON_BYTES), str(path))
        tensors = open_tensors(directory)
    try:
        yield config, tensors
    finally:
        tensors.close()


def check_adapter(
    config: AdapterConfig, tensors: TensorSource, index: ModelIndex, max_rank: int, strict: bool
) -> CheckedAdapter:
    """Check an opened adapter. See :func:`read_adapter` for arguments and errors."""
    where = tensors.where
    field = config.where
    if index.shared:
        expected = "'none' (the base model's biases are shared)"
        require(config.base_bias == "none", field, "bias", expected, repr(config.base_bias))
    for name in () if index.shared else ("target_parameters", "trainable_token_indices"):
        if getattr(config, name):
            raise NotImplementedError(
                f"{field}: {name} is not supported in a LoraAdapter: AdapterPool serves such "
                "adapters, and from_peft trains them"
            )
    experts = wrapped_names(index.parameters, config.targeted_parameters(index))
    grouped, base, leftover = _group_keys(config, tensors, index, experts)
    shared = grouped.pop("", {})
    rows, tokens = find_rows(config, tensors, index, grouped)
    leftover = [key for key in leftover if key not in rows.values()]
    saved: dict[str, str] = {}
    if index.shared:
        other = {key: base_name(key) for key in (*base, *leftover)}
        saved = {key: name for key, name in other.items() if config.saves_whole(name)}
        base = {key: name for key, name in base.items() if key not in saved}
        leftover = [key for key in leftover if key not in saved]
    _check_targets(config, where, index, grouped)
    require(grouped, where, "keys", "LoRA factors of the base model", _some(leftover) or "none")
    fields, unused = config.of_modules(grouped)
    leftover += [*(f"config field {name}" for name in config.unknown), *unused]
    expected = f"expected only tensors and fields that the base model and {field} use"
    if strict and leftover:
        found = f"{_some(leftover)} (strict=False loads the rest)"
        raise ValueError(f"{where}: {expected}, found {found}")
    specs = {module: index.specs[module] for module in grouped}
    if config.kind.shared and index.shared:
        order = tuple(name for name in index.specs if name in grouped)
        specs = {module: replace(spec, order=order) for module, spec in specs.items()}
    for module, keys in grouped.items():  # check all headers before reading any tensor
        _check_headers(tensors, shared | keys, fields[module], specs[module], index, config)
    whole = find_replaced(config, tensors, index, saved, grouped) if index.shared else {}
    for key, name in base.items():  # check all headers before reading any tensor
        index.weights.check_header(tensors, key, name)
    found = (tensors, index, specs, grouped, shared, fields, whole, rows, tokens)
    checked = CheckedAdapter(config, tuple(leftover), *found)

    def without_values(key: str) -> Tensor:
        info: Any = tensors.infos[key]
        known = isinstance(info.dtype, torch.dtype)
        require(known, f"{where}: {key}", "dtype", "a dtype of torch", info.dtype)
        return torch.empty(info.shape, dtype=info.dtype, device="meta")

    for spec, factors in checked.factors(without_values) if index.shared else ():
        rank, expected = len(factors.a) // spec.experts, f"at most max_rank={max_rank}"
        require(rank <= max_rank, field, f"rank of {spec.name}", expected, rank)
    for key, name in base.items():
        index.weights.check(tensors, key, name)
    return checked


def _check_targets(
    config: AdapterConfig, where: str, index: ModelIndex, grouped: dict[str, dict[str, str]]
) -> None:
    """Raise unless the factors belong to the modules that the config targets, if it names any.

    Also raise if an invocation token is not in the vocabulary, or if an activated LoRA has factors
    for an embedding.
    """
    targets = config.targets(index)
    if targets is not None:  # Checked even if not strict: missing factors change the adapter.
        stray = [key for m in sorted(grouped.keys() - targets) for key in grouped[m].values()]
        expected = f"factors only of modules that {config.where} targets"
        require(not stray, where, "keys", expected, _some(stray))
        missing = sorted(targets - grouped.keys())
        stems = "lora_A and lora_B" if config.peft_type == "LORA" else ", ".join(_stems(config))
        expected = f"{stems} for each of {len(targets)} targeted modules"
        require(not missing, where, "keys", expected, f"none for {_some(missing)}")
    config.check_vocabulary(config.where, index.vocabulary)
    embedded = sorted(name for name in grouped if name in index.embedding)
    if config.invocation and embedded:
        expected = "adapters on linear layers"
        found = f"one on the embedding {embedded[0]!r}, which PEFT rejects too"
        raise NotImplementedError(
            f"{config.where}: alora_invocation_tokens: expected {expected}, found {found}"
        )


def _stems(config: AdapterConfig) -> list[str]:
    """Return the stems (names without the module) of tensors that modules do not share."""
    fields, _ = config.of_modules([""])
    parts = config.kind.parts(fields[""], unknown_spec(""))
    return [stem for stem in parts if stem not in config.kind.shared]


def stem_parser(config: AdapterConfig) -> Callable[[str], tuple[str, str] | None]:
    """Return a function that splits a tensor's name into module and stem (``lora_A.weight``).

    The function returns None for a tensor that is not part of the adapter, and an empty module for
    a tensor that all modules share.
    """
    if config.peft_type == "LORA":
        return lambda name: (key.module, key.stem) if (key := parse_key(name)) else None
    stems = sorted(_stems(config), key=len, reverse=True)
    prefixes = tuple(f"{stem}." for stem in config.kind.shared)

    def split(name: str) -> tuple[str, str] | None:
        if name.startswith(_SHARED) and not name.startswith(PREFIX):
            stem = name.removeprefix(_SHARED)
            return ("", stem) if f"{stem}.".startswith(prefixes) else None
        bare = name.removeprefix(PREFIX)
        found = (stem for stem in stems if bare.endswith(f".{stem}"))
        stem = next(found, None)
        return None if stem is None else (bare.removesuffix(f".{stem}"), stem)

    return split


def _group_keys(
    config: AdapterConfig, tensors: TensorSource, index: ModelIndex, experts: Mapping[str, str]
) -> tuple[dict[str, dict[str, str]], dict[str, str], list[str]]:
    """Group the keys of an adapter's tensors.

    Returns:
        the keys of factors by module and stem (such as ``lora_A.weight``), with an empty name for
        tensors that all modules share; the keys of weights of the base model, with their names
        there; and all remaining keys.
    """
    grouped: dict[str, dict[str, str]] = {}
    base: dict[str, str] = {}
    leftover: list[str] = []
    where, parse = tensors.where, stem_parser(config)
    for key in tensors.infos:
        expected, found = "a name as in an adapter file", "a name as in model.state_dict()"
        parsed = parse(key)
        require("modules_to_save" not in key, where, key, expected, found, NotImplementedError)
        if parsed is None:
            name = base_name(key)
            if name in index.weights:
                base[key] = name
            else:
                leftover.append(key)
            continue
        given, stem = parsed
        module = experts.get(given, given)
        own = module == given
        owner, _, _ = given.partition(".base_layer")
        expected = f"factors of only the {len(experts)} expert parameters in target_parameters"
        require(not (own and owner in index.parameters), where, "keys", expected, key)
        if module and module not in index.specs:
            kind = index.unsupported.get(module)
            if kind is None and own and in_routed_experts(module):
                kind = f"module of {ROUTED}"
            # Raise even if not strict, since an adapter without these factors is a different one.
            expected, found = "no adapters on unsupported modules", f"a {kind}"
            require(kind is None, where, key, expected, found, NotImplementedError)
            found = f"{module}, a {index.others.get(module)} without them"
            expected = "a base layer with in_features and out_features"
            require(module not in index.others, where, key, expected, found, NotImplementedError)
            leftover.append(key)
            continue
        other = grouped.setdefault(module, {}).setdefault(stem, key)
        require(other == key, where, "keys", "a single adapter", f"both {other} and {key}")
    return grouped, base, leftover


def _check_headers(
    tensors: TensorSource,
    keys: dict[str, str],
    fields: Mapping[str, Any],
    spec: LinearSpec,
    index: ModelIndex,
    config: AdapterConfig,
) -> None:
    module, kind = spec.name, config.kind
    embedding = spec.embedding and index.shared
    what = f"{kind.when or 'peft_type'} of {module}"
    wanted = f"no {kind.title} on embeddings"
    fits = not embedding or (config.peft_type == "LORA" and kind.sums)
    require(fits, config.where, what, wanted, fields.get(kind.when, True), NotImplementedError)
    wanted = f"false for an adapter of the embedding {module}, as in PEFT"
    require(not (spec.embedding and config.lora_bias), config.where, "lora_bias", wanted, True)
    expected = kind.parts(fields, spec)
    if config.peft_type == "LORA":
        short = [", ".join(stem.removeprefix("lora_") for stem in s) for s in (expected, keys)]
        set_ = ", ".join(
            f"{name}={getattr(config, name)}"
            for name in ("lora_bias", *(k.when for k in variants("LORA")))
        )
        found = f"lora_{{{short[1]}}} ({set_})"
        same = keys.keys() == expected.keys()
        require(same, tensors.where, module, f"lora_{{{short[0]}}}", found)
    for stem, part in expected.items():
        if stem in keys:
            check_header(tensors, keys[stem], part.shape, dtype=part.dtype)
        else:
            name = f"{_SHARED}{stem}" if stem in kind.shared else f"{module}.{stem}"
            require(part.optional, tensors.where, name, "a tensor", "none")


def _some(items: Iterable[str]) -> str:
    shown = [item[:200] for item in items]
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return ", ".join(shown[:4]) + more


def save_adapter(
    directory: str | os.PathLike[str],
    config: Any,
    state: Mapping[str, Tensor],
    *,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's format.

    Args:
        directory: path of the directory, which is created if it does not exist. Either all files
            are written, or none.
        config: a dict of PEFT's fields (at least ``target_modules``), or a ``peft.LoraConfig``.
        state: tensors by name, such as ``<module>.lora_A.weight``, with or without the prefix
            ``base_model.model.`` and the adapter's name. In the file, names have the prefix and do
            not have the adapter's name.
        beside: contents of additional files, by name.
    """
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        parsed = parse_key(key)
        name = "" if parsed is None else parsed.in_file
        require(name, "save_adapter", "state", "names such as <module>.lora_A.weight", key)
        require(name not in tensors, "save_adapter", "state", "a single adapter", f"{name} twice")
        tensors[name] = value
    write_adapter(directory, config, tensors, beside)


def write_adapter(
    directory: str | os.PathLike[str],
    config: Any,
    tensors: Mapping[str, Tensor],
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write an adapter as :func:`save_adapter` does, from tensors that are named as in the file.

    Args:
        directory: See :func:`save_adapter`.
        config: See :func:`save_adapter`.
        tensors: tensors by their name in the file.
        beside: contents of further files by file name.
    """
    from safetensors.torch import save

    raw = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    raw.setdefault("peft_type", "LORA")
    raw = AdapterConfig.parse(raw, CONFIG).raw  # raises for a config that could not be read back
    # Tensors are copied, since safetensors rejects tensors that share memory (tied weights).
    whole = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    text = json.dumps(raw, indent=2, sort_keys=True, default=_json_value)
    # The tensors are written last, so that the config exists whenever the tensors do.
    files = {
        **(beside or {}),
        "adapter_config.json": text.encode(),
        "adapter_model.safetensors": save(whole, metadata={"format": "pt"}),
    }
    write_files(directory, files)


def _json_value(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", str(value))
