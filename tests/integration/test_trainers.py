"""from_peft and CopRA in training loops of other packages: Trainer, accelerate, DDP and FSDP2."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from adapted_models import KINDS, adapted
from processes import TwoProcesses
from tiny import CONFIGS, VOCAB, make_model, make_peft, trainer_of
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_ext
from lora_ext.interop import CopraCallback
from lora_ext.interop.peft._layers import FusedLinear
from lora_ext.methods.copra import CopraConfig, CopraController

ROWS = torch.randint(1, VOCAB, (8, 6), generator=torch.Generator().manual_seed(0))
NAMES = ["red", "green", "blue", "red"]
SEQUENCES = [{"input_ids": row, "labels": row} for row in ROWS]


def tiny_peft(dropout: float = 0.0) -> Any:
    fields = {**CONFIGS["llama"]["green"], "lora_dropout": dropout}
    return make_peft(make_model("llama"), {"green": fields}).train()


def weights_of(model: Any) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters() if "lora_" in k}


def run_trainer(model: Any, folder: Path, steps: int, resume: bool = False) -> None:
    how = {"lr_scheduler_type": "constant", "save_steps": 2, "gradient_checkpointing": True}
    trainer = trainer_of(
        model, folder, SEQUENCES, max_steps=steps, per_device_train_batch_size=4, **how
    )
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.slow
def test_trainer_learns_as_with_peft_and_resumes_bitwise(tmp_path: Path) -> None:
    theirs = tiny_peft()
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    start = weights_of(ours)
    run_trainer(theirs, tmp_path / "theirs", 4)
    run_trainer(ours, tmp_path / "ours", 4)
    expected = weights_of(theirs)
    for key, weight in weights_of(ours).items():
        assert not torch.equal(weight, start[key])
        # Adam turns the rounding of a gradient near zero into a full step, in few entries.
        close = torch.isclose(weight, expected[key], rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.99, key
    unbroken = lora_ext.from_peft(tiny_peft(dropout=0.3))
    broken = copy.deepcopy(unbroken)
    run_trainer(unbroken, tmp_path / "a", 4)
    run_trainer(broken, tmp_path / "b", 2)
    resumed = lora_ext.from_peft(tiny_peft(dropout=0.3))
    run_trainer(resumed, tmp_path / "b", 4, resume=True)
    expected = weights_of(unbroken)
    assert all(torch.equal(weight, expected[key]) for key, weight in weights_of(resumed).items())


def test_accelerate_learns_as_with_peft() -> None:
    theirs = tiny_peft()
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    start, losses = weights_of(ours), {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        loader = torch.utils.data.DataLoader(SEQUENCES, batch_size=2)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses[name] = []
        for batch in loader:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses[name].append(loss.item())
        assert accelerator.unwrap_model(prepared, keep_fp32_wrapper=False) is model
    close = 1e-5  # a few dozen float32 roundings
    torch.testing.assert_close(losses["ours"], losses["theirs"], rtol=close, atol=0)
    expected = weights_of(theirs)
    for key, weight in weights_of(ours).items():
        change, wanted = weight - start[key], expected[key] - start[key]
        assert wanted.any()
        assert (change - wanted).norm() <= 4 * close * wanted.norm(), key


def _gradients(model: Any, rows: Tensor, names: list[str] | None = None) -> dict[str, Tensor]:
    extra = {} if names is None else {"adapter_names": names}
    model(input_ids=rows, labels=rows, **extra).loss.backward()
    found = {}
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient: Any = parameter.grad
            full = getattr(gradient, "full_tensor", None)
            found[key.removeprefix("module.")] = full() if full else gradient
    return found


def _ddp(rank: int) -> dict[str, Tensor]:
    model = DistributedDataParallel(lora_ext.from_peft(tiny_peft()))
    return _gradients(model, ROWS.chunk(2)[rank])


def mixed() -> Any:
    model = lora_ext.from_peft(make_peft(make_model("llama"), CONFIGS["llama"]).train())
    model.set_requires_grad(["red", "green", "blue"])
    return model


def _ddp_mixed(rank: int) -> dict[str, Tensor]:
    return _gradients(DistributedDataParallel(mixed()), ROWS.chunk(2)[rank], NAMES)


def _fsdp(rank: int) -> dict[str, Tensor]:
    model = lora_ext.from_peft(tiny_peft())
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert any(isinstance(m, FusedLinear) for m in model.modules())
    return _gradients(model, ROWS.chunk(2)[rank])


@pytest.mark.slow
@pytest.mark.parametrize("run", [_ddp, _ddp_mixed, _fsdp], ids=["ddp", "ddp-mixed", "fsdp2"])
def test_two_processes_average_the_gradients_of_one(
    run: Callable[[int], dict[str, Tensor]], two_processes: TwoProcesses
) -> None:
    found, _ = two_processes.run(run)
    if run is _ddp_mixed:
        expected = _gradients(mixed(), ROWS, NAMES * 2)
    else:
        expected = _gradients(lora_ext.from_peft(tiny_peft()), ROWS)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        worst = (found[key] - gradient).abs().max()
        assert worst <= 1e-5 * max(1.0, gradient.abs().max().item()), key


TOKENS = torch.randint(1, 11, (16, 6), generator=torch.Generator().manual_seed(0))
LABELLED = [{"input_ids": row, "labels": row} for row in TOKENS]
STEPS = 8


def controller_of(model: nn.Module, **fields) -> CopraController:
    return CopraController(model, CopraConfig(p0=0.2, seed=1, **fields), STEPS)


def run_copra(model: Any, folder: Path, steps: int = STEPS, **settings: Any) -> list[list[bool]]:
    """Train and return the mask of every forward in training mode."""
    resume = settings.pop("resume", False)
    controller, masks = controller_of(model), []
    hook = model.register_forward_pre_hook(
        lambda m, _: masks.append(controller.mask.tolist()) if m.training else None
    )
    usual = {"per_device_train_batch_size": 2, "lr_scheduler_type": "constant", "save_steps": 3}
    how = {"callbacks": [CopraCallback(controller)]}
    trainer = trainer_of(model, folder, LABELLED, how, max_steps=steps, **usual, **settings)
    trainer.train(resume_from_checkpoint=resume)
    hook.remove()
    assert controller.mask.all()
    return masks


def expected_masks(model: nn.Module, start: int = 0) -> list[list[bool]]:
    schedule = controller_of(model).schedule
    return [schedule.mask(step).tolist() for step in range(start, STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_each_step_has_one_mask_for_all_its_micro_batches(kind: str, tmp_path: Path):
    model = adapted(kind).train()
    masks = run_copra(model, tmp_path, gradient_accumulation_steps=3)
    expected = expected_masks(model)
    assert len(set(map(tuple, expected))) > 3
    # An epoch of 8 batches has steps of 3, 3 and 2 micro-batches.
    counts = [2 if step % 3 == 2 else 3 for step in range(STEPS)]
    assert masks == [m for m, count in zip(expected, counts, strict=True) for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["peft", "fused"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_resumed_run_of_copra_is_unchanged(kind: str, checkpointing: bool, tmp_path: Path):
    settings: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    unbroken, broken, resumed = (adapted(kind).train() for _ in range(3))
    expected = run_copra(unbroken, tmp_path / "a", **settings)
    first = run_copra(broken, tmp_path / "b", 3, **settings)
    rest = run_copra(resumed, tmp_path / "b", resume=True, **settings)
    assert first + rest == expected == expected_masks(unbroken)
    weights = weights_of(unbroken)
    assert all(torch.equal(w, weights[n]) for n, w in weights_of(resumed).items())


@pytest.mark.slow
def test_checkpointing_changes_no_step(tmp_path: Path):
    found = []
    for checkpointing in (False, True):
        model = adapted("fused").train()
        run_copra(model, tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        found.append(weights_of(model))
    for name, weight in found[0].items():
        # Adam turns the rounding of a gradient near zero into a full step, in few entries.
        close = torch.isclose(weight, found[1][name], rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.98, name


def test_evaluation_in_between_uses_all_layers(tmp_path: Path):
    model, seen = adapted("fused").train(), []
    hook = model.register_forward_pre_hook(
        lambda m, _: None if m.training else seen.append(controller_of(model).mask.all().item())
    )
    run_copra(model, tmp_path, eval_strategy="steps", eval_steps=2)
    hook.remove()
    assert len(seen) == 4 * 2 and all(seen)  # 16 rows in batches of 8


def test_other_controllers_raise_and_other_numbers_of_steps_warn():
    with pytest.raises(TypeError, match=r"CopraCallback: controller: expected a CopraController"):
        CopraCallback(CopraConfig())  # pyright: ignore[reportArgumentType]
    callback = CopraCallback(controller_of(adapted(KINDS[0])))
    with warnings.catch_warnings(action="error"):
        callback.on_train_begin(None, SimpleNamespace(max_steps=STEPS), None)
    with pytest.warns(UserWarning, match="total_steps=12, the number of steps .*, found 8"):
        callback.on_train_begin(None, SimpleNamespace(max_steps=12), None)


def _train(model: Any, controller: CopraController, rows: Tensor) -> dict[str, Any]:
    """Train some steps. Return all masks, and the last step's gradients with a partial mask."""
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


def _ddp_copra(rank: int, sync: str) -> dict[str, Any]:
    torch.manual_seed(rank)
    model = adapted("fused").train()
    controller = controller_of(model, sync=sync)
    wrapped = DistributedDataParallel(model, find_unused_parameters=sync == "seed")
    return _train(wrapped, controller, TOKENS.chunk(2)[rank])


@pytest.mark.slow
@pytest.mark.parametrize("sync", ["seed", "touch", "tensor"])
def test_two_copra_processes_draw_equal_masks_and_average_the_gradients_of_one(
    sync: str, two_processes: TwoProcesses
):
    found, other = two_processes.run(_ddp_copra, sync)
    assert found["masks"] == other["masks"]
    model = adapted("fused").train()
    expected = _train(model, controller_of(model, sync=sync), TOKENS)
    assert found["masks"] == expected["masks"] == expected_masks(model)
    assert found["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        if gradient is None:
            assert found["gradients"][name] is None, name
        else:
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-3, atol=1e-5)
    assert any(g is None for g in expected["gradients"].values()) == (sync == "seed")
