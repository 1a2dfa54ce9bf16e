"""Inspect, merge, resize, prune, compare and serve LoRA adapters; train a guide
for constrained generation.

An adapter is a folder that PEFT has saved, with adapter_config.json and
adapter_model.safetensors (or .bin). Nothing is downloaded, and only `prune`,
`serve` and `distil-guide` need a model.

Examples:
  lora-ext inspect pirate
  lora-ext merge pirate haiku --weights 0.7 0.3 --out both
  lora-ext resize both --rank 16 --out both-16
  lora-ext diff both both-16 --json | jq .distance

`lora-ext COMMAND --help` explains a command. A command writes its output
completely or not at all. The exit status is 0 on success; 1 if doctor or
gpu-report finds a fault or inspect a value that is not finite; 2 on bad input,
with one sentence on standard error.
"""

# The docstring of this file is the program's help. A command's help is its function's docstring.

from __future__ import annotations

import argparse
import inspect
import textwrap
from typing import Any, NoReturn, get_args

import lora_ext
from lora_ext.adapter import KINDS, MergeMode

from . import _changes, _gpu_report, _models, _reports

_FOLDER = "folder of an adapter"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Formatter that omits the line ``COMMAND`` above the list of commands."""

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        if isinstance(action, argparse._SubParsersAction):
            text = textwrap.indent(textwrap.dedent(text.partition("\n")[2]), "  ")
        return text


class _Parser(argparse.ArgumentParser):
    """Parser that reports a bad argument in one sentence, without the full usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line.

    The parsed namespace contains the name of the command as ``command`` and, as ``run``, the
    function that runs the command with the namespace as its argument.
    """
    about, mark, more = inspect.cleandoc(__doc__ or "").partition("Examples:")
    whole = _Parser("lora-ext", description=about, epilog=mark + more, formatter_class=_Help)
    whole.add_argument("--version", action="version", version=f"lora_ext {lora_ext.__version__}")
    kind: Any = {"title": "commands", "dest": "command", "metavar": "COMMAND"}
    commands = whole.add_subparsers(required=True, **kind)
    for run, add in (
        (_reports.doctor, _add_json),
        (_gpu_report.gpu_report, _add_gpu_report),
        (_reports.inspect, _add_inspect),
        (_changes.merge, _add_merge),
        (_changes.resize, _add_resize),
        (_changes.prune, _add_prune),
        (_reports.diff, _add_diff),
        (_models.serve, _add_serve),
        (_models.distil_guide, _add_distil_guide),
    ):
        words = inspect.getdoc(run) or ""
        name, summary = run.__name__.replace("_", "-"), words.partition(".\n")[0]
        summary = summary[:1].lower() + summary[1:]
        parser = commands.add_parser(name, help=summary, description=words, formatter_class=_Help)
        parser.set_defaults(run=run)
        add(parser)
    return whole


def _add(parser: Any, name: str, text: str, metavar: str | None = None, **more: Any) -> None:
    """Add an argument. The help shows the default value unless this is empty or zero."""
    if more.get("default") and more.get("action") is None:
        text += " (default: %(default)s)"
    parser.add_argument(name, help=text, metavar=metavar, **more)


def _add_gpu_report(parser: argparse.ArgumentParser) -> None:
    _add(parser, "--out", "file of the report, e.g. card.json", "FILE", required=True)
    _add(parser, "--minutes", "minutes for timing, after the checks", "N", type=float, default=3.0)
    text = "emu: check on the emulator, if it was built, without timing"
    _add(parser, "--backend", text, choices=("cuda", "emu"), default="cuda")
    _add(parser, "--only", "prefixes of op names, separated by commas", "OPS")


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    _add(parser, "adapter", _FOLDER, "ADAPTER")
    text = f"effective ranks to show, from {', '.join(KINDS)}"
    shown = "entropy stable threshold"
    _add(parser, "--kinds", text, "KIND", nargs="+", choices=KINDS, default=shown.split())
    text = "threshold for the effective ranks that count singular values"
    _add(parser, "--tau", text, "T", type=float, default=1e-2)
    _add_json(parser)


def _add_merge(parser: argparse.ArgumentParser) -> None:
    _add(parser, "adapters", _FOLDER, "ADAPTER", nargs="+")
    text = "weight of each adapter (default: equal, with sum 1; for ties and dare 1 each)"
    _add(parser, "--weights", text, "W", nargs="+", type=_numbers)
    _add(parser, "--mode", "one of the modes above", choices=get_args(MergeMode), default="delta")
    text = "rank of delta_svd, ties, dare (default: the largest rank of the adapters)"
    _add(parser, "--rank", text, "N", type=int)
    text = "fraction of an update's values that ties and dare keep (default: 0.2 and 0.1)"
    _add(parser, "--density", text, "D", type=float)
    _add(parser, "--seed", "seed of dare (default: 0)", "N", type=int, default=0)
    _add_json(parser, out=True)


def _add_resize(parser: argparse.ArgumentParser) -> None:
    _add(parser, "adapter", _FOLDER, "ADAPTER")
    _add(parser, "--rank", "rank of every module", "N", type=int, required=True)
    _add_json(parser, out=True)


_PRUNE_CHOICES = (  # option, choices with the default first, help
    (
        "score",
        ("distance", "angle", "alignment"),
        "distance of the update from its projection, mostly a measure of the update's size; angle "
        "between the two; or cosine with the alignment change, negative if the update reverts it",
    ),
    ("reference", ("population", "permutation", "released"), "distances to compare with"),
    ("granularity", ("module", "block"), "unit that is scored and pruned"),
    ("projection", ("frobenius", "orthogonal"), "map onto the aligned directions"),
    (
        "on-zero-alignment",
        ("raise", "skip"),
        "raise an error for a layer that is equal in both models, or keep it",
    ),
)


def _add_prune(parser: argparse.ArgumentParser) -> None:
    _add(parser, "adapter", _FOLDER, "ADAPTER")
    text = "folder of the base model, before alignment (safetensors)"
    _add(parser, "--base", text, "DIR", required=True)
    _add(parser, "--aligned", "folder of the aligned model", "DIR", required=True)
    amount = parser.add_mutually_exclusive_group(required=True)
    _add(amount, "--num", "number of layers to prune", "K", type=int)
    text = "prune layers with scores of at most T (smallest) or at least T (largest)"
    _add(amount, "--threshold", text, "T", type=float)
    text = "whether to prune the smallest or the largest scores; depends on --score"
    _add(parser, "--direction", text, choices=("smallest", "largest"), required=True)
    for name, choices, text in _PRUNE_CHOICES:
        _add(parser, f"--{name}", text, choices=choices, default=choices[0])
    _add(parser, "--rank", "largest number of directions (orthogonal)", "Q", type=int)
    text = "fraction of the sum of squared singular values of the change to keep (orthogonal)"
    _add(parser, "--energy", text, "E", type=float)
    text = "if the distances do not differ, set all scores to 0 instead of raising an error"
    parser.add_argument("--allow-degenerate", action="store_true", help=text)
    text = "project the chosen layers onto the aligned directions, without pruning (Safe LoRA)"
    parser.add_argument("--project", action="store_true", help=text)
    _add_json(parser, out=True)


def _add_diff(parser: argparse.ArgumentParser) -> None:
    _add(parser, "first", _FOLDER, "A")
    _add(parser, "second", _FOLDER, "B")
    _add_json(parser)


_SERVE_NUMBERS = (  # option, metavar, default and help
    ("port", "N", 8000, "port; 0 for any free port"),
    ("max-requests", "N", 64, "limit of waiting and running requests; others get status 429"),
    ("max-rank", "N", 64, "largest rank of an adapter"),
    ("context", "N", 4096, "largest number of tokens of a prompt and its answer"),
    ("max-body", "BYTES", 1 << 20, "largest size of a request's body"),
    ("max-loaded-bytes", "BYTES", None, "limit of the adapters on the device (default: none)"),
    ("host-cache-bytes", "BYTES", 1 << 30, "limit of the copies of evicted adapters on the host"),
    ("max-wait-s", "SECONDS", 3.0, "time after which a request that waits for room goes first"),
)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    _add(parser, "--model", "folder of the base model and its tokenizer", "DIR", required=True)
    _add(parser, "--adapters", "folder that contains the adapters' folders", "DIR", required=True)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    for name, metavar, default, text in _SERVE_NUMBERS:
        kind = float if metavar == "SECONDS" else int
        _add(parser, f"--{name}", text, metavar, type=kind, default=default)
    text = "dtype of the adapters in memory; float8_e4m3fn rounds them, for half the bytes"
    _add(parser, "--lora-dtype", text, choices=("auto", "float8_e4m3fn"), default="auto")
    _add(parser, "--device", "torch device (default: cuda if available)", "NAME")
    text = (
        "packed copy of the base model, for faster decoding on a CPU: auto (kept if it is "
        "faster), none, plain (in the dtype of the weights), or 8 or 4 bits per weight. No copy "
        "is made if it would take more than a quarter of the free memory"
    )
    _add(parser, "--pack", text, choices=("auto", "none", "plain", "8", "4"), default="auto")
    text = "the same as --pack none"
    parser.add_argument("--no-pack", action="store_const", const="none", dest="pack", help=text)
    text = "compute the same bits as a trainer's forward of lora_ext.exact(model); on a CPU only"
    parser.add_argument("--exact", action="store_true", help=text)
    text = "allow requests from web pages of this origin (CORS); may be repeated"
    _add(parser, "--allow-origin", text, "URL", action="append", default=[], dest="origins")


def _add_json(parser: argparse.ArgumentParser, out: bool = False) -> None:
    """Add ``--json`` and, if ``out``, also ``--out``, the folder that the command writes."""
    if out:
        text = "folder to write; an adapter in it is replaced"
        _add(parser, "--out", text, "DIR", required=True)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers, found {text!r}") from None


def _add_distil_guide(parser: argparse.ArgumentParser) -> None:
    _add(parser, "model", "folder of a causal LM and its tokenizer", "MODEL")
    _add(parser, "--states", "number of states", "N", type=int, default=512)
    _add(parser, "--prompts", "one prompt per line (default: a few requests)", "FILE")
    _add(parser, "--samples", "number of texts", "N", type=int, default=4096)
    _add(parser, "--length", "tokens per text", "N", type=int, default=32)
    _add(parser, "--seed", "seed (default: 0)", "N", type=int, default=0)
    _add_json(parser, out=True)
