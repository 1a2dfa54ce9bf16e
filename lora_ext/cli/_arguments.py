"""Parser of the command line: the commands and their arguments."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn, get_args

import lora_ext
from lora_ext.adapter import KINDS, MergeMode

from . import _changes, _gpu_report, _guides, _reports, servers

_DESCRIPTION = """\
Inspect, merge, resize, prune, compare and serve LoRA adapters; train a guide
for constrained generation.

An adapter is a folder that PEFT has saved, with adapter_config.json and
adapter_model.safetensors (or .bin). Nothing is downloaded, and only `prune`,
`serve` and `distil-guide` need a model."""

_EPILOG = """\
examples:
  lora-ext inspect pirate
  lora-ext merge pirate haiku --weights 0.7 0.3 --out both
  lora-ext resize both --rank 16 --out both-16
  lora-ext diff both both-16 --json | jq .distance

`lora-ext COMMAND --help` explains a command. A command writes its output
completely or not at all. The exit status is 0 on success; 1 if doctor or
gpu-report finds a fault or inspect a value that is not finite; 2 on bad input,
with one sentence on standard error."""


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

    The namespace that it returns has the name of the command as ``command``, and as ``run`` a
    function that runs the command and receives the namespace.
    """
    parser = _Parser("lora-ext", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=_Help)
    parser.add_argument("--version", action="version", version=f"lora_ext {lora_ext.__version__}")
    kind: Any = {"title": "commands", "dest": "command", "metavar": "COMMAND"}
    commands = parser.add_subparsers(required=True, **kind)
    for add in (
        _add_doctor,
        _add_gpu_report,
        _add_inspect,
        _add_merge,
        _add_resize,
        _add_prune,
        _add_diff,
        _add_serve,
        _add_distil_guide,
    ):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, summary: str, more: str, run: Callable[[Any], int]
) -> argparse.ArgumentParser:
    words = f"{summary[0].upper()}{summary[1:]}.\n\n{more}"
    parser = commands.add_parser(name, help=summary, description=words, formatter_class=_Help)
    parser.set_defaults(run=run)
    return parser


def _add(parser: Any, name: str, text: str, metavar: str | None = None, **more: Any) -> None:
    """Add an argument. Its default value is appended to the help unless it is empty or zero."""
    if more.get("default") and more.get("action") is None:
        text += " (default: %(default)s)"
    parser.add_argument(name, help=text, metavar=metavar, **more)


def _add_doctor(commands: Any) -> None:
    parser = _command(
        commands,
        "doctor",
        "show the installed versions and test each device",
        "Paste the output into a bug report. The exit status is 1 if an op failed.",
        _reports.doctor,
    )
    _add_json(parser)


def _add_gpu_report(commands: Any) -> None:
    parser = _command(
        commands,
        "gpu-report",
        "check and time every kernel on this GPU, and write a report",
        "Compares every op with its formula and times its kernels, next to the time that\n"
        "moving their bytes takes. Writes a JSON file and a Markdown page beside it.\n"
        "A case whose kernel crashes or hangs fails; the next one runs in a new process.\n"
        "Compiles and installs nothing. The report contains versions, GPU, clocks, the\n"
        "hash of the kernels, errors and times, but no names or paths. The exit status\n"
        "is 1 if a check fails.",
        _gpu_report.gpu_report,
    )
    _add(parser, "--out", "file of the report, e.g. card.json", "FILE", required=True)
    _add(parser, "--minutes", "minutes for timing, after the checks", "N", type=float, default=3.0)
    text = "emu: check on the emulator, if it was built, without timing"
    _add(parser, "--backend", text, choices=("cuda", "emu"), default="cuda")
    _add(parser, "--only", "prefixes of op names, separated by commas", "OPS")


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "show the modules of an adapter: ranks, norms, bad values",
        "  norm  Frobenius norm of the update, scaling * B A\n"
        "  bad   number of values that are NaN or infinite; if there are any, nothing\n"
        "        else is measured and the exit status is 1\n\n"
        "The other columns are effective ranks: the number of directions that the update\n"
        "uses.",
        _reports.inspect,
    )
    _add(parser, "adapter", _FOLDER, "ADAPTER")
    text = f"effective ranks to show, from {', '.join(KINDS)}"
    shown = "entropy stable threshold"
    _add(parser, "--kinds", text, "KIND", nargs="+", choices=KINDS, default=shown.split())
    text = "threshold of the kinds that count singular values"
    _add(parser, "--tau", text, "T", type=float, default=1e-2)
    _add_json(parser)


def _add_merge(commands: Any) -> None:
    parser = _command(
        commands,
        "merge",
        "merge several adapters of one base model into one",
        "The modes, with weights w and updates s B A:\n"
        "  delta      exact sum of w s B A; the ranks add up\n"
        "  delta_svd  best approximation of that sum with a smaller rank\n"
        "  factors    sum of the A and sum of the B; modules and ranks must be equal\n"
        "  ties       mean of the largest values of each update that have the sign of\n"
        "             their sum (TIES), truncated to a rank\n"
        "  dare       sum of randomly kept, rescaled values of each update, truncated\n"
        "             to a rank",
        _changes.merge,
    )
    _add(parser, "adapters", _FOLDER, "ADAPTER", nargs="+")
    text = "weight of each adapter (default: equal, with sum 1; for ties and dare 1 each)"
    _add(parser, "--weights", text, "W", nargs="+", type=_numbers)
    _add(parser, "--mode", "mode, see above", choices=get_args(MergeMode), default="delta")
    text = "rank of delta_svd, ties, dare (default: the largest rank of the adapters)"
    _add(parser, "--rank", text, "N", type=int)
    text = "share of an update's values that ties and dare keep (default: 0.2 and 0.1)"
    _add(parser, "--density", text, "D", type=float)
    _add(parser, "--seed", "seed of dare (default: 0)", "N", type=int, default=0)
    _add_json(parser, out=True)


def _add_resize(commands: Any) -> None:
    parser = _command(
        commands,
        "resize",
        "change the rank of an adapter and show the error",
        "A smaller rank keeps the largest singular values of each update, which is the\n"
        "best approximation; `error` is the Frobenius norm of the change. A larger rank\n"
        "does not change the updates. A rank that no module can use is an error: an\n"
        "update of I inputs and O outputs has rank min(I, O) at most.",
        _changes.resize,
    )
    _add(parser, "adapter", _FOLDER, "ADAPTER")
    _add(parser, "--rank", "rank of every module", "N", type=int, required=True)
    _add_json(parser, out=True)


_PRUNE_CHOICES = (  # option, choices with the default first, help
    (
        "score",
        ("distance", "angle", "alignment"),
        "distance of the update from its projection, mostly a measure of the update's size; angle "
        "between the two; or cosine with the change by alignment, negative if the update undoes it",
    ),
    ("reference", ("population", "permutation", "released"), "what a distance is compared with"),
    ("granularity", ("module", "block"), "unit that is scored and pruned"),
    ("projection", ("frobenius", "orthogonal"), "map onto the aligned directions"),
    (
        "on-zero-alignment",
        ("raise", "skip"),
        "raise an error for a layer that is equal in both models, or keep it",
    ),
)


def _add_prune(commands: Any) -> None:
    parser = _command(
        commands,
        "prune",
        "remove an adapter from the layers that undo safety",
        "SPLoRA. Layers are scored by the distance of their update from the change by\n"
        "alignment: the weights of the aligned model, on which the adapter was\n"
        "trained, minus the weights of its base. No data is needed, and one\n"
        "layer of the models is in memory at a time. With --project, Safe LoRA.",
        _changes.prune,
    )
    _add(parser, "adapter", _FOLDER, "ADAPTER")
    text = "folder of the base model, before alignment (safetensors)"
    _add(parser, "--base", text, "DIR", required=True)
    _add(parser, "--aligned", "folder of the aligned model", "DIR", required=True)
    amount = parser.add_mutually_exclusive_group(required=True)
    _add(amount, "--num", "prune K layers", "K", type=int)
    text = "prune layers with scores of at most T (smallest) or at least T (largest)"
    _add(amount, "--threshold", text, "T", type=float)
    text = "whether to prune the smallest or the largest scores; depends on --score"
    _add(parser, "--direction", text, choices=("smallest", "largest"), required=True)
    for name, choices, text in _PRUNE_CHOICES:
        _add(parser, f"--{name}", text, choices=choices, default=choices[0])
    _add(parser, "--rank", "largest number of directions (orthogonal)", "Q", type=int)
    text = "share of the squared singular values of the change to keep (orthogonal)"
    _add(parser, "--energy", text, "E", type=float)
    text = "set all scores to 0 if the distances do not differ, instead of an error"
    parser.add_argument("--allow-degenerate", action="store_true", help=text)
    text = "project these layers onto the aligned directions instead (Safe LoRA)"
    parser.add_argument("--project", action="store_true", help=text)
    _add_json(parser, out=True)


def _add_diff(commands: Any) -> None:
    parser = _command(
        commands,
        "diff",
        "compare two adapters of one base model",
        "  distance  Frobenius norm of the difference of the updates\n"
        "  cosine    cosine of the updates: 1 for equal directions, 0 for orthogonal ones\n"
        "  angles    principal angles between their column spaces, in degrees: the\n"
        "            smallest and the largest, or all of them with --json",
        _reports.diff,
    )
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
    (
        "max-wait-s",
        "SECONDS",
        3.0,
        "time after which a request that waits for room goes first",
    ),
)


def _add_serve(commands: Any) -> None:
    parser = _command(
        commands,
        "serve",
        "serve OpenAI's API over HTTP; `model` selects an adapter",
        "Serves chats and completions of a causal LM with continuous batching, or\n"
        "embeddings of an embedding model. An adapter is loaded at its first request.\n"
        "There is no authentication: listen on the loopback interface, or use a proxy.\n"
        "Ctrl-C stops the server.",
        servers.serve,
    )
    _add(parser, "--model", "folder of the base model and its tokenizer", "DIR", required=True)
    _add(parser, "--adapters", "folder that contains the adapters' folders", "DIR", required=True)
    parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
    for name, metavar, default, text in _SERVE_NUMBERS:
        kind = float if metavar == "SECONDS" else int
        _add(parser, f"--{name}", text, metavar, type=kind, default=default)
    _add(parser, "--device", "torch device (default: cuda if available)", "NAME")
    text = (
        "packed copy of the base model, for faster decoding on a CPU: kept if it is faster (auto, "
        "the default), none, plain (in the dtype of the weights), or of 8 or 4 bits. It is made "
        "if it takes at most a quarter of the free memory"
    )
    kinds = ("auto", "none", "plain", "8", "4")
    parser.add_argument("--pack", choices=kinds, default="auto", help=text)
    text = "the same as --pack none"
    parser.add_argument("--no-pack", action="store_const", const="none", dest="pack", help=text)
    text = "compute the same bits as a trainer's forward of lora_ext.exact(model); on a CPU only"
    parser.add_argument("--exact", action="store_true", help=text)
    text = "allow requests from web pages of this origin (CORS); may be repeated"
    _add(parser, "--allow-origin", text, "URL", action="append", default=[], dest="origins")


def _add_json(parser: argparse.ArgumentParser, out: bool = False) -> None:
    """Add ``--json``; with ``out``, also ``--out``, the folder that the command writes."""
    if out:
        text = "folder to write; an adapter in it is replaced"
        _add(parser, "--out", text, "DIR", required=True)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers, found {text!r}") from None


def _add_distil_guide(commands: Any) -> None:
    parser = _command(
        commands,
        "distil-guide",
        "train a guide for constrained generation on samples of a model",
        "Writes DIR/guide.safetensors for lora_ext.control.Guide.load, with the head\n"
        "that predicts the guide's state from the model. The measures are nats per token\n"
        "on held-out texts: of the guide, of the model, and of the guide with its head.",
        _guides.distil_guide,
    )
    _add(parser, "model", "folder of a causal LM and its tokenizer", "MODEL")
    _add(parser, "--states", "number of states", "N", type=int, default=512)
    _add(parser, "--prompts", "one prompt per line (default: a few requests)", "FILE")
    _add(parser, "--samples", "number of texts", "N", type=int, default=4096)
    _add(parser, "--length", "tokens per text", "N", type=int, default=32)
    _add(parser, "--seed", "seed (default: 0)", "N", type=int, default=0)
    _add_json(parser, out=True)
