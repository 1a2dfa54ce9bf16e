"""Train three adapters on SmolLM2-135M that differ in initialisation and learning rates.

Init[A] starts with a random A, Init[B] with a random B, both with the same learning rate. LoRA+
starts from Init[A], with a larger learning rate for B. Each adapter is trained once on the same 128
answers. The picture shows the loss, the size of A x, and the parts of each step that are due to A
and to B. The example takes two minutes on two cores, without GPU or network:
`python examples/lora_init.py`. `--quick` trains two steps.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
sys.path.append(str(Path(__file__).resolve().parent))

import matplotlib
import torch
from matplotlib import pyplot
from tqdm import tqdm
from training import ATTENTION, MLP, TEXTS, collate, read_examples

from lora_ext import LoraConfig, nn
from lora_ext.interop.smollm2 import load_smollm2
from lora_ext.methods.lora_init import LoraProbe, loraplus_param_groups

matplotlib.use("Agg")
OUT = Path(__file__).resolve().parents[1] / "out" / "lora_init"
STEPS = 32
#: Scheme, learning rate, LoRA+ ratio, colour.
RUNS = {
    "Init[A]": ("init_a_normal", 3e-3, 1, "#0072B2"),
    "Init[B]": ("init_b_normal", 3e-3, 1, "#D55E00"),
    "LoRA+, Init[A]": ("init_a_normal", 1e-3, 8, "#009E73"),
}


def main() -> None:
    """Train the three adapters and draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    model, tokenizer = load_smollm2()
    found = {name: train(model, tokenizer, name, 2 if args.quick else STEPS) for name in RUNS}
    for name, (losses, series) in found.items():
        print(f"{name}: loss {losses[-1]:.2f}, rms of A x {series['rms_Z_A'][-1]:.2f}")
    print(f"picture: {draw(found, args.out / 'lora_init.png')}")


def train(model: Any, tokenizer: Any, name: str, steps: int) -> tuple[list[float], dict]:
    """Train an adapter; return its losses, averaged over eight steps, and means over the layers of
    the probe's values."""
    scheme, lr, ratio, _ = RUNS[name]
    torch.manual_seed(0)
    last = list(range(20, model.config.num_hidden_layers))  # backward stops at the first one
    settings: Any = {"target_modules": [*ATTENTION, *MLP], "layers_to_transform": last}
    nn.wrap(model, LoraConfig(r=8, init_lora_weights=scheme, **settings))
    optimizer = torch.optim.AdamW(loraplus_param_groups(model, lr, ratio))
    texts = sorted(path.stem for path in TEXTS.glob("*.jsonl"))  # eight styles
    examples, losses = [e for text in texts for e in read_examples(tokenizer, text)], []
    with LoraProbe(model, track_decomposition=True) as probe:
        for step in (bar := tqdm(range(steps), desc=name, unit="step")):
            loss = model(**collate(examples[step::STEPS], tokenizer.pad_token_id)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.2f}")
    nn.unwrap(model)
    series: dict[str, list[float]] = {}
    for figure in ("rms_Z_A", "rms_d1", "rms_d2"):
        rows = [[r[figure] for r in probe.history if r["step"] == s] for s in range(1, steps)]
        series[figure] = [sum(row) / len(row) for row in rows]
    return [sum(losses[max(0, i - 7) : i + 1]) / min(8, i + 1) for i in range(steps)], series


def draw(found: dict[str, tuple[list[float], dict]], path: Path) -> Path:
    """Draw the loss, the size of A x, and the two parts of each step."""
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for name, (losses, series) in found.items():
        color, steps = RUNS[name][-1], range(1, len(losses))
        left.plot(losses, color=color, label=name)
        middle.plot(steps, series["rms_Z_A"], color=color, label=name)
        right.plot(steps, series["rms_d1"], color=color, label=f"{name}: by A")
        right.plot(steps, series["rms_d2"], "--", color=color, label=f"{name}: by B")
    left.set(xlabel="step", ylabel="loss, nats per token, mean of 8 steps")
    middle.set(xlabel="step", ylabel="rms of A x, mean of layers")
    right.set(xlabel="step", ylabel="rms of the change of B A x", yscale="log", ylim=(1e-3, 1))
    for axes in (left, middle, right):
        axes.legend(frameon=False, fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


if __name__ == "__main__":
    main()
