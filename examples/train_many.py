"""Train eight adapters at once: one model, one batch, one backward. Then serve all eight.

`python examples/train_many.py` where lora_ext[demo] is installed. No GPU, no network.
"""

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
# Before torch: threads that wait spin for microseconds, not for milliseconds. Where a machine does
# other work besides, they would keep the working ones from the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import matplotlib
import torch
from matplotlib import pyplot
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from training import ATTENTION, MLP, TEXTS, collate, read_examples

import lora_ext
from lora_ext.interop.smollm2 import load_smollm2

matplotlib.use("Agg")
NAMES = sorted(path.stem for path in TEXTS.glob("*.jsonl"))
RANKS = dict(zip(NAMES, (4, 8, 16, 8, 4, 8, 16, 32), strict=True))
STEPS, LEARNING_RATE = 64, 3e-3
QUESTION = "What is the moon?"
OUT = Path(__file__).resolve().parents[1] / "out" / "train_many"


def main(steps: int = STEPS) -> None:
    """Train, draw, serve."""
    torch.manual_seed(0)
    model, tokenizer = load_smollm2()
    options: Any = {"target_modules": [*ATTENTION, *MLP]}
    configs = {n: LoraConfig(r=r, lora_alpha=2 * r, **options) for n, r in RANKS.items()}
    peft_model: Any = get_peft_model(model, configs[NAMES[0]], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        peft_model.add_adapter(name, configs[name])
    lora_ext.from_peft(peft_model)  # the one line
    print(f"losses: {draw(train(peft_model, tokenizer, steps), OUT / 'losses.png')}")

    weights = {n: get_peft_model_state_dict(peft_model, adapter_name=n) for n in NAMES}
    model = peft_model.unload().eval()
    pool = lora_ext.AdapterPool(model, max_slots=len(NAMES), max_rank=max(RANKS.values()))
    for name in NAMES:  # from memory; a folder that PEFT has saved would do as well
        pool.load(name, (configs[name].to_dict(), weights[name]))
    lora_ext.attach(model, pool)
    question = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    batch = tokenizer([prompt] * len(NAMES), return_tensors="pt")
    with torch.inference_mode(), lora_ext.adapters(NAMES):
        answers = model.generate(**batch, max_new_tokens=40, do_sample=False)
    for name, answer in zip(NAMES, answers[:, batch.input_ids.shape[1] :], strict=True):
        print(f"{name:>9}: {tokenizer.decode(answer, skip_special_tokens=True).strip()}")


def train(model: Any, tokenizer: Any, steps: int) -> list[list[float]]:
    """One sequence of each text per step; each adapter has an optimizer of its own."""
    examples = [read_examples(tokenizer, name) for name in NAMES]
    model.set_requires_grad(NAMES)
    own = {n: [p for key, p in model.named_parameters() if f".{n}." in key] for n in NAMES}
    optimizers = [torch.optim.AdamW(own[n], lr=LEARNING_RATE, fused=True) for n in NAMES]
    model.train()
    history: list[list[float]] = []
    with tqdm(range(steps), unit="step") as bar:
        for step in bar:
            batch = collate([e[step % len(e)] for e in examples], tokenizer.pad_token_id)
            labels = batch.pop("labels")
            losses = sequence_losses(model(**batch, adapter_names=NAMES).logits, labels)
            losses.sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            history.append(losses.tolist())
            bar.set_postfix(loss=f"{losses.mean().item():.2f}")
    return history


def sequence_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each sequence over its own labels: what it would be alone."""
    flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    each = cross_entropy(*flat, ignore_index=-100, reduction="none").view(len(labels), -1)
    return each.sum(1) / (labels[:, 1:] != -100).sum(1)


def draw(history: list[list[float]], path: Path) -> Path:
    """The eight curves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyplot.plot(history, label=[f"{name}, rank {RANKS[name]}" for name in NAMES])
    pyplot.ylabel("loss")
    pyplot.legend(fontsize="small")
    pyplot.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="a batch of eight texts each")
    main(parser.parse_args().steps)
