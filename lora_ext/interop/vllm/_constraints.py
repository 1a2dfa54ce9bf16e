"""Constraints of requests in vLLM.

A constraint describes the texts that a request may generate (:mod:`lora_ext.control`). The client
sends its description in ``SamplingParams.extra_args``. When the request arrives, the engine builds
the constraint and checks that a text within the budget, the maximum number of new tokens, can
satisfy it. An error at this point affects only this request, whereas an error in a step would end
the engine for all requests. The workers receive the built constraint and apply it to the logits of
each step.

This file does not import vLLM. The class that vLLM loads is in :mod:`.processor`.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lora_ext._checks import instance, require
from lora_ext.control import Constraint, Guide, Plan, Row, advance, plans_of, vocabulary_of
from lora_ext.serving import Standing, constrained, read_format

from ._interface import wrap

KEY = "lora_ext_constraint"  # key in SamplingParams.extra_args
GUIDE = "lora_ext_guide"  # key in the engine's additional_config for the folder of a guide
PROCESSOR = "lora_ext.interop.vllm.processor:Constraints"
_MARK = "_lora_ext_constrains"
_KEPT_VOCABULARIES, _KEPT_PLANS = 4, 256
_GREEDY = 1e-5  # Below this temperature, vLLM always chooses the most likely token.
#: Fields of SamplingParams that could cut a text early, or forbid tokens that a constraint needs.
_NONE_OF = """stop bad_words allowed_token_ids structured_outputs ignore_eos
    thinking_token_budget""".split()
_engines: set[type] = set()  # engine classes of this process that build constraints


def asked_for(params: Any) -> Callable[[Any], Constraint] | None:
    """Return a function that builds the constraint of a request from a vocabulary.

    Returns None if the request has no constraint, or if the constraint has been built already.

    Args:
        params: vLLM's ``SamplingParams``.

    Raises:
        ValueError: If the value does not describe a constraint, or if another parameter must not be
            used with a constraint.
        NotImplementedError: If the constraint is a grammar, which an automaton cannot represent.
    """
    given = (params.extra_args or {}).get(KEY)
    if given is None or isinstance(given, Constraint):
        return None
    if isinstance(given, str):  # Over HTTP, the values of vllm_xargs cannot be objects.
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{KEY}: expected JSON: {error!s:.120}") from None
    instance(KEY, "value", given, Mapping)
    for name in _NONE_OF:
        found = getattr(params, name, None)
        require(not found, KEY, name, "none with a constraint", found)
    if set(given) != {"keywords"}:
        form = read_format(structured_outputs=given)
        return None if form is None else form.constraint
    words = given["keywords"]
    instance(KEY, "keywords", words, Mapping)
    more = sorted(map(str, set(words) - {"all_of", "none_of"}))
    require(not more, KEY, "keywords", "only the keys all_of and none_of", more[:3])
    return functools.partial(Constraint.keywords, **words)


def budget_of(params: Any, prompt: Sequence[int] | None, length: int) -> int:
    """Return the maximum number of new tokens of a request.

    ``max_tokens`` and the model's maximum length limit this number.
    """
    left = length - len(prompt or ())
    return left if params.max_tokens is None else min(params.max_tokens, left)


# --- arrival at the engine ------------------------------------------------------------------------
class Builder:
    """Builder of constraints for the requests to one engine.

    Args:
        config: vLLM's ``VllmConfig``.
    """

    def __init__(self, config: Any):
        self._model = config.model_config
        named = [getattr(each, "__name__", each) for each in self._model.logits_processors or ()]
        self._enabled = bool({PROCESSOR, PROCESSOR.partition(":")[2]} & set(named))
        self._vocabulary = functools.lru_cache(_KEPT_VOCABULARIES)(self._read_vocabulary)

    def built(self, request: Any) -> Any:
        """Return the sampling parameters of a request with its constraint built.

        The parameters of a request without a constraint are returned unchanged.

        Raises:
            ValueError: If :func:`asked_for` raises it; if the constraint is too large, or no text
                within the budget satisfies it; if the prompt is not given as tokens; or if the
                engine was started without lora_ext's logits processor.
            NotImplementedError: If the constraint is a grammar.
        """
        params = request.sampling_params
        if params is None or (asked := asked_for(params)) is None:
            return params
        expected = f"an engine with logits_processors=[{PROCESSOR!r}]"
        require(self._enabled, KEY, "value", expected, self._model.logits_processors)
        prompt = request.prompt_token_ids
        require(prompt is not None, KEY, "prompt", "tokens with a constraint", "embeddings")
        ends = tuple(sorted(params.all_stop_token_ids))
        require(ends, KEY, "stop_token_ids", "a token that ends texts", "none")
        constraint = asked(self._vocabulary(ends))
        budget = budget_of(params, prompt, self._model.max_model_len)
        plans_of(KEY, constraint, None, budget, params.min_tokens)
        params = copy.copy(params)
        params.extra_args = {**params.extra_args, KEY: constraint}
        return params

    def _read_vocabulary(self, ends: tuple[int, ...]) -> Any:
        from transformers import AutoTokenizer

        model = self._model
        # One tokenizer per set of end tokens: a vocabulary is cached for the life of its tokenizer.
        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer,
            revision=model.tokenizer_revision,
            trust_remote_code=model.trust_remote_code,
        )
        return vocabulary_of(KEY, tokenizer, model.get_vocab_size(), ends)


def build_on_arrival(engine: Any) -> None:
    """Make vLLM's ``EngineCore`` build constraints when requests arrive, in the whole process."""

    def preprocess_add_request(inner: Any, self: Any, request: Any, *args: Any) -> Any:
        if getattr(request, "sampling_params", None) is not None:
            if _MARK not in self.__dict__:
                self.__dict__[_MARK] = Builder(self.vllm_config)
            request.sampling_params = self.__dict__[_MARK].built(request)
        return inner(self, request, *args)

    wrap(engine, "preprocess_add_request", preprocess_add_request, _MARK)
    _engines.add(engine)


def in_front(settings: Any) -> Callable[[Any], None]:
    """Return a check for requests that have not reached the engine's core yet.

    The check builds the constraint of a request and raises the errors of :meth:`Builder.built`.

    Args:
        settings: vLLM's ``VllmConfig``.
    """
    return Builder(settings).built


# --- logits of a step -----------------------------------------------------------------------------
@dataclass
class _Following:
    """Request of the batch, with its constraint's state after the first ``seen`` new tokens."""

    row: Row | None
    temperature: float
    tokens: list[int]  # vLLM's list of generated tokens, to which vLLM appends
    seen: int = field(default=0)  # number of tokens that `row` includes


class ConstrainedRows:
    """Logits processor that applies constraints, without the base class of vLLM.

    After this processor, vLLM divides the logits by the temperature. Tokens then have the
    distribution that ``docs/control.md`` describes. Penalties, ``top_p``, ``top_k`` and ``min_p``
    change this distribution, but texts still satisfy their constraints. Rows without a constraint
    stay unchanged. Shape letters: ``B`` rows of the batch, ``V`` vocabulary size.

    Args:
        vllm_config: vLLM's configuration. If ``additional_config`` contains "lora_ext_guide", it is
            the folder of a guide: a hidden Markov model of the model's text, with which constraints
            look ahead.
        device: not used.
        is_pin_memory: not used.

    Raises:
        ValueError: If the vocabulary sizes of the guide and the model differ.
    """

    def __init__(self, vllm_config: Any, device: Any = None, is_pin_memory: bool = False):
        model, folder = vllm_config.model_config, (vllm_config.additional_config or {}).get(GUIDE)
        guide = None if folder is None else Guide.load(folder)
        size = model.get_vocab_size()
        if guide is not None:
            require(guide.vocab_size == size, KEY, GUIDE, f"{size} tokens", guide.vocab_size)
        self._length: int = model.max_model_len
        self._plan: Callable[[Constraint, int, int], Plan] = functools.lru_cache(_KEPT_PLANS)(
            lambda constraint, budget, least: Plan(constraint, budget, least, guide)
        )
        self._following: dict[int, _Following] = {}

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Raise ValueError if a constraint is invalid, or if it is given but the plug-in is off."""
        try:
            asked = asked_for(sampling_params)
        except NotImplementedError as error:
            raise ValueError(str(error)) from None
        expected = "an engine with lora_ext's plug-in (see LORA_EXT_VLLM and warnings at the start)"
        require(asked is None or _engines, KEY, "value", expected, "an engine without it")

    def is_argmax_invariant(self) -> bool:
        """Return False, because a constraint can forbid the most likely token."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Apply the changes of vLLM's batch: removed, added and moved rows, in this order."""
        if batch_update is None:
            return
        rows = self._following
        for place in batch_update.removed:
            rows.pop(place, None)
        for place, params, prompt, tokens in batch_update.added:
            rows.pop(place, None)
            constraint = (params.extra_args or {}).get(KEY)
            if isinstance(constraint, Constraint):
                budget = budget_of(params, prompt, self._length)
                first = Row.first(self._plan(constraint, budget, params.min_tokens))
                warm = params.temperature if params.temperature >= _GREEDY else 1.0
                rows[place] = _Following(first, warm, tokens)
        for here, there, how in batch_update.moved:
            moving, other = rows.pop(here, None), rows.pop(there, None)
            if moving is not None:
                rows[there] = moving
            if other is not None and how.name == "SWAP":
                rows[here] = other

    def apply(self, logits: Tensor) -> Tensor:
        """Return ``logits (B, V)``, plus ``temperature * log r`` for rows with a constraint.

        ``r`` is the ratio with which the constraint changes the probability of a token.
        """
        # A row may have several new tokens: a preempted request returns with all its tokens.
        while behind := [r for r in self._following.values() if r.seen < len(r.tokens)]:
            rows = advance([r.row for r in behind], [r.tokens[r.seen] for r in behind])
            for each, row in zip(behind, rows, strict=True):
                each.row, each.seen = row, each.seen + 1
        standing = [Standing(i, r.row, r.temperature) for i, r in sorted(self._following.items())]
        return constrained(logits[None], standing)[0]
