"""from_peft under other people's training loops: Trainer, accelerate, DDP and FSDP2."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers
from tiny import CONFIGS, VOCAB, make_model, make_peft
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_ext
from lora_ext.interop.peft._layers import FusedLinear

ROWS = torch.randint(1, VOCAB, (8, 6), generator=torch.Generator().manual_seed(0))


class Sequences(torch.utils.data.Dataset[dict[str, Tensor]]):
    """The rows, each its own label."""

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": ROWS[index], "labels": ROWS[index]}


def tiny_peft(dropout: float = 0.0) -> Any:
    fields = {**CONFIGS["llama"]["green"], "lora_dropout": dropout}
    return make_peft(make_model("llama"), {"green": fields}).train()


def weights_of(model: Any) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters() if "lora_" in k}


# --- Trainer --------------------------------------------------------------------------------------
def run_trainer(model: Any, folder: Path, steps: int, resume: bool = False) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        gradient_checkpointing=True,
        use_cpu=True,
        seed=3,
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Sequences())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


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


# --- accelerate -----------------------------------------------------------------------------------
def test_accelerate_learns_what_it_learns_with_peft() -> None:
    theirs = tiny_peft()
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    start, losses = weights_of(ours), {}
    for name, model in (("theirs", theirs), ("ours", ours)):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
        loader = torch.utils.data.DataLoader(Sequences(), batch_size=2)
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


# --- several processes ----------------------------------------------------------------------------
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


def _ddp_mixed(rank: int) -> dict[str, Tensor]:
    model: Any = lora_ext.from_peft(make_peft(make_model("llama"), CONFIGS["llama"]).train())
    names = ["red", "green", "blue", "red"]
    model.set_requires_grad(["red", "green", "blue"])
    return _gradients(DistributedDataParallel(model), ROWS.chunk(2)[rank], names)


def _fsdp(rank: int) -> dict[str, Tensor]:
    model = lora_ext.from_peft(tiny_peft())
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert any(isinstance(m, FusedLinear) for m in model.modules())
    return _gradients(model, ROWS.chunk(2)[rank])


def _process(rank: int, port: int, run: Callable[[int], dict[str, Tensor]], path: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        found = run(rank)
        if rank == 0:
            torch.save(found, path)
        distributed.barrier()  # nobody leaves while gloo's threads still serve the other
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("run", [_ddp, _ddp_mixed, _fsdp], ids=["ddp", "ddp-mixed", "fsdp2"])
def test_two_processes_average_the_gradients_of_one(
    run: Callable[[int], dict[str, Tensor]], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = tmp_path / "gradients.pt"
    torch.multiprocessing.spawn(_process, (port, run, str(path)), nprocs=2)
    found = torch.load(path)
    model: Any
    names = None
    if run is _ddp_mixed:
        model = lora_ext.from_peft(make_peft(make_model("llama"), CONFIGS["llama"]).train())
        model.set_requires_grad(["red", "green", "blue"])
        names = ["red", "green", "blue", "red"] * 2
    else:
        model = lora_ext.from_peft(tiny_peft())
    expected = _gradients(model, ROWS, names)
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        worst = (found[key] - gradient).abs().max()
        assert worst <= 1e-5 * max(1.0, gradient.abs().max().item()), key
