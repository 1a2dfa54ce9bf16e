"""Output that holds to a constraint, on SmolLM2: JSON from two adapters in one batch, and words.

Two adapters learn to talk for a moment; asked in one batch, each fills in the same form, and the
base model does too. Then a text of 32 tokens must say a word: a mask alone says it when it has to,
a guide, learned from a few of the model's texts, makes room for it. No GPU, no network, two minutes
on two cores: `python examples/control.py` if `.[demo,control]` is installed. A better guide
takes half an hour of one: `lora-ext distil-guide MODEL --out DIR`, then `--guide DIR`.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib import pyplot
from tqdm import tqdm
from training import read_examples, take_steps

import lora_ext
from lora_ext import control, nn
from lora_ext.interop.smollm2 import load_smollm2

matplotlib.use("Agg")
OUT = Path(__file__).resolve().parents[1] / "out" / "control"
ADAPTERS, BUDGET = ("pirate", "telegram"), 32
WORDS = " beach", " dog", " purple"
EVERY_4 = range(0, BUDGET, 4)
PARTS = {"greeting": {"type": "string", "maxLength": 40}, "people": {"type": "integer"}}
FORM = {"type": "object", "properties": PARTS, "required": list(PARTS)}


class Said(NamedTuple):
    """A text, by the token (from 0) with which it says its word."""

    law: str
    word: str
    place: int


def asked(tokenizer: Any, question: str, rows: int) -> torch.Tensor:
    """Prompts ``(rows, S)``."""
    said = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    return torch.tensor([list(ids)] * rows)


def write(model: Any, ids: torch.Tensor, how: Any, **settings: Any) -> torch.Tensor:
    """New tokens ``(rows, T)``."""
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, logits_processor=[how], **settings)
    return found[:, ids.shape[1] :]


def forms(model: Any, tokenizer: Any, steps: int) -> None:
    """Two adapters and the base model fill in a form, in one batch."""
    form = control.Constraint.json_schema(FORM, tokenizer)
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    for name in ADAPTERS:
        nn.wrap(model, nn.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
        take_steps(model, tokenizer, read_examples(tokenizer, name), steps, 5e-3, f"{name:>8}")
        pool.load(name, model)
        nn.unwrap(model)
    how = control.ConstraintProcessor(form, max_new_tokens=64)
    ids = asked(tokenizer, "Greet the people of a small town, and say how many live there.", 3)
    lora_ext.attach(model, pool)
    with lora_ext.adapters([*ADAPTERS, None]):
        found = write(model, ids, how, max_new_tokens=64, do_sample=False)
    for name, tokens in zip([*ADAPTERS, "base"], found, strict=True):
        print(f"{name:>8}: {json.loads(tokenizer.decode(tokens, skip_special_tokens=True))}")
    lora_ext.detach(model)


def words(model: Any, tokenizer: Any, prompts: torch.Tensor, guide: Any) -> list[Said]:
    """Where a word is said, with the mask alone and with a guide: one batch has all the words."""
    rows: list[Said] = []
    said = [word for word in WORDS for _ in prompts]
    each = [control.Constraint.keywords(tokenizer, [word]) for word in said]
    for law, look in (("mask", None), ("guided", guide)):
        how = control.ConstraintProcessor(each, look, max_new_tokens=BUDGET)
        torch.manual_seed(0)
        ids = prompts.repeat(len(WORDS), 1)
        found = write(model, ids, how, max_new_tokens=BUDGET, do_sample=True, top_k=0)
        for word, row in zip(said, found, strict=True):
            texts = (tokenizer.decode(row[: n + 1]) for n in range(BUDGET))
            rows.append(Said(law, word, next(n for n, text in enumerate(texts) if word in text)))
        for row in found[:: len(prompts)]:
            print(f"{law:>8}: {tokenizer.decode(row, skip_special_tokens=True)!r}")
    return rows


def draw(rows: list[Said], path: Path) -> None:
    """The share of texts that say the word with each four tokens, and Wilson's 95 % interval."""
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for law, color, shift in (("mask", "#E69F00", -0.8), ("guided", "#0072B2", 0.8)):
        places = torch.tensor([row.place for row in rows if row.law == law])
        share = torch.bincount(places // 4, minlength=BUDGET // 4) / len(places)
        wide = 1.96**2 / len(places)
        middle = (share + wide / 2) / (1 + wide)
        half = (wide * share * (1 - share) + wide**2 / 4).sqrt() / (1 + wide)
        spans = torch.stack([share - middle + half, middle + half - share]).clamp(min=0)
        at = torch.arange(BUDGET // 4) * 4 + 2.5 + shift
        axes.bar(at, share, 1.5, yerr=spans, capsize=2, color=color, label=f"{law}, {len(places)}")
    axes.set(xlabel="token with which the word is said, of 32", ylabel="share of texts")
    axes.set_xticks([n + 2.5 for n in EVERY_4], [f"{n + 1}-{n + 4}" for n in EVERY_4])
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    print(f"picture: {path}")


def keep(rows: list[Said], path: Path) -> None:
    """The rows of the picture."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([Said._fields, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--words", action="store_true", help="the words alone, without forms")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--guide", type=Path, help="a folder of distil-guide; default: learn one")
    args = parser.parse_args()
    steps, rows, states, samples = (2, 2, 4, 4) if args.quick else (8, 10, 128, 96)
    torch.manual_seed(0)
    model, tokenizer = load_smollm2()
    if args.quick:
        del model.model.layers[2:]
    nn.pack_linears(model)
    if not args.words:
        forms(model, tokenizer, steps)
    prompts = asked(tokenizer, "Tell me about a small town by the sea.", rows)
    guide = control.Guide.load(args.guide) if args.guide else None
    if guide is None:
        # A call of many rows costs less a row; up to 32 rows read the packed base.
        guide = control.distil(model, prompts, states, samples=samples, batch=32, progress=tqdm)
    print(f"guide: {guide}, {guide.measures}")
    rows = words(model, tokenizer, prompts, guide)
    draw(rows, args.out / "control.png")
    keep(rows, args.out / "control.csv")


if __name__ == "__main__":
    main()
