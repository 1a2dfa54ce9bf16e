"""Exact self-speculative decoding: a circuit drafts, the model verifies, no law changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext import ops
from lora_ext.nn import CircuitHead
from lora_ext.nn.circuit_head import Circuit
from lora_ext.reference.lora import accumulator

from .tail import DraftTail
from .trunk import Trunk

MODES = ("sample", "greedy")
WINDOWS = ("condition", "restart")


@dataclass(frozen=True)
class Generation:
    """What :meth:`SpeculativeDecoder.generate` returns. Lists have one entry per row.

    Attributes:
        sequences: ``(B, S + L)`` int64: prompts and new tokens, padded on the right.
        calls: passes of the verifier over a draft, while the row was unfinished.
        accepted: drafted tokens that the verifier kept, also those cut by a stop rule.
        emitted: accepted tokens and the verifier's own, one per call, also those cut.
        passes: passes of the trunk in all, after the prompts.
    """

    sequences: Tensor
    calls: list[int]
    accepted: list[int]
    emitted: list[int]
    passes: int

    @property
    def accepted_per_call(self) -> float:
        """Mean over all calls of all rows."""
        return sum(self.accepted) / max(1, sum(self.calls))

    @property
    def emitted_per_call(self) -> float:
        """Tokens that a call yields, on average."""
        return sum(self.emitted) / max(1, sum(self.calls))


class _Draft(NamedTuple):
    circuit: Circuit
    tokens: Tensor  # (B, K)
    conditional: Tensor  # (B, K)
    posterior: Tensor  # (B, K, C)


class SpeculativeDecoder:
    """Generates from ``model`` by drafting windows with ``head`` and verifying each in one pass.

    "sample" follows the model's distribution exactly (after temperature and top_p), "greedy" gives
    the model's own greedy tokens; both up to the rounding of the model's passes, whose shapes
    differ from those of token-by-token decoding.

    A call accepts a prefix of the draft and adds one token of the verifier's law. With
    ``window="condition"`` that token becomes evidence of the next window, and a call is one pass of
    the trunk; with ``"restart"`` it is first fed alone, which costs a second pass and frees all of
    the window.

    While it generates, the model carries hooks: one call at a time on one model.

    Args:
        model: a transformers causal LM with full attention, in evaluation mode.
        head: a trained head for it.
        mode: "sample" or "greedy". window: "condition" or "restart"; see docs/mtpc.md.
        temperature: of the model's law, above 0. top_p: nucleus of it, in (0, 1].
        tail: the draft path's own layers, if the head was trained with them.

    Raises:
        ValueError: a setting out of range, or a head of another width or vocabulary.

    Sources: speculative sampling (Leviathan et al. 2023); arXiv 2511.11346; conditioning the next
    window on the kept token is ours.
    """

    def __init__(
        self,
        model: Any,
        head: CircuitHead,
        mode: str = "sample",
        window: str = "condition",
        temperature: float = 1.0,
        top_p: float = 1.0,
        tail: DraftTail | None = None,
    ):
        vocab_size, hidden_size = model.get_output_embeddings().weight.shape
        for ok, name, expected, found in (
            (mode in MODES, "mode", f"one of {MODES}", mode),
            (window in WINDOWS, "window", f"one of {WINDOWS}", window),
            (0 < temperature < math.inf, "temperature", "a number above 0", temperature),
            (0 < top_p <= 1, "top_p", "a number in (0, 1]", top_p),
            (
                (head.vocab_size, head.hidden_size) == (vocab_size, hidden_size),
                "head",
                f"vocabulary and width {(vocab_size, hidden_size)} as in the model's LM head",
                (head.vocab_size, head.hidden_size),
            ),
        ):
            if not ok:
                raise ValueError(
                    f"SpeculativeDecoder: {name}: expected {expected}, found {found!r}"
                )
        self.model = model
        self.head = head
        self.mode = mode
        self.window = window
        self.temperature = temperature
        self.top_p = top_p
        self.tail = tail

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | Sequence[int] = 0,
    ) -> Generation:
        """New tokens for every prompt.

        Args:
            input_ids: ``(B, S)`` prompts, padded on the left.
            attention_mask: ``(B, S)``, 0 on padding; default is no padding.
            max_new_tokens: at least 1.
            eos_token_id: a row ends with the first of these; default is the model's own.
            pad_token_id: of rows that end early; default is the model's own, then the end's.
            seed: of row 0, and one more for each next row, or one per row. A row depends on its own
                seed alone, not on the batch around it.

        Raises:
            ValueError: shapes, padding or numbers that do not fit, naming the argument.
        """
        if max_new_tokens < 1:
            raise ValueError(
                f"SpeculativeDecoder: max_new_tokens: expected at least 1, found {max_new_tokens}"
            )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = _Rows(len(input_ids), max_new_tokens, *_ends(self.model, eos_token_id, pad_token_id))
        generators = _generators(seed, len(input_ids))
        n = self.head.n_token
        trunk = Trunk(self.model, self.tail, input_ids, mask, max_new_tokens)
        first, hidden, passes = trunk.first_logits, trunk.first_hidden, 0
        pending: Tensor | None = None  # (B,) tokens that are decided and not yet fed
        while rows.live:
            if pending is not None and self.window == "restart":
                logits, states = trunk.feed(pending[:, None])
                trunk.keep(torch.ones_like(pending), 1)
                first, hidden, pending = logits[:, 0], states[:, 0], None
                passes += 1
            uniforms = self._uniforms([generators[row] for row in rows.live], input_ids.device)
            draft = self._draft(hidden, pending, uniforms[:, : 2 * n].unflatten(1, (n, 2)))
            logits, states = trunk.feed(draft.tokens)
            passes += 1
            # With evidence the window's first token is not tested, whatever stands in its place.
            target = torch.cat([first[:, None], logits], 1)  # (B, K + 1, V)
            accepted, token = self._verify(draft, target, pending, uniforms[:, 2 * n :])
            trunk.keep(accepted, n)
            states = torch.cat([hidden[:, None], states], 1)  # (B, K + 1, D)
            hidden = states[torch.arange(len(accepted), device=states.device), accepted]
            stay = rows.take(draft.tokens, accepted, token, 0 if pending is None else 1)
            pending = token
            if len(stay) < len(accepted) and stay:
                index = torch.tensor(stay, device=input_ids.device)
                trunk.select(index)
                first, hidden, pending = first[index], hidden[index], pending[index]
        return Generation(
            rows.sequences(input_ids), rows.calls, rows.accepted, rows.emitted, passes
        )

    def _uniforms(self, generators: list[torch.Generator], device: torch.device) -> Tensor:
        """``(B, 3 K + 1)``: two per drafted token, one per test, one for the verifier's token."""
        size = 3 * self.head.n_token + 1
        return torch.stack([torch.rand(size, generator=g) for g in generators]).to(device)

    def _draft(self, hidden: Tensor, pending: Tensor | None, uniforms: Tensor) -> _Draft:
        circuit, kind = self._circuit(hidden, pending), self.head.kind
        evidence = None
        if pending is not None:
            evidence = pending.new_full((len(pending), self.head.n_token), -1)
            evidence[:, 0] = pending
        if self.mode == "greedy":
            tokens, _ = ops.circuit_argmax(kind, *circuit, evidence)
            # Greedy verification asks for no probability.
            unused = circuit.leaf.new_zeros(tokens.shape, dtype=accumulator(circuit.leaf.dtype))
            return _Draft(circuit, tokens, unused, unused[..., None].expand(-1, -1, self.head.rank))
        return _Draft(circuit, *ops.circuit_sample(kind, *circuit, uniforms, evidence))

    def _circuit(self, hidden: Tensor, pending: Tensor | None) -> Circuit:
        """Of the window. A first token outside the shortlist, which the head holds impossible, is
        made certain in every component instead: then it tells nothing of what follows."""
        circuit = self.head.circuit(hidden)
        if pending is None or self.head.shortlist is None:
            return circuit
        outside = ~torch.isin(pending, self.head.shortlist)[:, None, None]
        first = circuit.leaf[:, 0].masked_fill_(outside, -torch.inf)  # (B, C, V)
        own = pending[:, None, None].expand(-1, first.shape[1], 1)
        first.scatter_(-1, own, first.gather(-1, own).masked_fill(outside, 0))
        return circuit

    def _verify(
        self, draft: _Draft, target: Tensor, pending: Tensor | None, uniforms: Tensor
    ) -> tuple[Tensor, Tensor]:
        temperature = 0.0 if self.mode == "greedy" else self.temperature
        if temperature > 0 and self.top_p < 1:
            wide = target.to(accumulator(target.dtype))
            target, temperature = nucleus(wide / temperature, self.top_p), 1.0
        return ops.spec_verify(
            target,
            draft.tokens,
            draft.conditional,
            draft.posterior,
            draft.circuit.leaf,
            uniforms,
            None if pending is None else torch.ones_like(pending),
            temperature,
        )


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits with ``-inf`` outside the smallest set of likeliest tokens that has ``top_p``."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
    dropped = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
    return logits.masked_fill(dropped, -torch.inf)


class _Rows:
    """Tokens, stop rules and statistics of every row, on the host."""

    def __init__(self, batch: int, budget: int, ends: set[int], pad: int):
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.calls, self.accepted, self.emitted = ([0] * batch for _ in range(3))
        self.live = list(range(batch))
        self.budget, self.ends, self.pad = budget, ends, pad

    def take(self, drafted: Tensor, accepted: Tensor, token: Tensor, evidence: int) -> list[int]:
        """Append what a call decided; which of the rows that were live go on."""
        decided = torch.cat([drafted, token[:, None], accepted[:, None]], 1).tolist()
        stay: list[int] = []
        for i, (row, (*window, last, kept)) in enumerate(zip(self.live, decided, strict=True)):
            new = [*window[evidence:kept], last]
            self.calls[row] += 1
            self.accepted[row] += kept - evidence
            self.emitted[row] += len(new)
            new = new[: self.budget - len(self.tokens[row])]
            end = next((k + 1 for k, t in enumerate(new) if t in self.ends), None)
            self.tokens[row] += new[:end]
            if end is None and len(self.tokens[row]) < self.budget:
                stay.append(i)
        self.live = [self.live[i] for i in stay]
        return stay

    def sequences(self, prompts: Tensor) -> Tensor:
        """Prompts and new tokens, padded to the longest."""
        longest = max(len(tokens) for tokens in self.tokens)
        padded = [[*tokens, *[self.pad] * (longest - len(tokens))] for tokens in self.tokens]
        return torch.cat([prompts, torch.tensor(padded, device=prompts.device)], 1)


def _ends(model: Any, eos: int | Sequence[int] | None, pad: int | None) -> tuple[set[int], int]:
    config = getattr(model, "generation_config", None)
    eos = getattr(config, "eos_token_id", None) if eos is None else eos
    ends = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = getattr(config, "pad_token_id", None) if pad is None else pad
    return set(ends), (ends[0] if ends else 0) if pad is None else pad


def _generators(seed: int | Sequence[int], batch: int) -> list[torch.Generator]:
    seeds = [seed + row for row in range(batch)] if isinstance(seed, int) else list(seed)
    if len(seeds) != batch:
        raise ValueError(f"SpeculativeDecoder: seed: expected one or {batch}, found {len(seeds)}")
    return [torch.Generator().manual_seed(s) for s in seeds]
