"""Sampling and log-probabilities of one request in continuous batching."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_ext._checks import check_fields, require, within

OVERFLOWS = "expected finite logits, found NaN or inf"  # part of an error message of a request
_MOST_ROWS = 64  # maximum number of rows whose log-probabilities are in memory at the same time


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one request.

    Args:
        temperature: divisor of the logits. 0 selects the token with the largest logit, the first
            one in a tie.
        top_p: tokens are drawn from the smallest set of most likely tokens whose probabilities sum
            to at least this value.
        seed: seed of a generator for this request, so that its tokens do not depend on the batch.
            None uses torch's default generator. Forked requests share a generator.
        top_k: number of most likely tokens to draw from; -1 for all. Applied before ``top_p``.
        min_p: minimum probability of a drawn token, as a fraction of the largest probability.
            Applied after ``temperature`` and before ``top_p``.
        repetition_penalty: for all tokens that the prompt or the answer contains, divisor of
            positive logits and factor of negative ones. 1 changes nothing.
        logit_bias: numbers to add to logits, by token id.
        min_tokens: minimum number of tokens in the answer before an end token.

    Raises:
        ValueError: If an argument is invalid. The message names the argument.

    Source: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", for ``top_p``.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": within(0),
            "top_p": within(above=0, maximum=1),
            "seed": within(-(1 << 63), (1 << 63) - 1, expected="None or a 64-bit integer"),
            "top_k": within(-1, expected=("an integer", "a number of tokens, or -1 for all")),
            "min_p": within(0, 1),
            "repetition_penalty": within(above=0),
            "min_tokens": within(0),
        }
        check_fields(self, bounds)
        # Store a float, because torch cannot divide by integers of more than 64 bits.
        object.__setattr__(self, "temperature", float(self.temperature))
        found = self.top_k
        require(found != 0, "Sampling", "top_k", "a number of tokens, or -1 for all", found)

    @property
    def draws_from_all(self) -> bool:
        """True if tokens are drawn from the whole distribution."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k == -1 and self.min_p == 0

    def processors(self, prompt: int, ends: Collection[int], device: torch.device) -> Any:
        """Return transformers' logits processors for settings that apply before the temperature.

        Args:
            prompt: number of tokens in the prompt.
            ends: tokens that end the answer.
            device: device of the logits.
        """
        import transformers

        found: Any = transformers.LogitsProcessorList()
        if self.logit_bias:
            bias = [[[token], float(value)] for token, value in self.logit_bias.items()]
            found.append(transformers.SequenceBiasLogitsProcessor(bias))
        if self.repetition_penalty != 1:
            penalty = float(self.repetition_penalty)
            found.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
        if self.min_tokens and ends:
            given = prompt, self.min_tokens, list(ends), str(device)
            found.append(transformers.MinNewTokensLengthLogitsProcessor(*given))
        return found

    def generator(self, device: torch.device) -> torch.Generator | None:
        """Return a new generator with the seed, or None if there is no seed."""
        return None if self.seed is None else torch.Generator(device).manual_seed(self.seed)

    def draw(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample one token id from ``logits``.

        Args:
            logits: floating-point logits ``(V,)`` of the V tokens.
            generator: generator on the device of ``logits``, or None for torch's default generator.

        Returns:
            A token id, ``()`` int64; any id if a logit is NaN or no logit is finite.
        """
        if self.temperature == 0:
            return logits.argmax()
        # Subtract the largest logit before the division, so that no quotient overflows.
        heat = (logits - logits.max()).double() / self.temperature
        import transformers

        ids: Any = None  # these processors do not read the ids
        if self.top_k > 0:  # all logits equal to the k-th largest are kept
            heat = transformers.TopKLogitsWarper(self.top_k)(ids, heat[None])[0]
        if self.min_p > 0:
            heat = transformers.MinPLogitsWarper(self.min_p)(ids, heat[None])[0]
        # multinomial rejects NaN. On a GPU it fails an assertion, which would end all requests.
        probabilities = heat.softmax(-1).nan_to_num(1.0)
        if self.top_p < 1:
            falling, order = probabilities.sort(descending=True)
            before = falling.cumsum(-1) - falling
            probabilities[order[before >= self.top_p]] = 0
        return torch.multinomial(probabilities, 1, generator=generator)[0]


class TokenLogprob(NamedTuple):
    """Log-probability of one token.

    Attributes:
        token: id of the token.
        value: log-probability of the token.
        rank: number of tokens that are at least as likely, including this token.
        top: ids and log-probabilities of the most likely tokens, the most likely one first.
    """

    token: int
    value: float
    rank: int
    top: list[tuple[int, float]]


class Logprobs:
    """Log-probabilities of the tokens of a request, which the manager's thread appends.

    They are the float32 ``log_softmax`` of the model's logits, before the temperature and all other
    settings that change the distribution.

    Args:
        top: number of most likely tokens to record with each new token; None records no new tokens.
        prompt_top: number of most likely tokens to record with each prompt token; None records no
            prompt tokens.

    Attributes:
        tokens: records of the new tokens.
        prompt: records of the prompt tokens by position. The first token has no log-probability.
    """

    def __init__(self, top: int | None = 0, prompt_top: int | None = None):
        self.top, self.prompt_top = top, prompt_top
        self.tokens: list[TokenLogprob] = []
        self.prompt: dict[int, TokenLogprob] = {}


def logprobs_of(logits: Tensor, rows: list[int], tokens: list[int], top: int) -> list[TokenLogprob]:
    """Return the log-probability of ``tokens[i]`` in row ``rows[i]`` of ``logits``, for each i.

    ``logits`` is ``(N, V)``. Each result also contains the ``top`` most likely tokens of its row.
    """
    found = []
    for begin in range(0, len(rows), _MOST_ROWS):
        part = slice(begin, begin + _MOST_ROWS)
        law = logits[rows[part]].float().log_softmax(-1)
        own = law.gather(1, torch.tensor(tokens[part], device=law.device)[:, None])
        values, best = law.topk(min(top, law.shape[1]))
        columns = own[:, 0], (law >= own).sum(-1), best, values
        lists = tokens[part], *map(Tensor.tolist, columns)
        for token, value, rank, *pairs in zip(*lists, strict=True):
            found.append(TokenLogprob(token, value, rank, list(zip(*pairs, strict=True))))
    return found
