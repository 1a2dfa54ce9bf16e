"""Tokens that a circuit head covers: the whole vocabulary, or a shortlist.

A head with a shortlist computes leaves for its tokens only, in the order of the list. The *place*
of a token is its index in the list. :meth:`Shortlist.places` converts tokens to places, and
:meth:`Shortlist.widen` converts leaves over places to leaves over the vocabulary. Without a list,
both methods return their argument.

Source: FR-Spec (arXiv 2502.14856), for drafts; the treatment of evidence and targets outside the
list is ours (docs/mtpc.md, "Shortlist").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_ext._torch import compiles


@dataclass(frozen=True)
class Shortlist:
    """Tokens of a vocabulary for which a head computes leaves, and their places.

    Attributes:
        ids: ``(L,)`` int64, ascending and distinct; None if every token is its own place.
        vocab_size: ``V``.
    """

    ids: Tensor | None
    vocab_size: int

    @property
    def size(self) -> int:
        """``L``, number of places."""
        return self.vocab_size if self.ids is None else len(self.ids)

    def places(self, tokens: Tensor) -> Tensor:
        """Return the place of each token, and -1 for a token of the vocabulary without a place.

        A number outside the vocabulary is returned unchanged: -1 still marks a marginalised
        position, and the op that receives the places raises an error for any other number.
        """
        if self.ids is None:
            return tokens
        tokens = tokens.contiguous()
        place = torch.searchsorted(self.ids, tokens).clamp(max=self.size - 1)
        without = torch.where(self._in_vocabulary(tokens), -1, tokens)
        return torch.where(self.ids[place] == tokens, place, without)

    def tokens(self, places: Tensor) -> Tensor:
        """Return the tokens at these places."""
        return places if self.ids is None else self.ids[places]

    def lacks(self, tokens: Tensor) -> Tensor:
        """Return which tokens of the vocabulary have no place, as bool; False outside the
        vocabulary."""
        return self._in_vocabulary(tokens) & (self.places(tokens) == -1)

    def narrow(self, values: Tensor, dim: int = -1) -> Tensor:
        """Keep the values of the tokens in the list: ``V`` becomes ``L`` along ``dim``."""
        return values if self.ids is None else values.index_select(dim, self.ids.to(values.device))

    def widen(self, logits: Tensor) -> Tensor:
        """Return logits over places ``(..., L)`` as logits over the vocabulary ``(..., V)``, with
        ``-inf`` for tokens without a place."""
        if self.ids is None:
            return logits
        wide = logits.new_full((*logits.shape[:-1], self.vocab_size), -torch.inf)
        return wide.index_copy_(-1, self.ids, logits)

    def _in_vocabulary(self, tokens: Tensor) -> Tensor:
        return (tokens >= 0) & (tokens < self.vocab_size)


def checkable(t: Tensor) -> bool:
    """Return whether the values of ``t`` can be checked here: ``t`` is on the CPU, and no graph is
    being compiled. The ops check the values again when they run."""
    return t.device.type == "cpu" and not compiles()


def checked_ids(ids: Tensor | Sequence[int], vocab_size: int) -> Tensor:
    """Return the ids of a shortlist in ascending order, on the CPU.

    Raise unless there are at least 2 ids, which are int64, distinct and in the vocabulary.
    """
    where = "CircuitHead: shortlist: expected"
    if not isinstance(ids, Tensor | Sequence) or isinstance(ids, str):
        raise TypeError(f"{where} token ids, found {ids!r:.100}")
    ids = torch.as_tensor(ids, device="cpu")
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(f"{where} shape (L,) with L >= 2, found {tuple(ids.shape)}")
    if ids.dtype != torch.int64:
        raise TypeError(f"{where} int64, found {ids.dtype}")
    ids = ids.sort().values
    least, most = int(ids[0]), int(ids[-1])
    if least < 0 or most >= vocab_size:
        raise ValueError(f"{where} ids in [0, {vocab_size}), found {least} to {most}")
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise ValueError(f"{where} distinct ids, found {int(twice[0])} twice")
    return ids
