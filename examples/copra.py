"""Train SmolLM2 with CopRA (progressive layer dropping) and with plain LoRA, and compare.

Both adapters learn to talk like a pirate. The example then estimates each block's Shapley value,
with sixteen coalitions in one forward, and removes the least valuable blocks first. The example
takes two minutes on two cores, without GPU or network: `python examples/copra.py` if `.[demo]` is
installed. `--quick` takes seconds and only checks that the code runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import matplotlib
import torch
from copra_pictures import COLORS, draw_shapley
from matplotlib import pyplot
from training import answer_losses, collate, read_examples, take_steps

from lora_ext import nn
from lora_ext.interop.smollm2 import load_smollm2
from lora_ext.methods import copra

matplotlib.use("Agg")
OUT = Path(__file__).resolve().parents[1] / "out" / "copra"
METHODS = {"CopRA": 0.1, "LoRA": 1.0}  # probability of each layer at the first step


@torch.no_grad()
def losses_of(model: Any, controller: copra.CopraController, batch: Any, masks: Any) -> list[float]:
    """Return the loss for each of the ``masks`` of blocks; one forward computes all losses."""
    rows = len(batch["input_ids"])
    tiled = {name: t.repeat(len(masks), 1) for name, t in batch.items()}
    with nn.coalitions(controller.layers, masks, rows):
        return answer_losses(model(**tiled), tiled).view(len(masks), rows).mean(1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="check the code in seconds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    steps, orders = (2, 1) if args.quick else (32, 2)
    model, tokenizer = load_smollm2()
    if args.quick:
        del model.model.layers[4:]
    blocks = len(model.model.layers)
    examples = read_examples(tokenizer, "pirate")
    held_out = collate(examples[:2], tokenizer.pad_token_id)
    keep = sorted({round(blocks * part / 6) for part in range(7)})  # numbers of blocks to keep

    games: dict[str, copra.Shapley] = {}
    kept: dict[str, list[float]] = {}
    for method, p0 in METHODS.items():
        torch.manual_seed(0)
        nn.wrap(model, nn.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
        controller = copra.CopraController(model, copra.CopraConfig(p0=p0), steps)
        take_steps(model, tokenizer, examples[2:], steps, 5e-3, f"{method:>5}", controller)
        print(f"{method}: Shapley values of {blocks} blocks on unseen questions ...")
        games[method] = copra.layer_shapley(
            model,
            controller,
            lambda output, batch: -answer_losses(output, batch),
            "permutation",
            orders,
            torch.Generator().manual_seed(0),
            batch=held_out,
            batched_coalitions=16,
        )
        worth = games[method].values
        masks = torch.stack([worth.argsort(descending=True).argsort() < k for k in keep])
        kept[method] = losses_of(model, controller, held_out, masks)
        for k, loss in zip(keep, kept[method], strict=True):
            print(f"{method}: the {k} most valuable blocks: loss {loss:.3f}")
        nn.unwrap(model)

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 4), layout="constrained")
    draw_shapley(games, "nats per token", axes[0])
    axes[0].set_xlabel("block")
    for color, (method, losses) in zip(COLORS, kept.items(), strict=False):
        axes[1].plot(keep, losses, marker="o", color=color, label=method)
    axes[1].set(xlabel="blocks kept, most valuable first", ylabel="held-out loss, nats per token")
    axes[1].legend()
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "copra.png", dpi=120)
    pyplot.close(figure)
    print(f"picture: {args.out / 'copra.png'}")


if __name__ == "__main__":
    main()
