"""Request of one call of the decoder, with the arguments of transformers' ``generate``.

Arguments of the call override its ``generation_config``. If neither sets end tokens or padding,
those of the model's own configuration are used. The sampling settings of the model's configuration
are not read, since the decoder has its own settings. The decoder's output has the model's
distribution. A setting that would change this distribution, or that the decoder does not implement,
raises an error that names the setting. :class:`GeneratedRows` applies the request to each row.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_ext._checks import require

_WHERE = "SpeculativeDecoder"
_HONOURED = {
    "max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "stop_strings", "do_sample",
    "temperature", "top_p",
}  # fmt: skip
# Settings without effect on the tokens that follow a prompt.
_WITHOUT_EFFECT = {
    "bos_token_id", "decoder_start_token_id", "return_dict_in_generate", "transformers_version",
}  # fmt: skip
# Settings have no effect with 0 (those in _ZERO), 1 (_ONE), True (use_cache) or False (all others).
_ZERO = (
    "diversity_penalty", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff",
    "min_length", "min_new_tokens", "min_p", "no_repeat_ngram_size", "top_k",
)  # fmt: skip
_ONE = (
    "encoder_repetition_penalty", "guidance_scale", "length_penalty", "num_beam_groups",
    "num_beams", "num_return_sequences", "repetition_penalty", "typical_p",
)  # fmt: skip
_NEUTRAL = {**dict.fromkeys(_ZERO, 0), **dict.fromkeys(_ONE, 1), "use_cache": True}
# Settings of a model's own configuration that change its distribution, even in greedy decoding.
_PENALTIES = (
    "bad_words_ids", "begin_suppress_tokens", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "no_repeat_ngram_size", "repetition_penalty",
    "sequence_bias", "suppress_tokens",
)  # fmt: skip

#: ``stops(before, new)`` returns the number of new tokens that a row keeps, or None if the row
#: continues.
StopRule = Callable[[list[int], list[int]], int | None]


@dataclass(frozen=True)
class Request:
    """Stop rules and seeds of a call, and the settings of the decoder that the call replaces.

    Attributes:
        budget: maximum number of new tokens per row, at least 1.
        ends: tokens that end a row.
        pad: token that fills a row after its end.
        stops: rule of the stop strings, or None.
        seeds: one seed per row.
        law: values of mode, temperature and top_p that the call sets, by name.
    """

    budget: int
    ends: frozenset[int]
    pad: int
    stops: StopRule | None
    seeds: list[int]
    law: dict[str, Any]


def read_request(
    model: Any, input_ids: Tensor, seed: Any, config: Any, tokenizer: Any, arguments: dict[str, Any]
) -> Request:
    """Check the arguments of :meth:`SpeculativeDecoder.generate` and return the request.

    Args:
        config: the call's ``generation_config``.
        arguments: settings by their names in GenerationConfig; None for settings that are not set.

    Raises:
        ValueError: If a number is out of range, or a setting is not supported; the message names
            the setting.
        TypeError: If an argument is not a setting of ``generate``.
    """
    settings = _merged_settings(config, arguments)
    own = getattr(model, "generation_config", None)
    for name in _PENALTIES if config is None else ():
        value = getattr(own, name, None)
        neutral = _NEUTRAL.get(name)
        expected = f"a generation_config without {name}"
        found = f"{value!r:.80} (pass generation_config=GenerationConfig() to decode without it)"
        require(value in (None, neutral), _WHERE, "model", expected, found)
    budget = settings.get("max_new_tokens")
    if budget is None and "max_length" in settings:
        budget = settings["max_length"] - input_ids.shape[-1]
    found = "no value in the call or generation_config" if budget is None else budget
    require(budget is not None and budget >= 1, _WHERE, "max_new_tokens", "at least 1", found)
    assert budget is not None
    eos = settings.get("eos_token_id", getattr(own, "eos_token_id", None))
    ends = [] if eos is None else [eos] if isinstance(eos, int) else [int(e) for e in eos]
    pad = settings.get("pad_token_id", getattr(own, "pad_token_id", None))
    if pad is None:
        pad = ends[0] if ends else 0
    law = {name: settings[name] for name in ("temperature", "top_p") if name in settings}
    if "do_sample" in settings:
        law["mode"] = "sample" if settings["do_sample"] else "greedy"
    strings = settings.get("stop_strings")
    stops = None if strings is None else _stop_rule(strings, tokenizer)
    return Request(budget, frozenset(ends), pad, stops, row_seeds(seed, len(input_ids)), law)


def row_seeds(seed: int | Sequence[int] | None, batch: int) -> list[int]:
    """Return one seed per row.

    A single seed is expanded with a generator, so that neighbouring seeds have no row seed in
    common. If ``seed`` is None, the seeds are drawn from torch's generator.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (batch,)).tolist()
    one = not isinstance(seed, Iterable)
    try:
        seeds = [operator.index(s) for s in ([seed] if one else seed)]
    except TypeError:
        raise TypeError(
            f"{_WHERE}: seed: expected None, an integer or {batch} integers, found {seed!r:.80}"
        ) from None
    for each in seeds:
        require(0 <= each < 2**64, _WHERE, "seed", "a number from 0 to 2^64 - 1", each)
    if one:
        generator = torch.Generator().manual_seed(seeds[0])
        return torch.randint(2**63 - 1, (batch,), generator=generator).tolist()
    require(len(seeds) == batch, _WHERE, "seed", f"None, one seed or {batch} seeds", len(seeds))
    return seeds


def _merged_settings(config: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings with a value; arguments of the call override its
    ``generation_config``."""
    from transformers import GenerationConfig

    plain = vars(GenerationConfig())
    named = {name: value for name, value in arguments.items() if value is not None}
    expected = "a setting of transformers' GenerationConfig"
    for name in named:
        known = name in plain or name in _HONOURED
        require(known, _WHERE, name, expected, "another name", TypeError)
    changed = {
        name: value
        for name, value in ({} if config is None else vars(config)).items()
        if not name.startswith("_") and value is not None and value != plain.get(name)
    }
    settings = changed | named
    for name, value in settings.items():
        fits = name in _HONOURED | _WITHOUT_EFFECT or value == _NEUTRAL.get(name, False)
        expected = f"{_NEUTRAL.get(name, False)}, the only value that the decoder supports"
        require(fits, _WHERE, name, expected, f"{value!r:.80}")
    return settings


def _stop_rule(strings: str | Sequence[str], tokenizer: Any) -> StopRule:
    from transformers import StopStringCriteria

    require(tokenizer is not None, _WHERE, "tokenizer", "the tokenizer of the stop_strings", None)
    strings = [strings] if isinstance(strings, str) else list(strings)
    criteria = StopStringCriteria(tokenizer, strings)
    width = criteria.maximum_token_len
    filler = len(criteria.embedding_vec) - 1  # an id that matches no string

    def stops(before: list[int], new: list[int]) -> int | None:
        text = [*before, *new]
        ends = range(len(before) + 1, len(text) + 1)
        tails = [[*[filler] * (width - end), *text[max(0, end - width) : end]] for end in ends]
        ids: Any = torch.tensor(tails, dtype=torch.int64)  # the criteria's annotation is LongTensor
        completed = criteria(ids, None).tolist()
        return completed.index(True) + 1 if True in completed else None

    return stops


class GeneratedRows:
    """Tokens and statistics of every row of ``prompts (B, S)``, on the host, up to the row's stop.

    Rows that are not finished are called live; in shapes, ``live`` is their number. A streamer
    receives the prompt and then every token that the row keeps. A streamer requires a single row.
    """

    def __init__(self, prompts: Tensor, request: Request, streamer: Any = None):
        batch = len(prompts)
        require(streamer is None or batch == 1, _WHERE, "streamer", "a single prompt", batch)
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
        """Append tokens ``(live,)`` that were drawn without a draft. The return value is as in
        :meth:`take`."""
        return self._append([[t] for t in token.tolist()])

    def take(self, drafted: Tensor, accepted: Tensor, token: Tensor, evidence: int) -> list[int]:
        """Append the tokens of a call, up to the first stop.

        Args:
            drafted: drafted tokens ``(live, K)``.
            accepted: ``(live,)``, number of drafted tokens that are kept.
            token: ``(live,)``, the verifier's token, which follows the kept tokens.
            evidence: number of leading tokens of the draft that a row has already.

        Returns:
            the rows that remain live, as indices in the list of rows that were live before.
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
        """Append new tokens to every live row up to its first stop. The return value is as in
        :meth:`take`."""
        stay: list[int] = []
        for i, (row, new) in enumerate(zip(self.live, every, strict=True)):
            new = new[: self.request.budget - len(self.tokens[row])]
            ends = [k + 1 for k, t in enumerate(new) if t in self.request.ends][:1]
            if self.request.stops is not None:
                stop = self.request.stops([*self._before[row], *self.tokens[row]], new)
                ends += [] if stop is None else [stop]
            end = min(ends, default=None)
            self.tokens[row] += new[:end]
            if self.streamer is not None:
                for t in new[:end]:
                    self.streamer.put(torch.tensor([t]))
            if end is None and len(self.tokens[row]) < self.request.budget:
                stay.append(i)
        self.live = [self.live[i] for i in stay]
        if self.streamer is not None and not stay:
            self.streamer.end()
        return stay
