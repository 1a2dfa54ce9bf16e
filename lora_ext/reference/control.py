"""Reference of constrained generation, with dense tensors over states, latents and tokens.

A constraint is ``delta (S, V)`` int64, the next state for each of ``S`` states and ``V`` tokens: -1
for a forbidden token, and ``S`` after the end of the text. A guide is a hidden Markov model with
``transition (H, H)`` and ``emission (H, V)``; ``law (H,)`` is the distribution of its state at the
next token. The budget is ``n`` tokens, including the end token, of which ``k`` are left; at least
``least`` tokens precede the end token.

Source: docs/control.md. The recursion is that of Ctrl-G (arXiv 2406.13892); our choice: a budget
that includes the end token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def control_live(delta: Tensor, budget: int, least: int = 0) -> Tensor:
    """Return whether each state can reach the end of a text in at most k tokens, k = 0 .. n.

    The result is ``(n + 1, S + 1)`` bool, with indices k and the state; n is ``budget``.
    """
    states = len(delta)
    live = torch.zeros(budget + 1, states + 1, dtype=torch.bool)
    live[:, states] = True
    for k in range(1, budget + 1):
        live[k, :states] = (_open(delta, budget - k < least) & live[k - 1][delta]).any(1)
    return live


def control_messages(
    delta: Tensor, transition: Tensor, emission: Tensor, budget: int, least: int = 0
) -> Tensor:
    """Compute the probability that the guide ends a valid text in at most ``k`` tokens.

    The result ``C`` is ``(n + 1, S + 1, H)``. Its indices are ``k``, the state s of the constraint
    and the state z of the guide:
    ``C_k(s, z) = sum_z' T(z, z') sum_x beta(z', x) C_{k-1}(delta(s, x), z')`` with the transition
    ``T`` and the emission ``beta``; ``C_k(S, z) = 1`` after the end.
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
    """Compute the probability ``r (V,)`` that the guide ends a valid text after each next token.

    ``r(x) = sum_z A(z) beta(z, x) C_{k-1}(delta(s, x), z) / sum_z A(z) beta(z, x)`` with the law
    ``A`` and the emission ``beta``; ``C`` are the ``messages``.
    """
    closed = len(messages) - 1 - k < least
    ahead = messages[k - 1][delta[state]] * _open(delta, closed)[state, :, None]  # (V, H)
    joint = (law[:, None] * emission).t()  # (V, H)
    return (joint * ahead).sum(1) / joint.sum(1)


def control_filter(law: Tensor, transition: Tensor, emission: Tensor, token: int) -> Tensor:
    """Compute the distribution of the guide's state after one more token, ``(H,)``."""
    moved = (law * emission[:, token]) @ transition
    return moved / moved.sum()


def _open(delta: Tensor, closed: bool) -> Tensor:
    """Return which tokens each state allows, ``(S, V)``; ``closed`` excludes the end token."""
    return (delta >= 0) & ~((delta == len(delta)) & closed)
