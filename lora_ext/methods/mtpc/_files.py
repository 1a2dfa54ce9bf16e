"""Files of a draft: ``mtpc_config.json`` and ``mtpc.safetensors`` in a folder.

The JSON file contains the configuration and the shortlist, the other file the parameters. An
unembedding equal to the model's is not written; loading reads it from the model. The files are not
trusted: sizes, names and dtypes are compared with the configuration before memory is allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_ext._checks import require
from lora_ext._files import SafetensorsFile, TensorInfo, read_config, save_parts

from ._config import MtpcConfig
from ._drafting import TokenBridge
from .layers import CircuitHead

CONFIG, TENSORS = "mtpc_config.json", "mtpc.safetensors"
_MAX_CONFIG_BYTES = 16 << 20  # enough for a shortlist of a million tokens
_SHORTLIST, _UNEMBED = "head.shortlist", "head.unembed"
_BRIDGE, _FACTORS = "bridge.", "tail.factors."


def write_draft(
    folder: Path, config: MtpcConfig, state: Mapping[str, Tensor], unembedding: Tensor
) -> None:
    """Write both files or neither; ``unembedding (V, D)`` is that of the model."""
    kept = dict(state)
    ids = kept.pop(_SHORTLIST, None)
    if config.emission == "adapter":
        rows = unembedding if ids is None else unembedding[ids.to(unembedding.device)]
        if torch.equal(rows.to(kept[_UNEMBED]), kept[_UNEMBED]):
            del kept[_UNEMBED]
    save_parts(folder, "mtpc", config, kept, shortlist=None if ids is None else ids.tolist())


def read_draft_config(folder: Path) -> tuple[MtpcConfig, list[int] | None]:
    """Read the configuration and the shortlist."""
    path = folder / CONFIG
    config, data = read_config(path, MtpcConfig, _MAX_CONFIG_BYTES, "shortlist")
    ids, where = data["shortlist"], str(path)
    listed = isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)
    require(ids is None or listed, where, "shortlist", "token ids or null", f"{ids!r:.80}")
    # A saved draft has an emission: MtpcConfig.for_tokens replaces None.
    require(config.emission is not None, where, "emission", "a string", "none")
    return config, ids


def part_dtypes(
    file: SafetensorsFile, config: MtpcConfig, shortlist: list[int] | None, shape: torch.Size
) -> dict[str, torch.dtype]:
    """Return the dtypes of a draft, and compare its parameters with its configuration.

    The tensors are not read.

    Args:
        file: file of the parameters.
        config: configuration of the same folder.
        shortlist: shortlist of the same folder.
        shape: shape ``(V, D)`` of the model's unembedding: vocabulary and hidden width.

    Returns:
        Dtype of each part in the file: "head", "bridge" and "tail".

    Raises:
        ValueError: If keys, shapes or dtypes do not match the configuration; the message names the
            file and the key.
    """
    parts: dict[str, dict[str, TensorInfo]] = {"head": {}, "bridge": {}, "tail": {}}
    for key, info in file.infos.items():
        of_tail = "tail" if key.startswith(_FACTORS) else "head"
        parts["bridge" if key.startswith(_BRIDGE) else of_tail][key] = info
    dtypes: dict[str, torch.dtype] = {}
    for part, infos in parts.items():
        kinds = {info.dtype for info in infos.values()}
        dtype = next(iter(kinds), None)
        if len(kinds) == 1 and isinstance(dtype, torch.dtype) and dtype.is_floating_point:
            dtypes[part] = dtype
        elif infos or part == "head":
            expected = f"one floating-point dtype, found {kinds!r:.200}"
            raise ValueError(f"{file.where}: {part}: expected {expected}")
    vocab_size, width = shape
    modules: dict[str, nn.Module] = {}
    try:
        with torch.device("meta"):
            of_head = config.of_head()
            modules["head"] = CircuitHead(width, vocab_size, **of_head, shortlist=shortlist)
            if config.bridge:
                modules["bridge"] = TokenBridge(width, config.bridge)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # sizes too large
        raise ValueError(f"{file.where}: {error!s:.300}") from None
    states = {part: module.state_dict() for part, module in modules.items()}
    wanted = {f"{part}.{k}": tuple(t.shape) for part, own in states.items() for k, t in own.items()}
    wanted.pop(_SHORTLIST, None)
    found = {k: info.shape for k, info in (parts["head"] | parts["bridge"]).items()}
    if config.emission == "adapter":
        found.setdefault(_UNEMBED, wanted[_UNEMBED])
    _compare(file.where, wanted, found)
    tail = parts["tail"]
    if bool(tail) != bool(config.draft_layers):
        expected = f"factors of {config.draft_layers} layers"
        raise ValueError(f"{file.where}: expected {expected}, found {len(tail)} tensors")
    if tail:
        # Checked first, because every layer of the tail is allocated with this rank.
        rank, first = config.draft_rank, f"{_FACTORS}0"
        shape_found = tail[first].shape if first in tail else None
        fits = shape_found is not None and shape_found[:1] == (rank,)
        require(fits, file.where, first, f"shape ({rank}, ...)", shape_found)
    return dtypes


def read_state(file: SafetensorsFile, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with the values in the file. Values that are not in the file are taken
    from ``state``, the state dict of a draft with the same configuration."""
    infos = file.infos
    own = {k: tuple(t.shape) for k, t in state.items() if k.startswith(_FACTORS)}
    _compare(file.where, own, {k: i.shape for k, i in infos.items() if k.startswith(_FACTORS)})
    return {k: file.read(k) if k in infos else t for k, t in state.items()}


def _compare(
    where: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        fits, other = wanted.get(name) == found.get(name), found.get(name, "none")
        require(fits, where, f"{name:.200}", wanted.get(name, "no such key"), other)
