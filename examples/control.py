"""Constrained output on SmolLM2: JSON from two adapters in one batch, and required words.

Two adapters are trained for a few steps. In one batch, both adapters and the base model fill in the
same form. Then a text of 32 tokens must contain a given word. With a mask alone, the word appears
only when no later position is left for it. With a guide, a small model distilled from a few of the
model's texts, the text leads to the word earlier. The example takes two minutes on two cores,
without GPU or network: `python examples/control.py` if `.[demo,control]` is installed. A better
guide takes half an hour:
`lora-ext distil-guide MODEL --out DIR`, then `--guide DIR`.
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
    """Position (from 0) of the token that completes the required word of a text."""

    law: str
    word: str
    place: int


def asked(tokenizer: Any, question: str, rows: int) -> torch.Tensor:
    """Return the chat prompt of a question as token ids ``(rows, S)``, all rows equal."""
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return torch.tensor([list(ids)] * rows)


def write(model: Any, ids: torch.Tensor, how: Any, **settings: Any) -> torch.Tensor:
    """Generate new tokens ``(rows, T)`` with the logits processor ``how``."""
    mask = torch.ones_like(ids)
    found = model.generate(ids, attention_mask=mask, logits_processor=[how], **settings)
    return found[:, ids.shape[1] :]


def forms(model: Any, tokenizer: Any, steps: int) -> None:
    """Train two adapters; print the forms that they and the base model fill in, in one batch."""
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
    """Generate texts with the mask alone and with the guide; return the positions of the required
    words.

    One batch contains the texts for all words.
    """
    rows: list[Said] = []
    required = [word for word in WORDS for _ in prompts]
    each = [control.Constraint.keywords(tokenizer, [word]) for word in required]
    for law, look in (("mask", None), ("guided", guide)):
        how = control.ConstraintProcessor(each, look, max_new_tokens=BUDGET)
        torch.manual_seed(0)
        ids = prompts.repeat(len(WORDS), 1)
        found = write(model, ids, how, max_new_tokens=BUDGET, do_sample=True, top_k=0)
        for word, row in zip(required, found, strict=True):
            texts = (tokenizer.decode(row[: n + 1]) for n in range(BUDGET))
            rows.append(Said(law, word, next(n for n, text in enumerate(texts) if word in text)))
        for row in found[:: len(prompts)]:
            print(f"{law:>8}: {tokenizer.decode(row, skip_special_tokens=True)!r}")
    return rows


def draw(rows: list[Said], path: Path) -> None:
    """Draw the share of texts by position of the word, with Wilson's 95 % interval."""
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
    axes.set(xlabel="token that completes the word, of 32", ylabel="share of texts")
    axes.set_xticks([n + 2.5 for n in EVERY_4], [f"{n + 1}-{n + 4}" for n in EVERY_4])
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    print(f"picture: {path}")


def keep(rows: list[Said], path: Path) -> None:
    """Write the rows of the picture to a CSV file."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([Said._fields, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="check the code in seconds")
    parser.add_argument("--words", action="store_true", help="required words only, no forms")
    parser.add_argument("--out", type=Path, default=OUT)
    text = "folder that lora-ext distil-guide has written; default: distil a guide"
    parser.add_argument("--guide", type=Path, help=text)
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
        # A larger batch costs less per row; up to 32 rows use the packed base weights.
        guide = control.distil(model, prompts, states, samples=samples, batch=32, progress=tqdm)
    print(f"guide: {guide}, {guide.measures}")
    rows = words(model, tokenizer, prompts, guide)
    draw(rows, args.out / "control.png")
    keep(rows, args.out / "control.csv")


if __name__ == "__main__":
    main()
