"""Draws from the guided law (the distribution of the next token under a constraint, with a guide)
that do not compute this law for the whole vocabulary.

The guided law is ``p(x) r(x)``, see ``_law.py``. ``r(x)`` has the upper bound
``b(x) = max_z C_{k-1}(delta(s, x), z)``, which is the same for all tokens of a class. Tokens are
therefore drawn by rejection sampling with the envelope ``p(x) b(x)``: a token drawn from the
envelope is kept with probability ``r(x) / b(x)``, which is computed only for drawn tokens.

Letters: ``B`` rows of the batch, ``V`` vocabulary, ``H`` states of the guide, ``n`` rows that still
need a token, ``m`` tokens that one round draws per row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_ext._checks import require

from ._guide import Guide
from ._law import Block, Row, apply, finite_scales, log_quotient, log_ratios, moved, stacked_laws

_TOKENS_PER_ROUND = 32


def log_bound(row: Row) -> Tensor | None:
    """Return ``log b (V,)`` of a row; None if it is 0 for all tokens.

    Without a guide, ``b = r``.
    """
    plan = row.guided_plan
    if plan is None:
        return None if row.lost else row.mask()
    step = plan.step(row.state, row.left)
    scales = finite_scales(plan.messages(row.left - 1)[1], step)
    scales = scales[step.after.to(scales.device)]
    by_class = torch.where(step.live, scales.cpu(), -torch.inf)
    return by_class.index_select(0, plan.constraint.class_index)


def keep_probabilities(rows: Sequence[Row | None], tokens: Tensor) -> Tensor:
    """Return ``r(x) / b(x)`` of allowed tokens, ``(n, m)`` float64 on the CPU; 1 without a guide.

    Args:
        rows: The n rows; None for a row without a constraint.
        tokens: Allowed tokens ``(n, m)``, int64 on the CPU.
    """
    out = torch.ones(tokens.shape, dtype=torch.float64)
    guided: dict[Guide, list[tuple[int, Row, Tensor]]] = {}
    for i, row in enumerate(rows):
        if row is None or (plan := row.guided_plan) is None or plan.guide is None:
            continue
        step, (messages, _) = plan.step(row.state, row.left), plan.messages(row.left - 1)
        successors = step.after[plan.constraint.class_index[tokens[i]]]
        of_tokens = messages[successors.to(messages.device)]  # (m, H) of the next states, 1 for END
        guided.setdefault(plan.guide, []).append((i, row, of_tokens))
    for guide, members in guided.items():
        places, of_guide, messages = zip(*members, strict=True)
        laws = stacked_laws(of_guide)[:, None]  # (n, 1, H)
        emitted = guide.by_token[tokens[list(places)].to(laws.device)]  # (n, m, H)
        ratios = log_quotient(laws, emitted, torch.stack(messages))
        out[list(places)] = ratios.exp().double().cpu()
    return out


def draw(
    rows: Sequence[Row | None],
    scores: Tensor,
    temperature: float,
    uniforms: Callable[[list[int], int], Tensor],
    tries: int = _TOKENS_PER_ROUND,
    rounds: int = 3,
) -> tuple[list[int], int]:
    """Draw the next token of every row exactly from its mask law or guided law.

    Each round draws ``tries`` tokens per row (fewer in the first round) from ``p(x) b(x)``, and the
    first one that is kept is the row's token. If none is kept, the next round uses ``r`` instead of
    ``b`` for the rejected tokens. If no round keeps a token, the token is drawn from ``p(x) r(x)``,
    computed over the whole vocabulary.

    Args:
        rows: State of every row; None for a row without a constraint.
        scores: Model's scores (logits) of the next token, ``(B, V)``.
        temperature: Number by which the scores are divided.
        uniforms: Function ``uniforms(places, m)`` that returns new random numbers ``(n, m, 2)`` in
            [0, 1) at every call; ``places`` are the indices of the n rows.
        tries: Number of tokens per round.
        rounds: Largest number of rounds before the whole vocabulary is used.

    Returns:
        The token of each row, and the number of drawn tokens that were examined.

    Raises:
        ValueError: If all allowed tokens of a row have the score ``-inf``, or if the score of an
            allowed token is NaN or inf.
    """
    tempered, envelope = proposal_scores(rows, scores, temperature)
    wrong = (~envelope.amax(-1).isfinite()).nonzero()[:, 0].tolist()
    expected = "a finite largest score among the tokens that each row's constraint allows"
    require(not wrong, "draw", "scores", expected, f"none in rows {wrong[:4]}")
    return draw_from(rows, tempered, envelope, uniforms, tries, rounds)


def proposal_scores(
    rows: Sequence[Row | None], scores: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Return the scores at a temperature and the envelope ``log p b``, ``(B, V)`` each.

    Args:
        rows: See :func:`draw`.
        scores: See :func:`draw`.
        temperature: One number, or one per row as ``(B, 1)``.

    Returns:
        The scores, which are unchanged if the temperature is the number 1 and otherwise computed by
        :func:`_tempered`, and the envelope, which is float32 or wider.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    found = [None if row is None else log_bound(row) for row in rows]
    bounds = None
    if any(bound is not None for bound in found):  # Without bounds, the envelope is the scores.
        bounds = wide.new_zeros(wide.shape)
        for row, bound in zip(bounds, found, strict=True):
            if bound is not None:
                row.copy_(bound)
    if isinstance(temperature, Tensor) or temperature != 1:
        scores = wide = _tempered(wide, bounds, temperature)
    return scores, wide if bounds is None else bounds.add_(wide)


def _tempered(scores: Tensor, bounds: Tensor | None, temperature: float | Tensor) -> Tensor:
    """Return ``(scores - top) / temperature``; rows without a finite ``top`` are NaN.

    ``top`` is the largest score of an allowed token. Without subtracting it, the quotient could
    overflow.

    Args:
        scores: Scores ``(B, V)``, float32 or wider.
        bounds: ``log b (B, V)``, ``-inf`` for forbidden tokens; None if all are allowed.
        temperature: One number, or one per row as ``(B, 1)``.
    """
    allowed = scores
    if bounds is not None:
        allowed = scores + bounds.masked_fill(bounds > -torch.inf, 0)
    top = allowed.amax(-1, keepdim=True)
    quotient = ((scores - top).double() / temperature).clamp(max=0)  # forbidden scores may exceed 0
    return quotient.masked_fill(~top.isfinite(), torch.nan).to(scores)


def draw_from(
    rows: Sequence[Row | None],
    tempered: Tensor,
    envelope: Tensor,
    uniforms: Callable[[list[int], int], Tensor],
    tries: int = _TOKENS_PER_ROUND,
    rounds: int = 3,
) -> tuple[list[int], int]:
    """Draw tokens like :func:`draw`, given the two results of :func:`proposal_scores`."""
    tokens, looked_at = [-1] * len(rows), 0
    waiting, bounded = list(range(len(rows))), envelope
    # Rows without a guide accept every proposed token. Most rows with a guide accept one of the
    # first few proposed tokens.
    guided = any(row is not None and row.plan.guide is not None for row in rows)
    count = max(1, tries // 4) if guided else 1
    for turn in range(rounds):
        numbers = uniforms(waiting, count).double().cpu()
        found = _sampled(envelope, numbers[..., 0])  # (n, m)
        keep = keep_probabilities([rows[i] for i in waiting], found)
        at = found.to(envelope.device)
        if turn:  # The envelope of tokens from earlier rounds is p r, so they are always kept.
            tightened = (bounded.gather(1, at) - envelope.gather(1, at)).exp().cpu()
            keep = (keep * tightened).clamp(max=1)
        kept = numbers[..., 1] < keep
        first = torch.where(kept.any(1), kept.int().argmax(1), count).tolist()
        for j, (i, place) in enumerate(zip(waiting, first, strict=True)):
            looked_at += min(place + 1, count)
            if place < count:
                tokens[i] = int(found[j, place])
        still = [j for j, place in enumerate(first) if place == count]
        waiting = [waiting[j] for j in still]
        if not waiting:
            return tokens, looked_at
        bounded, envelope, at, keep = bounded[still], envelope[still], at[still], keep[still]
        # `scatter` and not `scatter_add`: the score of a token that was drawn twice must be lowered
        # only once.
        envelope = envelope.scatter(1, at, envelope.gather(1, at) + keep.log().to(envelope))
        count = tries
    whole = moved(log_ratios([rows[i] for i in waiting]), tempered[waiting])
    found = _sampled(whole.to(envelope), uniforms(waiting, 1).double().cpu()[..., 0])
    for i, token in zip(waiting, found[:, 0].tolist(), strict=True):
        tokens[i] = token
    return tokens, looked_at + len(waiting)


def _sampled(logits: Tensor, numbers: Tensor) -> Tensor:
    """Return tokens ``(n, m)`` drawn from logits ``(n, V)`` with numbers ``(n, m)`` in [0, 1)."""
    sums = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    limit = numbers.to(sums) * sums[:, -1:]
    return torch.searchsorted(sums, limit, right=True).cpu()


def likeliest(rows: Sequence[Row | None], scores: Tensor, tries: int = 256) -> list[int]:
    """Return the most likely token of every row under its law at temperature 1.

    Tokens are examined in descending order of the bound ``p(x) b(x)``. The search ends at the first
    token whose bound does not exceed the largest ``p(x) r(x)`` found. If the search has not ended
    after ``tries`` tokens, ``p(x) r(x)`` is computed over the whole vocabulary.
    """
    found = [(i, log_bound(row)) for i, row in enumerate(rows) if row is not None]
    envelope = moved([Block([i], bound[None]) for i, bound in found if bound is not None], scores)
    tokens = envelope.argmax(-1).tolist()
    for i, row in enumerate(rows):
        if row is None or row.guided_plan is None:
            continue
        bounds, order = envelope[i].topk(min(tries, envelope.shape[1]))
        best, chosen = -float("inf"), -1
        parts = (t.split(_TOKENS_PER_ROUND) for t in (bounds, order))
        for bound, candidates in zip(*parts, strict=True):
            if float(bound[0]) <= best or float(bound[0]) == -float("inf"):
                break
            keep = keep_probabilities([row], candidates[None].cpu())[0]
            values = bound.double() + keep.log().to(bound)
            top = int(values.argmax())
            if float(values[top]) > best:
                best, chosen = float(values[top]), int(candidates[top])
        else:
            if tries < envelope.shape[1]:
                chosen = int(apply([row], scores[i : i + 1])[0].argmax())
        tokens[i] = chosen
    return tokens
