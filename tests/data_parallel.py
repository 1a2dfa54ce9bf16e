"""Training in one process, or as one of two processes with DDP, FSDP2 or DeepSpeed."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
WAYS = [
    "ddp",
    "fsdp2",
    pytest.param("zero2", marks=needs_deepspeed),
    pytest.param("zero3", marks=needs_deepspeed),
]
STEPS, RATE = 2, 0.5
# DeepSpeed optimizes float32 copies of the parameters. Their relative error is 1e-6 to 1e-5 after
# two steps. It would be above 0.1 if gradients of other adapters were added.
BOUND = {"zero2": 1e-4, "zero3": 1e-4}

LossOf = Callable[[nn.Module], Tensor]


def trained(
    model: Any, way: str | None, units: Iterable[nn.Module], loss_of: LossOf
) -> dict[str, Tensor]:
    """Return the adapters after :data:`STEPS` steps of SGD.

    Args:
        way: One of :data:`WAYS`; None for one process.
        units: Parts of the model that FSDP2 shards separately.
        loss_of: Returns the mean loss over the rows of this process for the (wrapped) model.
    """
    own = {k: p for k, p in model.named_parameters() if p.requires_grad}
    if way in ("zero2", "zero3"):
        return _by_deepspeed(model, own, int(way[-1]), loss_of)
    wrapped = model
    if way == "ddp":
        wrapped = DistributedDataParallel(model)
    elif way == "fsdp2":
        mesh = init_device_mesh("cpu", (2,))
        for unit in (*units, model):
            fully_shard(unit, mesh=mesh)
        own = {k: p for k, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(own.values(), lr=RATE)
    for _ in range(STEPS):
        loss_of(wrapped).backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = {k: p.full_tensor() if way == "fsdp2" else p for k, p in own.items()}
    return {k: p.detach().clone() for k, p in whole.items()}


def _by_deepspeed(
    model: Any, own: dict[str, nn.Parameter], stage: int, loss_of: LossOf
) -> dict[str, Tensor]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    # This disables DeepSpeed's shared-memory all-reduce for the CPU: compiling it takes minutes.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's default is 1.0.
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,  # DeepSpeed also partitions small parameters
        },
    }
    optimizer = torch.optim.SGD(own.values(), lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for _ in range(STEPS):
        engine.backward(loss_of(engine))
        engine.step()
    with deepspeed.zero.GatheredParameters([*own.values()] if stage == 3 else []):
        return {k: p.detach().clone() for k, p in own.items()}


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor], bound: float
) -> None:
    """Check that every parameter changed as in one process.

    Args:
        bound: Largest difference between the two changes, relative to the largest change of any
            parameter.
    """
    assert found.keys() == expected.keys() == start.keys()
    largest = max((expected[k] - start[k]).abs().max().item() for k in start)
    assert largest > 0
    for key in start:
        apart = (found[key] - expected[key]).abs().max().item()
        assert apart <= bound * largest, f"{key}: error {apart / largest} of the largest change"
