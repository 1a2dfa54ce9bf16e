"""An attached model while a manager of continuous batching runs on it, or has left its traces."""

import gc
from typing import Any

import pytest
import torch
from test_continuous_batching import alone, attached, batching, generated, prompts
from tiny import side_by_side, tokens

import lora_ext

NAMES = ["a0", None, "a1", "a2"]


def long_running(manager: Any) -> str:
    return manager.add_request([5, 6, 7], adapter_name="a3", max_new_tokens=400)


def logits(model: Any, prompt: list[int], name: str | None) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([prompt]), adapter_names=[name]).logits


@pytest.mark.slow
def test_forwards_and_generate_beside_a_busy_manager_are_right() -> None:
    """transformers writes is_causal of a manager's step to the configuration that all read."""
    model, _ = attached(slots=4)
    given = prompts(len(NAMES))
    rows = list(zip(given, NAMES, strict=True))
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
def test_a_compiled_model_beside_a_busy_manager_is_right() -> None:
    """It is not compiled for that time; and a thread that compiles disturbs no other."""
    model, pool = attached(slots=4)
    (prompt,) = prompts(1)
    ids, expected = torch.tensor([prompt]), logits(model, prompt, "a0")
    compiled = torch.compile(model, backend="eager")

    def same() -> bool:
        with torch.no_grad(), lora_ext.adapters("a0", pool=pool):
            # float32, two layers, logits of about 1: another sum's order.
            return bool((compiled(ids).logits - expected).abs().max() < 1e-5)

    assert same()
    with model.continuous_batching_context_manager(**batching()) as manager:
        request = long_running(manager)
        assert all(same() for _ in range(10))
        assert manager.is_running()
        manager.cancel_request(request)
    assert same()


@pytest.mark.slow
def test_two_managers_on_one_model_are_right_and_leave_it_as_it_was() -> None:
    model, _ = attached(slots=4)
    given = prompts(len(NAMES))
    rows = list(zip(given, NAMES, strict=True))
    expected = [alone(model, *row) for row in rows]
    found = []

    def serve() -> None:
        for _ in range(3):
            found.append(generated(model.generate_batch(given, adapter_names=NAMES, **batching())))

    side_by_side(serve, [(), ()])
    assert found == [expected] * 6
    assert not hasattr(model.config, "is_causal")
    assert [alone(model, *row) for row in rows] == expected


@pytest.mark.slow
def test_paged_attention_outside_a_manager_is_refused() -> None:
    """transformers makes no mask for it: each token would see the whole sequence."""
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
def test_a_manager_that_never_started_lets_its_adapters_go(end: str) -> None:
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
