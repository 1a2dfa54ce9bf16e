"""Constraints of requests, from the door of vLLM's engine to the scores of each step.

A request says its constraint in ``SamplingParams.extra_args``. The door of the engine builds it and
holds it against the budget: what cannot be met is refused there, for that request alone, since an
error in a step would end the engine for everybody. What comes to the workers is the constraint
itself, and nothing is left to be refused. This file needs no vLLM; :mod:`.processor` is the class
that vLLM is told of.
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
from lora_ext.serving import Format, Standing, constrained, read_format

from ._interface import wrap

KEY = "lora_ext_constraint"  # of SamplingParams.extra_args
GUIDE = "lora_ext_guide"  # of the engine's additional_config: a folder
PROCESSOR = "lora_ext.interop.vllm.processor:Constraints"
_MARK = "_lora_ext_constrains"
_KEPT_VOCABULARIES, _KEPT_PLANS = 4, 256
_GREEDY = 1e-5  # vLLM takes the likeliest token below this temperature
#: Fields of SamplingParams that would cut a text or take away what a constraint needs.
_NONE_OF = (
    "stop",
    "bad_words",
    "allowed_token_ids",
    "structured_outputs",
    "ignore_eos",
    "thinking_token_budget",
)
_doors: list[type] = []  # engines of this process that build what their requests ask for


@dataclass(frozen=True)
class Words:
    """Words that must and must not occur, as :meth:`Constraint.keywords` takes them."""

    all_of: Sequence[Any] = ()
    none_of: Sequence[str] = ()

    def constraint(self, vocabulary: Any) -> Constraint:
        """Build it, as :meth:`Format.constraint` does."""
        return Constraint.keywords(vocabulary, self.all_of, self.none_of)


def asked_for(params: Any) -> Format | Words | None:
    """What a request's parameters ask for; None without a constraint.

    Args:
        params: vLLM's ``SamplingParams``.

    Raises:
        ValueError: for what is no constraint, and for parameters that rule one out.
        NotImplementedError: for grammars, which no automaton holds to.
    """
    given = (params.extra_args or {}).get(KEY)
    if given is None or isinstance(given, Constraint):
        return None
    if isinstance(given, str):  # over HTTP, where vllm_xargs has no objects
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{KEY}: expected JSON, found {error!s:.120}") from None
    instance(KEY, "value", given, Mapping)
    for name in _NONE_OF:
        found = getattr(params, name, None)
        require(not found, KEY, name, "none beside a constraint", found)
    if set(given) != {"keywords"}:
        return read_format(structured_outputs=given)
    words = given["keywords"]
    instance(KEY, "keywords", words, Mapping)
    more = sorted(map(str, set(words) - {"all_of", "none_of"}))
    require(not more, KEY, "keywords", "all_of, none_of", more[:3])
    return Words(**words)


def budget_of(params: Any, prompt: Sequence[int] | None, length: int) -> int:
    """Tokens that may come: vLLM cuts a text at ``max_tokens`` and at the model's length."""
    left = length - len(prompt or ())
    return left if params.max_tokens is None else min(params.max_tokens, left)


# --- the door of the engine -----------------------------------------------------------------------
class Builder:
    """Builds the constraints of requests to one engine.

    Args:
        config: vLLM's ``VllmConfig``.
    """

    def __init__(self, config: Any):
        self._model = config.model_config
        named = [getattr(each, "__name__", each) for each in self._model.logits_processors or ()]
        self._enabled = bool({PROCESSOR, PROCESSOR.partition(":")[2]} & set(named))
        self._vocabulary = functools.lru_cache(_KEPT_VOCABULARIES)(self._read_vocabulary)

    def built(self, request: Any) -> Any:
        """A request's parameters with its constraint built; as they are without one.

        Raises:
            ValueError, NotImplementedError: as :func:`asked_for`, for a constraint that is none, is
                too large, or does not fit into the budget, and without our logits processor.
        """
        params = request.sampling_params
        if params is None or (asked := asked_for(params)) is None:
            return params
        expected = f"logits_processors=[{PROCESSOR!r}] of the engine beside it"
        require(self._enabled, KEY, "value", expected, self._model.logits_processors)
        prompt = request.prompt_token_ids
        require(prompt is not None, KEY, "prompt", "tokens beside a constraint", "embeddings")
        ends = tuple(sorted(params.all_stop_token_ids))
        require(ends, KEY, "stop_token_ids", "a token that ends texts", "none")
        constraint = asked.constraint(self._vocabulary(ends))
        budget = budget_of(params, prompt, self._model.max_model_len)
        plans_of(KEY, constraint, None, budget, params.min_tokens)
        params = copy.copy(params)
        params.extra_args = {**params.extra_args, KEY: constraint}
        return params

    def _read_vocabulary(self, ends: tuple[int, ...]) -> Any:
        from transformers import AutoTokenizer

        model = self._model
        # Read anew for each set of ends: what is kept of a tokenizer lives as long as it does.
        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer,
            revision=model.tokenizer_revision,
            trust_remote_code=model.trust_remote_code,
        )
        return vocabulary_of(KEY, tokenizer, model.get_vocab_size(), ends)


def build_at_door(engine: Any) -> None:
    """Put a :class:`Builder` behind the door of vLLM's ``EngineCore``, for the process; once."""

    def preprocess_add_request(inner: Any, self: Any, request: Any, *args: Any) -> Any:
        if getattr(request, "sampling_params", None) is not None:
            if _MARK not in self.__dict__:
                self.__dict__[_MARK] = Builder(self.vllm_config)
            request.sampling_params = self.__dict__[_MARK].built(request)
        return inner(self, request, *args)

    wrap(engine, "preprocess_add_request", preprocess_add_request, _MARK)
    if engine not in _doors:
        _doors.append(engine)


def in_front(settings: Any) -> Callable[[Any], None]:
    """What looks at each request in front of an engine of these settings: builds what it asks for,
    and raises what :meth:`Builder.built` does."""
    return Builder(settings).built


# --- the scores of a step -------------------------------------------------------------------------
@dataclass
class _Following:
    """A request of the batch, and where its text stands."""

    row: Row | None
    temperature: float
    tokens: list[int]  # vLLM's own list, which grows
    seen: int = field(default=0)


class ConstrainedRows:
    """The rows of vLLM's batch that have constraints: what its logits processors are asked.

    vLLM divides by the temperature afterwards, so what is returned makes its law the stated one
    (docs/control.md); penalties, ``top_p``, ``top_k`` and ``min_p`` change the law and not the
    satisfaction. Rows without a constraint keep every bit.

    Args:
        vllm_config: with ``additional_config["lora_ext_guide"]``, a folder, or without: mask law.
        device, is_pin_memory: as vLLM has it, not read.

    Raises:
        ValueError: for a guide of another vocabulary.
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
        """Refuse, before the engine sees it, what :func:`asked_for` refuses, and any constraint
        where the plug-in is off, or vLLM has no such door."""
        try:
            asked = asked_for(sampling_params)
        except NotImplementedError as error:
            raise ValueError(str(error)) from None
        expected = "the plug-in, which builds it (LORA_EXT_VLLM; a warning says what vLLM lacks)"
        require(asked is None or _doors, KEY, "value", expected, "it off")

    def is_argmax_invariant(self) -> bool:
        """A constraint forbids the likeliest token too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow vLLM's batch: rows leave, come and change places, in this order."""
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
        """``logits (B, V) + temperature * log r`` of the rows with constraints."""
        self._catch_up()
        standing = [Standing(i, r.row, r.temperature) for i, r in sorted(self._following.items())]
        return constrained(logits[None], standing)[0]

    def _catch_up(self) -> None:
        """Read tokens that have come; a request that was put off comes back with all of its own."""
        while behind := [r for r in self._following.values() if r.seen < len(r.tokens)]:
            rows = advance([r.row for r in behind], [r.tokens[r.seen] for r in behind])
            for each, row in zip(behind, rows, strict=True):
                each.row, each.seen = row, each.seen + 1
