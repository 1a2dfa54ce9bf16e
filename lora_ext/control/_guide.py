"""Guides: hidden Markov models of a language model's texts, which constraints use to look ahead."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext._checks import renamed, require
from lora_ext._files import SafetensorsFile, parse_json, write_files
from lora_ext.circuits import Categorical, Circuit, RegionGraph

_FILE, _METADATA = "guide.safetensors", "lora_ext.guide"
_NAMES, _PRIOR = ("initial", "transition", "emission"), "prior"
MAX_ERROR_OF_SUM = 1e-3  # allows for rounding in sums of many float32 probabilities


class Guide:
    """Hidden Markov model over tokens.

    ``p(x_1 .. x_n) = sum_z initial(z_1) emission(z_1, x_1) prod transition(z_t, z_t+1) ...``.

    Letters: ``H`` states, ``V`` tokens of the vocabulary, ``B`` rows, ``T`` tokens of a row, ``D``
    features of the model's hidden states.

    Args:
        initial: Distribution ``(H,)`` of the state at the first new token, float32 or float64.
        transition: Transition probabilities ``(H, H)``; row z is the distribution of the next state
            after state z.
        emission: Emission probabilities ``(H, V)``; row z is the distribution of the token in state
            z.

    Attributes:
        measures: Measurements by name, see :func:`distil`.
        prior: Weight ``(H, D)`` of a :class:`~lora_ext.control.PriorHead` that was learned with the
            guide, or None. The weight is saved and loaded with the guide.

    Raises:
        ValueError: If a shape, dtype or device is wrong, or values are not probabilities.
    """

    def __init__(self, initial: Tensor, transition: Tensor, emission: Tensor):
        given = dict(zip(_NAMES, (initial, transition, emission), strict=True))
        for name, tensor in given.items():
            known = isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.float64)
            require(known, "Guide", name, "float32 or float64 probabilities", _told(tensor))
        states, tokens = max(1, initial.numel()), max([1, *emission.shape[-1:]])
        shapes = (states,), (states, states), (states, tokens)
        for (name, tensor), shape in zip(given.items(), shapes, strict=True):
            where, found = ("Guide", name), tuple(tensor.shape)
            require(found == shape, *where, f"shape {shape}", found)
            same = tensor.dtype == initial.dtype and tensor.device == initial.device
            expected = f"{initial.dtype} on {initial.device}, as initial"
            require(same, *where, expected, f"{tensor.dtype} on {tensor.device}")
            require_distributions(*where, tensor)
        self.initial = initial.detach()
        self.transition = transition.detach()
        self.emission = emission.detach()
        self.measures: dict[str, float] = {}
        self.prior: Tensor | None = None

    # --- conversion and files ---------------------------------------------------------------------
    @classmethod
    def from_circuit(cls, circuit: Circuit) -> Guide:
        """Return the guide of a circuit over ``RegionGraph.hmm(..., homogeneous=True)``.

        Args:
            circuit: Circuit with ``Categorical`` leaves, for example trained by ``train_em``.

        Raises:
            ValueError: If the circuit has a different graph, or fewer than two variables.
        """
        graph = circuit.graph
        where = "Guide.from_circuit", "circuit"
        expected = "RegionGraph.hmm(..., homogeneous=True)"
        leaves = {r.leaf for r in graph.regions if r.leaf is not None}
        one = len(leaves) == 1 and isinstance(next(iter(leaves)), Categorical)
        told = f"{len(graph.regions)} regions over {graph.num_variables} variables"
        fits = one and graph.num_variables >= 2
        require(fits, *where, f"{expected} of at least 2 Categorical variables", told)
        (leaf,) = leaves
        assert leaf is not None
        rank = next(r.units for r in graph.regions if r.leaf is not None)
        wanted = RegionGraph.hmm(graph.num_variables, rank, leaf, homogeneous=True)
        require(graph.regions == wanted.regions, *where, expected, told)
        root, latent, inputs = regions_of_hmm(graph)
        norm = (lambda w: w.softmax(-1)) if circuit.norm == "logits" else torch.exp
        emission = leaf.log_table(circuit.region_leaves(inputs)).exp()
        tensors = norm(circuit.region_weights(root))[0], norm(circuit.region_weights(latent))
        return cls(*(t.detach().clone() for t in (*tensors, emission)))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``guide.safetensors`` into a folder atomically."""
        from safetensors.torch import save  # imported here, as only this function needs it

        kept = {name: getattr(self, name) for name in (*_NAMES, _PRIOR)}
        tensors = {name: t.cpu().contiguous() for name, t in kept.items() if t is not None}
        data = save(tensors, {_METADATA: json.dumps({"measures": self.measures})})
        write_files(folder, {_FILE: data})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Guide:
        """Load a guide that :meth:`save` wrote. The file may be untrusted: it is validated.

        Raises:
            ValueError: If the file is malformed, or values are not probabilities.
        """
        file = SafetensorsFile(Path(folder) / _FILE)
        with contextlib.closing(file):
            found = file.infos.keys()
            right = found - {_PRIOR} == set(_NAMES)
            require(right, file.where, "tensors", ", ".join(_NAMES), f"{[*found]!r:.200}")
            told = file.metadata.get(_METADATA, "{}").encode(errors="surrogatepass")
            kept = parse_json(told, file.where)
            with renamed(file.where):
                guide = cls(*(file.read(name) for name in _NAMES))
            if _PRIOR in found:
                guide.prior = weight = file.read(_PRIOR)
                dtype, shape = guide.initial.dtype, (guide.num_states, *weight.shape[1:2])
                require(weight.dtype == dtype, file.where, _PRIOR, dtype, weight.dtype)
                fits = weight.dim() == 2 and weight.shape == shape and weight.numel() > 0
                finite = fits and bool(weight.isfinite().all())
                found = f"shape {tuple(weight.shape)}" + (" with NaN or inf" if fits else "")
                require(finite, file.where, _PRIOR, f"shape ({guide.num_states}, D), finite", found)
        measures = kept.get("measures", {}) if isinstance(kept, dict) else {}
        if isinstance(measures, dict):
            guide.measures = {str(k): float(v) for k, v in measures.items() if _finite(v)}
        return guide

    @property
    def num_states(self) -> int:
        """Number of states ``H``."""
        return len(self.initial)

    @property
    def vocab_size(self) -> int:
        """Number of tokens ``V``."""
        return self.emission.shape[1]

    def __repr__(self) -> str:
        return f"Guide(states={self.num_states}, vocab_size={self.vocab_size})"

    # --- following a text -------------------------------------------------------------------------
    def step(self, law: Tensor, tokens: Tensor) -> Tensor:
        """Return the distribution of the next state, given one more token of each row: ``(B, H)``.

        If a token has probability 0 under the guide, only the transition is applied.

        Args:
            law: Distribution of the state that emits the token, ``(B, H)``.
            tokens: Next token of each row, ``(B,)`` int64.
        """
        seen = law * self.by_token[tokens]
        total = seen.sum(-1, keepdim=True)
        law = torch.where(total > 0, seen / total.clamp(min=torch.finfo(law.dtype).tiny), law)
        moved = _product(law, self._packed_transition, self.transition)
        return moved / moved.sum(-1, keepdim=True)

    def filter(self, tokens: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return the distribution of the state after each row of tokens, ``(B, H)``.

        Args:
            tokens: Integer tokens ``(B, T)``; -1 is padding and does not change the distribution.
            prior: Distribution at the first token, ``(B, H)``; None for :attr:`initial`.

        Raises:
            ValueError: If tokens are out of range, or a shape is wrong.
        """
        where = "Guide.filter", "tokens"
        whole = isinstance(tokens, Tensor) and not tokens.is_floating_point()
        require(whole and tokens.dim() == 2, *where, "integers (B, T)", _told(tokens))
        wrong = tokens[(tokens < -1) | (tokens >= self.vocab_size)].tolist()
        require(not wrong, *where, f"values in -1 .. {self.vocab_size - 1}", wrong[:3])
        law = self.initial.expand(len(tokens), -1) if prior is None else prior
        shape = len(tokens), self.num_states
        require(law.shape == shape, "Guide.filter", "prior", f"shape {shape}", tuple(law.shape))
        for token in tokens.to(self.initial.device, torch.long).unbind(1):
            law = torch.where((token >= 0)[:, None], self.step(law, token.clamp(min=0)), law)
        return law

    def log_prob(self, tokens: Tensor, prior: Tensor | None = None) -> Tensor:
        """Return the guide's log-probability of each row of tokens, ``(B,)``.

        Args:
            tokens: Integer tokens ``(B, T)``; -1 is padding.
            prior: See :meth:`filter`.
        """
        law = self.initial.expand(len(tokens), -1) if prior is None else prior
        total = law.new_zeros(len(tokens))
        for token in tokens.to(self.initial.device).unbind(1):
            given, known = token.clamp(min=0), token >= 0
            seen = (law * self.by_token[given]).sum(-1).log()
            total = total + torch.where(known, seen, 0.0)
            law = torch.where(known[:, None], self.step(law, given), law)
        return total

    # --- products ---------------------------------------------------------------------------------
    @cached_property
    def by_token(self) -> Tensor:
        """Transposed emission with one row per token, ``(V, H)``."""
        return self.emission.t().contiguous()

    @cached_property
    def _packed_emission(self) -> Tensor | None:
        return _packed(self.by_token)

    @cached_property
    def _packed_transition(self) -> Tensor | None:
        return _packed(self.transition.t().contiguous())

    def over_vocabulary(self, vectors: Tensor) -> Tensor:
        """Return the product of ``vectors (R, H)`` and the emission, ``(R, V)``, for R rows.

        In float32 on the CPU, the bits of a row do not depend on the other rows.
        """
        return _product(vectors, self._packed_emission, self.emission)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def require_distributions(where: str, argument: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last axis contains probabilities that sum to one."""
    sums = tensor.double().sum(-1)
    near = bool(((sums - 1).abs() <= MAX_ERROR_OF_SUM).all())
    if not (near and bool((tensor >= 0).all())):
        found = f"sums of {float(sums.min()):.6g} to {float(sums.max()):.6g}"
        found += f" and a smallest value of {float(tensor.min()):.6g}"
        require(False, where, argument, "probabilities whose rows sum to one", found)


def _packed(weight: Tensor) -> Tensor | None:
    one = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return ops.pack_weight(weight) if one else None


def _product(rows: Tensor, packed: Tensor | None, matrix: Tensor) -> Tensor:
    if packed is None:
        return rows @ matrix
    return ops.packed_linear(rows.contiguous(), packed, None, matrix.shape[1])


def regions_of_hmm(graph: RegionGraph) -> tuple[int, int, int]:
    """Return the indices of three regions of ``RegionGraph.hmm(..., homogeneous=True)``.

    The regions are the root z0, a latent region with the shared transitions, and an input region
    with the shared leaves.
    """
    latent = next(i for i, r in enumerate(graph.regions) if r.tie == "transition")
    inputs = next(i for i, r in enumerate(graph.regions) if r.leaf is not None)
    return graph.roots[0], latent, inputs


def _told(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
