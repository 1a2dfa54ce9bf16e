"""CopRA under the Trainer and under data parallel training in two processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapted_models import KINDS, adapted
from processes import TwoProcesses
from tiny import trainer_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lora_ext.interop import CopraCallback
from lora_ext.methods.copra import CopraConfig, CopraController

ROWS = torch.randint(1, 11, (16, 6), generator=torch.Generator().manual_seed(0))
SEQUENCES = [{"input_ids": row, "labels": row} for row in ROWS]
STEPS = 8


def controller_of(model: nn.Module, **fields) -> CopraController:
    return CopraController(model, CopraConfig(p0=0.2, seed=1, **fields), STEPS)


def run_trainer(model: Any, folder: Path, steps: int = STEPS, **settings: Any) -> list[list[bool]]:
    """Train; returns the mask of every forward in training mode."""
    resume = settings.pop("resume", False)
    controller, masks = controller_of(model), []
    hook = model.register_forward_pre_hook(
        lambda m, _: masks.append(controller.mask.tolist()) if m.training else None
    )
    usual = {"per_device_train_batch_size": 2, "lr_scheduler_type": "constant", "save_steps": 3}
    how = {"callbacks": [CopraCallback(controller)]}
    trainer = trainer_of(model, folder, SEQUENCES, how, max_steps=steps, **usual, **settings)
    trainer.train(resume_from_checkpoint=resume)
    hook.remove()
    assert controller.mask.all()
    return masks


def expected_masks(model: nn.Module, start: int = 0) -> list[list[bool]]:
    schedule = controller_of(model).schedule
    return [schedule.mask(step).tolist() for step in range(start, STEPS)]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_step_has_its_mask_and_its_micro_batches_share_it(kind: str, tmp_path: Path):
    model = adapted(kind).train()
    masks = run_trainer(model, tmp_path, gradient_accumulation_steps=3)
    expected = expected_masks(model)
    assert len(set(map(tuple, expected))) > 3
    # An epoch of 8 batches has steps of 3, 3 and 2 micro-batches.
    counts = [2 if step % 3 == 2 else 3 for step in range(STEPS)]
    assert masks == [m for m, count in zip(expected, counts, strict=True) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peft", "fused"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(
    kind: str, checkpointing: bool, tmp_path: Path
):
    settings: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    unbroken, broken, resumed = (adapted(kind).train() for _ in range(3))
    expected = run_trainer(unbroken, tmp_path / "a", **settings)
    first = run_trainer(broken, tmp_path / "b", 3, **settings)
    rest = run_trainer(resumed, tmp_path / "b", resume=True, **settings)
    assert first + rest == expected == expected_masks(unbroken)
    weights = weights_of(unbroken)
    assert all(torch.equal(w, weights[n]) for n, w in weights_of(resumed).items())


@pytest.mark.slow
def test_checkpointing_changes_no_step(tmp_path: Path):
    found = []
    for checkpointing in (False, True):
        model = adapted("fused").train()
        run_trainer(model, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        found.append(weights_of(model))
    for name, weight in found[0].items():
        # Adam turns the rounding of a gradient near zero into a step of its own size: few entries.
        close = torch.isclose(weight, found[1][name], rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.98, name


def test_an_evaluation_in_between_sees_all_layers(tmp_path: Path):
    model, seen = adapted("fused").train(), []
    hook = model.register_forward_pre_hook(
        lambda m, _: None if m.training else seen.append(controller_of(model).mask.all().item())
    )
    run_trainer(model, tmp_path, eval_strategy="steps", eval_steps=2)
    hook.remove()
    assert len(seen) == 4 * 2 and all(seen)  # of 16 rows in batches of 8


def test_something_else_than_a_controller_is_refused():
    with pytest.raises(TypeError, match=r"CopraCallback: controller: expected a CopraController"):
        CopraCallback(CopraConfig())  # pyright: ignore[reportArgumentType]


def test_another_number_of_steps_than_the_schedules_is_told():
    callback = CopraCallback(controller_of(adapted(KINDS[0])))
    with warnings.catch_warnings(action="error"):
        callback.on_train_begin(None, SimpleNamespace(max_steps=STEPS), None)
    with pytest.warns(UserWarning, match="total_steps=12, the steps of this Trainer, found 8"):
        callback.on_train_begin(None, SimpleNamespace(max_steps=12), None)


def _train(model: Any, controller: CopraController, rows: Tensor) -> dict[str, Any]:
    """Some steps; masks, and the gradients of the last step whose mask is not full."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    masks, gradients = [], {}
    for _ in range(STEPS):
        masks.append(controller.step().tolist())
        optimizer.zero_grad()
        model(input_ids=rows, labels=rows).loss.backward()
        if not all(masks[-1]):
            gradients = {
                n.removeprefix("module."): None if p.grad is None else p.grad.clone()
                for n, p in model.named_parameters()
                if p.requires_grad
            }
        optimizer.step()
    return {"masks": masks, "gradients": gradients}


def _ddp(rank: int, sync: str) -> dict[str, Any]:
    torch.manual_seed(rank)
    model = adapted("fused").train()
    controller = controller_of(model, sync=sync)
    wrapped = DistributedDataParallel(model, find_unused_parameters=sync == "seed")
    return _train(wrapped, controller, ROWS.chunk(2)[rank])


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["seed", "touch", "tensor"])
def test_two_processes_draw_the_same_masks_and_average_the_gradients_of_one(
    sync: str, two_processes: TwoProcesses
):
    found, other = two_processes.run(_ddp, sync)
    assert found["masks"] == other["masks"]
    model = adapted("fused").train()
    expected = _train(model, controller_of(model, sync=sync), ROWS)
    assert found["masks"] == expected["masks"] == expected_masks(model)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        if gradient is None:
            assert found["gradients"][name] is None, name
        else:
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=1e-5)
    assert any(g is None for g in expected["gradients"].values()) == (sync == "seed")
