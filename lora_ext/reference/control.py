"""The laws of constrained generation, dense: every state, every latent, every token.

A constraint is ``delta (S, V)`` int64: the next state, -1 where a token is forbidden, ``S`` behind
the end of a text. A guide is a hidden Markov model, ``transition (H, H)`` and ``emission (H, V)``;
``law (H,)`` is its law of the state at the next token. Of ``n`` tokens ``k`` may still come, the
one that ends included, and at least ``least`` come before it.

Source: docs/control.md; the recursion is Ctrl-G's (arXiv 2406.13892) over a budget that counts the
end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def control_live(delta: Tensor, budget: int, least: int = 0) -> Tensor:
    """Whether the end is reached from each state in at most k tokens, ``(n + 1, S + 1)`` bool."""
    states = len(delta)
    live = torch.zeros(budget + 1, states + 1, dtype=torch.bool)
    live[:, states] = True
    for k in range(1, budget + 1):
        live[k, :states] = (_open(delta, budget - k < least) & live[k - 1][delta]).any(1)
    return live


def control_messages(
    delta: Tensor, transition: Tensor, emission: Tensor, budget: int, least: int = 0
) -> Tensor:
    """``C (n + 1, S + 1, H)``: the probability that a guide completes the text in k tokens.

    ``C_k(s, z) = sum_z' T(z, z') sum_x beta(z', x) C_{k-1}(delta(s, x), z')``, 1 behind the end.
    """
    states = len(delta)
    out = [emission.new_zeros(states + 1, len(transition))]
    out[0][states] = 1
    for k in range(1, budget + 1):
        ahead = out[-1][delta] * _open(delta, budget - k < least)[..., None]  # (S, V, H)
        inside = torch.einsum("zv,svz->sz", emission, ahead)
        out.append(torch.cat([inside @ transition.t(), out[0][states:]]))
    return torch.stack(out)


def control_ratio(
    delta: Tensor,
    emission: Tensor,
    messages: Tensor,
    law: Tensor,
    state: int,
    k: int,
    least: int = 0,
) -> Tensor:
    """``r (V,)``: the guide's probability of a satisfied constraint behind each next token.

    ``r(x) = sum_z A(z) beta(z, x) C_{k-1}(delta(s, x), z) / sum_z A(z) beta(z, x)``.
    """
    closed = len(messages) - 1 - k < least
    ahead = messages[k - 1][delta[state]] * _open(delta, closed)[state, :, None]  # (V, H)
    joint = (law[:, None] * emission).t()  # (V, H)
    return (joint * ahead).sum(1) / joint.sum(1)


def control_filter(law: Tensor, transition: Tensor, emission: Tensor, token: int) -> Tensor:
    """The law of the guide's state behind one more token, ``(H,)``."""
    moved = (law * emission[:, token]) @ transition
    return moved / moved.sum()


def _open(delta: Tensor, closed: bool) -> Tensor:
    """Which edges may be taken, ``(S, V)``; those into the end where it is not closed."""
    return (delta >= 0) & ~((delta == len(delta)) & closed)
