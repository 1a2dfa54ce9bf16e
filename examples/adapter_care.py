"""Train two adapters with CopRA, then inspect, merge, prune and serve them.

SmolLM2 learns to talk like a pirate with one adapter and in telegrams with the other. The example
measures the ranks of both adapters, merges the adapters in factor space and in weight space, and
prunes the merged adapter by the Shapley values of its blocks. One pool serves all adapters. The
example takes two minutes on two cores, without GPU or network: `python examples/adapter_care.py` if
`.[demo]` is installed. `--quick` takes seconds and only checks that the code runs.
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
from rich.console import Console
from rich.table import Table
from training import answer_losses, collate, read_examples, take_steps

import lora_ext
from lora_ext import nn
from lora_ext.adapter import LoraAdapter, merge_adapters, prune_adapter, rank_report
from lora_ext.interop.smollm2 import load_smollm2
from lora_ext.methods import copra

matplotlib.use("Agg")
OUT = Path(__file__).resolve().parents[1] / "out" / "adapter_care"
TEXTS = ("pirate", "telegram")
MODULES = ["q_proj", "v_proj", "down_proj"]
HELD_OUT, RANK, QUESTION = 2, 8, "What is the moon?"
console = Console()


class Care:
    """Base model, tokenizer and texts of the example."""

    def __init__(self, quick: bool):
        self.steps = 2 if quick else 30
        self.new_tokens = 4 if quick else 28
        self.model, self.tokenizer = load_smollm2()
        if quick:
            del self.model.model.layers[4:]
            self.model.config.num_hidden_layers = 4
        self.examples = {name: read_examples(self.tokenizer, name) for name in TEXTS}
        pad = self.tokenizer.pad_token_id
        unseen = {name: e[:HELD_OUT] for name, e in self.examples.items()}
        self.held_out = {name: collate(e, pad) for name, e in unseen.items()}
        self.of_both = collate([pair for e in unseen.values() for pair in e], pad)

    def train(self, name: str) -> LoraAdapter:
        """Train an adapter on one text and return it."""
        torch.manual_seed(0)
        nn.wrap(self.model, nn.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES))
        controller = copra.CopraController(self.model, copra.CopraConfig(), self.steps)
        learned = self.examples[name][HELD_OUT:]
        take_steps(self.model, self.tokenizer, learned, self.steps, 4e-3, f"{name:>9}", controller)
        value = LoraAdapter.from_model(self.model)
        nn.unwrap(self.model)
        return value

    def loss(self, _: Any = None) -> float:
        """Return the mean loss over the unseen questions of both texts."""
        return sum(self.loss_of(name) for name in TEXTS) / len(TEXTS)

    @torch.no_grad()
    def loss_of(self, name: str) -> float:
        """Return the loss on the unseen questions of one text."""
        batch = self.held_out[name]
        return answer_losses(self.model(**batch), batch).mean().item()


def main() -> None:
    """Train, inspect, merge, prune and serve the adapters."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="check the code in seconds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    care = Care(args.quick)
    first, second = (care.train(name) for name in TEXTS)
    adapters = {**dict(zip(TEXTS, (first, second), strict=True))}
    inspect(adapters)

    adapters["merged, factors"] = merge_adapters([first, second], [0.5, 0.5], mode="factors")
    adapters["merged"] = merge_adapters([first, second], [1.0, 1.0], mode="delta")
    console.print("loss on the line between the two adapters ...")
    lines = between(care, first, second)
    console.print("Shapley values of the merged adapter's blocks ...")
    game, names = weigh(care, adapters["merged"])
    keep = copra.top_by_shapley(names, game, k=len(game.values) * 2 // 3)
    adapters["merged, pruned"] = prune_adapter(adapters["merged"], keep)
    losses = serve(care, adapters, args.out)
    show(losses, adapters)
    path = draw(args.out / "adapter_care.png", lines, game, losses)
    console.print(f"pictures: {path}", soft_wrap=True)


def inspect(adapters: dict[str, LoraAdapter]) -> None:
    """Print the mean rank and the largest update of each adapter."""
    for name, value in adapters.items():
        report = rank_report(value, kinds=("entropy",))
        mean = sum(row["entropy"] for row in report) / len(report)
        largest = max(report, key=lambda row: row["fro"])
        console.print(
            f"{name}: {len(report)} modules of rank {RANK}, mean entropy rank {mean:.2f}, "
            f"largest update {largest['fro']:.2f} in {largest['module']}"
        )


def between(care: Care, first: LoraAdapter, second: LoraAdapter) -> dict[str, copra.Barrier]:
    """Return the barriers between two adapters, and the losses on the line between them, in factor
    and in weight space."""
    nn.wrap(care.model, nn.LoraConfig(r=RANK, target_modules=MODULES))
    found = {
        space: copra.lmc_barrier(care.model, first, second, care.loss, 5, space)
        for space in ("factors", "delta")
    }
    nn.unwrap(care.model)
    return found


def weigh(care: Care, value: LoraAdapter) -> tuple[copra.Shapley, list[list[str]]]:
    """Return the Shapley values of the blocks, and the modules of each block."""
    nn.wrap(care.model, nn.LoraConfig(r=2 * RANK, lora_alpha=2 * RANK, target_modules=MODULES))
    layers: dict[str, Any] = nn.adapted_layers(care.model)
    with torch.no_grad():
        for name, factors in value.modules.items():
            layers[name].lora_A["default"].weight.copy_(factors.a)
            layers[name].lora_B["default"].weight.copy_(factors.scaling * factors.b)
    controller = copra.CopraController(care.model, copra.CopraConfig(), 1)
    game = copra.layer_shapley(
        care.model,
        controller,
        lambda output, batch: -answer_losses(output, batch),
        "permutation",
        1,
        torch.Generator().manual_seed(0),
        batch=care.of_both,
        batched_coalitions=16,
    )
    groups = controller.groups
    nn.unwrap(care.model)
    return game, groups


def serve(care: Care, adapters: dict[str, LoraAdapter], out: Path) -> dict[str, list[float]]:
    """Print each adapter's answer to a question; return each adapter's losses on both texts."""
    pool = lora_ext.AdapterPool(care.model, max_slots=len(adapters), max_rank=2 * RANK)
    for name, value in adapters.items():
        value.save(out / name.replace(", ", "-"))  # in PEFT's format
        pool.load(name, out / name.replace(", ", "-"))
    lora_ext.attach(care.model, pool)
    prompt = care.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], tokenize=False, add_generation_prompt=True
    )
    names = [None, *adapters]
    batch = care.tokenizer([prompt] * len(names), return_tensors="pt")
    length = batch["input_ids"].shape[1]
    with lora_ext.adapters(names):
        ids = care.model.generate(**batch, max_new_tokens=care.new_tokens, do_sample=False)
    losses: dict[str, list[float]] = {}
    for name, answer in zip(names, ids[:, length:], strict=True):
        label = name or "base"
        console.print(f"{label}: {care.tokenizer.decode(answer, skip_special_tokens=True)}")
        with lora_ext.adapters(name):
            losses[label] = [care.loss_of(text) for text in TEXTS]
    lora_ext.detach(care.model)
    return losses


def show(losses: dict[str, list[float]], adapters: dict[str, LoraAdapter]) -> None:
    """Print each adapter's loss on both texts and its size."""
    table = Table(title="loss on unseen questions, nats per token")
    for column in ("adapter", *TEXTS, "modules", "parameters"):
        table.add_column(column)
    for name, values in losses.items():
        modules = adapters[name].modules if name in adapters else {}
        size = sum(f.a.numel() + f.b.numel() for f in modules.values())
        table.add_row(name, *(f"{v:.3f}" for v in values), str(len(modules)), f"{size:,}")
    console.print(table)


def draw(
    path: Path,
    lines: dict[str, copra.Barrier],
    game: copra.Shapley,
    losses: dict[str, list[float]],
) -> Path:
    """Draw barriers, Shapley values and losses side by side."""
    figure, axes = pyplot.subplots(1, 3, figsize=(16, 4.2), layout="constrained")
    draw_barriers(lines, "loss on both texts, nats per token", axes[0])
    axes[0].set_title(f"from {TEXTS[0]} to {TEXTS[1]}")
    draw_shapley({"merged": game}, "nats per token", axes[1])
    axes[1].set(title="blocks of the merged adapter, on both texts", xlabel="block")
    for place, text in enumerate(TEXTS):
        x = [i + 0.4 * place - 0.2 for i in range(len(losses))]
        heights = [values[place] for values in losses.values()]
        axes[2].bar(x, heights, 0.38, label=text, color=COLORS[place])
    axes[2].set_xticks(range(len(losses)), losses, rotation=20)
    axes[2].set(title="served from one pool", ylabel="loss, nats per token")
    axes[2].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def draw_barriers(lines: dict[str, copra.Barrier], unit: str, axes: Any) -> None:
    """Draw the loss on lines between adapters, with a dotted straight line between the ends."""
    for color, (label, line) in zip(COLORS, lines.items(), strict=False):
        label = f"{label}, barrier {line.barrier:.3g}"
        axes.plot(line.lambdas, line.losses, marker="o", color=color, label=label)
        ends = [(line.lambdas[i], line.losses[i]) for i in (0, -1)]
        axes.plot(*zip(*ends, strict=True), linestyle=":", color=color)
    axes.set(xlabel="lambda, from the first adapter to the second", ylabel=unit)
    axes.legend()


if __name__ == "__main__":
    main()
