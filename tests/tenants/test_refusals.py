"""Tables of invalid values for each argument. The error must name the argument that the caller
passed, not one of an inner function."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_service import VOCAB, datum, llama
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lora_ext.tenants import Datum, Sampler, Service, Tenant

NAN, HUGE = float("nan"), 1 << 70
NO_NUMBER = (None, "1", [], True, NAN, object())
COUNT = (*NO_NUMBER, -1, 0, 0.5, HUGE)
POSITIVE = (*NO_NUMBER, -1, float("inf"))
PATH = (None, "", ".", "../out", "/tmp/out", "a\0b", b"x", 1, True, [], NAN)
FLAG = (None, "no", 0, [])
TOKENS = (None, "ab", 1, [], [VOCAB], [-1], [0.5], [True], [[1]], [HUGE], object(), {})
FLOATS = (None, "ab", 1.0, [], ["a"], [[1.0]], [1.0, 2.0], [HUGE], [1j])


def small(kind: Any, config: Any, **more: Any) -> Any:
    sizes = {"vocab_size": 97, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    return kind(config(**{**sizes, "intermediate_size": 16, **more})).eval()


def one(**inputs: Any) -> list[Datum]:
    return [Datum([1], {"target_tokens": [1], "logprobs": [0.0], "advantages": [1.0], **inputs})]


def learns(**inputs: Any) -> list[Datum]:
    return [Datum([1], {"target_tokens": [1], **inputs})]


#: Entries are (argument, rejected values).
SERVICE: list[tuple[str, Any]] = [
    ("max_tokens", COUNT),
    ("queue", COUNT),
    ("max_adapters", COUNT),
    ("store", ("", "a\0b", b"x", 1, True, [], NAN)),
    ("tokenizer", ("", 1, True, object())),
]
#: Entries are (function, argument as in the error, call that passes a value, rejected values).
TENANT: list[tuple[str, str, Any, Any]] = [
    ("create", "rank", lambda s, t, d, v: s.create(v), (*COUNT, 513)),
    ("create", "seed", lambda s, t, d, v: s.create(2, seed=v), (*NO_NUMBER, 0.5, HUGE)),
    ("create", "alpha", lambda s, t, d, v: s.create(2, alpha=v), (*NO_NUMBER, 1e31)),
    (
        "create", "targets", lambda s, t, d, v: s.create(2, targets=v),
        ("", "zz", "(", [], ["zz"], [""], [None], 1, True, b"x", NAN, {}, object()),
    ),
    # If a module supports no adapter, the error names the module before the argument.
    ("create: model.norm", "targets", lambda s, t, d, v: s.create(2, targets=v), (["norm"],)),
    ("load", "path", lambda s, t, d, v: s.load(v), (*PATH, "none", "x" * 999)),
    ("sampler", "path", lambda s, t, d, v: s.sampler(v), (*PATH[1:], "none")),
    ("forward", "data", lambda s, t, d, v: t.forward(v), (None, "", [], {}, 1, object())),
    ("forward", "data[0]", lambda s, t, d, v: t.forward([v]), (None, "", 1, ([1], {}))),
    ("forward", "data[0].tokens", lambda s, t, d, v: t.forward([Datum(v, {})]), TOKENS),
    (
        "forward", "data[0].inputs", lambda s, t, d, v: t.forward([Datum([1], v)]),
        (None, "ab", 1, NAN, [], {}, {"target_tokens": [1], "zz": [1]}, {1: [1]}),
    ),
    (
        "forward", "data[0].inputs['target_tokens']",
        lambda s, t, d, v: t.forward(learns(target_tokens=v)), (*TOKENS[:-5], [1, 2], [HUGE]),
    ),
    (
        "forward", "data[0].inputs['weights']",
        lambda s, t, d, v: t.forward(learns(weights=v)), FLOATS,
    ),
    (
        "forward", "data[0].inputs['logprobs']",
        lambda s, t, d, v: t.forward(one(logprobs=v), "ppo"), FLOATS,
    ),
    (
        "forward", "data[0].inputs['advantages']",
        lambda s, t, d, v: t.forward(one(advantages=v), "ppo"), FLOATS,
    ),
    (  # The loss needs both inputs.
        "forward", "data[0].inputs", lambda s, t, d, v: t.forward(learns(**v), "ppo"),
        ({}, {"logprobs": [0.0]}, {"advantages": [0.0]}),
    ),
    (
        "forward_backward", "config", lambda s, t, d, v: t.forward_backward(d, config=v),
        ({"clip_low_threshold": 1},),
    ),
    ("forward_backward", "loss", lambda s, t, d, v: t.forward_backward(d, v), (None, "", "dro", 1)),
    (
        "forward_backward", "config", lambda s, t, d, v: t.forward_backward(one(), "ppo", v),
        ("", 1, True, [], NAN, {"zz": 1}),
    ),
    (
        "forward_backward", "config['clip_low_threshold']",
        lambda s, t, d, v: t.forward_backward(one(), "ppo", {"clip_low_threshold": v}), POSITIVE,
    ),
    ("optim_step", "lr", lambda s, t, d, v: t.optim_step(v), POSITIVE),
    (
        "optim_step", "betas", lambda s, t, d, v: t.optim_step(0.1, betas=v),
        (None, 0.9, (0.9,), (0.9, 1), (NAN, 0.9), ("a", 0.9), (-0.1, 0.9), "ab"),
    ),
    ("optim_step", "eps", lambda s, t, d, v: t.optim_step(0.1, eps=v), (*POSITIVE, 0)),
    (
        "optim_step", "weight_decay", lambda s, t, d, v: t.optim_step(0.1, weight_decay=v),
        POSITIVE,
    ),
    (
        "optim_step", "max_grad_norm", lambda s, t, d, v: t.optim_step(0.1, max_grad_norm=v),
        (*POSITIVE[1:], 0),
    ),
    ("save", "path", lambda s, t, d, v: t.save(v), PATH),
    ("save", "wait", lambda s, t, d, v: t.save("a", wait=v), FLAG),
    ("restore", "path", lambda s, t, d, v: t.restore(v), (*PATH, "none")),
    ("restore", "optimizer", lambda s, t, d, v: t.restore("a", optimizer=v), FLAG),
    ("restore", "wait", lambda s, t, d, v: t.restore("a", wait=v), FLAG),
    ("sampler", "mode", lambda s, t, d, v: t.sampler(v), (None, "", "live", 1)),
    ("sampler", "wait", lambda s, t, d, v: t.sampler(wait=v), FLAG),
    ("close", "wait", lambda s, t, d, v: t.close(wait=v), FLAG),
    ("close", "save_as", lambda s, t, d, v: t.close(save_as=v), PATH[1:]),
]  # fmt: skip
SAMPLER: list[tuple[str, Any]] = [
    ("tokens", TOKENS),
    ("max_tokens", (*COUNT, 1000)),
    ("num_samples", COUNT),
    ("temperature", POSITIVE),
    ("top_p", (*POSITIVE, 0, 1.5)),
    ("top_k", (*NO_NUMBER, 0, -2, 0.5)),
    ("seed", (*NO_NUMBER[1:], 0.5)),
    ("stop", (None, "text", 0.5, NAN, object(), [VOCAB], [-1], [0.5], [None], [""], [True])),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Tenant, Sampler]]:
    folder = tmp_path_factory.mktemp("store")
    with Service(llama(), max_tokens=256, store=folder, queue=64) as service:
        tenant = service.create(2)
        yield service, tenant, tenant.sampler()


def made_with(model: Any, argument: str, value: Any) -> Service:
    return Service(model, **{argument: value})


def refused(where: str, argument: str, value: Any, call: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        found = call()
        pytest.fail(f"{where}: {argument}: {value!r:.60} was accepted: {found}")
    named = rf"{re.escape(where)}: {re.escape(argument)}: expected .*, found "
    assert re.match(named, str(caught.value), re.DOTALL), (value, str(caught.value))


def test_every_error_names_the_argument_of_the_caller(made: Any) -> None:
    service, tenant, sampler = made
    model = llama()
    for argument, values in SERVICE:
        for value in values:
            refused("Service", argument, value, lambda: made_with(model, argument, value))  # noqa: B023
    for where, argument, call, values in TENANT:
        for value in values:
            refused(where, argument, value, lambda: call(service, tenant, [datum(1)], value))  # noqa: B023
    for argument, values in SAMPLER:
        for value in values:
            how = {"tokens": [1], "max_tokens": 1, argument: value}
            refused("Sampler.sample", argument, value, lambda: sampler.sample(**how))  # noqa: B023
    for value in (*TOKENS, [1] * 129):
        refused("Sampler.logprobs", "tokens", value, lambda: sampler.logprobs(value))  # noqa: B023
    # The rejected calls must not have changed the service.
    assert tenant.forward([datum(1)]).result().metrics["loss:sum"] > 0
    assert len(sampler.sample([1], 2, temperature=HUGE, top_k=HUGE, seed=HUGE)[0].tokens) == 2


def test_only_causal_models_without_adapters_are_accepted() -> None:
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (
        None,
        "name",
        torch.nn.Linear(2, 2),
        small(BertModel, BertConfig),
        small(BertForMaskedLM, BertConfig),  # not causal: tokens attend to later padding
        small(T5ForConditionalGeneration, T5Config, d_model=16, d_kv=8, d_ff=16, num_layers=1),
        wrapped,
    ):
        training = getattr(model, "training", None)
        refused("Service", "model", model, lambda: Service(model))  # noqa: B023
        assert getattr(model, "training", None) == training


def test_low_precision_encoder_is_refused() -> None:
    # If later tokens change, the first logits of this encoder change by only one unit in the last
    # place, and those of a causal model do not change.
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = small(BertForMaskedLM, BertConfig, **sizes).to(torch.bfloat16)
    refused("Service", "model", model, lambda: Service(model))
    Service(llama().to(torch.bfloat16)).close()


def test_causal_model_is_accepted_if_rows_of_a_batch_are_rounded_differently() -> None:
    # On older processors, libraries give results for equal rows of a batch that differ by up to 25
    # eps.
    model = llama()

    def round_rows(_: Any, __: Any, out: Any) -> None:
        rows = torch.arange(len(out.logits)).view(-1, 1, 1)
        out.logits *= 1 + 100 * torch.finfo(out.logits.dtype).eps * rows

    handle = model.register_forward_hook(round_rows)
    Service(model).close()
    handle.remove()


def test_causal_mixture_of_experts_is_accepted() -> None:
    # Experts process the tokens of all rows together, so the rounding of a row depends on other
    # rows.
    torch.manual_seed(0)
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    Service(small(MixtralForCausalLM, MixtralConfig, hidden_size=64, **experts)).close()


@pytest.mark.parametrize(
    "more",
    [
        {"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"},
        {"peft_type=LOHA": peft.LoHaConfig}, {"peft_type=VERA": peft.VeraConfig},
    ],
)  # fmt: skip
def test_saved_adapter_with_unsupported_fields_is_refused_by_name(
    made: Any, tmp_path: Path, more: dict[str, Any]
) -> None:
    service, tenant, _ = made
    ((field, value),) = more.items()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], **(more if "=" not in field else {}))
    config = value(r=2, target_modules=["q_proj"]) if "=" in field else config
    peft.get_peft_model(llama(), config).save_pretrained(service.store.root / field)
    for call in (service.load, tenant.restore):
        with pytest.raises(ValueError, match=rf"^(load|restore): path: expected .* found {field} "):
            call(field)
