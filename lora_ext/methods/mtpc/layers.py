"""CircuitHead: a joint distribution over the next tokens, computed from hidden states.

A query has four steps. :class:`CircuitHead` explains the shape letters.

1. :meth:`CircuitHead.rows` checks ``h (..., D)`` and reshapes it to rows ``(N, D)``;
2. an :class:`~lora_ext.methods.mtpc._emission.Emission` computes the leaves of every row's circuit,
   over the tokens of a :class:`~lora_ext.methods.mtpc._shortlist.Shortlist`;
3. :class:`~lora_ext.methods.mtpc._emission.SumWeights` compute the prior and the transitions;
4. a circuit op computes the result: ``circuit_scan`` a likelihood, ``circuit_conditional_dist`` the
   distribution of the next token, ``circuit_sample`` and ``circuit_argmax`` a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_ext import ops, reference
from lora_ext._checks import FLOATS, integer, require, require_shape
from lora_ext._memory import free_bytes
from lora_ext.layers import IGNORE

from ._config import EmissionName, Evidence, Kind, check_structure
from ._emission import EMISSIONS, LeafSizes, SumWeights
from ._evidence import SharedCircuit
from ._shortlist import Shortlist, checkable, checked_ids

# Initial weights are uniform in ± _INIT_BOUND / sqrt(D), so that the size of the first logits does
# not depend on D. For D = 4096, the bound is that of the authors.
_INIT_BOUND = 0.01275 * 64
# Attributes of the head that contain parameters, and the names of these parameters in the head.
_PARTS = {
    "leaves": ("emit", "maps", "unembed", "lora_A", "lora_B"),
    "sums": ("prior", "trans_bias", "trans", "leaf"),
}
_FLAT = [(f"{part}.{name}", name) for part, names in _PARTS.items() for name in names]
_NESTED = [(name, nested) for nested, name in _FLAT]


class Circuit(NamedTuple):
    """Logits of the circuits of ``N`` rows, as arguments of the circuit ops; :class:`CircuitHead`
    explains the shape letters."""

    leaf: Tensor  # (N, K, C, V) or (N, K, C, L)
    prior: Tensor | None  # (N, C)
    trans: Tensor | None  # (N, M, C, C)


def _part_parameter(part: str, name: str) -> Any:
    """Return a property of the head that reads a parameter of one of its parts."""
    return property(lambda head: getattr(getattr(head, part), name))


def _rename(keys: Any, _head: Any, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    """Rename entries of a state dict; ``keys`` are pairs of an old and a new name."""
    for old, new in keys:
        if prefix + old in state_dict:
            state_dict[prefix + new] = state_dict.pop(prefix + old)


def _check_room(
    emission: EmissionName, sizes: LeafSizes, shared: int, dtype: torch.dtype, device: Any
) -> None:
    """Raise ValueError if the device has too little free memory for the leaves and the ``shared``
    leaf logits; the message suggests smaller settings."""
    free = free_bytes(device)
    if free is None:
        return
    leaves = EMISSIONS[emission](sizes, dtype=dtype, device="meta")
    wanted = sum(t.nbytes for t in (*leaves.parameters(), *leaves.buffers()))
    wanted += shared * dtype.itemsize
    k, c, num_leaves, width, _ = sizes
    smaller = "a shortlist or a smaller n_token and rank"
    if emission != "adapter":
        smaller = f'emission="adapter", {smaller}'
    expected = f"leaves that fit into the free memory of {free / 1e9:.1f} GB"
    size = f"{k} positions x {c} components x {num_leaves} tokens x width {width}"
    size += f" and {shared} shared leaf logits" if shared else ""
    found = f"{emission!r} of {size}, which takes {wanted / 1e9:.1f} GB; use {smaller}"
    require(wanted <= free, "CircuitHead", "emission", expected, found)


class CircuitHead(nn.Module):
    """``q(x_1 .. x_K | h)``: a probabilistic circuit with parameters computed from ``h``.

    Shape letters: ``N`` rows, ``D`` hidden width, ``K`` positions, ``C`` components, ``V``
    vocabulary, ``L`` tokens of the shortlist (without one ``L = V``), ``M`` transition matrices. A
    leaf is the distribution of one token given one component, ``softmax(logits)``; the weights of a
    sum are ``softmax(w @ h)`` with a parameter ``w``:

    ============  ===========================================  ================================
    emission      logits of position k, component z            parameters
    ============  ===========================================  ================================
    ``full``      ``emit[k, z] @ h``                           ``emit (K, C, L, D)``
    ``expander``  ``unembed @ (maps[k, z] @ h)``               ``maps (K, C, D, D)``,
                                                               ``unembed (L, D)``
    ``adapter``   ``unembed @ (h + B[k, z] @ A[k, z] @ h)``    ``lora_A (K C, R, D)``,
                                                               ``lora_B (K C, D, R)``; ``unembed``
                                                               is a frozen buffer
    ============  ===========================================  ================================

    The submodule ``leaves`` contains these parameters, and ``sums`` contains ``prior``, ``trans``
    and ``trans_bias``. All these parameters are also attributes of the head, and have these names
    in its state dict.

    Methods accept hidden states ``(..., D)`` and windows ``(..., K)`` with the same leading
    dimensions; results have these dimensions, too. Tokens equal to :data:`IGNORE` are marginalised.

    Args:
        hidden_size: ``D``, width of the hidden states.
        vocab_size: ``V``, size of the vocabulary, at least 2.
        n_token: ``K``, number of tokens in a window.
        rank: ``C``, number of components.
        kind: circuit family: ``"ff"``, ``"cp"``, ``"hmm"`` or ``"btree"``.
        emission: way to compute the leaves, see the table. ``full`` for small vocabularies,
            ``adapter`` for large ones.
        adapter_rank: ``R``, rank of each adapter of emission ``adapter``, at least 1.
        contextual: whether transitions depend on ``h``; if False, transitions are free parameters.
        share_transitions: whether to use one transition matrix instead of ``M``.
        init_identity: whether transitions initially keep the state with probability 0.99, so that
            an HMM or tree starts near the mixture CP; if False, transitions start near uniform.
        evidence: if ``"soft"``, the emission computes only one vector of logits ``l_k`` per
            position. These logits condition a circuit S that all rows share: ``q(x) = S(x) prod_k
            exp(l_k[x_k]) / Z``. The leaf logits ``leaf (K, C, L)`` and the sums of S are free
            parameters for any value of ``contextual``.
        shortlist: ``(L,)`` int64, at least 2 distinct ids of the tokens that have leaves. All other
            tokens have probability exactly 0 and need no parameters. Tokens after such a token have
            log-probability ``-inf``. Default is the whole vocabulary. The ids are a buffer: after
            ``to_empty()``, they are undefined until a state dict is loaded.
        dtype: dtype of the parameters: float16, bfloat16, float32 or float64.
        device: device of the parameters.

    Raises:
        ValueError: If a size is out of range; if kind or emission is unknown; if ``ff`` has a rank
            other than 1, or soft evidence; if ``hmm`` or ``btree`` has rank or n_token below 2; if
            the shortlist has fewer than 2 tokens, a repeated token or one outside the vocabulary;
            or if the leaves are larger than the free memory.
        NotImplementedError: If ``dtype`` is none of these dtypes.

    Source: arXiv 2511.11346 and its code; ``adapter`` is our addition (docs/mtpc.md). The shortlist
    for the draft is from FR-Spec (arXiv 2502.14856).
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        n_token: int,
        rank: int,
        kind: Kind,
        emission: EmissionName = "full",
        adapter_rank: int = 16,
        contextual: bool = True,
        share_transitions: bool = False,
        init_identity: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        shortlist: Tensor | Sequence[int] | None = None,
        evidence: Evidence = "none",
    ):
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.hidden_size, self.vocab_size = hidden_size, vocab_size
        self.n_token, self.rank, self.kind = n_token, rank, kind
        self.emission, self.adapter_rank = emission, adapter_rank
        self.contextual, self.share_transitions = contextual, share_transitions
        self.init_identity, self.evidence = init_identity, evidence
        check_structure("CircuitHead", self)
        integer("CircuitHead", "hidden_size", hidden_size, 1)
        integer("CircuitHead", "vocab_size", vocab_size, 2)
        known = dtype in FLOATS
        require(known, "CircuitHead", "dtype", f"one of {FLOATS}", dtype, NotImplementedError)
        ids = None if shortlist is None else checked_ids(shortlist, vocab_size)
        if ids is not None:
            ids = ids.to(torch.empty(0, device=device).device)  # torch's default device if None
        self.shortlist: Tensor | None
        self.register_buffer("shortlist", ids)
        self.num_leaves = self.listed.size

        options: dict[str, Any] = {"dtype": dtype, "device": device}
        sizes = LeafSizes(n_token, rank, self.num_leaves, hidden_size, adapter_rank)
        of_leaves = sizes._replace(rank=1) if evidence == "soft" else sizes
        shared = math.prod(sizes[:3]) if evidence == "soft" else 0
        _check_room(emission, of_leaves, shared, **options)  # before any memory is allocated
        self.leaves = EMISSIONS[emission](of_leaves, **options)
        starts = share_transitions, init_identity
        self.sums: SumWeights = (
            SharedCircuit(kind, sizes, *starts, **options)
            if evidence == "soft"
            else SumWeights(kind, sizes, contextual, *starts, **options)
        )
        # In a state dict, parameters of `leaves` and `sums` have names without these prefixes.
        self.register_state_dict_post_hook(partial(_rename, _FLAT))
        self.register_load_state_dict_pre_hook(partial(_rename, _NESTED))
        self.reset_parameters()

    emit = _part_parameter("leaves", "emit")
    maps = _part_parameter("leaves", "maps")
    unembed = _part_parameter("leaves", "unembed")
    lora_A = _part_parameter("leaves", "lora_A")
    lora_B = _part_parameter("leaves", "lora_B")
    prior = _part_parameter("sums", "prior")
    trans_bias = _part_parameter("sums", "trans_bias")
    trans = _part_parameter("sums", "trans")
    leaf = _part_parameter("sums", "leaf")

    @property
    def listed(self) -> Shortlist:
        """Tokens that have leaves: those of the shortlist, or the whole vocabulary."""
        return Shortlist(self.shortlist, self.vocab_size)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw new initial values from torch's generator.

        :meth:`init_from_lm_head` makes the leaves of all components of a position equal. The
        components still differ, because the sum weights and the leaves of later positions are
        random.
        """
        bound = _INIT_BOUND / math.sqrt(self.hidden_size)
        self.leaves.reset_parameters(bound)
        self.sums.reset_parameters(bound)

    @torch.no_grad()
    def init_from_lm_head(self, weight: Tensor, num_blocks: int = 1) -> None:
        """Initialise the leaves from the unembedding of a language model.

        ``full``: every component of position k is set to block k; positions beyond the blocks keep
        their values. ``expander``: the unembedding is a copy of block 0. ``adapter``: the
        unembedding is block 0 itself; without a shortlist, and if dtype and device agree, the head
        shares the model's memory.

        Args:
            weight: unembedding ``(num_blocks * V, D)``, one block per position that the model
                predicts.
            num_blocks: number of these positions.

        Raises:
            ValueError: If ``weight`` has the wrong shape, or ``num_blocks`` is below 1.
        """
        where = "CircuitHead.init_from_lm_head"
        shape = (self.vocab_size, self.hidden_size)
        require(num_blocks >= 1, where, "num_blocks", "at least 1", num_blocks)
        require_shape(where, "weight", weight, "(V, D)", (num_blocks * shape[0], shape[1]))
        blocks = weight.detach().unflatten(0, (num_blocks, self.vocab_size))
        self.leaves.start_from(self.listed.narrow(blocks, 1))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        ids = state_dict.get(prefix + "shortlist")
        if ids is not None:
            ascends = torch.equal(ids, checked_ids(ids, self.vocab_size).to(ids.device))
            found = "" if ascends else f"{ids.tolist()!r:.200}"
            require(ascends, "CircuitHead", "shortlist", "ascending ids", found)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # ---------------------------------------------------------------------------------------------
    # Queries

    def circuit(self, h: Tensor) -> Circuit:
        """Return the circuits of all rows of ``h (..., D)``, as arguments of the circuit ops.

        The circuits contain ``N K C V`` logits, so call this method for few rows only. Tokens
        outside the shortlist have the logit ``-inf``.
        """
        listed, circuit = self.listed, self.narrow_circuit(h)
        return circuit if listed.ids is None else circuit._replace(leaf=listed.widen(circuit.leaf))

    def narrow_circuit(self, h: Tensor) -> Circuit:
        """Return the circuits with leaves over only the L tokens of the shortlist: ``N K C L``
        logits."""
        rows = self.rows(h)
        logits = self.leaves.logits(rows)
        if isinstance(self.sums, SharedCircuit):
            return Circuit(*self.sums.circuit(logits))
        return Circuit(logits, *self.sums(rows))

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        """Compute ``log q(x_1 .. x_k | h)`` for every k, ``(..., K)``.

        The last entry is the log-probability of the whole window. If the window has a token outside
        the shortlist, the entries of this and all later positions are ``-inf``.

        The result is differentiable. The method stores ``N K C`` numbers and one chunk of bounded
        size, but no logits over the whole vocabulary.

        Args:
            h: hidden states ``(..., D)``, floating-point.
            x: ``(..., K)`` int64, tokens or :data:`IGNORE`.

        Raises:
            ValueError: If a shape is wrong, or (on the CPU) a token is outside the vocabulary.
            TypeError: If hidden states are not floating-point, or tokens are not int64.
        """
        return self.scan(h, x).prefix.view(x.shape)

    def conditionals(self, h: Tensor, x: Tensor) -> Tensor:
        """Compute ``log q(x_k | x_<k, h)`` for every k, ``(..., K)``; 0 if ``x_k`` is ignored.
        Arguments and errors are those of :meth:`log_prob`."""
        conditional = self.scan(h, x).conditional.view(x.shape)
        return torch.where(x == IGNORE, 0, conditional)  # exactly 0 despite rounded weights

    @torch.no_grad()
    def full_conditional(self, h: Tensor, x: Tensor, k: int | Tensor) -> Tensor:
        """Compute ``log q(. | x_<k, h)`` over the vocabulary, ``(..., V)``, without gradient.

        Args:
            h: hidden states, as in :meth:`log_prob`.
            x: tokens, as in :meth:`log_prob`.
            k: position, counted from 0: one for all rows, or ``(...)`` int64 with one per row.

        Raises:
            ValueError: If ``k`` is outside [0, K), or as for :meth:`log_prob`.
        """
        rows, tokens = self.rows(h), self.tokens(h, x)
        shape, k = h.shape[:-1], torch.as_tensor(k, device=h.device)
        require(k.dtype == torch.int64, "CircuitHead", "k", "int64", k.dtype, TypeError)
        fits = k.shape in ((), shape)
        expected = f"one position or shape {tuple(shape)}"
        require(fits, "CircuitHead", "k", expected, tuple(k.shape))
        k = k.expand(shape).reshape(-1)
        wrong = (k < 0) | (k >= self.n_token)
        if checkable(k) and bool(wrong.any()):
            expected, found = f"positions in [0, {self.n_token})", int(k[wrong][0])
            raise ValueError(f"CircuitHead: k: expected {expected}, found {found}")
        dist = ops.circuit_conditional_dist(self.kind, *self.circuit(rows), tokens, k)
        return dist.view(*shape, self.vocab_size)

    @torch.no_grad()
    def sample(
        self,
        h: Tensor,
        evidence: Tensor | None = None,
        generator: torch.Generator | None = None,
        uniforms: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw exact samples of the window.

        Args:
            h: hidden states ``(..., D)``.
            evidence: ``(..., K)`` int64: known tokens at the first positions, :data:`IGNORE` at all
                others.
            generator: generator of the random numbers, on the device of ``h``.
            uniforms: ``(..., K, 2)`` numbers in [0, 1) to use instead of random numbers; equal
                numbers give equal tokens.

        Returns:
            tokens ``(..., K)`` int64, and their conditional log-probabilities ``(..., K)``.
        """
        rows, shape = self.rows(h), (*h.shape[:-1], self.n_token)
        if uniforms is None:
            options = {"dtype": torch.float32, "device": h.device}
            uniforms = torch.rand(*shape, 2, generator=generator, **options)
        require_shape("CircuitHead", "uniforms", uniforms, "(..., K, 2)", (*shape, 2))
        given = self._evidence(h, evidence)
        tokens, conditional, *_ = ops.circuit_sample(
            self.kind, *self.circuit(rows), uniforms.reshape(-1, self.n_token, 2), given
        )
        return tokens.view(shape), conditional.view(shape)

    @torch.no_grad()
    def argmax(self, h: Tensor, evidence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the jointly most probable tokens and latent variables.

        If the latent variables are summed out, other tokens may be more probable.

        Args:
            h: hidden states ``(..., D)``.
            evidence: as in :meth:`sample`.

        Returns:
            tokens ``(..., K)`` int64, and their joint log-probability with the latent variables
            ``(...)``.
        """
        rows, given = self.rows(h), self._evidence(h, evidence)
        tokens, value = ops.circuit_argmax(self.kind, *self.circuit(rows), given)
        return tokens.view(*h.shape[:-1], self.n_token), value.view(h.shape[:-1])

    # ---------------------------------------------------------------------------------------------
    # Steps

    def rows(self, h: Tensor) -> Tensor:
        """Reshape hidden states ``(..., D)`` to rows ``(N, D)`` in the dtype of the parameters.

        Raises:
            TypeError: If hidden states are not floating-point.
            ValueError: If their width is wrong.
        """
        require(h.is_floating_point(), "CircuitHead", "h", "a floating dtype", h.dtype, TypeError)
        fits = h.dim() != 0 and h.shape[-1] == self.hidden_size
        require(fits, "CircuitHead", "h", f"shape (..., {self.hidden_size})", tuple(h.shape))
        return h.reshape(-1, self.hidden_size).to(next(self.leaves.parameters()).dtype)

    def tokens(self, h: Tensor, x: Tensor) -> Tensor:
        """Reshape windows ``(..., K)`` to ``(N, K)``, with -1 for marginalised tokens, as the
        circuit ops expect.

        Raises:
            TypeError: If tokens are not int64.
            ValueError: If the shape does not match ``h``, or (on the CPU) a token is outside the
                vocabulary.
        """
        require(x.dtype == torch.int64, "CircuitHead", "tokens", "int64", x.dtype, TypeError)
        shape, found = (*h.shape[:-1], self.n_token), tuple(x.shape)
        require(found == shape, "CircuitHead", "tokens", f"shape {shape}", found)
        if checkable(x):
            wrong = ((x < 0) | (x >= self.vocab_size)) & (x != IGNORE)
            if bool(wrong.any()):
                expected, found = f"ids in [0, {self.vocab_size}) or {IGNORE}", int(x[wrong][0])
                raise ValueError(f"CircuitHead: tokens: expected {expected}, found {found}")
        return torch.where(x == IGNORE, -1, x).reshape(-1, self.n_token)

    def scan(self, h: Tensor, x: Tensor) -> reference.CircuitScan:
        """Compute prefix marginals and conditionals ``(N, K)`` and posteriors ``(N, K, C)`` of the
        windows' tokens in one pass. Arguments and errors are those of :meth:`log_prob`."""
        rows, tokens = self.rows(h), self.tokens(h, x)
        places = self.listed.places(tokens)
        if isinstance(self.sums, SharedCircuit):
            observed, *sums = self.sums.observed(self.leaves, rows, places)
        else:
            observed, sums = self.leaves.observed(rows, places), self.sums(rows)
        if self.shortlist is not None:
            observed = observed.masked_fill(self.listed.lacks(tokens)[..., None], -torch.inf)
        return ops.circuit_scan(self.kind, observed, *sums)

    def _evidence(self, h: Tensor, evidence: Tensor | None) -> Tensor | None:
        if evidence is None:
            return None
        given = self.tokens(h, evidence)
        if checkable(given) and bool(((given[:, 1:] >= 0) & (given[:, :-1] < 0)).any()):
            found = f"found {evidence.tolist()!r:.200}"
            raise ValueError(f"CircuitHead: evidence: expected {IGNORE} only at the end, {found}")
        return given

    def extra_repr(self) -> str:
        """Return width, vocabulary, window, rank, kind, emission and shortlist, for ``print``."""
        listed = "" if self.shortlist is None else f", shortlist of {self.num_leaves}"
        listed += ", evidence='soft'" if self.evidence == "soft" else ""
        return (
            f"{self.hidden_size}, {self.vocab_size}, n_token={self.n_token}, rank={self.rank}, "
            f"kind={self.kind!r}, emission={self.emission!r}{listed}"
        )
