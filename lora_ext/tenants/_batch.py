"""Steps of the service. A step runs one forward and one backward for several tenants' calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_ext._checks import require
from lora_ext.layers import LoraLayer, recomputed, rows_per_chunk, softcap_of
from lora_ext.rows import adapters, layer_names

from ._data import LOSSES, Checked, Result
from ._live import LiveAdapter

#: Description, in error messages, of the model that a service needs. Sequences are padded at the
#: end without a mask, so the logits of a token must not depend on later tokens.
CAUSAL = "a transformers causal LM, in which no token depends on later tokens"


@dataclass(eq=False)
class Call:
    """Pending call of ``forward_backward`` or ``forward``.

    The call's data are sorted from long to short and split into parts of at most ``most`` tokens,
    including padding. A part is always computed in one step. The split depends only on the data of
    the call, so the results do not depend on other calls.
    """

    adapter: LiveAdapter
    data: list[Checked]
    loss: str
    options: dict[str, float]
    backward: bool
    most: int
    future: Future[Result] = field(default_factory=Future)
    logprobs: dict[int, Tensor] = field(default_factory=dict)
    total: float = 0.0
    gradients: list[Tensor] | None = None

    def __post_init__(self) -> None:
        self.parts: list[Part] = []
        rows: list[int] = []
        for i in sorted(range(len(self.data)), key=lambda i: -self.data[i].length):
            if rows and (len(rows) + 1) * self.data[rows[0]].length > self.most:
                self.parts.append(Part(self, rows))
                rows = []
            rows = [*rows, i]
        self.parts.append(Part(self, rows))

    @property
    def tokens(self) -> int:
        """Number of tokens of all data. For a datum with more targets than tokens, the targets are
        counted."""
        return sum(max(each.length, each.targets.numel()) for each in self.data)

    def fail(self, error: BaseException) -> None:
        """Set the error of the future and drop the remaining parts."""
        self.parts.clear()
        if not self.future.done():
            self.future.set_exception(error)

    def finish(self) -> None:
        """Add the gradients of all parts to the adapter, and set the result of the future."""
        if self.backward and self.gradients is not None:
            self.adapter.add(self.gradients)
        each = [self.logprobs[i] for i in range(len(self.data))]
        if not self.future.done():
            self.future.set_result(Result(each, {"loss:sum": self.total}))


@dataclass(frozen=True, eq=False)
class Part:
    """Data of a call that one step computes; ``rows`` contains the indices of the data."""

    call: Call
    rows: list[int]

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each datum."""
        return [self.call.data[i].length for i in self.rows]


class BatchStep:
    """Forward and backward of a transformers causal LM for parts of several calls.

    The model must be in evaluation mode.
    """

    def __init__(self, model: Any):
        self.model, self.head = model, model.get_output_embeddings()
        self.device = model.get_input_embeddings().weight.device
        self.vocabulary: int = model.get_input_embeddings().weight.shape[0]
        require(not self._looks_ahead(), "Service", "model", CAUSAL, type(model).__name__)
        self._apart = self._head_is_separate()

    def _looks_ahead(self) -> bool:
        """Return whether a token's logits depend on later tokens, which may be padding.

        The method measures how the logits of the first token of row 1 change with the later tokens
        of row 1 and with row 0. A change of row 0 can only affect rounding, in models with experts
        that compute all rows in one product. The model looks ahead if the later tokens have a
        clearly larger effect than row 0. All forwards have the same shape, so that libraries choose
        the same algorithm for each.
        """

        def logits(row: int, first: int) -> Tensor:
            """Return the logits of the first token of row 1, with tokens ``first:`` of ``row``
            changed."""
            ids = torch.arange(1, 4, device=self.device).repeat(2, 1) % self.vocabulary
            ids[row, first:] = (ids[row, first:] + self.vocabulary // 2) % self.vocabulary
            with torch.no_grad():
                return self.model(input_ids=ids, use_cache=False).logits[1, 0]

        base = logits(0, 3)  # no token is changed, since a row has three tokens
        moved, *rounding = ((logits(*it) - base).abs().max() for it in ((1, 1), (0, 1), (0, 0)))
        return not bool(moved <= 16 * max(rounding))

    def _head_is_separate(self) -> bool:
        """Return whether the model's logits are exactly ``head(body(ids))``.

        Some models cap or scale the output of the head. This is tested once, with a short input.
        Logits that are all zero prove nothing, since a scale would not change such logits. In this
        case, the result is False.
        """
        body = getattr(self.model, "base_model", None)
        if body is None or body is self.model or self.head is None:
            return False
        if softcap_of(self.model) is not None:
            return False
        ids = torch.arange(4, device=self.device)[None] % self.vocabulary
        with torch.no_grad():
            logits = self.model(input_ids=ids, use_cache=False).logits
            own = self.head(body(input_ids=ids, use_cache=False)[0])
            return bool(logits.any()) and torch.equal(logits, own)

    def run(self, parts: Sequence[Part]) -> None:
        """Compute the parts, and store the results or the error in each call.

        If an error is raised, each half of the parts is computed separately: the memory may suffice
        for fewer parts, and the error of one call must not fail the others.
        """
        try:
            self._run(parts)
        except Exception as error:  # The model may raise any error. The call's future receives it.
            if len(parts) == 1:
                parts[0].call.fail(error)
                return
            half = len(parts) // 2
            self.run(parts[:half])
            self.run(parts[half:])

    def _run(self, parts: Sequence[Part]) -> None:
        owners = [(part, i) for part in parts for i in part.rows]
        owners.sort(key=lambda owner: -owner[0].call.data[owner[1]].length)
        with torch.set_grad_enabled(any(part.call.backward for part in parts)):
            found = self._logprobs(owners)
            sums: dict[Part, Tensor] = {}
            for (part, i), logprobs in zip(owners, found, strict=True):
                call = part.call
                inputs = {k: v.to(self.device) for k, v in call.data[i].inputs.items()}
                loss = LOSSES[call.loss].sum(logprobs, inputs, call.options)
                sums[part] = sums[part] + loss if part in sums else loss
        totals = {part: float(loss.detach()) for part, loss in sums.items()}
        for part, total in totals.items():
            if not math.isfinite(total):
                part.call.fail(_not_finite("loss", total))
        wanted = [p for p in parts if p.call.backward and math.isfinite(totals[p])]
        gradients = self._gradients(wanted, sums)
        # The code below does not raise. A call is therefore changed either completely or not at
        # all, and `run` may recompute its part after an error.
        for (part, i), logprobs in zip(owners, found, strict=True):
            part.call.logprobs[i] = logprobs.detach().cpu()
        for part in parts:
            call = part.call
            if part in gradients:
                own, finite = gradients[part]
                if not finite:
                    call.fail(_not_finite("gradient", "NaN or infinity"))
                elif call.gradients is None:
                    call.gradients = own
                else:
                    torch._foreach_add_(call.gradients, own)  # pyright: ignore[reportPrivateImportUsage]
            call.total += totals[part]

    def _gradients(
        self, parts: Sequence[Part], sums: dict[Part, Tensor]
    ) -> dict[Part, tuple[list[Tensor], bool]]:
        """Compute the gradients of each part's loss for its adapter, in float32 or wider.

        Returns:
            For each part, the gradients and whether all of them are finite.
        """
        if not parts:
            return {}
        total = torch.stack([sums[part] for part in parts]).sum()
        factors = [list(part.call.adapter.parameters.values()) for part in parts]
        flat = [p for own in factors for p in own]
        grads = iter(torch.autograd.grad(total, flat, allow_unused=True))
        return {
            part: _copied(own, [next(grads) for _ in own])
            for part, own in zip(parts, factors, strict=True)
        }

    def _logprobs(self, owners: Sequence[tuple[Part, int]]) -> list[Tensor]:
        """Return the log-probabilities of each datum's targets, in the shape of the targets."""
        data = [part.call.data[i] for part, i in owners]
        longest = data[0].length
        ids = pad_sequence([datum.tokens for datum in data], batch_first=True)
        # No mask is needed, because padding follows the tokens and a token does not depend on later
        # tokens. Without a mask, a sequence is computed by the same kernels as if it were alone.
        at = [torch.arange(datum.length) + row * longest for row, datum in enumerate(data)]
        # Targets are flattened because a datum may have several targets for each token.
        targets = torch.cat([d.targets.flatten() for d in data])
        counts = [torch.full((d.length,), d.targets.numel() // d.length) for d in data]
        names = [part.call.adapter.name for part, _ in owners]
        with adapters(names, pool=layer_names):
            found = self._of_rows(
                ids.to(self.device),
                torch.cat(at).to(self.device),
                torch.cat(counts),
                targets.to(self.device),
            )
        each = found.split([d.targets.numel() for d in data])
        return [lp.view(d.targets.shape) for lp, d in zip(each, data, strict=True)]

    def _of_rows(self, ids: Tensor, at: Tensor, counts: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probabilities of the targets at ``M`` positions of a padded batch.

        Args:
            ids: ``(B, T)`` tokens of ``B`` sequences.
            at: ``(M,)`` positions in the flattened batch.
            counts: ``(M,)`` number of targets of each position, on the CPU.
            targets: flat targets, ordered by position.
        """
        if not self._apart or isinstance(self.model.get_output_embeddings(), LoraLayer):
            logits = self.model(input_ids=ids, use_cache=False).logits
            return _chosen(logits.flatten(0, 1)[at], counts, targets)
        hidden = self.model.base_model(input_ids=ids, use_cache=False)[0]
        rows = hidden.flatten(0, 1)[at]  # (M, d)
        if len(targets) == len(rows) and rows.requires_grad:
            found: Any = _OneTarget.apply(rows, targets, self.head)
            return found
        pieces = counts.split(rows_per_chunk(self.vocabulary))
        parts = targets.split([int(piece.sum()) for piece in pieces])
        pairs = zip(rows.split([len(piece) for piece in pieces]), pieces, parts, strict=True)
        return torch.cat([recomputed(self._of_hidden, *pair) for pair in pairs])

    def _of_hidden(self, rows: Tensor, counts: Tensor, targets: Tensor) -> Tensor:
        return _chosen(self.head(rows), counts, targets)


class _OneTarget(torch.autograd.Function):
    """Log-probabilities ``(M,)`` of one target for each of ``M`` hidden states ``(M, d)``.

    The head is frozen, so only the hidden states need a gradient. The gradient of a state is the
    incoming gradient times ``d log p(target) / d state``. The forward computes this derivative with
    the logits, in chunks of rows, so that the backward needs no logits.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor, head: Any) -> Tensor:
        most = rows_per_chunk(head.weight.shape[0])
        found: list[Tensor] = []
        slopes: list[Tensor] = []
        for part, wanted in zip(rows.split(most), targets.split(most), strict=True):
            with torch.enable_grad():
                own = part.detach().requires_grad_()
                logits = head(own)
            law = _wide_logits(logits.detach()).log_softmax(-1)
            at = torch.arange(len(wanted), device=wanted.device)
            found.append(law[at, wanted])
            slope = law.exp_().neg_()
            slope[at, wanted] += 1
            slopes += torch.autograd.grad(logits, own, slope.to(logits.dtype))
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grads[0][:, None]).to(slopes.dtype), None, None


def _wide_logits(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _chosen(logits: Tensor, counts: Tensor, targets: Tensor) -> Tensor:
    rows = torch.arange(len(counts)).repeat_interleave(counts).to(logits.device)
    return _wide_logits(logits).log_softmax(-1)[rows, targets]


def _copied(
    parameters: list[nn.Parameter], gradients: list[Tensor | None]
) -> tuple[list[Tensor], bool]:
    """Copy gradients, which may be views of the stacked gradients of several adapters.

    Returns the copies, in float32 or wider, and whether all values are finite.
    """
    own: list[Tensor] = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        wide = torch.promote_types(parameter.dtype, torch.float32)
        own.append(torch.zeros_like(parameter, dtype=wide, requires_grad=False))
        if gradient is not None:
            own[-1].copy_(gradient)
    largest = torch.nn.utils.get_total_norm(own, math.inf)  # NaN if any value is NaN
    return own, bool(largest.isfinite())


def _not_finite(what: str, found: object) -> ValueError:
    return ValueError(f"forward_backward: {what}: expected a finite number, found {found}")
