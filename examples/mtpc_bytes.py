"""Compare the loss and acceptance of four circuit heads on a small byte-level model.

The example trains a transformer on the source of Python's standard library (its top-level modules,
4.7 MB in 3.11), freezes it, retrofits a head of each kind, and decodes with all heads. This takes
eighteen minutes on two cores, without GPU or network: `python examples/mtpc_bytes.py` if `.[demo]`
is installed. The trained models stay in out/mtpc_bytes/trained, so a second run only decodes, for
two minutes. `--quick` takes seconds and only checks that the code runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from common import Timing, interleaved
from lean import LeanLlama, token_by_token
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from lora_ext.methods import mtpc

OUT = Path(__file__).resolve().parents[1] / "out" / "mtpc_bytes"
EOS, VOCAB = 256, 257
MODES, BATCHES = ("sample", "greedy"), (1, 8)
SINGLES = 4  # prompts decoded one after the other at batch 1
console = Console()


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, the heads and the runs."""

    width: int = 256
    layers: int = 4
    length: int = 256
    batch: int = 8
    base_steps: int = 1200
    head_batch: int = 4
    head_steps: int = 300
    n_token: int = 8
    rank: int = 8
    adapter_rank: int = 32
    held_out: int = 64
    new_tokens: int = 192
    rounds: int = 3


QUICK = Sizes(32, 2, 64, 2, 4, 2, 3, 4, 2, 4, 8, 12, 1)


@dataclass
class Found:
    """Measurements of one head."""

    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)  # nats, by position
    accepted: dict[tuple[str, int], float] = field(default_factory=dict)
    emitted: dict[tuple[str, int], float] = field(default_factory=dict)


def main() -> None:
    """Train the model, retrofit the heads, decode with them and draw the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="check the code in seconds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    sizes = QUICK if args.quick else Sizes()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    train, held_out = read_text(sizes)
    console.print(
        f"text: Python's standard library, {train.numel()} bytes to train on, "
        f"{held_out.numel()} held out"
    )
    model, drafts, found = trained(args.out / "trained", train, held_out, sizes)
    times = decode(model, drafts, held_out, sizes, found)
    show(found, times, sizes)
    console.print(f"chart: {draw(found, times, sizes, args.out / 'mtpc.png')}", soft_wrap=True)


def trained(
    folder: Path, train: Tensor, held_out: Tensor, sizes: Sizes
) -> tuple[Any, dict[str, mtpc.Draft], dict[str, Found]]:
    """Load the model and its heads from the folder, or train and save them there."""
    if folder.exists():
        console.print(f"trained before: {folder}", soft_wrap=True)
        model: Any = LlamaForCausalLM.from_pretrained(folder / "model").eval()
        known = json.loads((folder / "found.json").read_text())
        found = {kind: Found(**values) for kind, values in known.items()}
        return model, {kind: mtpc.Draft.load(model, folder / kind).eval() for kind in found}, found
    model = train_model(train, sizes)
    console.print(f"model, held-out loss: {model_loss(model, held_out, sizes):.3f} nats per byte")
    found = {kind: Found() for kind in ("ff", "cp", "hmm", "btree")}
    drafts = {
        kind: train_head(model, kind, train, held_out, sizes, one) for kind, one in found.items()
    }
    model.save_pretrained(folder / "model")
    for kind, draft in drafts.items():
        draft.save(folder / kind)
    (folder / "found.json").write_text(json.dumps({k: asdict(one) for k, one in found.items()}))
    return model, drafts, found


def read_text(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Pack modules into rows; some rows of every tenth module are held out."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    modules = [list(path.read_bytes()) for path in paths]
    train = [module for i, module in enumerate(modules) if i % 10]
    pack = mtpc.pack_documents
    held_out = pack(modules[::10], sizes.length, EOS)
    return pack(train, sizes.length, EOS), held_out[:: len(held_out) // sizes.held_out]


def batches(rows: Tensor, steps: int, batch: int, name: str) -> Any:
    """Yield a progress bar and random rows for each step."""
    generator = torch.Generator().manual_seed(torch.initial_seed() + 1)
    for _ in (bar := tqdm(range(steps), desc=name, unit="step")):
        index = torch.randint(len(rows), (batch,), generator=generator)
        yield bar, rows[index]


def train_model(rows: Tensor, sizes: Sizes) -> Any:
    """Train a language model over bytes."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=sizes.width,
        intermediate_size=3 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    model: Any = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    warm = max(1, sizes.base_steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, (s + 1) / warm) * (1 + math.cos(math.pi * s / sizes.base_steps)) / 2,
    )
    for bar, ids in batches(rows, sizes.base_steps, sizes.batch, "model"):
        loss = next_byte_loss(model, ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def next_byte_loss(model: Any, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of all bytes but the first."""
    return cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def model_loss(model: Any, rows: Tensor, sizes: Sizes) -> float:
    """Return the mean loss on held-out rows."""
    losses = [next_byte_loss(model, ids) for ids in rows.split(sizes.batch)]
    return torch.stack(losses).mean().item()


def train_head(
    model: Any, kind: str, rows: Tensor, held_out: Tensor, sizes: Sizes, found: Found
) -> mtpc.Draft:
    """Retrofit a head to the frozen model, train only the head, and return it."""
    rank = 1 if kind == "ff" else sizes.rank
    config = mtpc.MtpcConfig(sizes.n_token, rank, kind, "adapter", sizes.adapter_rank)
    draft = mtpc.retrofit(model, config)
    optimizer = torch.optim.AdamW(draft.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, sizes.head_steps)
    for bar, ids in batches(rows, sizes.head_steps, sizes.head_batch, kind):
        loss, _ = draft.loss(ids, eos_id=EOS)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        found.losses.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        each = [draft.loss(ids, eos_id=EOS)[1] for ids in held_out.split(sizes.batch)]
    found.held_out = torch.stack(each).mean(0).tolist()
    return draft.eval()


def decode(
    model: Any, drafts: dict[str, mtpc.Draft], rows: Tensor, sizes: Sizes, found: dict[str, Found]
) -> dict[tuple[str, str, int], Timing]:
    """Time decoding from held-out prompts; return seconds by (engine, mode, batch).

    At batch 1, four prompts are decoded one after the other. All engines share a lean model.
    """
    lean = LeanLlama(model)
    prompts = rows[:: max(1, len(rows) // max(BATCHES)), : sizes.length // 4][: max(BATCHES)]
    calls: dict[Any, Callable[[], object]] = {}

    def speculative(kind: str, mode: str, batch: int) -> None:
        decoder = mtpc.SpeculativeDecoder(lean, drafts[kind].head, mode=mode)
        outs = [
            decoder.generate(ids, max_new_tokens=sizes.new_tokens, eos_token_id=[])
            for ids in prompts.split(batch)[:SINGLES]
        ]
        counts = sum(sum(out.calls) for out in outs)
        found[kind].accepted[mode, batch] = sum(sum(out.accepted) for out in outs) / counts
        found[kind].emitted[mode, batch] = sum(sum(out.emitted) for out in outs) / counts

    def plain(mode: str, batch: int) -> None:
        for ids in prompts.split(batch)[:SINGLES]:
            token_by_token(lean, ids, sizes.new_tokens, sample=mode == "sample")

    for mode in MODES:
        for batch in BATCHES:
            calls["plain", mode, batch] = partial(plain, mode, batch)
            for kind in drafts:
                calls[kind, mode, batch] = partial(speculative, kind, mode, batch)
    console.print(f"timing {sizes.rounds} rounds of {sizes.new_tokens} tokens ...")
    return interleaved(calls, sizes.rounds, warm_up=0)


def tokens(batch: int, sizes: Sizes) -> int:
    """Return the number of new tokens of a timed run."""
    return (SINGLES if batch == 1 else batch) * sizes.new_tokens


def show(found: dict[str, Found], times: dict[tuple[str, str, int], Timing], sizes: Sizes) -> None:
    """Print one line per engine, mode and batch."""
    table = Table(title=f"n = {sizes.n_token}, r = {sizes.rank}, {torch.get_num_threads()} threads")
    columns = (
        "engine",
        "mode",
        "batch",
        "held-out nats",
        "accepted",
        "emitted",
        "tokens/s",
        "x plain",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    for (engine, mode, batch), timing in times.items():
        rate = f"{tokens(batch, sizes) / timing.median:.0f}"
        speed = f"{1 / timing.over(times['plain', mode, batch]):.2f}"
        if engine == "plain":
            table.add_row(engine, mode, str(batch), "", "", "1", rate, "1", end_section=False)
            continue
        one, key = found[engine], (mode, batch)
        loss = f"{sum(one.held_out) / sizes.n_token:.3f}"
        counts = f"{one.accepted[key]:.2f}", f"{one.emitted[key]:.2f}"
        table.add_row(engine, mode, str(batch), loss, *counts, rate, speed)
    console.print(table)


def draw(
    found: dict[str, Found],
    times: dict[tuple[str, str, int], Timing],
    sizes: Sizes,
    path: Path,
) -> Path:
    """Draw training, loss by position, tokens per call and tokens per second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(16, 3.6), layout="constrained")
    for kind, one in found.items():
        axes[0].plot(one.losses, label=kind)
        axes[1].plot(range(1, sizes.n_token + 1), one.held_out, marker="o", label=kind)
    axes[0].set(xlabel="step", ylabel="loss", title="training")
    axes[1].set(xlabel="position k", ylabel="-log q(x_k | x_<k), nats", title="held out")
    axes[0].legend()
    settings = [(mode, batch) for mode in MODES for batch in BATCHES]
    names = [f"{mode}\nbatch {batch}" for mode, batch in settings]
    engines = ["plain", *found]
    for place, engine in enumerate(engines):
        x = [i + (place - 2) * 0.16 for i in range(len(settings))]
        emitted = [1.0 if engine == "plain" else found[engine].emitted[s] for s in settings]
        rates = [tokens(s[1], sizes) / times[(engine, *s)].median for s in settings]
        color = "#999999" if engine == "plain" else f"C{place - 1}"
        axes[2].bar(x, emitted, 0.15, label=engine, color=color)
        axes[3].bar(x, rates, 0.15, label=engine, color=color)
    for axis, title in ((axes[2], "tokens per call"), (axes[3], "tokens per second (grey: plain)")):
        axis.set_xticks(range(len(settings)), names)
        axis.set_title(title)
    axes[3].set_yscale("log")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    console.print(f"{time.perf_counter() - start:.0f} s in all")
