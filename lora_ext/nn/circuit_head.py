"""CircuitHead: hidden states to a joint distribution over the next tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_ext import ops, reference
from lora_ext.reference.circuit import KINDS, log_softmax, num_transitions

from .labels import IGNORE
from .rows import keep

EMISSIONS = ("full", "expander", "adapter")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Of new rows, times D^-1/2, so that logits start alike at any width: the authors' at D = 4096.
_INIT_BOUND = 0.01275 * 64
_STAY = 0.99  # probability of keeping the state under init_identity; our choice
_CHUNK = 1 << 24  # elements of the largest intermediate tensor of a chunk of rows


class Circuit(NamedTuple):
    """Logits of the circuits of ``N`` rows, as the circuit ops take them."""

    leaf: Tensor  # (N, K, C, V)
    prior: Tensor | None  # (N, C)
    trans: Tensor | None  # (N, M, C, C)


class CircuitHead(nn.Module):
    """``q(x_1 .. x_K | h)``: a probabilistic circuit whose parameters are functions of ``h``.

    Letters: ``N`` rows, ``D`` hidden width, ``K`` positions, ``C`` components, ``V`` vocabulary,
    ``L`` tokens of the shortlist (without one ``L = V``), ``M`` transition matrices. Sum weights
    are ``softmax(w @ h)``; leaves are ``softmax(logits)``:

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

    Hidden states are ``(..., D)`` and windows ``(..., K)``, with the same leading dimensions, which
    results keep. A token :data:`IGNORE` is marginalised.

    Args:
        hidden_size: ``D``. vocab_size: ``V``, at least 2. n_token: ``K``. rank: ``C``.
        kind: ``"ff"``, ``"cp"``, ``"hmm"`` or ``"btree"``.
        emission: see the table. ``full`` for small vocabularies, ``adapter`` for large ones.
        adapter_rank: ``R`` of ``adapter``, 1 to 256.
        contextual: whether transitions depend on ``h``; otherwise they are free parameters.
        share_transitions: one transition matrix instead of ``M``.
        init_identity: transitions start by keeping the state with probability 0.99, so that an HMM
            or tree starts near the mixture CP; otherwise they start near uniform.
        shortlist: ``(L,)`` int64, distinct ids of at least 2 tokens: all others have probability
            exactly 0, no parameters and no products. As evidence they are impossible: what follows
            one has log-probability ``-inf``. Default is the whole vocabulary.
        dtype, device: of the parameters; float16, bfloat16, float32 or float64.

    Raises:
        ValueError: sizes out of range, an unknown kind or emission, ``ff`` with a rank other than
            1, ``hmm`` or ``btree`` with rank or n_token below 2, a shortlist with fewer than 2
            tokens, a token twice or one outside the vocabulary. NotImplementedError: other dtypes.

    Source: "Fast and Expressive Multi-Token Prediction with Probabilistic Circuits" (arXiv
    2511.11346) and its code; ``adapter`` is ours (docs/mtpc.md). A shortlist for the draft:
    FR-Spec (arXiv 2502.14856).
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        n_token: int,
        rank: int,
        kind: str,
        emission: str = "full",
        adapter_rank: int = 16,
        contextual: bool = True,
        share_transitions: bool = False,
        init_identity: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        shortlist: Tensor | Sequence[int] | None = None,
    ):
        super().__init__()
        _check_sizes(hidden_size, vocab_size, n_token, rank, kind, emission, adapter_rank)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _DTYPES:
            raise NotImplementedError(
                f"CircuitHead: dtype: expected one of {_DTYPES}, found {dtype}"
            )
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.n_token = n_token
        self.rank = rank
        self.kind = kind
        self.emission = emission
        self.adapter_rank = adapter_rank
        self.contextual = contextual
        self.share_transitions = share_transitions
        self.init_identity = init_identity
        self.num_transitions = num_transitions(kind, n_token)
        self.shortlist: Tensor | None
        checked = None if shortlist is None else _checked_shortlist(shortlist, vocab_size)
        if checked is not None:
            checked = checked.to(torch.empty(0, device=device).device)
        self.register_buffer("shortlist", checked)
        self.num_leaves = vocab_size if self.shortlist is None else len(self.shortlist)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device))

        k, c, v, d = n_token, rank, self.num_leaves, hidden_size
        if emission == "full":
            self.emit = parameter(k, c, v, d)
        elif emission == "expander":
            self.maps = parameter(k, c, d, d)
            self.unembed = parameter(v, d)
        else:
            self.lora_A = parameter(k * c, adapter_rank, d)
            self.lora_B = parameter(k * c, d, adapter_rank)
            self.register_buffer("unembed", torch.empty(v, d, dtype=dtype, device=device))
        self.prior = None if kind == "ff" else parameter(c, d)
        stored = min(self.num_transitions, 1) if share_transitions else self.num_transitions
        self.trans_bias = parameter(stored, c, c) if stored else None
        self.trans = parameter(stored, c, c, d) if stored and contextual else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """New initial values, from torch's generator.

        :meth:`init_from_lm_head` makes the components of some positions equal; random sum weights
        and later positions tell them apart.
        """
        bound = _INIT_BOUND / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        if self.emission == "expander":
            self.maps.copy_(torch.eye(self.hidden_size).expand_as(self.maps))
        elif self.emission == "adapter":
            # Not in place: it may be the model's own.
            self.unembed = torch.empty_like(self.unembed).uniform_(-bound, bound)
            bound = 1 / math.sqrt(self.hidden_size)  # what "init_a" of init_lora_ draws
            nn.init.uniform_(self.lora_A, -bound, bound)
            nn.init.zeros_(self.lora_B)
        if self.trans_bias is not None:
            stay = math.log((self.rank - 1) * _STAY / (1 - _STAY)) if self.init_identity else 0.0
            self.trans_bias.copy_(stay * torch.eye(self.rank).expand_as(self.trans_bias))

    @torch.no_grad()
    def init_from_lm_head(self, weight: Tensor, num_blocks: int = 1) -> None:
        """Start from the unembedding of a language model.

        ``full``: every component of position k becomes block k; positions beyond the blocks keep
        their values. ``expander``: a copy of block 0. ``adapter``: block 0 itself; without
        a shortlist and where dtype and device agree it shares the model's memory.

        Args:
            weight: ``(num_blocks * V, D)``. num_blocks: how many positions the model predicts.

        Raises:
            ValueError: another shape.
        """
        expected = (num_blocks * self.vocab_size, self.hidden_size)
        if num_blocks < 1 or tuple(weight.shape) != expected:
            raise ValueError(
                f"CircuitHead.init_from_lm_head: weight: expected shape {expected} for "
                f"{num_blocks} blocks, found {tuple(weight.shape)}"
            )
        blocks = weight.detach().unflatten(0, (num_blocks, self.vocab_size))
        if self.shortlist is not None:
            blocks = blocks[:, self.shortlist.to(weight.device)]
        if self.emission == "full":
            for position, block in zip(self.emit, blocks, strict=False):
                position.copy_(block.expand_as(position))
        elif self.emission == "expander":
            self.unembed.copy_(blocks[0])
        else:
            self.unembed = blocks[0].to(self.unembed)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        listed = state_dict.get(prefix + "shortlist")
        if listed is not None and not torch.equal(
            listed, _checked_shortlist(listed, self.vocab_size).to(listed.device)
        ):
            raise ValueError("CircuitHead: shortlist: expected ascending ids in a state dict")
        saved = state_dict.get(prefix + "unembed")
        if self.emission == "adapter" and saved is not None and not self.unembed.is_meta:
            same = saved.shape == self.unembed.shape
            if not (same and torch.equal(saved.to(self.unembed), self.unembed)):
                self.unembed = torch.empty_like(self.unembed)  # the old one may be the model's own
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # ---------------------------------------------------------------------------------------------
    # Queries

    def circuit(self, h: Tensor) -> Circuit:
        """The circuits of all rows, for the circuit ops: ``N K C V`` logits, so for few rows.
        Those of tokens outside the shortlist are ``-inf``."""
        rows = self._rows(h)
        leaf = self._leaf(rows)
        if self.shortlist is not None:
            wide = leaf.new_full((*leaf.shape[:3], self.vocab_size), -torch.inf)
            leaf = wide.index_copy_(-1, self.shortlist, leaf)
        return Circuit(leaf, *self._sum_weights(rows))

    def log_prob(self, h: Tensor, x: Tensor) -> Tensor:
        """``log q(x_1 .. x_k | h)`` for every k, ``(..., K)``; the last is the whole window's.
        ``-inf`` from the first token outside the shortlist on.

        Differentiable. Memory is ``N K C`` and a bounded chunk: no logits over the vocabulary.

        Args:
            h: ``(..., D)`` floating. x: ``(..., K)`` int64 tokens or :data:`IGNORE`.

        Raises:
            ValueError: a shape that does not fit, or (on the CPU) a token outside the vocabulary.
            TypeError: hidden states that are not floating, tokens that are not int64.
        """
        return self._scan(h, x).prefix.view(x.shape)

    def conditionals(self, h: Tensor, x: Tensor) -> Tensor:
        """``log q(x_k | x_<k, h)``, ``(..., K)``; 0 where ``x_k`` is ignored. As
        :meth:`log_prob`."""
        conditional = self._scan(h, x).conditional.view(x.shape)
        return torch.where(x == IGNORE, 0, conditional)  # 0, not a sum of weights rounded to 1

    @torch.no_grad()
    def full_conditional(self, h: Tensor, x: Tensor, k: int | Tensor) -> Tensor:
        """``log q(. | x_<k, h)`` over the vocabulary, ``(..., V)``; without gradient.

        Args:
            h, x: as in :meth:`log_prob`. k: one position from 0, or one per row, ``(...)`` int64.

        Raises:
            ValueError: k outside [0, K), or as :meth:`log_prob`.
        """
        rows, tokens = self._rows(h), self._tokens(h, x)
        k = torch.as_tensor(k, device=h.device)
        if k.dtype != torch.int64:
            raise TypeError(f"CircuitHead: k: expected int64, found {k.dtype}")
        if k.dim() and k.shape != h.shape[:-1]:
            raise ValueError(
                f"CircuitHead: k: expected one position or shape {tuple(h.shape[:-1])}, "
                f"found {tuple(k.shape)}"
            )
        k = k.expand(h.shape[:-1]).reshape(-1)
        if _looked_at(k) and bool(((k < 0) | (k >= self.n_token)).any()):
            raise ValueError(f"CircuitHead: k: expected positions in [0, {self.n_token})")
        dist = ops.circuit_conditional_dist(self.kind, *self.circuit(rows), tokens, k)
        return dist.view(*h.shape[:-1], self.vocab_size)

    @torch.no_grad()
    def sample(
        self,
        h: Tensor,
        evidence: Tensor | None = None,
        generator: torch.Generator | None = None,
        uniforms: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Exact samples of the window.

        Args:
            h: ``(..., D)``.
            evidence: ``(..., K)`` int64, given tokens first, then :data:`IGNORE`.
            generator: of the uniforms, on the device of ``h``.
            uniforms: ``(..., K, 2)`` in [0, 1) instead: equal uniforms, equal tokens.

        Returns:
            tokens ``(..., K)`` int64, and their log conditionals ``(..., K)``.
        """
        rows, shape = self._rows(h), (*h.shape[:-1], self.n_token)
        if uniforms is None:
            options = {"dtype": torch.float32, "device": h.device}
            uniforms = torch.rand(*shape, 2, generator=generator, **options)
        elif tuple(uniforms.shape) != (*shape, 2):
            raise ValueError(
                f"CircuitHead: uniforms: expected shape {(*shape, 2)}, "
                f"found {tuple(uniforms.shape)}"
            )
        given = self._evidence(h, evidence)
        tokens, conditional, *_ = ops.circuit_sample(
            self.kind, *self.circuit(rows), uniforms.reshape(-1, self.n_token, 2), given
        )
        return tokens.view(shape), conditional.view(shape)

    @torch.no_grad()
    def argmax(self, h: Tensor, evidence: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The most probable tokens and latents: tokens ``(..., K)``, log-probability ``(...)``.

        Not the mode over tokens alone. Evidence is as in :meth:`sample`.
        """
        rows, given = self._rows(h), self._evidence(h, evidence)
        tokens, value = ops.circuit_argmax(self.kind, *self.circuit(rows), given)
        return tokens.view(*h.shape[:-1], self.n_token), value.view(h.shape[:-1])

    # ---------------------------------------------------------------------------------------------
    # Training

    def loss(
        self,
        h: Tensor,
        labels: Tensor,
        gamma: float = 0.9,
        beta: float = 0.0,
        teacher_logits: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Discounted cross entropy of the windows, with optional distillation.

        ``CE_k`` is the mean of ``-log q(x_k | x_<k)`` over the windows whose ``x_k`` counts, and
        ``KL_k`` that of ``KL(p_k || q(. | x_<k))``:
        ``loss = sum_k gamma^(k-1) (beta KL_k + (1 - beta) CE_k) / sum_k gamma^(k-1)``.

        Args:
            h: ``(..., D)``.
            labels: ``(..., K)`` windows, as ``methods.mtpc.unfold_windows`` makes them. Tokens
                outside the shortlist are marginalised, as :data:`IGNORE` is.
            gamma: discount in (0, 1]. beta: share of distillation in [0, 1].
            teacher_logits: ``(..., K, V)`` of the verifier, required with ``beta > 0``. That term
                is plain torch on chunks of rows, and costs ``N K C L`` logits in time. With a
                shortlist the teacher's law given that the token is on it.

        Returns:
            the loss, and ``beta KL_k + (1 - beta) CE_k`` of each position ``(K,)``.

        Raises:
            ValueError: gamma or beta out of range, a teacher that is missing or of another shape;
            or as :meth:`log_prob`.

        Source: arXiv 2511.11346 (docs/mtpc.md, "Objective").
        """
        if not 0 < gamma <= 1:
            raise ValueError(f"CircuitHead.loss: gamma: expected a number in (0, 1], found {gamma}")
        if not 0 <= beta <= 1:
            raise ValueError(f"CircuitHead.loss: beta: expected a number in [0, 1], found {beta}")
        if self.shortlist is not None:
            places = self._places(self._tokens(h, labels)).view(labels.shape)
            labels = torch.where(places == -1, IGNORE, labels)
        conditionals = self.conditionals(h, labels)  # first, because it checks them
        count = (labels != IGNORE).reshape(-1, self.n_token).sum(0).clamp(min=1)
        each = -conditionals.view(-1, self.n_token).sum(0) / count  # (K,)
        if beta > 0:
            divergence = self._divergence(h, labels, teacher_logits) / count
            each = beta * divergence + (1 - beta) * each
        weight = gamma ** torch.arange(self.n_token, dtype=each.dtype, device=each.device)
        return (weight * each).sum() / weight.sum(), each

    def _divergence(self, h: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """``sum_b KL(p_k || q(. | x_<k))`` over the windows whose ``x_k`` counts, ``(K,)``."""
        expected = (*labels.shape, self.vocab_size)
        if teacher is None or tuple(teacher.shape) != expected:
            found = "none" if teacher is None else tuple(teacher.shape)
            raise ValueError(
                f"CircuitHead.loss: teacher_logits: expected shape {expected} with beta > 0, "
                f"found {found}"
            )
        if labels.numel() == 0:
            return teacher.new_zeros(self.n_token)
        if labels.dim() > 2:  # windows of a teacher share memory, which flattening would undo
            parts = zip(h, labels, teacher, strict=True)
            return torch.stack([self._divergence(*part) for part in parts]).sum(0)
        chunk = self._chunk(self.n_token * self.rank * self.num_leaves)
        parts = zip(h.split(chunk), labels.split(chunk), teacher.split(chunk), strict=True)
        return torch.stack([_recomputed(self._chunk_divergence, *part) for part in parts]).sum(0)

    def _chunk_divergence(self, h: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
        rows, tokens = self._rows(h), self._places(self._tokens(h, labels))
        circuit = Circuit(self._leaf(rows), *self._sum_weights(rows))
        posterior = reference.circuit_scan(self.kind, *circuit, tokens).posterior
        leaf = circuit.leaf.to(posterior.dtype).softmax(-1)
        q = torch.einsum("nkc,nkcv->nkv", posterior, leaf)
        log_q = q.clamp(min=torch.finfo(q.dtype).tiny).log()
        if self.shortlist is not None:
            teacher = teacher[..., self.shortlist]
        log_p = log_softmax(teacher.to(posterior.dtype))
        gap = torch.where(log_p == -torch.inf, 0, log_p - log_q)
        return ((log_p.exp() * gap).sum(-1) * (tokens >= 0)).sum(0)

    # ---------------------------------------------------------------------------------------------
    # Parts

    def _leaf(self, rows: Tensor) -> Tensor:
        """Logits of the leaves, ``(N, K, C, L)``."""
        if self.emission == "full":
            leaf = F.linear(rows, self.emit.flatten(0, 2))  # (N, K C L)
        else:
            leaf = F.linear(self._states(rows), self.unembed)  # (N K C, L)
        return leaf.view(len(rows), self.n_token, self.rank, self.num_leaves)

    def _places(self, tokens: Tensor) -> Tensor:
        """Of tokens on the shortlist; -1 for others of the vocabulary, and what is no token stays
        as it is, for the ops to refuse or marginalise."""
        if self.shortlist is None:
            return tokens
        tokens = tokens.contiguous()
        place = torch.searchsorted(self.shortlist, tokens).clamp(max=self.num_leaves - 1)
        other = torch.where((tokens >= 0) & (tokens < self.vocab_size), -1, tokens)
        return torch.where(self.shortlist[place] == tokens, place, other)

    def _scan(self, h: Tensor, x: Tensor) -> reference.CircuitScan:
        rows, tokens = self._rows(h), self._tokens(h, x)
        places = self._places(tokens)
        observed = self._observed(rows, places)
        if self.shortlist is not None:
            impossible = (places == -1) & (tokens >= 0)
            observed = observed.masked_fill(impossible[..., None], -torch.inf)
        return ops.circuit_scan(self.kind, observed, *self._sum_weights(rows))

    def _observed(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """``log leaf(x_k)`` under every component, ``(N, K, C)``."""
        if self.emission == "full":
            return ops.emission_gather(rows, self.emit, tokens)
        chunk = self._chunk(self.n_token * self.rank * self.hidden_size)
        if len(rows) <= chunk:  # its states are few enough to be kept for the backward
            return self._chunk_observed(rows, tokens)
        parts = zip(rows.split(chunk), tokens.split(chunk), strict=True)
        return torch.cat([_recomputed(self._chunk_observed, *part) for part in parts])

    def _chunk_observed(self, rows: Tensor, tokens: Tensor) -> Tensor:
        shape = len(rows), self.n_token, self.rank
        targets = tokens[:, :, None].expand(shape).reshape(-1, 1)
        states, unembed = self._states(rows), self.unembed[None, None]
        return ops.emission_gather(states, unembed, targets).view(shape)

    def _states(self, rows: Tensor) -> Tensor:
        """A hidden state per position and component, over the shared unembedding,
        ``(N K C, D)``."""
        d, adapters = self.hidden_size, self.n_token * self.rank
        if self.emission == "expander":
            return F.linear(rows, self.maps.flatten(0, 2)).view(-1, d)
        x = rows[:, None].expand(-1, adapters, -1).reshape(-1, d)

        def make() -> tuple[Tensor, Tensor]:
            ids = torch.arange(adapters, dtype=torch.int32, device=rows.device).repeat(len(rows))
            return ids, ops.lora_plan(ids, adapters)

        ids, plan = keep(("circuit_head", adapters, len(rows)), rows.device, make)
        return x + ops.lora_apply(x, self.lora_A, self.lora_B, ids, plan=plan)

    def _sum_weights(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Logits of prior ``(N, C)`` and transitions ``(N, M, C, C)``."""
        prior = None if self.prior is None else F.linear(rows, self.prior)
        if self.trans_bias is None:
            return prior, None
        stored, c = self.trans_bias.shape[:2]
        if self.trans is None:
            trans = self.trans_bias[None]
        else:
            trans = F.linear(rows, self.trans.flatten(0, 2), self.trans_bias.flatten())
            trans = trans.view(-1, stored, c, c)
        return prior, trans.expand(len(rows), self.num_transitions, c, c)

    def _chunk(self, per_row: int) -> int:
        return max(1, _CHUNK // per_row)

    def _rows(self, h: Tensor) -> Tensor:
        """``(N, D)`` in the dtype of the parameters."""
        if not h.is_floating_point():
            raise TypeError(f"CircuitHead: h: expected a floating dtype, found {h.dtype}")
        if h.dim() == 0 or h.shape[-1] != self.hidden_size:
            raise ValueError(
                f"CircuitHead: h: expected shape (..., {self.hidden_size}), found {tuple(h.shape)}"
            )
        return h.reshape(-1, self.hidden_size).to(self._dtype())

    def _dtype(self) -> torch.dtype:
        return (self.emit if self.emission == "full" else self.unembed).dtype

    def _tokens(self, h: Tensor, x: Tensor) -> Tensor:
        """``(N, K)`` of the vocabulary, with -1 for what is marginalised, as the ops have it."""
        if x.dtype != torch.int64:
            raise TypeError(f"CircuitHead: tokens: expected int64, found {x.dtype}")
        expected = (*h.shape[:-1], self.n_token)
        if tuple(x.shape) != expected:
            raise ValueError(
                f"CircuitHead: tokens: expected shape {expected}, found {tuple(x.shape)}"
            )
        if _looked_at(x):
            wrong = ((x < 0) | (x >= self.vocab_size)) & (x != IGNORE)
            if bool(wrong.any()):
                raise ValueError(
                    f"CircuitHead: tokens: expected ids in [0, {self.vocab_size}) or {IGNORE}, "
                    f"found {int(x[wrong][0])}"
                )
        return torch.where(x == IGNORE, -1, x).reshape(-1, self.n_token)

    def _evidence(self, h: Tensor, evidence: Tensor | None) -> Tensor | None:
        if evidence is None:
            return None
        given = self._tokens(h, evidence)
        if _looked_at(given) and bool(((given[:, 1:] >= 0) & (given[:, :-1] < 0)).any()):
            raise ValueError("CircuitHead: evidence: expected given tokens first, found a gap")
        return given

    def extra_repr(self) -> str:
        """Sizes and kind."""
        listed = "" if self.shortlist is None else f", shortlist of {self.num_leaves}"
        return (
            f"{self.hidden_size}, {self.vocab_size}, n_token={self.n_token}, rank={self.rank}, "
            f"kind={self.kind!r}, emission={self.emission!r}{listed}"
        )


def _looked_at(t: Tensor) -> bool:
    """Whether the head may read numbers on the host; the ops look once more, when they run."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling()


def _recomputed(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    """``function(*args)``, whose intermediate tensors the backward computes again."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore[reportReturnType]


def _checked_shortlist(shortlist: Tensor | Sequence[int], vocab_size: int) -> Tensor:
    """In ascending order, on the CPU."""
    ids = torch.as_tensor(shortlist, device="cpu")
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(
            f"CircuitHead: shortlist: expected shape (L,) with L >= 2, found {tuple(ids.shape)}"
        )
    if ids.dtype != torch.int64:
        raise TypeError(f"CircuitHead: shortlist: expected int64, found {ids.dtype}")
    ids = ids.sort().values
    if int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        raise ValueError(
            f"CircuitHead: shortlist: expected ids in [0, {vocab_size}), "
            f"found {int(ids[0])} to {int(ids[-1])}"
        )
    if bool((ids[1:] == ids[:-1]).any()):
        raise ValueError("CircuitHead: shortlist: expected distinct ids, found one twice")
    return ids


def _check_sizes(
    hidden_size: int,
    vocab_size: int,
    n_token: int,
    rank: int,
    kind: str,
    emission: str,
    adapter_rank: int,
) -> None:
    def require(ok: bool, name: str, expected: str, found: object) -> None:
        if not ok:
            raise ValueError(f"CircuitHead: {name}: expected {expected}, found {found!r}")

    require(kind in KINDS, "kind", f"one of {KINDS}", kind)
    require(emission in EMISSIONS, "emission", f"one of {EMISSIONS}", emission)
    require(hidden_size >= 1, "hidden_size", "at least 1", hidden_size)
    require(vocab_size >= 2, "vocab_size", "at least 2", vocab_size)
    chained = kind in ("hmm", "btree")
    least = 2 if chained else 1
    require(n_token >= least, "n_token", f"at least {least} for {kind!r}", n_token)
    require(rank >= least, "rank", f"at least {least} for {kind!r}", rank)
    require(kind != "ff" or rank == 1, "rank", "1 for 'ff'", rank)
    require(1 <= adapter_rank <= 256, "adapter_rank", "1 to 256", adapter_rank)
