"""Constraints of vLLM requests, tested with small fakes of its batch, engine and sampler.

:class:`Batch` applies vLLM's ``BatchUpdate``, which removes, adds, moves and swaps rows.
"""

from __future__ import annotations

import importlib
import math
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch
from control_tokenizer import tokenizer
from control_toys import guide as toy_guide

from lora_ext import control
from lora_ext.interop.vllm import _constraints
from lora_ext.interop.vllm._constraints import (
    GUIDE,
    KEY,
    PROCESSOR,
    ConstrainedRows,
    build_on_arrival,
    in_front,
)
from lora_ext.interop.vllm._interface import register_check

V, LENGTH = len(tokenizer()), 64
EOS = tokenizer().eos_token_id


def sampling(constraint=None, max_tokens=20, temperature=1.0, min_tokens=0, **more):
    """Return an object with the fields of vLLM's SamplingParams that lora_ext reads."""
    neutral = dict.fromkeys(("allowed_token_ids", "structured_outputs", "thinking_token_budget"))
    neutral |= {"stop": [], "bad_words": [], "ignore_eos": False, "all_stop_token_ids": {EOS}}
    given = None if constraint is None else {"other": 1, KEY: constraint}
    fields = {"extra_args": given, "max_tokens": max_tokens, "temperature": temperature}
    return SimpleNamespace(**{**neutral, **fields, "min_tokens": min_tokens, **more})


def settings(processors=(PROCESSOR,), folder=None, **more):
    """Return an object with the fields of vLLM's VllmConfig that lora_ext reads."""
    model = {"logits_processors": list(processors), "max_model_len": LENGTH, "tokenizer": "here"}
    model |= {"tokenizer_revision": None, "trust_remote_code": False, "get_vocab_size": lambda: V}
    also = {} if folder is None else {GUIDE: str(folder)}
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**model, **more}), additional_config=also
    )


@pytest.fixture(autouse=True)
def here(monkeypatch):
    found = SimpleNamespace(from_pretrained=lambda *args, **kwargs: tokenizer())
    monkeypatch.setattr("transformers.AutoTokenizer", found)
    monkeypatch.setattr(_constraints, "_engines", set())


def save_guide(folder):
    toy = toy_guide(states=3, vocab=V)
    control.Guide(*(t.float() for t in (toy.initial, toy.transition, toy.emission))).save(folder)


def engine_with(config):
    class EngineCore:
        vllm_config = config

        def preprocess_add_request(self, request):
            return request.sampling_params, 0

    build_on_arrival(EngineCore)
    build_on_arrival(EngineCore)
    return EngineCore()


def built(params, config=None, prompt=(5, 6, 7)):
    """Return the sampling parameters as the workers receive them."""
    request = SimpleNamespace(sampling_params=params, prompt_token_ids=prompt)
    return engine_with(config or settings()).preprocess_add_request(request)[0]


class Batch:
    """Fake of vLLM's batch, with a growing token list per row; rows may move."""

    def __init__(self, rows):
        self.rows, self.places = rows, {}

    def update(self, removed=(), added=(), moved=()):
        for place in removed:
            self.places.pop(place)
        for place, params, tokens in added:
            self.places[place] = (params, tokens)
        for here, there, how in moved:
            moving, other = self.places.pop(here), self.places.pop(there, None)
            self.places[there] = moving
            if how == "SWAP":
                self.places[here] = other
        rows = [(place, params, [5, 6, 7], tokens) for place, params, tokens in added]
        ways = [(a, b, SimpleNamespace(name=how)) for a, b, how in moved]
        size = len(self.places)
        self.rows.update_state(
            SimpleNamespace(batch_size=size, removed=list(removed), added=rows, moved=ways)
        )

    def step(self, seed):
        """Sample a token for every row from random scores; return the scores before and after."""
        scores = torch.randn(len(self.places), V, generator=torch.Generator().manual_seed(seed))
        changed = self.rows.apply(scores.clone())
        generator = torch.Generator().manual_seed(seed)
        for place, (params, tokens) in sorted(self.places.items()):
            warm = params.temperature or 1.0
            law = (changed[place] / warm).softmax(-1)
            tokens.append(int(law.multinomial(1, generator=generator)))
        self.rows.update_state(None)
        return scores, changed


def told(tokens):
    return tokenizer().decode(tokens[: tokens.index(EOS)])


def test_rows_keep_their_constraints_when_the_batch_changes():
    rows = ConstrainedRows(settings())
    date = built(sampling({"choice": ["2024-10", "1999-12"]}, temperature=0.5))
    dog = built(sampling({"keywords": {"all_of": [" dog"], "none_of": ["b"]}}, max_tokens=12))
    answer = built(sampling('{"choice": ["yes", "no"]}', max_tokens=9))
    batch, texts = Batch(rows), {name: [] for name in ("date", "dog", "answer", "plain", "late")}
    batch.update(added=[(0, date, texts["date"]), (1, sampling(), texts["plain"])])
    scores, changed = batch.step(0)
    assert torch.equal(changed[1], scores[1])  # row without a constraint
    batch.update(added=[(2, dog, texts["dog"]), (3, answer, texts["answer"])])
    batch.step(1)
    batch.update(moved=[(0, 2, "SWAP")])
    batch.step(2)
    batch.update(removed=[1], moved=[(3, 1, "UNIDIRECTIONAL")])
    for seed in range(3, 20):
        batch.step(seed)
        if seed == 9:  # preempt a row, and resume it elsewhere
            batch.update(removed=[0])
            batch.update(added=[(0, dog, texts["dog"])])
    assert told(texts["date"]) in ("2024-10", "1999-12")
    assert " dog" in told(texts["dog"]) and "b" not in told(texts["dog"])
    assert told(texts["answer"]) in ("yes", "no")
    assert texts["dog"].index(EOS) < 12 and texts["answer"].index(EOS) < 9


@pytest.mark.parametrize("warm", [0.0, 0.7])
def test_scores_of_a_row_equal_those_of_constraint_processor(warm, tmp_path):
    # vLLM and the processor divide scores by the temperature of the row (1 for greedy decoding).
    save_guide(tmp_path)
    params = built(sampling({"choice": ["aba", "abab", "babba", "bbaa"]}, 8, warm, min_tokens=4))
    rows, tokens, one = ConstrainedRows(settings(folder=tmp_path)), [], params.extra_args[KEY]
    how = control.ConstraintProcessor(
        one, control.Guide.load(tmp_path), max_new_tokens=8, min_new_tokens=4,
        temperature=warm or 1.0,
    )  # fmt: skip
    batch = Batch(rows)
    batch.update(added=[(0, params, tokens)])
    for seed in range(8):
        before = torch.tensor([[5, 6, 7, *tokens]])
        scores, changed = batch.step(seed)
        assert torch.equal(changed, how(before, scores))
        if tokens[-1] == EOS:
            break
    assert 4 <= tokens.index(EOS) <= 7


def test_token_budget_is_limited_by_max_model_len():
    word = {"keywords": {"all_of": ["a"]}}
    params = built(sampling(word, max_tokens=None), prompt=range(LENGTH - 3))
    # The prompt has three tokens.
    batch, tokens = Batch(ConstrainedRows(settings(max_model_len=6))), []
    batch.update(added=[(0, params, tokens)])
    for seed in range(3):
        batch.step(seed)
    assert EOS in tokens


def test_unsatisfiable_constraints_are_refused_by_the_engine_core():
    date = {"choice": ["2024-10"]}
    with pytest.raises(ValueError, match="max_new_tokens: expected at least"):
        built(sampling(date, max_tokens=3))
    with pytest.raises(ValueError, match="max_new_tokens: expected at least"):
        built(sampling(date), prompt=range(LENGTH - 4))
    with pytest.raises(ValueError, match="min_new_tokens: expected an allowed text of 8 to"):
        built(sampling({"choice": ["yes"]}, min_tokens=8))
    with pytest.raises(ValueError, match=r"with logits_processors=\['lora_ext.interop.vllm"):
        built(sampling(date), settings(processors=()))
    with pytest.raises(ValueError, match="prompt: expected tokens"):
        built(sampling(date), prompt=None)
    with pytest.raises(ValueError, match="stop_token_ids: expected a token that ends"):
        built(sampling(date, all_stop_token_ids=set()))
    params = sampling(date)
    assert built(params).extra_args["other"] == 1 and params.extra_args[KEY] == date
    assert built(sampling()).extra_args is None and built(None) is None


def test_llm_engine_refuses_a_request_before_it_is_recorded():
    # vLLM's LLMEngine records a request before its core checks it, and would wait for a refused
    # request.
    class LLMEngine:
        def __init__(self, config):
            self.vllm_config, self.waits = config, []
            self.input_processor = SimpleNamespace(process_inputs=lambda request: request)

        def add_request(self, request):
            self.waits.append(self.input_processor.process_inputs(request))

    register_check(LLMEngine, in_front)
    register_check(LLMEngine, in_front)
    engine, form = LLMEngine(settings()), {"choice": ["2024-10"]}
    for most in (3, 20):
        request = SimpleNamespace(sampling_params=sampling(form, most), prompt_token_ids=[5])
        with pytest.raises(ValueError, match="at least 8") if most == 3 else nullcontext():
            engine.add_request(request)
    assert engine.waits == [request] and request.sampling_params.extra_args[KEY] == form


@pytest.mark.parametrize(
    ("given", "more", "message"),
    [
        ("{", {}, "expected JSON"),
        (7, {}, "expected a Mapping"),
        ({"regex": "a", "choice": ["b"]}, {}, "fields: expected exactly one of"),
        ({"keywords": ["dog"]}, {}, "keywords: expected a Mapping"),
        ({"keywords": {"all": ["dog"]}}, {}, "keywords: expected only the keys all_of"),
        ({"grammar": "a"}, {}, "grammar"),
        ({"regex": "a"}, {"stop": ["b"]}, "stop: expected none"),
        ({"regex": "a"}, {"ignore_eos": True}, "ignore_eos: expected none"),
        ({"regex": "a"}, {"structured_outputs": object()}, "structured_outputs: expected none"),
        ({"regex": "a"}, {}, "expected an engine with lora_ext's plug-in"),
    ],
)
def test_invalid_constraints_are_refused_by_validate_params(given, more, message):
    with pytest.raises(ValueError, match=message):
        ConstrainedRows.validate_params(sampling(given, **more))


def test_processor_is_a_subclass_of_vllms_logits_processor(monkeypatch, tmp_path):
    class LogitsProcessor:
        pass

    for name in ("vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.logits_processor"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    stub = sys.modules["vllm.v1.sample.logits_processor"]
    monkeypatch.setattr(stub, "LogitsProcessor", LogitsProcessor, raising=False)
    monkeypatch.delitem(sys.modules, "lora_ext.interop.vllm.processor", raising=False)
    module, _, name = PROCESSOR.partition(":")
    made = getattr(importlib.import_module(module), name)
    monkeypatch.delitem(sys.modules, module)
    assert issubclass(made, LogitsProcessor)
    build_on_arrival(type("EngineCore", (), {"preprocess_add_request": lambda self, request: None}))
    save_guide(tmp_path)
    made.validate_params(sampling({"regex": "a"}))
    assert made(settings(), "cpu", False).is_argmax_invariant() is False
    assert math.isinf(made(settings()).apply(torch.tensor([[-math.inf]])))
    with pytest.raises(ValueError, match=f"{GUIDE}: expected {V + 1} tokens, found"):
        made(settings(folder=tmp_path, get_vocab_size=lambda: V + 1))
