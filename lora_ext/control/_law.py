"""Where each row of a batch stands, and its law of the next token: a number for every token.

The mask law is ``p(x) 1[END can be reached]``. The guided law is ``p(x) r(x)``, where

    r(x) = sum_z A(z) beta(z, x) C_{k-1}(delta(s, x), z) / sum_z A(z) beta(z, x)

is the probability that the guide gives to a text that satisfies the constraint, given the tokens so
far and ``x``. Both are told as ``log r``, 0 on live tokens for the mask law.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import require

from ._guide import Guide
from ._messages import MatchedPlan, NextTokens, Plan

_AT_ONCE = 32  # tokens whose r is found together
_FAR = 50.0  # how far below the others what the guide holds impossible stands, in nats


@dataclass(frozen=True)
class Row:
    """A row between two tokens; a value, so that rows are forked and rolled back by keeping it.

    Attributes:
        plan: the constraint and its budget.
        state: of the constraint; -1 behind a forbidden token.
        left: ``k``, the tokens that may still come.
        law: ``A (H,)``, the guide's law of its next state; None without a guide.
    """

    plan: Plan | MatchedPlan
    state: int
    left: int
    law: Tensor | None = None

    @classmethod
    def first(cls, plan: Plan | MatchedPlan, prior: Tensor | None = None) -> Row:
        """Before the first token; ``prior (H,)`` is the guide's law there, None: its initial."""
        if plan.guide is None:
            return cls(plan, 0, plan.budget)
        return cls(plan, 0, plan.budget, plan.guide.initial if prior is None else prior)

    @property
    def ended(self) -> bool:
        """Whether the text is complete and its end has come."""
        return self.state == self.plan.constraint.end

    @property
    def only(self) -> int | None:
        """The token that must come, where one alone may; None behind the end."""
        if self.ended or self.lost:
            return None
        return self.plan.only(self.state, self.left)

    @property
    def lost(self) -> bool:
        """Whether a token came that the constraint forbids."""
        return self.state < 0


def advance(rows: Sequence[Row | None], tokens: Sequence[int]) -> list[Row | None]:
    """Every row behind one more token of its own; rows of one guide move in one product."""
    moved: list[Row | None] = []
    guided: dict[Guide, list[int]] = {}
    for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        if row is None or row.lost or row.ended:
            moved.append(row)
            continue
        state = row.plan.after(row.state, row.left, token)
        moved.append(replace(row, state=state, left=row.left - 1))
        if row.plan.guide is not None and state >= 0 and state != row.plan.constraint.end:
            guided.setdefault(row.plan.guide, []).append(i)
    for guide, places in guided.items():
        before = torch.stack([_law(rows[i]) for i in places])
        chosen = torch.tensor([tokens[i] for i in places], device=before.device)
        for i, law in zip(places, guide.step(before, chosen).unbind(), strict=True):
            row = moved[i]
            assert row is not None
            moved[i] = replace(row, law=law)
    return moved


def _law(row: Row | None) -> Tensor:
    assert row is not None and row.law is not None
    return row.law


class Block(NamedTuple):
    """Rows with one constraint, state and budget: their places in the batch, and ``log r (n, V)``,
    ``-inf`` on forbidden tokens."""

    places: list[int]
    ratio: Tensor


def log_ratios(rows: Sequence[Row | None]) -> list[Block]:
    """``log r`` of all rows but those that are left alone: without a constraint, lost, or with
    every token alive under the mask law. A row's bits are its own where the guide is in float32 on
    the CPU.
    """
    groups: dict[tuple[Plan | MatchedPlan, int, int], list[int]] = {}
    for i, row in enumerate(rows):
        if row is not None and not row.lost:
            left = 0 if row.ended else row.left
            groups.setdefault((row.plan, row.state, left), []).append(i)
    out: list[Block] = []
    guided: dict[Guide, list[tuple[list[int], _Group]]] = {}
    for (plan, state, left), places in groups.items():
        guide = plan.guide
        if guide is None or isinstance(plan, MatchedPlan) or state == plan.constraint.end:
            if (mask := plan.mask(state, left)) is not None:
                out.append(Block(places, mask.expand(len(places), -1)))
            continue
        laws = torch.stack([_law(rows[i]) for i in places])
        guided.setdefault(guide, []).append((places, _Group(plan, state, left, laws)))
    for guide, works in guided.items():
        out.extend(_guided(guide, works))
    return out


def _guided(guide: Guide, works: list[tuple[list[int], _Group]]) -> list[Block]:
    """``log r`` of rows of one guide: one product with the vocabulary, and one pass after the other
    over what comes of it, for all of them."""
    seen = [work for _, work in works if work.layout.wide]
    if not seen:
        return [Block(places, work.ratio(None)) for places, work in works]
    laws, ahead = torch.cat([w.laws for w in seen]), torch.cat([w.ahead for w in seen])
    totals, joints = guide.over_vocabulary(torch.cat([laws, ahead])).split([len(laws), len(ahead)])
    if len(ahead) > len(laws):
        first, owner = 0, []
        for work in seen:
            owner += list(range(first, first + len(work.laws))) * len(work.layout.wide)
            first += len(work.laws)
        totals = totals[owner]
    smallest = torch.finfo(joints.dtype).tiny
    if float(totals.min()) >= smallest:
        joints.div_(totals)
    else:  # a token that the guide holds impossible says nothing of the state
        unseen = ahead.sum(-1, keepdim=True)
        joints = torch.where(totals > 0, joints / totals.clamp(min=smallest), unseen)
    scales = torch.cat([w.scales for w in seen])
    values = joints.clamp_(smallest, 1.0).log_().add_(scales[:, None])
    out, first = [], 0
    for places, work in works:
        last = first + len(work.ahead)
        out.append(Block(places, work.ratio(values[first:last])))
        first = last
    return out


def apply(
    rows: Sequence[Row | None], scores: Tensor, temperature: float = 1.0
) -> tuple[Tensor, list[Block]]:
    """``scores (B, V) + temperature * log r``, and ``log r``.

    Then ``softmax(scores / temperature)`` is the stated law. Rows that are left alone keep their
    bits. ``scores`` is not changed.
    """
    blocks = [Block(places, r.to(scores.device)) for places, r in log_ratios(rows)]
    return moved(blocks, scores, temperature), blocks


def moved(blocks: Sequence[Block], scores: Tensor, temperature: float = 1.0) -> Tensor:
    """``scores (B, V) + temperature * log r`` of the blocks, ``-inf`` where that is."""
    if not blocks:
        return scores
    scores = scores.clone()
    for places, ratio in blocks:
        ratio = ratio.to(scores)
        if temperature != 1:
            ratio = temperature * ratio  # apart: a fused product would round by the place in memory
        first, last = places[0], places[-1]
        if places == list(range(first, last + 1)):
            scores[first : last + 1].add_(ratio)
        else:
            scores[places] += ratio
    return scores


def _floored(scale: Tensor, step: NextTokens) -> Tensor:
    """Scales in which a live state that the guide holds impossible stands below all others."""
    known = scale[step.states.to(scale.device)]
    if bool((known > -torch.inf).all()):
        return scale
    known = known[known > -torch.inf]
    lowest = float(known.min()) - _FAR if len(known) else 0.0
    return torch.where(scale > -torch.inf, scale, lowest)


class _Group:
    """Guided rows with one state and budget.

    Attributes:
        laws: ``(n, H)``. layout: of the step.
        ahead: ``(w n, H)``, the laws times the message of each successor with many tokens.
        scales: ``(w n,)``, the logarithms that belong to these.
    """

    def __init__(self, plan: Plan, state: int, left: int, laws: Tensor):
        step = plan.step(state, left)
        self.plan, self.laws, self.layout = plan, laws, step.layout
        self.table, scale = plan.messages(left - 1)
        self.scale = _floored(scale, step)
        wide = self.layout.wide
        self.ahead = torch.cat([laws * self.table[s] for s in wide]) if wide else laws[:0]
        self.scales = self.scale[wide].repeat_interleave(len(laws))

    def ratio(self, values: Tensor | None) -> Tensor:
        """``log r (n, V)``, from that of the successors with many tokens, ``(w n, V)``."""
        assert self.plan.guide is not None
        layout, device, rows = self.layout, self.laws.device, len(self.laws)
        if values is None or not layout.wide:
            shape = (rows, self.plan.constraint.vocab_size)
            out = torch.full(shape, -torch.inf, dtype=self.laws.dtype, device=device)
        else:
            out, *more = values.split(rows)
            for mask, value in zip(layout.others, more, strict=True):
                out = torch.where(mask.to(device), value, out)
            if layout.dead.dtype == torch.bool:
                out.masked_fill_(layout.dead.to(device), -torch.inf)
            elif len(layout.dead):
                out.index_fill_(1, layout.dead.to(device), -torch.inf)
        tokens, behind = layout.narrow.to(device), layout.behind.to(device)
        if len(tokens):
            ahead, emitted = self.table[behind], self.plan.guide.by_token[tokens]  # (t, H)
            for i, one in enumerate(self.laws):
                joint = one * emitted
                value = _log_ratio((joint * ahead).sum(-1), joint.sum(-1), one, ahead)
                out[i, tokens] = value + self.scale[behind]
        return out.index_fill_(1, layout.ends.to(device), 0.0)


def _log_ratio(joint: Tensor, total: Tensor, laws: Tensor, ahead: Tensor) -> Tensor:
    """``log (joint / total)``; live tokens stay alive where a product is too small for the dtype.

    A token that the guide holds impossible says nothing of the state: ``laws`` times ``ahead``.
    """
    smallest = torch.finfo(joint.dtype).tiny
    ratio = joint / total.clamp(min=smallest)
    if not bool((total > 0).all()):
        ratio = torch.where(total > 0, ratio, (laws * ahead).sum(-1))
    return ratio.clamp(smallest, 1.0).log()


# --- sparse: where we draw ourselves --------------------------------------------------------------
def bounds(rows: Sequence[Row | None]) -> list[Block]:
    """As :func:`log_ratios`, with ``log b`` for ``log r``: ``r(x) <= b(x) = max_z C_{k-1}(s', z)``.

    A look-up by the class of a token; nothing is multiplied with the vocabulary. Under the mask law
    ``b`` is ``r``.
    """
    found = ((i, _log_bound(row)) for i, row in enumerate(rows) if row is not None and not row.lost)
    return [Block([i], bound[None]) for i, bound in found if bound is not None]


def _log_bound(row: Row) -> Tensor | None:
    """``log b (V,)`` of a row; None where it is 0 everywhere."""
    plan, left = row.plan, 0 if row.ended else row.left
    if row.ended or isinstance(plan, MatchedPlan) or plan.guide is None:
        return plan.mask(row.state, left)
    step = plan.step(row.state, left)
    scale = _floored(plan.messages(left - 1)[1], step)
    scale = scale[step.after.to(scale.device)]
    by_class = torch.where(step.live, scale.cpu(), -torch.inf)
    return by_class.index_select(0, plan.constraint.class_index)


def keep_probabilities(rows: Sequence[Row], tokens: Tensor) -> Tensor:
    """``r(x) / b(x)`` of live tokens of each row, ``(n, m)`` float64 on the CPU: 4 H flops each.

    Args:
        tokens: ``(n, m)`` int64 on the CPU.
    """
    out = torch.ones(tokens.shape, dtype=torch.float64)
    guided: dict[Guide, list[tuple[int, Tensor, Tensor]]] = {}
    for i, row in enumerate(rows):
        plan, guide = row.plan, row.plan.guide
        if guide is None or isinstance(plan, MatchedPlan) or row.ended or row.law is None:
            continue
        step = plan.step(row.state, row.left)
        after = step.after[plan.constraint.class_index[tokens[i]]]
        ahead = plan.messages(row.left - 1)[0][after.to(row.law.device)]  # of END it is all ones
        guided.setdefault(guide, []).append((i, row.law, ahead))
    for guide, found in guided.items():
        places = [i for i, _, _ in found]
        laws, ahead = torch.stack([x for _, x, _ in found]), torch.stack([x for _, _, x in found])
        joint = laws[:, None] * guide.by_token[tokens[places].to(laws.device)]  # (n, m, H)
        ratio = _log_ratio((joint * ahead).sum(-1), joint.sum(-1), laws[:, None], ahead)
        out[places] = ratio.exp().double().cpu()
    return out


def draw(
    rows: Sequence[Row | None],
    scores: Tensor,
    temperature: float,
    uniforms: Callable[[list[int], int], Tensor],
    tries: int = _AT_ONCE,
    rounds: int = 3,
) -> tuple[list[int], int]:
    """A token of every row by its law, without a product with the vocabulary where that works out.

    ``x`` is drawn from ``p(x) b(x)`` and kept with probability ``r(x) / b(x)``, ``tries`` of them
    at once, of which the first that is kept counts. Where none is, ``r`` takes the place of ``b``
    on these tokens for the next round: what was likely and refused is not drawn in vain again.
    Rows that fail every round are drawn from the dense law. So the law is the stated one exactly.

    Args:
        rows, scores, temperature: as :func:`apply` takes them.
        uniforms: gives ``(n, m, 2)`` numbers of [0, 1) for a list of n rows and m tries, new ones
            at every call.
        tries: in a round. rounds: before the dense law.

    Returns:
        the tokens, and how many were looked at for them in all.

    Raises:
        ValueError: where all tokens that may come have a score of ``-inf``, and for NaN and inf.
    """
    heat, envelope = proposed(rows, scores, temperature)
    finite = bool(envelope.amax(-1).isfinite().all())
    expected = "a largest one, that is finite, of the tokens that each row's constraint allows"
    require(finite, "draw", "scores", expected, "a row without")
    return decided(rows, heat, envelope, uniforms, tries, rounds)


def decided(
    rows: Sequence[Row | None],
    heat: Tensor,
    envelope: Tensor,
    uniforms: Callable[[list[int], int], Tensor],
    tries: int = _AT_ONCE,
    rounds: int = 3,
) -> tuple[list[int], int]:
    """As :func:`draw`, of what :func:`proposed` has made of the scores."""
    tokens, drawn = [-1] * len(rows), 0
    waiting, bound = list(range(len(rows))), envelope
    # What is not guided is always kept, and most rows keep one of the first few.
    guided = any(row is not None and row.plan.guide is not None for row in rows)
    few = max(1, tries // 4) if guided else 1
    for turn in range(rounds):
        count = tries if turn else few
        numbers = uniforms(waiting, count).double().cpu()
        found = _at(envelope, numbers[..., 0])
        some = [j for j, i in enumerate(waiting) if (row := rows[i]) and not row.lost]
        keep = torch.ones(found.shape, dtype=torch.float64)
        asked = [row for j in some if (row := rows[waiting[j]]) is not None]
        keep[some] = keep_probabilities(asked, found[some])
        if turn:  # the envelope is p r itself where it was tightened, and what it gives is kept
            at = found.to(bound.device)
            ratio = (bound.gather(1, at) - envelope.gather(1, at)).exp().cpu()
            keep = (keep * ratio).clamp(max=1)
        good = numbers[..., 1] < keep
        first = torch.where(good.any(1), good.int().argmax(1), count).tolist()
        for j, (i, place) in enumerate(zip(waiting, first, strict=True)):
            drawn += min(place + 1, count)
            if place < count:
                tokens[i] = int(found[j, place])
        still = [j for j, place in enumerate(first) if place == count]
        waiting = [waiting[j] for j in still]
        if not waiting:
            return tokens, drawn
        bound, envelope = bound[still], _tightened(envelope[still], found[still], keep[still])
    dense = moved(log_ratios([rows[i] for i in waiting]), heat[waiting])
    found = _at(dense.to(envelope), uniforms(waiting, 1).double().cpu()[..., 0])
    for i, token in zip(waiting, found[:, 0].tolist(), strict=True):
        tokens[i] = token
    return tokens, drawn + len(waiting)


def proposed(
    rows: Sequence[Row | None], scores: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Scores by which tokens are drawn, and ``log p b``, both ``(B, V)``; the bounds of a row are
    looked up once.

    Args:
        rows, scores: as :func:`apply` takes them.
        temperature: one, or ``(B, 1)``.

    Returns:
        ``scores`` at the temperature 1, else :func:`_heated`; and that with the bounds, in float32
        or wider.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    found = [None if row is None or row.lost else _log_bound(row) for row in rows]
    # What is added is laid together first, as passes over a vocabulary are few then.
    added = None
    if any(bound is not None for bound in found):
        added = wide.new_zeros(wide.shape)
        for row, bound in zip(added, found, strict=True):
            if bound is not None:
                row.copy_(bound)
    as_they_are = not isinstance(temperature, Tensor) and temperature == 1
    heat = scores if as_they_are else _heated(wide, added, temperature)
    wide = wide if as_they_are else heat
    return heat, wide if added is None else added.add_(wide)


def _tightened(envelope: Tensor, tokens: Tensor, keep: Tensor) -> Tensor:
    """``log p b`` with ``log p r`` on some tokens of each row, ``(n, m)``; a token may stand twice,
    and a second subtraction from it would be wrong."""
    at = tokens.to(envelope.device)
    return envelope.scatter(1, at, envelope.gather(1, at) + keep.log().to(envelope))


def _heated(scores: Tensor, bounds: Tensor | None, temperature: float | Tensor) -> Tensor:
    """``scores / temperature`` of rows, ``(B, V)``, less a number for each: the largest of a token
    that may come becomes 0 first, so that no quotient overflows.

    Args:
        scores: ``(B, V)`` float32 or wider. bounds: ``(B, V)``, ``-inf`` on what must not come.
        temperature: one, or ``(B, 1)``.

    Returns:
        Rows that have no largest such score, or one that is not finite, are NaN.
    """
    live = scores
    if bounds is not None:
        live = scores + bounds.masked_fill(bounds > -torch.inf, 0)
    top = live.amax(-1, keepdim=True)
    heat = ((scores - top).double() / temperature).clamp(max=0)  # what may not come may be above 0
    return heat.masked_fill(~top.isfinite(), torch.nan).to(scores)


def likeliest(rows: Sequence[Row | None], scores: Tensor, tries: int = 256) -> list[int]:
    """The likeliest token of every row under its law at temperature 1.

    Tokens are looked at in the order of ``p(x) b(x)`` until that is below the best ``p(x) r(x)``;
    after ``tries`` the row takes the dense way.
    """
    proposed = moved(bounds(rows), scores, 1.0)
    first = proposed.argmax(-1).tolist()
    for i, row in enumerate(rows):
        if row is None or row.lost or row.ended or row.plan.guide is None:
            continue
        value, order = proposed[i].topk(min(tries, proposed.shape[1]))
        best, chosen, done = -float("inf"), -1, False
        for bound, token in zip(value.split(_AT_ONCE), order.split(_AT_ONCE), strict=True):
            if float(bound[0]) <= best or float(bound[0]) == -float("inf"):
                done = True
                break
            here = bound.double() + keep_probabilities([row], token[None].cpu())[0].log().to(bound)
            top = int(here.argmax())
            if float(here[top]) > best:
                best, chosen = float(here[top]), int(token[top])
        if not done and tries < proposed.shape[1]:
            chosen = int(apply([row], scores[i : i + 1])[0].argmax())
        first[i] = chosen
    return first


def _at(logits: Tensor, numbers: Tensor) -> Tensor:
    """Tokens ``(n, m)`` of laws that are told by logits ``(n, V)``, by numbers ``(n, m)``."""
    sums = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    limit = numbers.to(sums) * sums[:, -1:]
    return torch.searchsorted(sums, limit, right=True).cpu()
