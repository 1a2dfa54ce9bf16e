"""VoRA on SmolLM2: a language model that has read a lot and seen nothing captions pictures.

The model is frozen; adapters of rank 64 in its first six blocks serve the tokens of images alone
(route "vision"), beside an embedding of patches. It learns coloured shapes of three resolutions,
captions others, and answers text as before, bit for bit. No GPU, no network, minutes on two cores:
`python examples/vora.py` where lora_ext[demo] is installed; `--quick` for a run of seconds that
shows nothing but that it works.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from lora_ext.interop.smollm2 import load_smollm2
from lora_ext.methods import vora
from lora_ext.methods.vora.shapes import Picture, draw_picture

OUT = Path(__file__).resolve().parents[1] / "out" / "vora"
SIZES = (32, 32), (32, 48), (48, 32)
BEFORE, PLACEHOLDER, BATCH = " A picture of a", -200, 8
PROMPTS = ("The capital of France is", "Red and blue make", "Once upon a time there was")
PROCESSOR = vora.VoraImageProcessor(patch=16, min_pixels=256)


def draw(count: int, seed: int) -> list[Picture]:
    generator = torch.Generator().manual_seed(seed)
    return [draw_picture(SIZES[i % len(SIZES)], generator) for i in range(count)]


def encode(pictures: list[Picture], tokenizer: Any, captions: bool) -> dict[str, Any]:
    """Each picture, the words before a caption, and the caption, which alone is predicted."""
    start = [PLACEHOLDER, *tokenizer(BEFORE).input_ids]
    ends = [tokenizer(f" {p.caption}.").input_ids if captions else [] for p in pictures]
    longest = max(map(len, ends))
    rows = [start + end + [tokenizer.pad_token_id] * (longest - len(end)) for end in ends]
    valid = [[1] * len(start + end) + [0] * (longest - len(end)) for end in ends]
    ids, mask = torch.tensor(rows), torch.tensor(valid)
    images = PROCESSOR([[p.image] for p in pictures])["pixel_values"]
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "images": images}
    if captions:
        batch["labels"] = ids.masked_fill(mask == 0, -100)
        batch["labels"][:, : len(start)] = -100
    return batch


def caption(seer: Any, tokenizer: Any, pictures: list[Picture]) -> list[str]:
    """What the model says, up to the full stop."""
    batch = encode(pictures, tokenizer, captions=False)
    found = seer.generate(**batch, max_new_tokens=6, do_sample=False)
    return [tokenizer.decode(row).partition(".")[0].strip() for row in found]


@torch.no_grad()
def read(model: Any, tokenizer: Any) -> list[Any]:
    """For each prompt the logits of its tokens, and how the model goes on."""
    batches = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
    going_on = [model.generate(**b, max_new_tokens=8, do_sample=False)[0] for b in batches]
    return [
        (model(**b).logits, tokenizer.decode(t)) for b, t in zip(batches, going_on, strict=True)
    ]


def main() -> None:
    """Train, caption, compare, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    steps, count = (1, 4) if args.quick else (120, 96)
    model, tokenizer = load_smollm2()
    if args.quick:
        del model.model.layers[7:]
    before = read(model, tokenizer)
    torch.manual_seed(0)
    config = vora.VoraConfig(6, 64, route="vision", image_size=32, patch=16, embed_dim=192)
    seer = vora.VoraForCausalLM(model, config)
    with torch.no_grad():  # tokens of images start as large as those of text
        seer.vision.out_proj.weight *= 3**0.5 * model.get_input_embeddings().weight.std()
    optimizer = torch.optim.AdamW([p for p in seer.parameters() if p.requires_grad], lr=1e-3)
    pictures = draw(steps * BATCH, seed=1)
    for step in (bar := tqdm(range(steps), unit="step")):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 10, 3 * (1 - step / steps))
        batch = encode(pictures[step * BATCH : (step + 1) * BATCH], tokenizer, captions=True)
        loss = seer(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")

    held_out = draw(count, seed=2)
    found = caption(seer, tokenizer, held_out)
    right = sum(p.caption == words for p, words in zip(held_out, found, strict=True))
    print(f"captions right, of pictures not seen before: {right} of {count}")
    for part in ("colour", "shape", "quadrant"):
        right = sum(getattr(p, part) in words for p, words in zip(held_out, found, strict=True))
        print(f"  {part}: {right} of {count}")
    for (old, words), (new, again) in zip(before, read(model, tokenizer), strict=True):
        print(f"{words!r}: {'equal, bit for bit' if old.equal(new) and words == again else again}")

    figure = Figure(figsize=(11, 5), layout="constrained")
    for axis, p, words in zip(figure.subplots(2, 5).flat, held_out, found, strict=False):
        axis.imshow(p.image.movedim(0, 2).numpy())
        axis.set_title(words, fontsize="small", color="black" if words == p.caption else "#D55E00")
        axis.set_axis_off()
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "vora.png", dpi=110)
    print(f"picture: {args.out / 'vora.png'}")


if __name__ == "__main__":
    main()
