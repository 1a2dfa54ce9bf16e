"""Train SmolLM2 with LoRA, with LoRA and MoD, and with MoD alone, and compare.

With MoD, the last three layers predict together. All three models learn to talk like a pirate. The
example prints the models' losses on unseen answers, and the loss of each of the last three layers
alone. The picture shows the weights of late layers for each token. The example takes two minutes
on two cores, without GPU or network: `python examples/mod.py` if `.[demo]` is installed. `--quick`
takes seconds and only checks that the code runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent))

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.colors import LogNorm
from rich.console import Console
from rich.table import Table
from training import collate, read_examples, take_steps

from lora_ext import nn
from lora_ext.interop.smollm2 import load_smollm2
from lora_ext.methods import mod

matplotlib.use("Agg")
OUT = Path(__file__).resolve().parents[1] / "out" / "mod"
ARMS = {"LoRA": (True, False), "LoRA + MoD": (True, True), "MoD alone": (False, True)}
CONFIG = mod.ModConfig(k=3, distill_weight=0.1)


@torch.no_grad()
def measure(model: Any, batch: dict[str, Any]) -> tuple[float, list[float], Any]:
    """Return the loss on unseen answers and, for MoD, the last layers' losses and weights."""
    out = model(**batch)
    if not isinstance(out, mod.ModOutput):
        return out.loss.item(), [], None
    return out.ce_loss.item(), out.layer_losses.tolist(), out.routing_weights


def draw_routing(weights: torch.Tensor, tokens: list[str], first_layer: int, axes: Any) -> None:
    """Draw the weights ``(T, k)`` of the late layers for each predicted token, in log colours.

    The last layer is left out: its weight is one minus the sum of the others.
    """
    late = weights[:, :-1].float().T.cpu().numpy()  # (k - 1, T)
    scale = LogNorm(1e-4, 1, clip=True)
    shown = axes.imshow(late, aspect="auto", cmap="viridis", norm=scale, interpolation="nearest")
    axes.set_yticks(range(len(late)), [str(first_layer + e) for e in range(len(late))])
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=7)
    axes.set(xlabel="predicted token", ylabel="layer")
    axes.figure.colorbar(shown, ax=axes, label="weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="check the code in seconds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    model, tokenizer = load_smollm2()
    if args.quick:
        del model.model.layers[4:]
        model.config.num_hidden_layers = 4
    steps, layers = 2 if args.quick else 24, model.config.num_hidden_layers
    examples = read_examples(tokenizer, "pirate")
    held_out = collate(examples[:4], tokenizer.pad_token_id)
    table = Table("", "parameters", "unseen answers", "layers alone", "their weights")
    untuned, _, _ = measure(model, held_out)
    table.add_row("untuned", "0", f"{untuned:.3f}", "", "")

    routing: dict[str, Any] = {}
    last = list(range(2 * layers // 3, layers))
    for arm, (with_lora, with_mod) in ARMS.items():
        torch.manual_seed(0)
        model.requires_grad_(False)
        if with_lora:
            targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
            nn.wrap(model, nn.LoraConfig(r=8, target_modules=targets, layers_to_transform=last))
        if with_mod:
            mod.apply(model, CONFIG)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        take_steps(model, tokenizer, examples[4:], steps, 3e-3, f"{arm:>10}", batch=2)
        loss, alone, weights = measure(model, held_out)
        cells = [" ".join(f"{x:.3f}" for x in alone)]
        if weights is not None:
            valid = held_out["labels"][:, 1:] != -100
            routing[arm] = weights[0, :-1][valid[0]]
            means = weights[:, :-1][valid].mean(0)
            cells.append(" ".join(f"{x:.3f}" for x in means.tolist()))
            mod.remove(model)
        table.add_row(arm, f"{trained:,}", f"{loss:.3f}", *cells)
        if with_lora:
            nn.unwrap(model)

    Console(width=100).print(table)
    answer = held_out["labels"][0][held_out["labels"][0] != -100]
    texts = [tokenizer.decode([token]).replace("\n", " ") for token in answer]
    figure, axes = pyplot.subplots(len(routing), 1, figsize=(11, 5), layout="constrained")
    for axis, (arm, weights) in zip(axes, routing.items(), strict=True):
        draw_routing(weights, texts, layers - CONFIG.k + 1, axis)
        axis.set_title(arm)
    args.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out / "mod.png", dpi=120)
    pyplot.close(figure)
    print(f"picture: {args.out / 'mod.png'}")


if __name__ == "__main__":
    main()
