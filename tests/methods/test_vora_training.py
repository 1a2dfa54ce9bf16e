"""`VoraForCausalLM`: losses, gradients, merged and saved models, and Trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from methods.vora_support import (
    PLACEHOLDER,
    batch,
    language,
    seeing,
    settings,
    teacher_states,
    text,
    tokens,
)
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lora_ext.methods import vora
from lora_ext.methods.vora._states import block_states

FAMILIES = ("llama", "qwen2", "gpt2")


def run(model: Any, **given: Any) -> Any:
    with torch.no_grad():
        return model(**given)


# -------------------------------------------------------------------------------------------------
# Losses and gradients


@pytest.mark.parametrize("pairing", ["output", "released"])
@pytest.mark.parametrize("n_blocks", [2, 3])
def test_losses_equal_those_computed_by_hand(n_blocks: int, pairing: str) -> None:
    model = seeing(pairing=pairing, n_blocks=n_blocks, teacher=7, distill_weight=0.3)
    given = batch()
    states = teacher_states(tokens(given), n_blocks)
    found = run(model, **given, teacher_states=states)
    torch.testing.assert_close(found.loss, found.lm_loss + 0.3 * found.distill_loss)

    hiddens: list[Tensor] = []  # recorded with separate hooks on every block

    def take(_: Any, args: Any, out: Any) -> None:
        hiddens.append(out if pairing == "output" else args[0])

    handles = [block.register_forward_hook(take) for block in model.model.model.layers]
    run(model, **given)
    for handle in handles:
        handle.remove()
    assert model.heads is not None
    expected = [
        1 - F.cosine_similarity(head(hidden[found.vision_mask]), state)
        for head, hidden, state in zip(model.heads, hiddens, states, strict=False)
    ]
    torch.testing.assert_close(found.distill_loss, torch.stack(expected).mean())

    logits, mask = found.logits, given["attention_mask"]
    counted = []
    for sample in range(3):  # The target of a token is the next text token; images are skipped.
        places = (~found.vision_mask[sample]).nonzero()[:, 0].tolist()
        ids = given["input_ids"][sample][mask[sample].bool()]
        ids = ids[ids != PLACEHOLDER].tolist()
        for place, token in zip(places, ids, strict=False):
            if place:
                counted.append(-logits[sample, place - 1].log_softmax(-1)[token])
    torch.testing.assert_close(found.lm_loss, torch.stack(counted).mean())


def test_batch_without_labels_and_teacher_has_no_loss() -> None:
    model, given = seeing(teacher=7), batch()
    states = teacher_states(tokens(given))
    labels = given.pop("labels")
    found = run(model, **given)
    assert found.loss is None and found.lm_loss is None and found.distill_loss is None
    found = run(model, **given, teacher_states=states)
    assert found.lm_loss is None and torch.equal(found.loss, found.distill_loss)
    found = run(model, **given, labels=torch.full_like(labels, -100))
    assert found.loss == 0


def test_teacher_states_are_resampled_to_the_students_grids() -> None:
    model, given = seeing(teacher=7), batch()
    one = teacher_states(sum(h * w for h, w in ((4, 4), (1, 6), (2, 1))))
    found = run(model, **given, teacher_states=one, teacher_grids=[(4, 4), (1, 6), (2, 1)])
    assert 0 < found.distill_loss < 2
    with pytest.raises(ValueError, match=r"teachers: expected 9 tokens, as in .*found 24"):
        run(model, **given, teacher_states=one)
    with pytest.raises(ValueError, match=r"teachers: expected 2 tensors, one per block, found 1"):
        run(model, **given, teacher_states=teacher_states(tokens(given), 1))


@pytest.mark.parametrize("route", ["all", "vision"])
def test_only_new_parameters_are_trained(route: str) -> None:
    model, given = seeing(route, teacher=7), batch()
    states = teacher_states(tokens(given))
    base = {id(p) for p in model.model.parameters()} - {
        id(p) for m in model.modules() if isinstance(m, vora.VoraLinear) for p in (m.A, m.B)
    }
    model(**given, teacher_states=states).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is (id(parameter) not in base), name
        moves = parameter.grad is not None and bool(parameter.grad.any())
        assert moves is parameter.requires_grad, name
    assert all(state.grad is None for state in states)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_and_autocast_losses_are_near_float32(attention: str) -> None:
    # The factors of the bfloat16 model are float32.
    model, given = seeing("vision", teacher=7, attn_implementation=attention), batch()
    states = teacher_states(tokens(given))
    expected = model(**given, teacher_states=states)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(**given, teacher_states=states)
    half = vora.VoraForCausalLM(
        language(attn_implementation=attention).bfloat16(), settings("vision"), 7
    )
    vora.load_state_dict(half, vora.state_dict(model))
    narrow = half(**given, teacher_states=states)
    assert narrow.logits.dtype == torch.bfloat16 and narrow.loss.dtype == torch.float32
    for found in (cast, narrow):
        for name in ("lm_loss", "distill_loss"):
            torch.testing.assert_close(found[name], expected[name], rtol=0.02, atol=0.02)
        found.loss.backward()
    for parameter in half.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
        assert (parameter.grad is not None) is parameter.requires_grad


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("route", ["all", "vision"])
def test_batch_without_images_gives_every_parameter_a_gradient(route: str, labelled: bool) -> None:
    model, given = seeing(route, teacher=7), text()
    if not labelled:
        del given["labels"]
    found = model(**given, teacher_states=teacher_states(0))
    assert found.distill_loss == 0
    found.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            moves = route == "all" and labelled and "lora_" in name
            assert bool(parameter.grad.any()) is moves, name
    model.zero_grad()
    model(**text()).distill_loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("route", ["all", "vision"])
def test_checkpointing_changes_no_gradient_beyond_rounding(route: str, family: str) -> None:
    model, given = seeing(route, family, teacher=7), batch()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    states = teacher_states(tokens(given))

    def grads() -> list[Tensor]:
        model.zero_grad()
        found = model(**given, teacher_states=states)
        run(model, **text())  # a second forward, before the backward of the first one
        found.loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    expected = grads()
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(grads(), expected, rtol=1e-5, atol=1e-6)
    model.gradient_checkpointing_disable()
    torch.testing.assert_close(grads(), expected, rtol=0, atol=0)


def test_hooks_are_removed_after_a_forward() -> None:
    model, given = seeing("vision", teacher=7), batch()
    for _ in range(2):
        model(**given, teacher_states=teacher_states(tokens(given)))
        model.generate(
            given["input_ids"], given["images"], given["attention_mask"], max_new_tokens=2
        )
    with pytest.raises(ValueError, match="expected 2 tensors, one per block"):
        model(**given, teacher_states=[])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# -------------------------------------------------------------------------------------------------
# Merging, copies, saving and training


def test_merge_keeps_the_logits_and_remove_restores_the_model() -> None:
    model, given = seeing(), batch()
    expected = run(model, **given).logits
    twin = copy.deepcopy(model)
    assert vora.merge(model) is model
    assert not any(isinstance(m, vora.VoraLinear) for m in model.modules())
    torch.testing.assert_close(run(model, **given).logits, expected, rtol=0, atol=1e-4 * 30)
    assert torch.equal(run(twin, **given).logits, expected)
    assert vora.remove(twin) is twin
    assert torch.equal(run(twin.model, **text()).logits, run(language(), **text()).logits)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_trainer_trains_and_saves_the_model(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lm = language(tie_word_embeddings=tied)
    model = vora.VoraForCausalLM(lm, settings("vision"), teacher_width=7)
    given = batch()
    rows = [
        {key: value[i] for key, value in given.items()} for i in (0, 1, 2, 1)
    ]  # One sample of the second batch has no image.

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        found = {key: [sample[key] for sample in samples] for key in samples[0]}
        return {k: v if k == "images" else torch.stack(v) for k, v in found.items()}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        max_steps=6,
        learning_rate=0.02,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=True,
        seed=1,
    )
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        eval_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=collate,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    parameters = dict(model.named_parameters())
    assert all(torch.equal(value, parameters[name]) for name, value in frozen.items())
    expected = run(model.eval(), **given).logits
    other = vora.VoraForCausalLM(
        language(tie_word_embeddings=tied), settings("vision"), teacher_width=7
    )
    from safetensors.torch import load_file

    other.load_state_dict(load_file(tmp_path / "checkpoint-6" / "model.safetensors"))
    assert torch.equal(run(other.eval(), **given).logits, expected)


def test_distillation_inside_a_reentrant_checkpoint_is_refused() -> None:
    # Older versions of transformers run the hooks of a block inside its checkpoint.
    block, x = torch.nn.Linear(3, 3), torch.randn(2, 3, requires_grad=True)
    with block_states([block], "output") as states:
        checkpoint(block, x, use_reentrant=False)
        assert states[0].requires_grad
        with pytest.raises(ValueError, match="expected use_reentrant=False, found a reentrant"):
            checkpoint(block, x, use_reentrant=True)
