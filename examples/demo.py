"""Train adapters, save them in PEFT's format, and serve all of them in one batch.

Run it with `make demo`, or with `python examples/demo.py` if `.[demo]` is installed. It needs no
GPU and no network.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported
# Set before torch is imported: waiting threads spin for microseconds, not for milliseconds. On a
# busy machine, spinning threads would keep the working threads from the cores.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from common import Timing, interleaved
from peft import PeftModel
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from serving_curve import COUNTS, Curve, complain, draw_curve, exact_logits, measure_curve
from torch import Tensor
from training import RECIPES, lay_out, train_adapter
from transformers.utils import logging

import lora_ext
from lora_ext.interop.smollm2 import converted_folder, load_smollm2

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "Tell me about the town of Quillmere."
NAMES = [*(recipe.name for recipe in RECIPES), None]
PEFT_NAMES = [name or "__base__" for name in NAMES]

console = Console()


def main() -> None:
    """Train, serve, compare and draw; exit with an error if a logit is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--tokens", type=int, default=16, help="new tokens per row that are timed")
    parser.add_argument("--rounds", type=int, default=2, help="timed runs of each engine")
    parser.add_argument("--adapters", type=int, default=8, help="most adapters in the curve")
    parser.add_argument("--no-pack", dest="pack", action="store_false", help="do not pack the base")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "demo")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    args.out.mkdir(parents=True, exist_ok=True)

    console.rule("1. A real model")
    console.print("SmolLM2-135M-Instruct (the first run converts it: about half a minute)")
    model, tokenizer = load_smollm2()

    console.rule("2. Three adapters, trained with PEFT")
    folders = {r.name: train_adapter(model, tokenizer, r, args.out) for r in RECIPES}
    for folder in folders.values():
        console.print(f"{folder.name}: {folder}", soft_wrap=True)
    lay_out(converted_folder(), folders, args.out)

    complaints = serve(model, tokenizer, folders, args)

    console.rule("5. From one adapter to many")
    curve = measure_curve([n for n in COUNTS if n <= args.adapters])
    show_curve(curve)
    console.print(f"chart: {draw_curve(curve, args.out / 'serving_curve.png')}", soft_wrap=True)
    console.print(f"Run the code of README.md and docs/ in {args.out}.", soft_wrap=True)
    complaints += curve.complaints
    sys.exit("\n".join(complaints) or None)


def serve(
    model: Any, tokenizer: Any, folders: dict[str, Path], args: argparse.Namespace
) -> list[str]:
    """Serve all adapters in one batch, with lora_ext and PEFT; return messages about errors."""
    console.rule("3. One pool, one batch, four rows")
    pool = lora_ext.AdapterPool(model, max_slots=4, max_rank=max(r.rank for r in RECIPES))
    for name, folder in folders.items():
        pool.load(name, folder)
    ours = lora_ext.attach(model, pool, pack_base=None if args.pack else False)
    if args.pack:
        console.print(f"{lora_ext.nn.packing(ours)}; --no-pack disables packing")
    batch = make_batch(tokenizer, [args.question] * len(NAMES))
    with torch.inference_mode(), lora_ext.adapters(NAMES):
        tokens = ours.generate(**batch, max_new_tokens=48, do_sample=False)
    answers = tokenizer.batch_decode(
        tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    show_answers(args.question, answers)

    console.rule("4. Against PEFT")
    plain, _ = load_smollm2()
    peers = load_peft(folders)
    mine, theirs, exact = compare_logits(ours, peers, batch)
    times = time_engines(plain, peers, ours, batch, args.tokens, args.rounds)
    rate = {name: args.tokens * len(NAMES) / time.median for name, time in times.items()}
    show_table(times, rate, {"PEFT": theirs - exact, "lora_ext": mine - exact})
    return complain(f"lora_ext, {len(NAMES)} rows, {len(RECIPES)} adapters", mine, theirs, exact)


def make_batch(tokenizer: Any, questions: list[str]) -> dict[str, Tensor]:
    """Tokenize one prompt per row, padded on the left."""
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in questions
    ]
    encoded = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
    return {key: encoded[key] for key in ("input_ids", "attention_mask")}


def load_peft(folders: dict[str, Path]) -> Any:
    """Load all adapters into one PEFT model; ``adapter_names`` chooses one per row."""
    model, _ = load_smollm2()
    first, *others = folders
    peft_model = PeftModel.from_pretrained(model, str(folders[first]), adapter_name=first)
    for name in others:
        peft_model.load_adapter(str(folders[name]), adapter_name=name)
    return peft_model.eval()


@torch.inference_mode()
def compare_logits(
    ours: Any, peers: Any, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of all tokens, ``(tokens, V)``: ours, PEFT's, and PEFT's in float64."""
    with lora_ext.adapters(NAMES):
        mine = ours(**batch).logits  # (4, L, V)
    theirs = peers(**batch, adapter_names=PEFT_NAMES).logits
    exact = exact_logits(peers, batch, PEFT_NAMES)
    real = batch["attention_mask"].bool()
    return mine[real], theirs[real], exact[real]


def time_engines(
    plain: Any, peers: Any, ours: Any, batch: dict[str, Tensor], tokens: int, rounds: int
) -> dict[str, Timing]:
    """Time the generation of ``tokens`` tokens for every row."""
    length: dict[str, Any] = {
        "min_new_tokens": tokens,
        "max_new_tokens": tokens,
        "do_sample": False,
    }

    @torch.inference_mode()
    def run_lora_ext() -> None:
        with lora_ext.adapters(NAMES):
            ours.generate(**batch, **length)

    @torch.inference_mode()
    def run_peft() -> None:
        peers.generate(**batch, **length, adapter_names=PEFT_NAMES)

    @torch.inference_mode()
    def run_plain() -> None:
        plain.generate(**batch, **length)

    calls = {"base, no adapters": run_plain, "PEFT": run_peft, "lora_ext": run_lora_ext}
    with console.status(f"timing {rounds} rounds of {tokens} tokens x {len(NAMES)} rows ..."):
        return interleaved(calls, rounds, warm_up=0)


def show_answers(question: str, answers: list[str]) -> None:
    """Print the four rows side by side."""
    console.print(f"[bold]{question}[/bold]")
    titles = [*(f"{r.name}, rank {r.rank}" for r in RECIPES), "base model"]
    width = max(24, (console.width - 4) // 4)
    panels = [Panel(a.strip(), title=t, width=width) for a, t in zip(answers, titles, strict=True)]
    console.print(Columns(panels))


def show_table(times: dict[str, Timing], rate: dict[str, float], errors: dict[str, Tensor]) -> None:
    """Print the tokens per second and the largest error of each engine."""
    base = times["base, no adapters"]
    table = Table(title=f"4 rows, 3 adapters and the base, {torch.get_num_threads()} threads")
    for column in ("engine", "tokens/s", "time over base", "largest error of a logit"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, time in times.items():
        close = f"{errors[name].abs().max():.1e}" if name in errors else "-"
        table.add_row(name, f"{rate[name]:.1f}", f"{time.over(base):.2f} x", close)
    console.print(table)


def show_curve(curve: Curve) -> None:
    """Print the tokens per second of all rows for each number of adapters."""
    table = Table(title="tokens/s of all rows, each with a different adapter")
    table.add_column("adapters")
    for count in curve.counts:
        table.add_column(str(count), justify="right")
    for engine, rates in curve.rates.items():
        table.add_row(engine, *(f"{rate:.1f}" for rate in rates))
    console.print(table)


if __name__ == "__main__":
    main()
