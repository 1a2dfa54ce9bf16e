"""Layers recomputed in a backward pass use the block of their forward pass, or raise."""

import contextvars
import threading
from collections import deque
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from two_layers import adapter, formula, inputs, make, pins

import lora_ext
from lora_ext.rows import _past


def gradient(y: Tensor, x: Tensor) -> Tensor:
    x.grad = None
    y.square().sum().backward()
    assert x.grad is not None
    return x.grad


def expected(model: Any, x: Tensor, name: str | None) -> Tensor:
    return gradient(formula(model, x, [name] * x[..., 0].numel()), x)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_pool_layers_use_the_block_of_their_forward(reentrant: bool) -> None:
    model, x = make(torch.float64), inputs(2, 3, dtype=torch.float64).requires_grad_()
    runs = {}
    for name in ("red", None, "blue"):
        with lora_ext.adapters(name):
            runs[name] = checkpoint(model, x, use_reentrant=reentrant)
    outside = checkpoint(model, x, use_reentrant=reentrant)
    for name in ("blue", "red", None):
        with lora_ext.adapters("green"):  # not the block of the forward pass
            found = gradient(runs[name], x)
            # The open block is the only pin after the backward pass.
            assert pins(model) == 1
        torch.testing.assert_close(found, expected(model, x, name), rtol=1e-12, atol=1e-12)
    with lora_ext.adapters("green"):
        found = gradient(outside, x)
    torch.testing.assert_close(found, expected(model, x, None), rtol=1e-12, atol=1e-12)
    assert pins(model) == 0


@pytest.mark.parametrize("change", ["update", "unload", "evict"])
def test_error_for_an_adapter_changed_since_the_forward_names_it(change: str) -> None:
    model, x = make(), inputs(2, 3).requires_grad_()
    pool = model.up.pool
    with lora_ext.adapters("red"):
        run = checkpoint(model, x, use_reentrant=False)
    if change == "update":
        pool.update("red", adapter("red"))
    elif change == "unload":
        pool.unload("red")
        pool.load("other", adapter("red"))  # The new adapter gets the slot of red.
    else:
        with lora_ext.adapters(["blue", "green"]):
            pool.load("other", adapter("red"))
            pool.load("another", adapter("red"))
    with pytest.raises(RuntimeError, match="adapter 'red' was unloaded, updated or evicted after"):
        run.sum().backward()
    assert pins(model) == 0
    # After this error, the model may outlive the test for an unknown reason, so detach it.
    lora_ext.detach(model)


def test_block_entered_in_the_recomputation_is_used() -> None:
    model, x = make(torch.float64), inputs(2, 3, dtype=torch.float64).requires_grad_()

    def run(x: Tensor) -> Tensor:
        with lora_ext.adapters("red"):
            return model(x)

    for reentrant in (False, True):
        found = gradient(checkpoint(run, x, use_reentrant=reentrant), x)
        torch.testing.assert_close(found, expected(model, x, "red"), rtol=1e-12, atol=1e-12)


def test_nested_checkpoints_use_their_blocks_unless_reentrant() -> None:
    model, x = make(torch.float64), inputs(2, 3, dtype=torch.float64).requires_grad_()

    def run(reentrant: bool) -> Tensor:
        def outer(x: Tensor) -> Tensor:
            return checkpoint(model, torch.tanh(x), use_reentrant=reentrant)

        with lora_ext.adapters("red"):
            return checkpoint(outer, x, use_reentrant=reentrant)

    rows = ["red"] * 6
    found = gradient(run(False), x)
    torch.testing.assert_close(found, gradient(formula(model, torch.tanh(x), rows), x))
    with pytest.raises(RuntimeError, match="no reentrant checkpoint inside another"):
        run(True).sum().backward()
    lora_ext.detach(model)


def test_checkpoint_inside_a_compiled_graph_uses_the_block_of_its_forward() -> None:
    torch._dynamo.reset()
    model, x = make(torch.float64), inputs(2, 3, dtype=torch.float64).requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False)

    with lora_ext.adapters("red"):
        y = run(x)
    with lora_ext.adapters("blue"):
        found = gradient(y, x)
    torch.testing.assert_close(found, expected(model, x, "red"), rtol=1e-12, atol=1e-12)


def test_threads_record_their_blocks_separately() -> None:
    # Autograd numbers nodes per thread, so nodes with equal numbers belong to different blocks.
    model, x = make(torch.float64), inputs(2, 3, dtype=torch.float64)
    found: dict[str | None, Tensor] = {}

    def train(name: str | None) -> None:
        mine = x.clone().requires_grad_()
        with lora_ext.adapters(name):
            y = checkpoint(model, mine, use_reentrant=False)
        found[name] = gradient(y, mine)

    def inherited(name: str) -> None:
        mine = x.clone().requires_grad_()
        y = checkpoint(model, mine, use_reentrant=False)
        found[name] = gradient(y, mine)

    threads = [threading.Thread(target=train, args=(name,)) for name in ("red", None, "blue")]
    with lora_ext.adapters("green"):
        run = contextvars.copy_context().run
        threads.append(threading.Thread(target=run, args=(inherited, "green")))
        for thread in threads:
            thread.start()
            thread.join()
    for name, gradient_of_x in found.items():
        mine = x.clone().requires_grad_()
        torch.testing.assert_close(gradient_of_x, expected(model, mine, name))
    assert len(found) == 4


def test_block_entered_before_the_first_autograd_node_of_its_thread_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Check a backward in a thread of autograd, as on a GPU, while the thread of the forward is in
    its block."""
    monkeypatch.setattr(_past, "_timelines", deque())
    block, nodes, found = object(), [], []

    def run_forward() -> None:
        _past.record(block)
        nodes.append(torch.ones(1, requires_grad=True).exp().grad_fn)

    def run_backward() -> None:
        monkeypatch.setattr(torch._C, "_current_autograd_node", lambda: nodes[0])
        found.append(_past.block_of_forward(1))

    for run in (run_forward, run_backward):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert nodes[0]._sequence_nr() == 0 and found == [block]


def test_forwards_without_grad_are_not_recorded() -> None:
    model, x = make(), inputs(2, 3)
    with torch.no_grad():
        model(x)
        before = len(_past.here.timeline.starts)
        for _ in range(5):
            with lora_ext.adapters("red"):
                model(x)
    assert len(_past.here.timeline.starts) <= before + 1


def test_backward_after_too_many_blocks_raises() -> None:
    model, x = make(), inputs(2, 3).requires_grad_()
    with lora_ext.adapters("red"):
        run = checkpoint(model, x, use_reentrant=False)
    for _ in range(140):
        with lora_ext.adapters("red"):
            model(x)
    with pytest.raises(RuntimeError, match=r"within 128 entries and exits of blocks"):
        run.sum().backward()
    lora_ext.detach(model)
    assert len(_past.here.timeline.starts) <= 130
