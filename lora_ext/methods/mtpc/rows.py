"""The rows of a batch while they are decoded: their tokens, stop rules and statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .request import Request


class Rows:
    """Tokens, stop rules and statistics of every row, on the host.

    Args:
        prompts: ``(B, S)``.
        request: the stop rules.
        streamer: gets the prompt, then every token that the one row keeps; None for nobody.

    Raises:
        ValueError: a streamer beside more than one row.
    """

    def __init__(self, prompts: Tensor, request: Request, streamer: Any = None):
        batch = len(prompts)
        if streamer is not None and batch != 1:
            raise ValueError(f"SpeculativeDecoder: streamer: expected one prompt, found {batch}")
        self.prompts = prompts
        self.request = request
        self.streamer = streamer
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.calls, self.accepted, self.emitted = ([0] * batch for _ in range(3))
        self.live = list(range(batch))
        self._before = [] if request.stops is None else prompts.tolist()
        if streamer is not None:
            streamer.put(prompts.cpu())

    def start(self, token: Tensor) -> list[int]:
        """Append tokens ``(live,)`` that no call has decided; returns as :meth:`take` does."""
        return self._append([[t] for t in token.tolist()])

    def take(self, drafted: Tensor, accepted: Tensor, token: Tensor, evidence: int) -> list[int]:
        """Append what a call decided, up to the first stop.

        Args:
            drafted: ``(live, K)``. accepted: ``(live,)``, how many of them are kept.
            token: ``(live,)``, the verifier's, which follows the kept ones.
            evidence: how many leading tokens of the draft a row has already.

        Returns:
            which of the rows that were live go on, by their places among them.
        """
        decided = torch.cat([drafted, token[:, None], accepted[:, None]], 1).tolist()
        every: list[list[int]] = []
        for row, (*window, last, kept) in zip(self.live, decided, strict=True):
            new = [*window[evidence:kept], last]
            self.calls[row] += 1
            self.accepted[row] += kept - evidence
            self.emitted[row] += len(new)
            every.append(new)
        return self._append(every)

    def _append(self, every: list[list[int]]) -> list[int]:
        """Take new tokens of every live row up to its first stop; which rows go on."""
        stay: list[int] = []
        for i, (row, new) in enumerate(zip(self.live, every, strict=True)):
            new = new[: self.request.budget - len(self.tokens[row])]
            end = self._end(row, new)
            self.tokens[row] += new[:end]
            if self.streamer is not None:
                for t in new[:end]:
                    self.streamer.put(torch.tensor([t]))
            if end is None and len(self.tokens[row]) < self.request.budget:
                stay.append(i)
        self.live = [self.live[i] for i in stay]
        return stay

    def _end(self, row: int, new: list[int]) -> int | None:
        """How many of the new tokens a row keeps where one of them ends it, else None."""
        ends = [k + 1 for k, t in enumerate(new) if t in self.request.ends][:1]
        if self.request.stops is not None:
            stop = self.request.stops([*self._before[row], *self.tokens[row]], new)
            ends += [] if stop is None else [stop]
        return min(ends, default=None)

    def sequences(self) -> Tensor:
        """Prompts and new tokens, padded to the longest; ends the stream."""
        if self.streamer is not None:
            self.streamer.end()
        longest = max(len(tokens) for tokens in self.tokens)
        padded = [[*t, *[self.request.pad] * (longest - len(t))] for t in self.tokens]
        return torch.cat([self.prompts, torch.tensor(padded, device=self.prompts.device)], 1)
