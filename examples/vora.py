"""Teach SmolLM2 to caption pictures with VoRA.

The language model is frozen. Adapters of rank 64 in its first six blocks apply to image tokens
only, so text is processed as before, bit for bit. The example takes minutes on two cores, without
GPU or network: `python examples/vora.py` if `.[demo]` is installed. `--quick` only checks that the
code runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from coloured_shapes import Picture, draw_picture
from matplotlib.figure import Figure
from tqdm import tqdm

from lora_ext.interop.smollm2 import load_smollm2
from lora_ext.methods import vora

OUT = Path(__file__).resolve().parents[1] / "out" / "vora"
BEFORE, PLACEHOLDER, BATCH, RATE = " A picture of a", -200, 8, 1e-3
PROMPTS = ("The capital of France is", "Red and blue make", "Once upon a time there was")
PROCESSOR = vora.VoraImageProcessor(patch=16, min_pixels=256)


def draw(count: int, seed: int) -> list[Picture]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (32, 32), (32, 48), (48, 32)
    return [draw_picture(sizes[i % 3], generator) for i in range(count)]


def encode(pictures: list[Picture], tokenizer: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return inputs to generate captions, and inputs to train with the caption as labels."""
    both = {"images": PROCESSOR([[p.image] for p in pictures])["pixel_values"]}
    start = torch.tensor([[PLACEHOLDER, *tokenizer(BEFORE).input_ids]] * len(pictures))
    words = [f" {p.caption}." for p in pictures]
    end = tokenizer(words, padding=True, padding_side="right", return_tensors="pt")
    predicted = end.input_ids.masked_fill(end.attention_mask == 0, -100)
    labels = torch.cat([torch.full_like(start, -100), predicted], 1)
    ids = torch.cat([start, end.input_ids], 1)  # padding is last: no token attends to it
    return {"input_ids": start, **both}, {"input_ids": ids, "labels": labels, **both}


@torch.no_grad()
def read(model: Any, tokenizer: Any) -> list[Any]:
    """Return the logits and the text, continued by the model, of each prompt in ``PROMPTS``."""
    batches = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    going_on = [model.generate(**b, max_new_tokens=8, do_sample=False)[0] for b in batches]
    logits = [model(**b).logits for b in batches]
    return list(zip(logits, map(tokenizer.decode, going_on), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach SmolLM2 to caption pictures with VoRA.")
    parser.add_argument("--quick", action="store_true", help="check the code in seconds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    steps, count = (1, 4) if args.quick else (400, 96)
    model, tokenizer = load_smollm2()
    if args.quick:
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:7], 7
    before = read(model, tokenizer)
    torch.manual_seed(0)
    config = vora.VoraConfig(6, 64, route="vision", image_size=32, patch=16, embed_dim=192)
    seer = vora.VoraForCausalLM(model, config)
    # Scale image tokens to the size of text tokens at the start.
    seer.vision.out_proj.weight.data *= 3**0.5 * model.get_input_embeddings().weight.std()
    optimizer = torch.optim.AdamW([p for p in seer.parameters() if p.requires_grad], lr=RATE)
    pictures = draw(steps * BATCH, seed=1)
    for step in (bar := tqdm(range(steps), unit="step")):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 10, 3 * (1 - step / steps))
        loss = seer(**encode(pictures[step * BATCH : (step + 1) * BATCH], tokenizer)[1]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    held_out = draw(count, seed=2)
    tokens = seer.generate(**encode(held_out, tokenizer)[0], max_new_tokens=6, do_sample=False)
    found = [tokenizer.decode(row).partition(".")[0].strip() for row in tokens]
    pairs = list(zip(held_out, found, strict=True))
    for part in ("caption", "colour", "shape", "quadrant"):
        right = sum(getattr(p, part) in words for p, words in pairs)
        print(f"{part} right: {right} of {count} unseen pictures")
    for (old, words), (new, again) in zip(before, read(model, tokenizer), strict=True):
        print(f"{words!r}: {'equal, bit for bit' if old.equal(new) and words == again else again}")
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axis, (p, words) in zip(figure.subplots(2, 5).flat, pairs, strict=False):
        axis.imshow(p.image.movedim(0, 2).numpy())
        axis.set_title(words, fontsize="small", color="black" if words == p.caption else "#D55E00")
        axis.set_axis_off()
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "vora.png", dpi=110)
    print(f"picture: {args.out / 'vora.png'}")


if __name__ == "__main__":
    main()
