"""Modules that compute a circuit's parameters from hidden states: three for leaves, one for sums.

An emission contains the parameters of the leaves. Each class has four methods:

* ``logits(rows)``: compute all leaves of rows ``(N, D)``, as ``(N, K, C, L)``; for decoding, with
  few rows;
* ``observed(rows, places)``: compute the log-probability of one token per position, ``(N, K, C)``;
  for training, since the logits of all rows would not fit in memory. ``places (N, K)`` contains the
  tokens' indices in the shortlist; -1 marginalises its position. The result is differentiable
  once;
* ``reset_parameters(bound)``: draw new values from torch's generator; new unembeddings are uniform
  in ``±bound``;
* ``start_from(blocks)``: start from a language model's unembedding, ``blocks (positions, L, D)``
  with one block for each position that the model predicts.

Shape letters: ``N`` rows, ``D`` hidden width, ``K`` positions, ``C`` components, ``L`` tokens that
have leaves, ``R`` rank of an adapter, ``M`` transition matrices. Rows have the dtype of the
parameters. The softmax is computed in float32 (float64 for float64).

Sources: ``full`` and ``expander`` are the authors' (arXiv 2511.11346 and its code); ``adapter`` is
our addition (docs/mtpc.md, "Head").
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext import ops
from lora_ext._torch import linear
from lora_ext.layers import recomputed, rows_per_chunk
from lora_ext.reference import num_transitions
from lora_ext.rows import keep

_STAY = 0.99  # initial probability of keeping a latent state with init_identity; our choice


class LeafSizes(NamedTuple):
    """Sizes of a head's leaves."""

    n_token: int  # K
    rank: int  # C
    num_leaves: int  # L
    hidden_size: int  # D
    adapter_rank: int  # R, for AdapterEmission only


class Emission(nn.Module):
    """Parameters of the leaves of a circuit.

    A subclass allocates the parameters with :func:`torch.empty`, from the sizes and the options
    dtype and device.
    """

    def __init__(self, sizes: LeafSizes) -> None:
        super().__init__()
        self.sizes = sizes


class FullEmission(Emission):
    """``emit[k, z] @ h``: one unembedding per position and component."""

    def __init__(self, sizes: LeafSizes, **options: Any) -> None:
        super().__init__(sizes)
        self.emit = nn.Parameter(torch.empty(sizes[:4], **options))

    def reset_parameters(self, bound: float) -> None:
        """Draw the unembedding of every position and component."""
        nn.init.uniform_(self.emit, -bound, bound)

    def start_from(self, blocks: Tensor) -> None:
        """Set every component of position k to block k; positions beyond the blocks keep their
        values."""
        for position, block in zip(self.emit, blocks, strict=False):
            position.copy_(block.expand_as(position))

    def logits(self, rows: Tensor) -> Tensor:
        """Return the leaf logits ``(N, K, C, L)``, computed with all unembeddings in one
        product."""
        return linear(rows, self.emit.flatten(0, 2)).unflatten(-1, self.emit.shape[:3])

    def observed(self, rows: Tensor, places: Tensor) -> Tensor:
        """Return the tokens' log-probabilities ``(N, K, C)``. The op computes the logits of one
        position and one chunk of rows at a time."""
        return ops.emission_gather(rows, self.emit, places)


class SharedEmission(Emission):
    """``unembed @ states[k, z](h)``: one unembedding, applied to one state per position and
    component."""

    unembed: Tensor  # (L, D)

    def states(self, rows: Tensor) -> Tensor:
        """Return a hidden state for every row, position and component, ``(N K C, D)``."""
        raise NotImplementedError

    def logits(self, rows: Tensor) -> Tensor:
        """Return the leaf logits ``(N, K, C, L)``: the unembedding applied to every state."""
        k, c, num_leaves = self.sizes[:3]
        return linear(self.states(rows), self.unembed).view(len(rows), k, c, num_leaves)

    def observed(self, rows: Tensor, places: Tensor) -> Tensor:
        """Return the tokens' log-probabilities ``(N, K, C)``.

        If the states of all rows are too large to store, the backward pass recomputes them, one
        chunk of rows at a time.
        """
        chunk = rows_per_chunk(self.sizes.n_token * self.sizes.rank * self.sizes.hidden_size)
        if len(rows) <= chunk:
            return self._observed(rows, places)
        parts = zip(rows.split(chunk), places.split(chunk), strict=True)
        return torch.cat([recomputed(self._observed, *part) for part in parts])

    def _observed(self, rows: Tensor, places: Tensor) -> Tensor:
        shape = len(rows), self.sizes.n_token, self.sizes.rank
        targets = places[:, :, None].expand(shape).reshape(-1, 1)
        states = self.states(rows).to(self.unembed.dtype)  # autocast may lower their precision
        return ops.emission_gather(states, self.unembed[None, None], targets).view(shape)


class ExpanderEmission(SharedEmission):
    """``unembed @ (maps[k, z] @ h)``: one square map per position and component."""

    def __init__(self, sizes: LeafSizes, **options: Any) -> None:
        super().__init__(sizes)
        k, c, num_leaves, d, _ = sizes
        self.maps = nn.Parameter(torch.empty(k, c, d, d, **options))
        self.unembed = nn.Parameter(torch.empty(num_leaves, d, **options))

    def reset_parameters(self, bound: float) -> None:
        """Set every map to the identity and draw the unembedding."""
        identity = torch.eye(self.sizes.hidden_size, device=self.maps.device)
        self.maps.copy_(identity.expand_as(self.maps))
        nn.init.uniform_(self.unembed, -bound, bound)

    def start_from(self, blocks: Tensor) -> None:
        """Copy block 0 into the unembedding; the maps keep their values."""
        self.unembed.copy_(blocks[0])

    def states(self, rows: Tensor) -> Tensor:
        """Return the states ``(N K C, D)``, computed with all maps in one product."""
        return linear(rows, self.maps.flatten(0, 2)).view(-1, self.sizes.hidden_size)


class AdapterEmission(SharedEmission):
    """``unembed @ (h + B[k, z] @ A[k, z] @ h)``: one adapter per position and component before a
    frozen unembedding, which is never written because it may share the language model's memory."""

    def __init__(self, sizes: LeafSizes, **options: Any) -> None:
        super().__init__(sizes)
        k, c, num_leaves, d, r = sizes
        self.lora_A = nn.Parameter(torch.empty(k * c, r, d, **options))
        self.lora_B = nn.Parameter(torch.empty(k * c, d, r, **options))
        self.register_buffer("unembed", torch.empty(num_leaves, d, **options))

    def reset_parameters(self, bound: float) -> None:
        """Draw A and zero B, as LoRA does, and draw a new unembedding."""
        self.unembed = torch.empty_like(self.unembed).uniform_(-bound, bound)
        bound = 1 / math.sqrt(self.sizes.hidden_size)  # as in init_lora_
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def start_from(self, blocks: Tensor) -> None:
        """Use block 0 as the unembedding, without a copy if dtype and device agree."""
        self.unembed = blocks[0].to(self.unembed)

    def states(self, rows: Tensor) -> Tensor:
        """Return the states ``(N K C, D)``. Adapter ``k C + z`` computes the state of position k
        and component z from every row."""
        adapters = len(self.lora_A)
        x = rows[:, None].expand(-1, adapters, -1).reshape(-1, self.sizes.hidden_size)

        def make() -> tuple[Tensor, Tensor]:
            ids = torch.arange(adapters, dtype=torch.int32, device=rows.device).repeat(len(rows))
            return ids, ops.lora_plan(ids, adapters)

        ids, plan = keep(("circuit_head", adapters, len(rows)), rows.device, make)
        return x + ops.lora_apply(x, self.lora_A, self.lora_B, ids, plan=plan)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(prefix + "unembed")
        if saved is not None and not self.unembed.is_meta:
            same = saved.shape == self.unembed.shape
            if not (same and torch.equal(saved.to(self.unembed), self.unembed)):
                self.unembed = torch.empty_like(self.unembed)  # the model may use the old tensor
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


EmissionModule = FullEmission | ExpanderEmission | AdapterEmission
EMISSIONS: dict[str, type[EmissionModule]] = {
    "full": FullEmission,
    "expander": ExpanderEmission,
    "adapter": AdapterEmission,
}


class SumWeights(nn.Module):
    """Logits of the prior, ``prior @ h``, and of ``M`` transitions, ``trans @ h + trans_bias``.

    Args:
        kind: circuit family, as in the head.
        sizes: sizes of the head.
        contextual: whether transitions depend on ``h``.
        shared: the head's ``share_transitions``.
        stays: the head's ``init_identity``.
        how: dtype and device of the parameters.

    Attributes:
        prior: ``(C, D)``; None for ``ff``, which has no sum.
        trans_bias: ``(M, C, C)``, or ``(1, C, C)`` if the steps share one matrix; None if
            ``M = 0``.
        trans: ``(M, C, C, D)`` or ``(1, C, C, D)``; None if ``M = 0`` or transitions do not depend
            on ``h``.
    """

    def __init__(
        self, kind: str, sizes: LeafSizes, contextual: bool, shared: bool, stays: bool, **how: Any
    ):
        super().__init__()
        c, d = sizes.rank, sizes.hidden_size
        self.init_identity = stays
        self.num_transitions = num_transitions(kind, sizes.n_token)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **how))

        stored = min(self.num_transitions, 1) if shared else self.num_transitions
        self.prior = None if kind == "ff" else parameter(c, d)
        self.trans_bias = parameter(stored, c, c) if stored else None
        self.trans = parameter(stored, c, c, d) if stored and contextual else None

    def reset_parameters(self, bound: float) -> None:
        """Draw new values from torch's generator, uniform in ``±bound``. Set the bias according to
        ``init_identity``."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if self.trans_bias is not None:
            rank = self.trans_bias.shape[-1]
            stay = math.log((rank - 1) * _STAY / (1 - _STAY)) if self.init_identity else 0.0
            identity = torch.eye(rank, device=self.trans_bias.device)
            self.trans_bias.copy_(stay * identity.expand_as(self.trans_bias))

    def forward(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Compute the logits of rows ``(N, D)``: prior ``(N, C)`` and transitions ``(N, M, C, C)``.
        A result is None if the circuit has no prior or no transitions."""
        if self.prior is None:
            return None, None
        prior = linear(rows, self.prior)
        if self.trans_bias is None:
            return prior, None
        stored, c = self.trans_bias.shape[:2]
        if self.trans is None:
            trans = self.trans_bias[None].to(prior.dtype)  # autocast may lower its precision
        else:
            trans = linear(rows, self.trans.flatten(0, 2), self.trans_bias.flatten())
            trans = trans.view(-1, stored, c, c)
        return prior, trans.expand(len(rows), self.num_transitions, c, c)
