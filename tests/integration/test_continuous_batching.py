"""Transformers' continuous batching of an attached model on the CPU, with concurrent calls."""

import gc
import threading
from typing import Any

import pytest
import tiny
import torch
from tiny import CONFIGS, make_model, make_peft, side_by_side, tokens
from transformers import CompileConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

import lora_ext
from lora_ext.layers import requests_apart
from lora_ext.layers.model import _attention
from lora_ext.serving._continuous import adapter_requests

NEW = 6
MANY = [f"a{i}" for i in range(16)]
PAGE = 4
FOUR = ["a0", None, "a1", "a2"]


def adapter(pool: lora_ext.AdapterPool, seed: int, **fields: Any) -> Any:
    """Return random factors that change tokens; the rank depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    targets = fields.setdefault("target_modules", ["q_proj", "v_proj", "down_proj", "lm_head"])
    rank, state = 2 + seed % 5, {}
    for module, spec in pool.index.linear.items():
        if module.rpartition(".")[2] in targets:
            stem = f"base_model.model.{module}"
            a = torch.randn(rank, spec.in_features, generator=generator)
            b = torch.randn(spec.out_features, rank, generator=generator)
            state |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b * 0.3}
            if fields.get("use_dora"):
                state[f"{stem}.lora_magnitude_vector"] = torch.rand(spec.out_features) + 5
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, **fields}, state


def attached(family: str = "llama", slots: int = 16, **how: Any) -> tuple[Any, Any]:
    model = make_model(family)
    targets = ["c_attn", "c_fc"] if family == "gpt2" else None
    pool = lora_ext.AdapterPool(model, max_slots=slots, max_rank=8)
    for seed, name in enumerate(MANY[:slots]):
        fields = {} if targets is None else {"target_modules": targets}
        pool.load(name, adapter(pool, seed, **fields))
    return lora_ext.attach(model, pool, **how), pool


def batching(**fields: Any) -> dict[str, Any]:
    return tiny.batching(NEW, **{"num_blocks": 128, "max_batch_tokens": 32, **fields})


def prompts(count: int, shared: int = 0) -> list[list[int]]:
    """Return prompts of different lengths; the first ``shared`` tokens are equal."""
    start = tokens(1, shared, 99)[0].tolist() if shared else []
    return [start + tokens(1, 2 + 3 * i % 11, i)[0].tolist() for i in range(count)]


def alone(model: Any, prompt: list[int], name: str | None) -> list[int]:
    ids = torch.tensor([prompt])
    with lora_ext.adapters(name, pool=pool_of(model)):
        how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    return out[0, len(prompt) :].tolist()


def pool_of(model: Any) -> Any:
    return model.model.layers[0].self_attn.q_proj.pool if hasattr(model, "model") else None


def generated(results: dict[str, Any]) -> list[list[int]]:
    assert [result.error for result in results.values()] == [None] * len(results)
    return [result.generated_tokens for result in results.values()]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_requests_of_16_adapters_equal_single_requests(family: str, attention: str) -> None:
    model, pool = attached(family)
    model.set_attn_implementation(attention)
    given, names = [*prompts(16), *prompts(3)], [*MANY, None, "__base__", "a3"]
    found = generated(model.generate_batch(given, adapter_names=names, **batching()))
    expected = [alone(model, *each) for each in zip(given, names, strict=True)]
    assert found == expected
    assert len({str(tokens) for tokens in expected}) > 16  # The adapters change the tokens.
    assert pool.stats()["pins"] == 0
    assert model.config._attn_implementation == attention


@pytest.mark.slow
def test_shared_prefixes_are_never_used_by_other_adapters() -> None:
    """Check equal prompts: each adapter's second request reuses the cache of its first one only."""
    model, _ = attached()
    prompt = tokens(1, 4 * PAGE + 2, 7)[0].tolist()
    names = FOUR
    expected = [alone(model, prompt, name) for name in names]
    assert len({str(tokens) for tokens in expected}) == 4
    matches = []
    with model.continuous_batching_context_manager(**batching()) as manager:
        search = manager.batch_processor.cache.search_prefix_match
        manager.batch_processor.cache.search_prefix_match = lambda *a: (
            matches.append(search(*a)) or matches[-1]
        )
        for _ in range(2):
            for name, answer in zip(names, expected, strict=True):
                manager.add_request(prompt, adapter_name=name)
                assert manager.get_result(timeout=30).generated_tokens == answer
    assert matches == [0] * 4 + [4 * PAGE] * 4


@pytest.mark.slow
def test_tensor_prompts_are_unchanged_and_empty_ones_raise() -> None:
    model, _ = attached(slots=2)
    given = [torch.tensor(prompt) for prompt in prompts(2, shared=2 * PAGE)]
    before = [prompt.tolist() for prompt in given]
    names = ["a0", "a1"]
    expected = [alone(model, *each) for each in zip(before, names, strict=True)]
    assert generated(model.generate_batch(given, adapter_names=names, **batching())) == expected
    with model.continuous_batching_context_manager(**batching()) as manager:
        manager.add_request(given[0], adapter_name="a0")
        assert manager.get_result(timeout=30).generated_tokens == expected[0]
    assert [prompt.tolist() for prompt in given] == before
    model, pool = attached(slots=2)
    message = "add_request: input_ids: expected at least one token, found none"
    with model.continuous_batching_context_manager(**batching()) as manager:
        with pytest.raises(ValueError, match=message):
            manager.add_request([], adapter_name="a0")
        manager.add_request([2, 3], adapter_name="a0")
        assert manager.get_result(timeout=30).generated_tokens == alone(model, [2, 3], "a0")
    with pytest.raises(ValueError, match=message):
        model.generate_batch([[2, 3], []], adapter_names=["a0", "a1"], **batching())
    assert pool.stats()["pins"] == 0
    how = batching()
    how["generation_config"].max_new_tokens = 400
    with model.continuous_batching_context_manager(**how) as manager:
        request = manager.add_request([5, 6, 7], adapter_name="a0")
        other = manager.add_request([5, 6, 7], adapter_name="a1", max_new_tokens=NEW)
        manager.cancel_request(request)
        assert manager.get_result(timeout=30).request_id == other
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_new_version_of_an_adapter_shares_no_prefix_with_the_old_one() -> None:
    model, pool = attached()
    prompt = tokens(1, 4 * PAGE + 2, 7)[0].tolist()
    answers = []
    with model.continuous_batching_context_manager(**batching()) as manager:
        for version in range(3):
            pool.update("a0", adapter(pool, 20 + version))
            manager.add_request(prompt, adapter_name="a0")
            answers.append(manager.get_result(timeout=30).generated_tokens)
            assert answers[-1] == alone(model, prompt, "a0")
    assert len({str(tokens) for tokens in answers}) == 3


@pytest.mark.slow
def test_running_request_keeps_its_adapter() -> None:
    model, pool = attached()
    prompt = tokens(1, 9, 7)[0].tolist()
    how = batching()
    how["generation_config"].max_new_tokens = 40
    with model.continuous_batching_context_manager(**how) as manager:
        step, go = manager._generation_step, threading.Event()
        manager._generation_step = lambda: (go.wait(), step())
        manager.add_request(prompt, adapter_name="a0")
        expected = alone(model, prompt, "a0")
        pool.update("a0", adapter(pool, 30))
        pool.unload("a0")
        go.set()
        result = manager.get_result(timeout=30)
        assert result.generated_tokens[:NEW] == expected
        with pytest.raises(KeyError, match="'a0' is not loaded"):
            manager.add_request(prompt, adapter_name="a0")
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_parallel_sequences_and_prompts_of_several_steps_keep_their_adapter() -> None:
    model, pool = attached(slots=4)
    given, names = prompts(4, shared=30), ["a0", "a1", None, "a0"]
    how = batching()
    how["generation_config"].num_return_sequences = 3
    how["generation_config"].do_sample = True
    how["generation_config"].top_k = 1
    found = generated(model.generate_batch(given, adapter_names=names, **how))
    expected = [alone(model, *each) for each in zip(given, names, strict=True)]
    assert found == [tokens for tokens in expected for _ in range(3)]
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_preempted_requests_keep_their_adapter() -> None:
    model, pool = attached()
    given = prompts(8, shared=13)
    how = batching(num_blocks=24, allow_block_sharing=False)
    how["generation_config"].max_new_tokens = 30
    with model.continuous_batching_context_manager(**how) as manager:
        offloaded = []
        offload = manager.batch_processor.offloading_manager.offload_requests
        manager.batch_processor.offloading_manager.offload_requests = lambda: (
            offloaded.append(1) or offload()
        )
        ids = manager.add_requests(given, adapter_names=MANY[:8], max_new_tokens=30)
        results = [manager.get_result(timeout=60) for _ in ids]
    found = {result.request_id: result.generated_tokens[:NEW] for result in results}
    assert offloaded
    for request_id, prompt, name in zip(ids, given, MANY, strict=False):
        assert found[request_id] == alone(model, prompt, name)
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_full_pool_delays_batches_and_single_requests_raise() -> None:
    model, pool = attached(slots=2)
    state = adapter(pool, 40)
    pool.prefetch({f"b{i}": adapter(pool, 40 + i) for i in range(4)})
    given, names = prompts(6), ["a0", "a1", "b0", "b1", "b2", "b3"]
    found = generated(model.generate_batch(given, adapter_names=names, **batching()))
    assert found == [alone(model, *each) for each in zip(given, names, strict=True)]
    manager = model.init_continuous_batching(**batching())
    manager.add_request(given[0], adapter_name="a0")
    manager.add_request(given[0], adapter_name="a1")
    with pytest.raises(lora_ext.pool.PoolFullError, match="the rest is pinned"):
        manager.add_request(given[0], adapter_name="b0")
    assert state[0]["r"] == 2
    manager.start()
    manager.stop()
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_block_or_default_sets_the_names_of_requests() -> None:
    model, pool = attached(slots=2)
    given, names = prompts(2), ["a1", None]
    expected = [alone(model, *each) for each in zip(given, names, strict=True)]
    with lora_ext.adapters(names):
        assert generated(model.generate_batch(given, **batching())) == expected
        with pytest.raises(ValueError, match="names of the block: expected one name for each of"):
            model.generate_batch(prompts(3), **batching())
        other = generated(model.generate_batch(given, adapter_names=["a0", "a0"], **batching()))
    assert other == [alone(model, prompt, "a0") for prompt in given] != expected
    ids = torch.tensor([[5, 6, 7], [8, 9, 3]])
    paged = model.generate(ids, adapter_names=names, cache_implementation="paged", **batching())
    assert paged[0, 0, 3:].tolist() == alone(model, [5, 6, 7], "a1")
    assert paged[0, 1, 3:].tolist() == alone(model, [8, 9, 3], None)
    lora_ext.attach(lora_ext.detach(model), pool, default="a1")
    assert generated(model.generate_batch(given[:1], **batching())) == expected[:1]
    lora_ext.attach(lora_ext.detach(model), pool, default="error")
    with pytest.raises(RuntimeError, match="default='error'"):
        model.generate_batch(given, **batching())
    assert generated(model.generate_batch(given, adapter_names=names, **batching())) == expected


def _result(manager: Any) -> Any:
    return manager.get_result(timeout=30)


def test_waiting_requests_for_the_base_model_have_the_name_none() -> None:
    model, _ = attached(slots=1)
    manager = model.init_continuous_batching(**batching())
    for name in (None, "__base__", "a0"):
        manager.add_request([5, 6], adapter_name=name)
        with lora_ext.adapters(name):
            manager.add_request([5, 6])
    assert adapter_requests(manager).load(1).waiting == [None, None, None, None, "a0", "a0"]
    manager.destroy()


@pytest.mark.slow
def test_single_requests_use_the_block_and_wrong_names_raise() -> None:
    model, pool = attached(slots=2)
    for names, error, message in (
        (["a0", "a7"], KeyError, "'a7' is not loaded; 2 are loaded"),
        (["a0"], ValueError, "adapter_names: expected one name for each of 2 req.*, found 1"),
        (["a0", 3], ValueError, "adapter_names: expected str or None, found 3"),
    ):
        with pytest.raises(error, match=message):
            model.generate_batch(prompts(2), adapter_names=names, **batching())
    with lora_ext.adapters([["a0", "a1"]]), pytest.raises(ValueError, match="names per token"):
        model.generate_batch(prompts(2), **batching())
    with model.continuous_batching_context_manager(**batching()) as manager:
        manager.add_request([5, 6], "mine", adapter_name="a0", max_new_tokens=400)
        with pytest.raises(ValueError, match="request_id: expected an id that is not in use"):
            manager.add_request([5, 6], "mine", adapter_name="a1")
        manager.cancel_request("mine")
    assert pool.stats()["pins"] == 0
    prompt = prompts(1)[0]
    with model.continuous_batching_context_manager(**batching()) as manager:
        with lora_ext.adapters("a1"):
            manager.add_request(prompt)
            manager.add_request(prompt, adapter_name=None)
        with lora_ext.adapters(["a0", "a1"]), pytest.raises(ValueError, match="each of 1 requests"):
            manager.add_request(prompt)
        results = {r.request_id: r.generated_tokens for r in map(_result, [manager] * 2)}
    assert results == {
        "req_0": alone(model, prompt, "a1"),
        "req_1": alone(model, prompt, None),
    }


def test_managers_without_adapters_and_compiled_steps_raise() -> None:
    model, _ = attached(slots=2)
    how = batching()
    manager = ContinuousBatchingManager(
        model, how["generation_config"], how["continuous_batching_config"]
    )
    manager.start()
    manager.add_request([5, 6, 7])
    result = manager.get_result(timeout=30)
    manager.stop()
    assert "manager without adapters" in result.error
    assert result.generated_tokens == []
    model.set_attn_implementation("eager")
    how = batching(varlen_compile_config=CompileConfig(fullgraph=False))
    with pytest.raises(NotImplementedError, match="attached model without varlen_compile_config"):
        model.generate_batch(prompts(2), adapter_names="a0", **how)
    assert model.config._attn_implementation == "eager"


@pytest.mark.slow
def test_peft_model_uses_its_active_adapter_and_rejects_names() -> None:
    plain = make_model("llama")
    model = lora_ext.from_peft(make_peft(plain, CONFIGS["llama"]))
    given = prompts(2)
    with pytest.raises(NotImplementedError, match="adapter_names: expected none for a PEFT model"):
        model.generate_batch(given, adapter_names=["red", "green"], **batching())
    model.set_adapter("green")
    found = generated(model.generate_batch(given, **batching()))
    how = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    for prompt, answer in zip(given, found, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
        assert out[0, len(prompt) :].tolist() == answer


@pytest.mark.slow
def test_detach_restores_the_methods_and_does_not_wait() -> None:
    model, pool = attached(slots=2)
    given = prompts(2)
    expected = [alone(model, prompt, None) for prompt in given]
    how = batching()
    with model.continuous_batching_context_manager(**how) as manager:
        with pytest.raises(RuntimeError, match=r"detach: expected no running manager"):
            lora_ext.detach(model)
    model.generate_batch(given, adapter_names="a0", persistent_manager=True, **how)
    manager = model._cached_continuous_batching_manager
    lora_ext.detach(model)
    processor = manager.batch_processor
    for thing in (model, manager, manager.output_router, processor.cache, processor.scheduler):
        own = {name for name in vars(thing) if callable(getattr(type(thing), name, None))}
        assert own == set()
    assert generated(model.generate_batch(given, **how)) == expected
    lora_ext.attach(model, pool)
    model._cached_continuous_batching_manager = manager
    answers = generated(model.generate_batch(given, adapter_names="a1", **how))
    assert answers == [alone(model, prompt, "a1") for prompt in given] != expected


@pytest.mark.slow
def test_dora_rows_and_separate_threads_work() -> None:
    model, pool = attached(slots=4)
    pool.update("a0", adapter(pool, 50, use_dora=True, target_modules=["q_proj", "down_proj"]))
    twin = make_model("llama")
    lora_ext.attach(twin, pool)
    given, names = prompts(6), ["a0", "a1", None, "a2", "a0", "a3"]
    expected = [alone(model, *each) for each in zip(given, names, strict=True)]
    found: dict[int, list[list[int]]] = {}

    def serve(which: int, served: Any) -> None:
        for _ in range(2):
            results = served.generate_batch(given, adapter_names=names, **batching())
            found[which] = generated(results)

    side_by_side(serve, enumerate((model, twin)))
    assert found == {0: expected, 1: expected}
    assert pool.stats()["pins"] == 0


@pytest.mark.slow
def test_non_finite_values_of_a_request_do_not_reach_other_requests() -> None:
    """Check requests packed into one row: an attention mask alone would not stop a NaN."""
    model, pool = attached(slots=3)
    config, state = adapter(pool, 3)
    pool.load("overflows", (config, {name: tensor * 1e25 for name, tensor in state.items()}))
    given, names = prompts(3), ["a0", "overflows", None]
    results = model.generate_batch(given, adapter_names=names, **batching())
    errors = [result.error for result in results.values()]
    told = "model: expected finite logits, found NaN or inf with adapter 'overflows'"
    assert errors == [None, told, None]
    first, _, third = (result.generated_tokens for result in results.values())
    assert first == alone(model, given[0], "a0") and third == alone(model, given[2], None)


def long_running(manager: Any) -> str:
    return manager.add_request([5, 6, 7], adapter_name="a3", max_new_tokens=400)


def logits(model: Any, prompt: list[int], name: str | None) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt]), adapter_names=[name]).logits


@pytest.mark.slow
def test_forwards_and_generate_during_a_managers_run_are_correct() -> None:
    """Check that ``is_causal``, which a step of the manager sets in the shared configuration, has
    no effect on other calls."""
    model, _ = attached(slots=4)
    given = prompts(len(FOUR))
    rows = list(zip(given, FOUR, strict=True))
    expected = [alone(model, *row) for row in rows]
    forwards = [logits(model, *row) for row in rows]
    with model.continuous_batching_context_manager(**batching()) as manager:
        request = long_running(manager)
        for _ in range(3):
            assert [alone(model, *row) for row in rows] == expected
            for row, before in zip(rows, forwards, strict=True):
                assert torch.equal(logits(model, *row), before)
        assert manager.is_running()
        manager.cancel_request(request)
    assert not hasattr(model.config, "is_causal")


@pytest.mark.slow
def test_compiled_model_during_a_managers_run_is_correct() -> None:
    """Check that the model runs uncompiled, and that compiling does not disturb other threads."""
    model, pool = attached(slots=4)
    (prompt,) = prompts(1)
    ids, expected = torch.tensor([prompt]), logits(model, prompt, "a0")
    compiled = torch.compile(model, backend="eager")

    def same() -> bool:
        with torch.no_grad(), lora_ext.adapters("a0", pool=pool):
            # Sums differ in order: float32, two layers, logits of about 1.
            return bool((compiled(ids).logits - expected).abs().max() < 1e-5)

    assert same()
    with model.continuous_batching_context_manager(**batching()) as manager:
        request = long_running(manager)
        assert all(same() for _ in range(10))
        assert manager.is_running()
        manager.cancel_request(request)
    assert same()


@pytest.mark.slow
def test_two_managers_on_one_model_are_correct_and_leave_it_unchanged() -> None:
    model, _ = attached(slots=4)
    given = prompts(len(FOUR))
    rows = list(zip(given, FOUR, strict=True))
    expected = [alone(model, *row) for row in rows]
    found = []

    def serve() -> None:
        for _ in range(3):
            found.append(generated(model.generate_batch(given, adapter_names=FOUR, **batching())))

    side_by_side(serve, [(), ()])
    assert found == [expected] * 6
    assert not hasattr(model.config, "is_causal")
    assert [alone(model, *row) for row in rows] == expected


@pytest.mark.slow
def test_paged_attention_outside_a_manager_raises() -> None:
    """Check the error, since without a mask each token would attend to the whole sequence."""
    model, pool = attached(slots=2)
    model.set_attn_implementation("eager")
    ids = tokens(1, 6)
    before = logits(model, ids[0].tolist(), "a0")
    with model.continuous_batching_context_manager(**batching()) as manager:
        for call in (model, model.generate):
            with pytest.raises(RuntimeError, match=r"attention: expected .* found 'paged\|eager'"):
                call(ids, adapter_names=["a0"])
        manager.add_request([5, 6, 7], adapter_name="a1")
        assert manager.get_result(timeout=30).generated_tokens
    assert torch.equal(logits(model, ids[0].tolist(), "a0"), before)
    assert pool.stats()["pins"] == 0


@pytest.mark.parametrize("end", ["destroy", "forget"])
def test_manager_that_never_started_releases_its_adapters(end: str) -> None:
    model, pool = attached(slots=2)
    manager = model.init_continuous_batching(**batching())
    manager.add_request([5, 6, 7], adapter_name="a0")
    assert pool.stats()["pins"] == 1
    if end == "destroy":
        manager.destroy()
    else:
        del manager
        gc.collect()
    assert pool.stats()["pins"] == 0


QUERIES, KEYS = [1, 5, 40, 1], [60, 5, 70, 1]


def packed_requests(dtype: torch.dtype, window: int = 1 << 20) -> tuple[Any, ...]:
    """Return q, k, v, the mask and the lengths of requests in one row, as transformers packs them.

    Each query attends to the last ``window`` keys up to its own.
    """
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, sum(n), 64).to(dtype)
        for heads, n in ((6, QUERIES), (3, KEYS), (3, KEYS))
    )
    mask = torch.full((1, 1, sum(QUERIES), sum(KEYS)), torch.finfo(dtype).min, dtype=dtype)
    row = start = 0
    for more, length in zip(QUERIES, KEYS, strict=True):
        for i in range(more):
            end = start + length - more + i + 1
            mask[..., row, max(start, end - window) : end] = 0
            row += 1
        start += length
    ends = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (QUERIES, KEYS)]
    return q, k, v, mask, {"cu_seq_lens_q": ends[0], "cu_seq_lens_k": ends[1], "scaling": 0.125}


def attend(inner: Any, q: torch.Tensor, *given: Any) -> torch.Tensor:
    *tensors, how = given
    with requests_apart():
        return _attention._each_request(inner, None, q, *tensors, **how)[0]


def refused(*_: Any, **__: Any) -> Any:
    raise AssertionError("expected no call of sdpa")


@pytest.mark.parametrize("window", [1 << 20, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_of_all_requests_is_one_call_with_the_bits_of_each_request(
    dtype: torch.dtype, window: int
) -> None:
    q, k, v, mask, how = packed_requests(dtype, window)
    found = attend(refused, q, k, v, mask, how)  # (1, T, H, D)
    boolean = attend(refused, q, k, v, mask == 0, how)
    assert found.equal(boolean)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.125
    law = scores.masked_fill(mask != 0, -torch.inf).softmax(-1)
    exact = (law @ v.double().repeat_interleave(2, 1)).transpose(1, 2)
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=0.125, enable_gqa=True
    ).transpose(1, 2)
    error, bound = (found - exact).abs().max(), 3 * (plain - exact).abs().max()
    assert error <= bound
    row = start = 0
    for more, length in zip(QUERIES, KEYS, strict=True):
        rows, span = slice(row, row + more), slice(start, start + length)
        alone = q[:, :, rows], k[:, :, span], v[:, :, span], mask[..., rows, span]
        ends = [torch.tensor([0, n]) for n in (more, length)]
        own = {**how, "cu_seq_lens_q": ends[0], "cu_seq_lens_k": ends[1]}
        assert attend(refused, *alone, own).equal(found[:, rows])
        row, start = row + more, start + length
    k[:, :, 60:65] = v[:, :, 60:65] = torch.nan  # the keys of the second request
    spoiled = attend(refused, q, k, v, mask, how)
    assert spoiled[:, 1:6].isnan().all()
    assert spoiled[:, [0, *range(6, 47)]].equal(found[:, [0, *range(6, 47)]])


def test_masks_that_are_not_ranges_are_computed_request_by_request() -> None:
    q, k, v, mask, how = packed_requests(torch.float32)
    calls: list[torch.Tensor] = []

    def inner(module: object, q: Any, k: Any, v: Any, mask: torch.Tensor, **how: Any) -> Any:
        calls.append(mask)
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=0.125, enable_gqa=True
        )
        return found.transpose(1, 2), None

    expected = attend(refused, q, k, v, mask, how)
    gap, biased, across = mask.clone(), mask.clone(), mask.clone()
    gap[..., 0, 30] = torch.finfo(torch.float32).min
    biased[..., 0, 30] = -1.0
    across[..., 1, 59] = 0  # a key of the first request
    for other in (gap, biased, across):
        calls.clear()
        found = attend(inner, q, k, v, other, how)
        assert [each.shape[2:] for each in calls] == [*zip(QUERIES, KEYS, strict=True)]
        assert (found[:, 1:] - expected[:, 1:]).abs().max() < 1e-5
        assert ((found[:, 0] - expected[:, 0]).abs().max() > 1e-3) == (other is not across)
