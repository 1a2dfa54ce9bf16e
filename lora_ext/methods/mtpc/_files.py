"""Files of a draft: ``mtpc_config.json`` and ``mtpc.safetensors`` in a folder.

The JSON file contains the configuration and the shortlist, the other file the parameters. An
unembedding equal to the model's is not written; loading reads it from the model. A folder is not
trusted: sizes, names and dtypes are compared with the configuration before memory is allocated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_ext._checks import require
from lora_ext._files import SafetensorsFile, TensorInfo, read_json, write_files

from ._config import MtpcConfig
from ._drafting import TokenBridge
from .layers import CircuitHead

CONFIG, TENSORS = "mtpc_config.json", "mtpc.safetensors"
_MAX_CONFIG_BYTES = 16 << 20  # enough for a shortlist of a million tokens
_VERSION = 1
_SHORTLIST, _UNEMBED = "head.shortlist", "head.unembed"
_BRIDGE, _FACTORS = "bridge.", "tail.factors."


def write_draft(
    folder: Path, config: MtpcConfig, state: Mapping[str, Tensor], unembedding: Tensor
) -> None:
    """Write both files or neither; ``unembedding`` is the model's, ``(V, D)``."""
    from safetensors.torch import save as as_bytes  # imported late: only this function needs it

    kept = dict(state)
    ids = kept.pop(_SHORTLIST, None)
    if config.emission == "adapter":
        rows = unembedding if ids is None else unembedding[ids.to(unembedding.device)]
        if torch.equal(rows.to(kept[_UNEMBED]), kept[_UNEMBED]):
            del kept[_UNEMBED]
    data = {
        "version": _VERSION,
        "config": dataclasses.asdict(config),
        "shortlist": None if ids is None else ids.tolist(),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in kept.items()}
    write_files(folder, {TENSORS: as_bytes(tensors), CONFIG: json.dumps(data, indent=1).encode()})


def read_config(folder: Path) -> tuple[MtpcConfig, list[int] | None]:
    """Read the configuration and the shortlist."""
    path = folder / CONFIG
    data = read_json(path, _MAX_CONFIG_BYTES)
    if not isinstance(data, dict) or data.keys() != {"version", "config", "shortlist"}:
        raise ValueError(f"{path}: expected keys version, config, shortlist, found {data!r:.200}")
    where = str(path)
    version = data["version"]
    found = data["config"]
    ids = data["shortlist"]
    require(version == _VERSION, where, "version", _VERSION, f"{version!r:.80}")
    if ids is not None:
        fits = isinstance(ids, list) and all(type(i) is int and 0 <= i < 2**31 for i in ids)
        require(fits, where, "shortlist", "token ids or null", f"{ids!r:.80}")
    require(isinstance(found, dict), where, "config", "a JSON object", f"{found!r:.80}")
    known = [field.name for field in dataclasses.fields(MtpcConfig)]
    for name in found:
        require(name in known, where, "config", f"keys from {known}", f"{name!r:.80}")
    try:
        config = MtpcConfig(**found)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error!s:.300}") from None
    # A saved draft has an emission: MtpcConfig.for_tokens replaces None.
    require(config.emission is not None, where, "emission", "a string", "none")
    return config, ids


class DraftFile:
    """Parameters of a draft, checked against a configuration without being read.

    Args:
        folder: folder of the draft.
        config: configuration that :func:`read_config` returned for the folder.
        shortlist: shortlist that :func:`read_config` returned for the folder.
        shape: shape ``(V, D)`` of the model's unembedding: vocabulary and hidden width.

    Attributes:
        dtypes: dtype of each part in the file: "head", "bridge" and "tail".

    Raises:
        ValueError: If keys, shapes or dtypes do not match the configuration; the message names file
            and key.
    """

    def __init__(
        self, folder: Path, config: MtpcConfig, shortlist: list[int] | None, shape: torch.Size
    ):
        self._file = file = SafetensorsFile(folder / TENSORS)
        try:
            tail = {k: v for k, v in file.infos.items() if k.startswith(_FACTORS)}
            bridge = {k: v for k, v in file.infos.items() if k.startswith(_BRIDGE)}
            head = {k: v for k, v in file.infos.items() if k not in tail | bridge}
            self.dtypes = {"head": self._dtype("head", head)}
            for part, infos in (("bridge", bridge), ("tail", tail)):
                if infos:
                    self.dtypes[part] = self._dtype(part, infos)
            wanted = self._head_shapes(config, shortlist, *shape)
            found = {k: info.shape for k, info in (head | bridge).items()}
            if config.emission == "adapter":
                found.setdefault(_UNEMBED, wanted[_UNEMBED])
            self._compare(wanted, found)
            if bool(tail) != bool(config.draft_layers):
                expected = f"factors of {config.draft_layers} layers"
                raise ValueError(f"{file.where}: expected {expected}, found {len(tail)} tensors")
            if tail:
                # Checked first, because every layer of the tail is allocated with this rank.
                rank, first = config.draft_rank, f"{_FACTORS}0"
                shape_found = tail[first].shape if first in tail else None
                fits = shape_found is not None and shape_found[:1] == (rank,)
                require(fits, file.where, first, f"shape ({rank}, ...)", shape_found)
        except BaseException:
            file.close()
            raise

    def _dtype(self, part: str, infos: Mapping[str, TensorInfo]) -> torch.dtype:
        found = {info.dtype for info in infos.values()}
        dtype = next(iter(found), None)
        if len(found) != 1 or not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            expected = f"one floating-point dtype, found {found!r:.200}"
            raise ValueError(f"{self._file.where}: {part}: expected {expected}")
        return dtype

    def _head_shapes(
        self, config: MtpcConfig, shortlist: list[int] | None, vocab_size: int, hidden_size: int
    ) -> dict[str, tuple[int, ...]]:
        try:
            with torch.device("meta"):
                arguments = config.of_head()
                head = CircuitHead(hidden_size, vocab_size, **arguments, shortlist=shortlist)
                bridge = TokenBridge(hidden_size, config.bridge) if config.bridge else None
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # sizes too large
            raise ValueError(f"{self._file.where}: {error!s:.300}") from None
        parts = {"head": head} if bridge is None else {"head": head, "bridge": bridge}
        shapes = {
            f"{part}.{name}": tuple(t.shape)
            for part, module in parts.items()
            for name, t in module.state_dict().items()
        }
        shapes.pop(_SHORTLIST, None)
        return shapes

    def _compare(
        self, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
    ) -> None:
        for name in sorted(wanted.keys() | found.keys()):
            fits = wanted.get(name) == found.get(name)
            other = found.get(name, "none")
            require(fits, self._file.where, f"{name:.200}", wanted.get(name, "no such key"), other)

    def read(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a state dict with the file's values; keys that the file lacks are taken from
        ``state``, the state dict of a draft with the same configuration."""
        infos = self._file.infos
        own = {k: tuple(t.shape) for k, t in state.items() if k.startswith(_FACTORS)}
        self._compare(own, {k: i.shape for k, i in infos.items() if k.startswith(_FACTORS)})
        return {k: self._file.read(k) if k in infos else t for k, t in state.items()}

    def close(self) -> None:
        """Close the file; tensors that were read stay valid."""
        self._file.close()
