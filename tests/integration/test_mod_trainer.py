"""A model with MoD trains, evaluates, predicts and resumes in transformers' Trainer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from adapted_models import adapted, llama

from lora_ext.methods import mod

ROWS = torch.randint(1, 11, (10, 6), generator=torch.Generator().manual_seed(0))
#: Rows whose labels are their tokens, except for the first ones.
SEQUENCES = [
    {"input_ids": row, "labels": torch.where(torch.arange(6) < i % 4, -100, row)}
    for i, row in enumerate(ROWS)
]


def trainer_of(model: Any, folder: Path, **settings: Any) -> Any:
    how = {"compute_metrics": settings.pop("compute_metrics", None)}
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_steps": 3}
    usual = {"save_strategy": "no", **sizes, **settings}
    return tiny.trainer_of(model, folder, SEQUENCES, how, **usual)


@pytest.mark.parametrize("kind", ["ours", "peft", "fused", "whole"])
def test_model_trains_evaluates_and_predicts_as_before(kind: str, tmp_path: Path):
    base = llama() if kind == "whole" else adapted(kind)
    expected = trainer_of(base, tmp_path).predict(SEQUENCES)
    model = mod.apply(llama() if kind == "whole" else adapted(kind))
    seen: list[Any] = []
    trainer = trainer_of(
        model,
        tmp_path,
        compute_metrics=lambda p: {"seen": seen.append(p.predictions) or 1.0},
        eval_strategy="steps",
        eval_steps=2,
    )
    before = {n: p.detach().clone() for n, p in model.named_parameters() if "mod." in n}
    trainer.train()
    assert all((p != before[n]).any() for n, p in model.named_parameters() if n in before)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    found = trainer.predict(SEQUENCES)
    assert isinstance(found.predictions, np.ndarray)
    assert found.predictions.shape == expected.predictions.shape == seen[0].shape
    everything = trainer.predict(SEQUENCES, ignore_keys=["cache"]).predictions
    assert len(everything) == 5  # logits, two terms, weights, losses of the layers
    assert everything[3].shape == (10, 6, 3)


@pytest.mark.parametrize("settings", [{"label_smoothing_factor": 0.1}, {"bf16": True}])
def test_label_smoothing_and_mixed_precision_give_finite_losses(settings: dict, tmp_path: Path):
    model = mod.apply(adapted("peft"))
    trainer = trainer_of(model, tmp_path, **settings)
    assert np.isfinite(trainer.train().training_loss)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert isinstance(trainer.predict(SEQUENCES).predictions, np.ndarray)
    out = model(input_ids=ROWS, labels=ROWS)
    assert out.routing_weights.shape == (10, 6, 3)
    mod.remove(model)
    assert not isinstance(model(input_ids=ROWS), mod.ModOutput)


@pytest.mark.slow
def test_accumulated_steps_equal_those_of_one_batch(tmp_path: Path):
    found = []
    for rows, steps in ((4, 1), (1, 4)):
        model = mod.apply(adapted("fused"), mod.ModConfig(distill_weight=1.0))
        trainer = trainer_of(
            model,
            tmp_path,
            max_steps=2,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=steps,
            optim="sgd",
        )
        loss = trainer.train().training_loss
        found.append([torch.tensor(loss), *(p.detach() for p in model.parameters())])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one(tmp_path: Path):
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_checkpointing": True,
    }
    unbroken, resumed = (mod.apply(llama()).train() for _ in range(2))
    trainer_of(unbroken, tmp_path, **settings).train()
    trainer_of(resumed, tmp_path, **settings).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    start, found = mod.state_dict(mod.apply(llama())), dict(resumed.named_parameters())
    for name, parameter in unbroken.named_parameters():
        assert torch.equal(parameter, found[name]), name
        assert name not in start or not torch.equal(parameter, start[name])
