"""Train a LoRA adapter with PEFT on a page of questions and answers; save it in PEFT's format."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from lora_ext.methods.copra import CopraController

TEXTS = Path(__file__).with_name("texts")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Recipe:
    """Text, modules and training settings of one adapter."""

    name: str  # name of the text in texts/ and of the adapter
    rank: int
    modules: tuple[str, ...]
    learning_rate: float
    first_layer: int = 14  # first trained layer of 30, where the backward stops; enough for style
    epochs: int = 6
    batch: int = 4
    seed: int = 0

    def config(self, layers: int) -> LoraConfig:
        """Return PEFT's configuration for a model of ``layers`` decoder layers."""
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=2 * self.rank,
            target_modules=list(self.modules),
            layers_to_transform=list(range(self.first_layer, layers)),
        )


RECIPES = (
    Recipe("pirate", rank=8, modules=ATTENTION, learning_rate=3e-3, epochs=4),
    Recipe("telegram", rank=16, modules=ATTENTION + MLP, learning_rate=1.2e-3),
    Recipe("town", rank=32, modules=MLP, learning_rate=2e-3, epochs=3),
)


def train_adapter(model: Any, tokenizer: Any, recipe: Recipe, parent: Path) -> Path:
    """Train one adapter, or return that of an earlier run with the same text and recipe.

    Args:
        model: The base model; unchanged afterwards.
        tokenizer: A tokenizer with a chat template.
        recipe: Text, modules and training settings.
        parent: Folder in which the adapter's folder is created, whole or not at all.

    Returns:
        The folder, with ``adapter_config.json`` and ``adapter_model.safetensors``.
    """
    text = (TEXTS / f"{recipe.name}.jsonl").read_bytes()
    digest = hashlib.sha256(json.dumps(asdict(recipe)).encode() + text).hexdigest()[:8]
    folder = parent / f"{recipe.name}-{digest}"
    if folder.is_dir():
        return folder
    torch.manual_seed(recipe.seed)
    peft_model = get_peft_model(model, recipe.config(model.config.num_hidden_layers))
    try:
        _train(peft_model, tokenizer, recipe)
        partial = parent / f".{folder.name}"
        shutil.rmtree(partial, ignore_errors=True)
        peft_model.save_pretrained(str(partial), save_embedding_layers=False)
        partial.rename(folder)
    finally:
        peft_model.unload()
        model.eval().requires_grad_(True)
    return folder


def lay_out(base: Path, adapters: Mapping[str, Path], out: Path) -> None:
    """Make the folder that the documentation's code runs in: `base-model` and `adapters/<name>`.

    The base model is a link. Adapters are copies, because a server refuses links to folders outside
    its folder of adapters. Their configuration names ``base-model`` as the base model.
    """
    (out / "adapters").mkdir(parents=True, exist_ok=True)
    (out / "base-model").unlink(missing_ok=True)
    (out / "base-model").symlink_to(base.resolve(), target_is_directory=True)
    for name, folder in adapters.items():
        copy = out / "adapters" / name
        if copy.is_symlink():
            copy.unlink()
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        config = json.loads((copy / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = "base-model"
        (copy / "adapter_config.json").write_text(json.dumps(config, indent=2))


def read_examples(tokenizer: Any, name: str) -> list[tuple[list[int], int]]:
    """Return the token ids and the question's length of each dialogue in ``texts/<name>.jsonl``."""
    lines = (TEXTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [_example(tokenizer, json.loads(line)) for line in lines]


def _train(model: Any, tokenizer: Any, recipe: Recipe) -> None:
    examples = read_examples(tokenizer, recipe.name)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    order = torch.Generator().manual_seed(recipe.seed)
    batches = [
        [examples[i] for i in chosen]
        for _ in range(recipe.epochs)
        for chosen in torch.randperm(len(examples), generator=order).split(recipe.batch)
    ]
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=len(batches), pct_start=0.1
    )
    model.train()
    label = f"{recipe.name:>9} r={recipe.rank:<2}"
    with tqdm(batches, desc=label, unit="step", dynamic_ncols=True) as bar:
        for batch in bar:
            loss = model(**collate(batch, tokenizer.pad_token_id)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.2f}")


def _example(tokenizer: Any, pair: dict[str, str]) -> tuple[list[int], int]:
    """Return the token ids of a dialogue and the length of its question, which has no loss."""
    messages = [{"role": "user", "content": pair["question"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    answer = pair["answer"] + tokenizer.eos_token
    question = tokenizer(prompt, add_special_tokens=False).input_ids
    return question + tokenizer(answer, add_special_tokens=False).input_ids, len(question)


def collate(batch: list[tuple[list[int], int]], pad: int) -> dict[str, Tensor]:
    """Pad rows to equal length on the right and mask the questions out of the labels."""
    length = max(len(ids) for ids, _ in batch)
    ids = torch.full((len(batch), length), pad)
    labels = torch.full((len(batch), length), -100)
    mask = torch.zeros((len(batch), length), dtype=torch.int64)
    for row, (tokens, prompt) in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        labels[row, prompt : len(tokens)] = torch.tensor(tokens[prompt:])
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def answer_losses(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Compute the mean loss of each row's answer, ``(rows,)``, without the masked questions."""
    logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
    each = cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # (rows, tokens)
    return each.sum(1) / (labels != -100).sum(1)


def take_steps(
    model: Any,
    tokenizer: Any,
    examples: list[tuple[list[int], int]],
    steps: int,
    learning_rate: float,
    label: str,
    controller: CopraController | None = None,
    batch: int = 4,
) -> None:
    """Train the unfrozen parameters on random batches, with the masks of a controller, if any."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    order = torch.Generator().manual_seed(0)
    model.train()
    for step in (bar := tqdm(range(steps), desc=label, unit="step", dynamic_ncols=True)):
        found = {} if controller is None else {"layers": int(controller.step(step).sum())}
        chosen = torch.randperm(len(examples), generator=order)[:batch].tolist()
        loss = model(**collate([examples[i] for i in chosen], tokenizer.pad_token_id)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.2f}", **found)
    model.eval()
