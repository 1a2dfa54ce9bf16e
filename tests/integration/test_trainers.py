"""from_peft under other people's training loops: Trainer, accelerate, DDP and FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from processes import TwoProcesses
from tiny import CONFIGS, VOCAB, make_model, make_peft, trainer_of
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_ext
from lora_ext.interop.peft._layers import FusedLinear

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
def test_trainer_learns_what_it_learns_with_peft(tmp_path: Path) -> None:
    theirs = tiny_peft()
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    start = weights_of(ours)
    run_trainer(theirs, tmp_path / "theirs", 4)
    run_trainer(ours, tmp_path / "ours", 4)
    expected = weights_of(theirs)
    for key, weight in weights_of(ours).items():
        assert not torch.equal(weight, start[key])
        # Adam turns the rounding of a gradient near zero into a step of its own size: few entries.
        close = torch.isclose(weight, expected[key], rtol=1e-3, atol=1e-4)
        assert close.float().mean() > 0.99, key


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit_dropout_included(tmp_path: Path) -> None:
    unbroken = lora_ext.from_peft(tiny_peft(dropout=0.3))
    broken = copy.deepcopy(unbroken)
    run_trainer(unbroken, tmp_path / "a", 4)
    run_trainer(broken, tmp_path / "b", 2)
    resumed = lora_ext.from_peft(tiny_peft(dropout=0.3))
    run_trainer(resumed, tmp_path / "b", 4, resume=True)
    expected = weights_of(unbroken)
    assert all(torch.equal(weight, expected[key]) for key, weight in weights_of(resumed).items())


def test_accelerate_learns_what_it_learns_with_peft() -> None:
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
    close = 1e-5  # some tens of roundings of float32
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
