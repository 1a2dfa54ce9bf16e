"""Tenants of a service with a tiny Llama: equality with a plain loop, saving, sampling."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from common import error_over_bound
from service_held import held
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ext
from lora_ext.tenants import Datum, QueueFullError, Service, Tenant
from lora_ext.tenants._live import Optimizer, checked_settings
from lora_ext.tenants._sampler import SamplingModel

pytestmark = pytest.mark.hosts

VOCAB, NAN = 97, float("nan")


def llama() -> Any:
    torch.manual_seed(0)
    shape: Any = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96}
    heads: Any = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, **heads, max_position_embeddings=128, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with Service(llama(), max_tokens=256, store=tmp_path / "store", queue=8) as made:
        yield made


def datum(seed: int, n: int = 20, **inputs: Any) -> Datum:
    x = torch.randint(0, VOCAB, (n + 1,), generator=torch.Generator().manual_seed(seed))
    return Datum(x[:-1], {"target_tokens": x[1:], **inputs})


def together(service: Service, *actions: Any) -> list[Any]:
    """Queue all calls before the first one runs. Return the result or error of each."""
    with held(service):
        futures = [action() for action in actions]
    return [future.exception() or future.result() for future in futures]


def factors(tenant: Tenant) -> list[Tensor]:
    return [p.detach().clone() for p in tenant.adapter.parameters.values()]


@pytest.mark.parametrize("family", ["Gemma2", "Granite"])
def test_capped_or_scaled_logits_are_detected_even_if_the_padding_embedding_is_zero(family: str):
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "head_dim": 4}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    own = {"final_logit_softcapping": 1.0, "logits_scaling": 3.0, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**shape, **heads, **own)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)[0] = 0
        data = datum(1)
        logits = model(torch.as_tensor(data.tokens)[None]).logits[0]
    expected = logits.log_softmax(-1).gather(1, data.inputs["target_tokens"][:, None])[:, 0]
    with Service(model) as made:
        found = made.create(2).forward([data]).result().logprobs[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_training_a_tenant_equals_training_with_peft(service: Service, tmp_path: Path) -> None:
    tenant = service.create(4, seed=1)
    tenant.save("start")
    model: Any = peft.PeftModel.from_pretrained(
        llama(), tmp_path / "store" / "start", is_trainable=True
    )
    own = [p for p in model.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(own, 1e-2, (0.9, 0.95), 1e-12, weight_decay=0.1)
    for k in range(3):
        data = [datum(k), datum(k + 9, 11, weights=torch.rand(11))]
        result = tenant.forward_backward(data)
        step = tenant.optim_step(1e-2, weight_decay=0.1, max_grad_norm=40.0)
        loss: Any = 0.0
        for d, lp in zip(data, result.result().logprobs, strict=True):
            logits = model(torch.as_tensor(d.tokens)[None]).logits[0]
            theirs = logits.log_softmax(-1).gather(1, d.inputs["target_tokens"][:, None])[:, 0]
            assert torch.allclose(lp, theirs, atol=2e-6)
            loss = loss - (theirs * d.inputs.get("weights", 1.0)).sum()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(own, 40.0))
        plain.step()
        plain.zero_grad()
        assert result.result().metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-6)
        assert step.result().metrics["grad_norm:mean"] == pytest.approx(norm, rel=1e-5)


def test_training_together_with_other_tenants_equals_training_alone() -> None:
    with Service(llama()) as service:
        start = [factors(service.create(r, seed=i)) for i, r in enumerate((4, 8, 16, 5))]

    def run(alone: bool, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], dict[str, int]]:
        with Service(llama().to(dtype)) as service:
            tenants = [service.create(r, seed=i) for i, r in enumerate((4, 8, 16, 5))]
            for tenant, values in zip(tenants, start, strict=True):
                for p, value in zip(tenant.adapter.parameters.values(), values, strict=True):
                    p.data.copy_(value)
            seen: list[Tensor] = []
            for k in range(3):
                calls = [
                    lambda t=t, i=i, k=k: t.forward_backward([datum(9 * i + k, 24), datum(i, 24)])
                    for i, t in enumerate(tenants)
                ]
                results = together(service, *(calls[:1] if alone else calls))
                seen += results[0].logprobs
                for tenant in tenants:
                    # The gradient norms are far above 5.0, so all gradients are clipped.
                    tenant.optim_step(1e-3, eps=1e-4, max_grad_norm=5.0)
            tenants[0].optim_step(0.0).result()
            return [*seen, *factors(tenants[0])], service.counts

    (alone, counts), (among, merged) = run(True), run(False)
    assert merged["most"] == 4 and counts["most"] == 1
    exact, _ = run(True, torch.float64)
    assert all(error_over_bound(*each) <= 1 for each in zip(among, alone, exact, strict=True))


def test_errors_of_another_tenant_change_no_bit() -> None:
    def run(fault: str | None) -> list[Tensor]:
        with Service(llama(), max_tokens=64, queue=2) as service:
            good, bad = service.create(4), service.create(8)
            if fault == "factors":
                next(iter(bad.adapter.parameters.values())).data.fill_(NAN)
            weights = torch.full((24,), NAN if fault == "loss" else 1.0)
            if fault == "gradient":
                weights.fill_(2e37)  # a finite loss with an infinite gradient
            calls = [
                lambda: good.forward_backward([datum(1, 24)]),
                lambda: bad.forward_backward([datum(2, 24, weights=weights)]),
            ]
            found = together(service, *calls)
            assert isinstance(found[1], ValueError) == (fault in ("loss", "gradient", "factors"))
            if fault == "oversize":
                with pytest.raises(ValueError, match=r"data\[0\]\.tokens: expected at most"):
                    bad.forward_backward([datum(3, 65)])
            elif fault == "full":
                with pytest.raises(QueueFullError, match="queue"):
                    together(service, *[lambda: bad.forward([datum(3)])] * 3)
            elif fault == "gone":
                bad.close()
                with pytest.raises(RuntimeError, match="closed"):
                    bad.forward([datum(1)])
            good.optim_step(1e-2).result()
            if fault in ("loss", "gradient"):
                before = factors(bad)
                assert bad.optim_step(1e-2).result().metrics == {"grad_norm:mean": 0.0}
                assert all(map(torch.equal, before, factors(bad)))
            return [*found[0].logprobs, *factors(good)]

    expected = run(None)
    for fault in ("loss", "gradient", "factors", "oversize", "full", "gone"):
        assert all(map(torch.equal, expected, run(fault))), fault


def test_idle_service_frees_a_closed_tenant(service: Service) -> None:
    tenant = service.create(4)
    adapter = weakref.ref(tenant.adapter)
    tenant.close()
    del tenant
    deadline = time.monotonic() + 10  # The thread of the service may still finish the call.
    while adapter() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert adapter() is None


def test_step_out_of_memory_is_split_and_fails_only_calls_that_do_not_fit(service: Service) -> None:
    tenants = [service.create(4, seed=i) for i in range(3)]
    alone = [t.forward_backward([datum(i)]).result() for i, t in enumerate(tenants)]
    base: Any = service.model.model
    inner = base.forward

    def forward(input_ids: Tensor, **how: Any) -> Any:
        if len(input_ids) > 1:  # a call with two data
            raise MemoryError("out of memory")
        return inner(input_ids=input_ids, **how)

    base.forward = forward
    calls = [lambda i=i, t=t: t.forward_backward([datum(i)]) for i, t in enumerate(tenants)]
    calls[1] = lambda: tenants[1].forward_backward([datum(1), datum(2)])
    found = together(service, *calls)
    assert isinstance(found[1], MemoryError)
    for i in (0, 2):
        assert torch.equal(found[i].logprobs[0], alone[i].logprobs[0])
    del base.forward
    assert tenants[1].forward_backward([datum(1)]).result().metrics == alone[1].metrics


def test_endless_steps_of_one_tenant_do_not_block_another(service: Service) -> None:
    busy, other = service.create(2), service.create(2)
    stop, scheduler = threading.Event(), service._scheduler

    def again() -> None:
        if not stop.is_set():
            scheduler.put("test", busy._queue, again)

    scheduler.put("test", busy._queue, again)
    for k in range(2):
        assert other.forward_backward([datum(k)]).result(60).metrics["loss:sum"] > 0
        other.optim_step(1e-3).result(60)
    stop.set()


@pytest.mark.slow
def test_queues_are_limited_in_calls_and_tokens(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = service.create(2), service.create(2)
    large = [datum(i, 64) for i in range(40)]  # 2560 tokens; the limit of a queue is 8 x 256
    found = together(
        service,
        lambda: one.forward(large),  # A call may exceed the limit if no other call is queued.
        lambda: two.forward(large[:20]),
        lambda: two.optim_step(0.0),
    )
    assert len(found[0].logprobs) == 40 and len(found[1].logprobs) == 20
    with pytest.raises(QueueFullError, match="queue: expected at most 2048 tokens of calls"):
        together(service, *[lambda: two.forward(large[:20])] * 2)
    with pytest.raises(QueueFullError, match="queue: expected at most 8 calls"):
        together(service, *[lambda: one.optim_step(0.0)] * 9)
    monkeypatch.setattr("lora_ext.tenants._sampler._MOST", 3)
    deliver, goes_on = SamplingModel._deliver, threading.Event()
    monkeypatch.setattr(SamplingModel, "_deliver", lambda own: (goes_on.wait(60), deliver(own)))
    sampler = service.sampler()
    try:
        first = sampler.begin([1], 2, 2)
        with pytest.raises(QueueFullError, match="queue: expected at most 3 waiting samples"):
            sampler.begin([1], 2, 2)
    finally:
        goes_on.set()
    assert [len(each.result(60).tokens) for each in first] == [2, 2]


@pytest.mark.slow
def test_samplers_survive_eviction_from_the_pool(tmp_path: Path) -> None:
    with Service(llama(), max_adapters=2) as service:
        tenant, other = service.create(4), service.create(4, seed=1)
        tenant.forward_backward([datum(1)])
        tenant.optim_step(5e-2)
        samplers = tenant.sampler(), tenant.sampler("inflight")
        service.sampling().pool.host_cache_bytes = 0
        before = [sampler.sample([1, 2], 5, seed=1) for sampler in samplers]
        others = [other.sampler() for _ in range(3)]
        assert not any(sampler.adapter in service.sampling().pool for sampler in samplers)
        assert [sampler.sample([1, 2], 5, seed=1) for sampler in samplers] == before
        assert len(others[0].logprobs([1, 2, 3])) == 2
        [other.sampler() for _ in range(3)]
        tenant.optim_step(0.0).result()


def test_waiting_call_cannot_be_cancelled(service: Service) -> None:
    tenant = service.create(2)

    def impatient() -> Any:
        future = tenant.optim_step(0.0)
        assert not future.cancel()
        return future

    assert together(service, impatient)[0].metrics["grad_norm:mean"] == 0
    assert tenant.forward([datum(0)]).result().metrics["loss:sum"] > 0


def test_losses_are_summed_over_tokens_as_in_tinker(service: Service) -> None:
    tenant = service.create(4)
    old, advantages = torch.full((6,), -4.4), torch.linspace(-1, 1, 6)
    d = datum(1, 6, logprobs=old, advantages=advantages)
    (lp,) = tenant.forward([datum(1, 6)]).result().logprobs
    ratio = (lp - old).exp()
    low, high = 0.95, 1.05
    clipped = ratio.clamp(low, high)
    config = {"clip_low_threshold": low, "clip_high_threshold": high}
    assert bool((clipped != ratio).any())
    for loss, given, terms in (
        ("importance_sampling", None, ratio * advantages),
        ("ppo", config, torch.minimum(ratio * advantages, clipped * advantages)),
        ("cispo", config, clipped * advantages * lp),
    ):
        total = tenant.forward([d], loss, given).result().metrics["loss:sum"]
        assert total == pytest.approx(-float(terms.sum()), rel=1e-5)
    many = torch.stack([d.inputs["target_tokens"], d.inputs["target_tokens"]], 1)
    weights = torch.tensor([[0.25, 0.75]]).expand(6, 2)
    both = Datum(d.tokens, {"target_tokens": many, "weights": weights})
    result = tenant.forward([both]).result()
    assert result.logprobs[0].shape == (6, 2)
    assert result.metrics["loss:sum"] == pytest.approx(-float(lp.sum()), rel=1e-5)


def test_call_split_into_steps_equals_the_sum_of_its_data(service: Service) -> None:
    tenant = service.create(4)
    data = [datum(i, 5 + 7 * i % 60) for i in range(30)]  # 256 tokens per step
    result = tenant.forward_backward(data).result()
    assert service.counts["steps"] > 3
    norm = tenant.optim_step(0.0).result().metrics["grad_norm:mean"]
    for d in data:
        tenant.forward_backward([d]).result()
    other = tenant.optim_step(0.0).result().metrics["grad_norm:mean"]
    assert math.isclose(norm, other, rel_tol=1e-5)
    each = [tenant.forward([d]).result().logprobs[0] for d in data[:3]]
    for a, b in zip(each, result.logprobs, strict=False):
        assert torch.allclose(a, b, atol=1e-6)


def test_saved_tenant_resumes_training_and_paths_stay_in_the_store(
    service: Service, tmp_path: Path
) -> None:
    tenant = service.create(4, targets=["q_proj", "down_proj"])
    tenant.forward_backward([datum(1)])
    tenant.optim_step(1e-2)
    tenant.save("runs/one")
    again = service.load("runs/one")
    for each in (tenant, again):
        each.forward_backward([datum(2)])
        each.optim_step(1e-2).result()
    assert all(map(torch.equal, factors(tenant), factors(again)))
    assert (tmp_path / "store/runs/one/adapter_model.safetensors").is_file()
    (tmp_path / "store/link").symlink_to(tmp_path)
    for path in ("../out", "/tmp/out", "a/../../out", "", ".", "link/out", "a\0b"):
        with pytest.raises(ValueError, match="path"):
            tenant.save(path)
        with pytest.raises(ValueError, match="path"):
            service.load(path)
    pool = lora_ext.AdapterPool(llama(), dtype=torch.float8_e4m3fn)
    pool.load("one", tmp_path / "store/runs/one")
    assert pool.modules["model.layers.0.mlp.down_proj"].a_pages.dtype == torch.float8_e4m3fn
    tenant.restore("runs/one")
    assert not all(map(torch.equal, factors(tenant), factors(again)))


@pytest.mark.slow
def test_sample_logprobs_are_close_to_training_logprobs(service: Service) -> None:
    tenant = service.create(4)
    tenant.forward_backward([datum(1)])
    tenant.optim_step(5e-2)
    sampler, live = tenant.sampler(), tenant.sampler("inflight")
    prompt = [1, 2, 3]
    one, two = sampler.sample(prompt, 6, 2, seed=3)
    assert one.tokens != two.tokens and one.stop_reason == "length" and len(one.tokens) == 6
    assert live.sample(prompt, 6, seed=4)[0].tokens == two.tokens
    whole = torch.tensor(prompt + one.tokens)
    given = Datum(whole[:-1], {"target_tokens": whole[1:]})
    (lp,) = tenant.forward([given]).result().logprobs
    assert torch.allclose(lp[2:], torch.tensor(one.logprobs), atol=1e-5)
    assert sampler.logprobs(whole) == pytest.approx(lp.tolist(), abs=1e-5)
    (stopped,) = sampler.sample(prompt, 6, seed=3, stop=[one.tokens[2]])
    assert stopped.tokens == one.tokens[: one.tokens.index(one.tokens[2]) + 1]
    assert stopped.stop_reason == "stop"
    (best,) = sampler.sample(prompt, 6, temperature=0.0)
    assert sampler.sample(prompt, 6, top_k=1)[0].tokens == best.tokens
    tenant.forward_backward([datum(1)])
    tenant.optim_step(5e-2).result()
    assert sampler.sample(prompt, 6, seed=3)[0].logprobs == pytest.approx(one.logprobs, abs=1e-5)
    assert live.sample(prompt, 6, seed=3)[0].logprobs != pytest.approx(one.logprobs, abs=1e-3)


def test_closing_a_service_restores_the_model() -> None:
    model = llama()
    before = dict(model.named_modules())
    with Service(model) as service:
        service.create(4)
    assert dict(model.named_modules()) == before
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="rank"), Service(model) as service:
        service.create(0)


def test_restored_optimizer_state_is_on_the_device_of_its_weights() -> None:
    def parameters(device: str) -> dict[str, torch.nn.Parameter]:
        return {"a": torch.nn.Parameter(torch.ones(3, device=device))}

    saved = Optimizer(parameters("cpu"))
    saved.step([torch.ones(3)], **checked_settings(1e-2, (0.9, 0.95), 1e-12, 0.0, None))
    other = Optimizer(parameters("meta"))  # not on the device of the file
    other.restore(saved.tensors())
    assert {t.device.type for t in other.tensors().values()} == {"meta"}
    assert len(other.tensors()) == 3
