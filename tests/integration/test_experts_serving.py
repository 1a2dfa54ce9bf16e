"""Adapters on routed experts served from a pool, compared with PEFT's ``target_parameters``."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from mixtures import CONFIGS, DOWN, FAMILIES, UP, make_mixture, make_peft, tokens
from tiny import attach_saved, batching, only

import lora_ext
import lora_ext.adapter
import lora_ext.rows._pool_layer
from lora_ext.rows._pool_layer import pool_of
from lora_ext.serving._continuous import adapter_requests

NAMES = ["red", "green", None, "blue", "green", "red"]
CLOSE = 2e-5  # tolerance for float32 logits of about 10; an adapter changes them by more than 0.5


def served(family: str, folder: Path, configs: Any = CONFIGS) -> tuple[Any, Any]:
    model = make_mixture(family)
    reference = make_peft(model, configs)
    reference.save_pretrained(folder)
    return attach_saved(model, folder, configs), reference


def alone(reference: Any, name: str | None, ids: torch.Tensor) -> torch.Tensor:
    """Return PEFT's logits for one adapter on the whole batch."""
    with only(reference, name):
        return reference(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_a_mixed_batch_and_their_tokens_equal_peft(family: str, tmp_path: Path) -> None:
    model, reference = served(family, tmp_path)
    ids = tokens(len(NAMES), 7)
    with lora_ext.adapters(NAMES):
        mixed = model(ids).logits
    base = alone(reference, None, ids)
    for row, name in enumerate(NAMES):
        theirs = alone(reference, name, ids)[row]
        assert (mixed[row] - theirs).abs().max() < CLOSE
        assert name is None or (theirs - base[row]).abs().max() > 0.5
    ids = tokens(len(NAMES), 5)
    how = {"max_new_tokens": 6, "do_sample": False}
    mixed = model.generate(ids, adapter_names=NAMES, **how)
    found = set()
    for row, name in enumerate(NAMES):
        with only(reference, name):
            theirs = reference.generate(input_ids=ids[row : row + 1], **how)
        assert mixed[row].tolist() == theirs[0].tolist()
        found.add(tuple(mixed[row, 5:].tolist()))
    assert len(found) > 3


@pytest.mark.parametrize("how", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_rows_of_the_base_model_keep_every_bit(family: str, how: str) -> None:
    model = make_mixture(family, how)
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    pool.load("red", make_peft(model, {"red": {"r": 4}}))
    base = model.model.layers[1].mlp.experts
    layer = lora_ext.attach(model, pool).model.layers[1].mlp.experts
    generator = torch.manual_seed(2)
    x = torch.randn(12, 24, generator=generator)
    scores = torch.rand(12, base.num_experts, generator=generator)
    weights, index = scores.topk(model.config.num_experts_per_tok)
    expected = base(x, index, weights)
    assert torch.equal(layer(x, index, weights), expected)
    with lora_ext.adapters(["red", None, None] * 4):
        got = layer(x, index, weights)
    own = torch.arange(12) % 3 == 0
    assert torch.equal(got[~own], expected[~own])
    assert (got[own] - expected[own]).abs().amax(1).min() > 0.5


@torch.no_grad()
def test_adapters_of_one_both_and_no_parameter_share_a_batch() -> None:
    model = make_mixture("gpt_oss")
    fields: dict[str, Any] = {
        "up": {"r": 3, "target_parameters": [UP]},
        "down": {"r": 12, "target_parameters": [DOWN]},
        "both": {"r": 5},
        "attention": {"r": 4, "target_modules": ["q_proj", "o_proj"], "target_parameters": None},
    }
    references = {name: make_peft(model, {name: f}) for name, f in fields.items()}
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=16)
    for name, reference in references.items():
        pool.load(name, reference)
    lora_ext.attach(model, pool)
    ids = tokens(5, 6)
    with lora_ext.adapters([*fields, None]):
        mixed = model(ids).logits
    for row, name in enumerate(fields):
        theirs = references[name](input_ids=ids).logits
        assert (mixed[row] - theirs[row]).abs().max() < CLOSE
        assert (theirs[row] - mixed[4]).abs().max() > 0.5


def test_float8_pages_refuse_experts_by_name() -> None:
    model = make_mixture("gpt_oss")
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=8, dtype=torch.float8_e4m3fn)
    message = r"experts\.\w+: expected an ordinary adapter in pages of .*, found 4 experts"
    with pytest.raises(NotImplementedError, match=message):
        pool.load("red", make_peft(model, {"red": {"r": 4}}))


@torch.no_grad()
def test_evicted_adapter_is_restored(tmp_path: Path) -> None:
    model, _ = served("qwen3", tmp_path)
    lora_ext.detach(model)
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=16)
    lora_ext.attach(model, pool)
    ids, before = tokens(2, 5), {}
    for name in CONFIGS:
        pool.load(name, tmp_path / name)
        with lora_ext.adapters(name):
            before[name] = model(ids).logits
    for name in CONFIGS:
        with lora_ext.adapters(name):
            assert torch.equal(model(ids).logits, before[name])
    pool.update("red", tmp_path / "blue")
    with lora_ext.adapters("red"):
        assert torch.equal(model(ids).logits, before["blue"])
    assert pool.stats()["evictions"] >= 4
    pool.unload("red")
    assert not torch.equal(before["red"], before["blue"])


@torch.no_grad()
def test_default_and_names_per_token_reach_the_experts(tmp_path: Path) -> None:
    model, reference = served("mixtral", tmp_path)
    pool = lora_ext.rows._pool_layer.pool_of(model)
    ids = tokens(2, 5)
    with lora_ext.adapters(["red", "blue"]):
        expected = model(ids).logits
    with lora_ext.adapters([["red"] * 5, ["blue"] * 5]):
        assert torch.equal(model(ids).logits, expected)
    which = torch.tensor([[0] * 5, [1] * 5])
    with lora_ext.adapters(["red", "blue"], token_ids=which):
        assert torch.equal(model(ids).logits, expected)
    lora_ext.attach(lora_ext.detach(model), pool, default="green")
    assert (model(ids).logits - alone(reference, "green", ids)).abs().max() < CLOSE
    lora_ext.attach(lora_ext.detach(model), pool, default="error")
    with pytest.raises(RuntimeError, match="expected an adapters block around every forward"):
        model(ids)


def test_attach_and_detach_leave_the_model_unchanged(tmp_path: Path) -> None:
    model = make_mixture("gpt_oss")
    keys, experts = list(model.state_dict()), model.model.layers[0].mlp.experts
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=8)
    assert not [name for name in pool.modules if "experts" in name]
    assert list(pool.experts)[:2] == [f"model.layers.0.mlp.{name}" for name in (UP, DOWN)]
    lora_ext.attach(model, pool)
    assert isinstance(model.model.layers[0].mlp.experts, lora_ext.nn.MultiLoraExperts)
    assert list(model.state_dict()) == keys
    assert model.model.layers[0].mlp.experts.num_experts == 4
    lora_ext.detach(model)
    assert model.model.layers[0].mlp.experts is experts


def test_gradient_reaches_the_input_embeddings(tmp_path: Path) -> None:
    """Check that a pool trains no adapters, but propagates gradients through them."""
    model, reference = served("gpt_oss", tmp_path)
    embed = model.get_input_embeddings()
    x = embed(tokens(1, 5)).detach().requires_grad_()
    reference.set_adapter("green")
    reference(inputs_embeds=x).logits.square().sum().backward()
    expected, x.grad = x.grad, None
    with lora_ext.adapters("green"):
        model(inputs_embeds=x).logits.square().sum().backward()
    assert (x.grad - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.slow
@torch.no_grad()
def test_new_weights_of_experts_share_no_pages_with_the_old_ones(tmp_path: Path) -> None:
    model, reference = served("mixtral", tmp_path)
    pool: Any = pool_of(model)
    prompt = tokens(1, 40)[0].tolist()
    ids, answers = torch.tensor([prompt]), []
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with model.continuous_batching_context_manager(**batching(page_size=8)) as manager:
        for name in ("red", "blue", "red"):
            pool.update("red", tmp_path / name)
            for _ in range(2):  # the second request reads the pages of the first
                manager.add_request(prompt, adapter_name="red")
                answers.append(manager.get_result(timeout=30).generated_tokens)
                with only(reference, name):
                    expected = reference.generate(input_ids=ids, **how)[0, 40:].tolist()
                assert answers[-1] == expected
    assert answers[0] != answers[2]
    # Of six prompts, three are computed, and three are read from pages except their last tokens.
    assert adapter_requests(manager).computed < 4 * len(prompt) + 6 * 4


@pytest.mark.slow
@torch.no_grad()
def test_packed_requests_equal_single_requests(tmp_path: Path) -> None:
    model, _ = served("mixtral", tmp_path)
    names = ["red", None, "blue", "green"]
    prompts = [tokens(4, 6)[i].tolist()[: 6 - i] for i in range(4)]
    results = model.generate_batch(prompts, adapter_names=names, **batching(page_size=16))
    found = {tuple(r.prompt_ids): r.generated_tokens for r in results.values()}
    for prompt, name in zip(prompts, names, strict=True):
        ids = torch.tensor([prompt])
        alone = model.generate(ids, adapter_names=[name], max_new_tokens=4, do_sample=False)
        assert found[tuple(prompt)] == alone[0, len(prompt) :].tolist()


@pytest.mark.slow
def test_compiled_model_uses_the_current_block() -> None:
    model = make_mixture("gpt_oss", "grouped_mm")
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    for name in ("red", "blue"):
        pool.load(name, make_peft(model, {name: CONFIGS[name]}))
    base = model.model.layers[0].mlp.experts
    layer = lora_ext.attach(model, pool).model.layers[0].mlp.experts
    x, scores = torch.randn(6, 24), torch.rand(6, 4)
    weights, index = scores.topk(2)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for names in (["red", "blue", None] * 2, ["blue"] * 6):
            with lora_ext.adapters(names):
                got, expected = compiled(x, index, weights), layer(x, index, weights)
            assert (got - expected).abs().max() < CLOSE
        assert (compiled(x, index, weights) - base(x, index, weights)).abs().max() < CLOSE
    wanted = [x.requires_grad_(), base.gate_up_proj, base.down_proj]
    with lora_ext.adapters("red"):
        expected = torch.autograd.grad(layer(x, index, weights).square().sum(), wanted)
        got = torch.autograd.grad(compiled(x, index, weights).square().sum(), wanted)
    for ours, eager in zip(got, expected, strict=True):
        assert (ours - eager).abs().max() < 1e-4 * eager.abs().max()


def test_pool_of_another_number_of_experts_raises() -> None:
    pool = lora_ext.AdapterPool(make_mixture("mixtral"), max_slots=1, max_rank=8)
    config = make_mixture("mixtral").config
    config.num_local_experts = 6
    other = type(make_mixture("mixtral"))(config)
    with pytest.raises(
        ValueError, match=r"0\.mlp\.experts: expected .*\(4, 24, 40\).*\(6, 24, 40\)"
    ):
        lora_ext.attach(other, pool)


def saved(family: str = "mixtral", **fields: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the base model, and an adapter's configuration and tensors as saved by PEFT."""
    model = make_mixture(family)
    reference = make_peft(model, {"red": {"r": 4, **fields}})
    return (
        model,
        reference.peft_config["red"].to_dict(),
        peft.get_peft_model_state_dict(reference, adapter_name="red"),
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_dora", True), ("lora_dropout", 0.1), ("lora_bias", True), ("fan_in_fan_out", True)],
)
def test_fields_without_support_for_parameters_raise(field: str, value: Any) -> None:
    model, config, tensors = saved()
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=8)
    message = rf"{field}={value} is not supported together with target_parameters"
    with pytest.raises(NotImplementedError, match=message):
        pool.load("red", ({**config, field: value}, tensors))
    assert pool.names == []


def test_other_parameters_and_adapters_without_a_model_raise() -> None:
    model, config, tensors = saved()
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=8)
    with pytest.raises(NotImplementedError, match="target_parameters is not supported in a"):
        lora_ext.adapter.LoraAdapter.load((config, tensors))
    config["target_parameters"] = [UP, DOWN, "mlp.gate.weight"]
    with pytest.raises(NotImplementedError, match=r"target_parameters: .*'mlp\.gate\.weight'"):
        pool.load("red", (config, tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 5}, r"layers\.0\.mlp\.experts.*lora_A\.weight: shape: expected \(20, 24\)"),
        ({"target_parameters": [DOWN]}, r"the 2 expert .*found .*experts\.base_layer\.lora_A"),
        ({"target_parameters": None}, r"the 0 expert .*found .*experts\.(base_layer\.)?lora_A"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_configuration_that_does_not_fit_the_tensors_raises(
    change: dict[str, Any], message: str, strict: bool
) -> None:
    model, config, tensors = saved()
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=8)
    with pytest.raises(ValueError, match=message):
        pool.load("red", ({**config, **change}, tensors), strict=strict)


def test_pool_of_some_parameters_rejects_or_skips_adapters_on_others() -> None:
    model, config, tensors = saved()
    pool = lora_ext.AdapterPool(model, max_slots=1, max_rank=8, targets=[UP, "q_proj"])
    with pytest.raises(ValueError, match=r"found .*0\.mlp\.experts\.lora_A\.weight"):
        pool.load("red", (config, tensors))
    assert len(pool.load("red", (config, tensors), strict=False)) == 4
    lora_ext.attach(model, pool)
    with torch.no_grad(), lora_ext.adapters("red"):
        model(tokens(1, 3))


def test_experts_with_a_forward_that_cannot_be_replaced_raise(tmp_path: Path) -> None:
    model, _ = served("mixtral", tmp_path, {"red": {"r": 4}})
    experts = model.model.layers[1].mlp.experts.base
    experts._is_expert_parallel = True
    with lora_ext.adapters("red"), pytest.raises(NotImplementedError, match="expert parallelism"):
        model(tokens(1, 4))
    experts._is_expert_parallel = False
    experts.register_forward_hook(lambda *_: None)
    with lora_ext.adapters("red"), pytest.raises(NotImplementedError, match="found hooks"):
        model(tokens(1, 4))
