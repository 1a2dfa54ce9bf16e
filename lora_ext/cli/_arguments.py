"""The commands and their arguments."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable
from typing import Any, NoReturn, get_args

import lora_ext
from lora_ext.adapter import KINDS, MergeMode

from . import _changes, _gpu_report, _guides, _reports, servers

_DESCRIPTION = """\
Look at LoRA adapters, merge them, resize them, prune them and compare them;
serve them; learn a guide for constraints on what a model writes.

An adapter is a folder as PEFT saves it, with adapter_config.json and
adapter_model.safetensors (or .bin). Nothing is downloaded, and only `prune`,
`serve` and `distil-guide` need a model."""

_EPILOG = """\
examples:
  lora-ext inspect pirate
  lora-ext merge pirate haiku --weights 0.7 0.3 --out both
  lora-ext resize both --rank 16 --out both-16
  lora-ext diff both both-16 --json | jq .distance

`lora-ext COMMAND --help` explains a command. What a command writes is there
whole, or not at all. The exit status is 0; 1 if doctor or gpu-report finds a
fault or inspect a value that is not finite; 2 on bad input, with one sentence
on standard error."""


_FOLDER = "folder of an adapter"


class _Help(argparse.RawDescriptionHelpFormatter):
    """Commands below their title, without a line for their placeholder."""

    def _format_action(self, action: argparse.Action) -> str:
        text = super()._format_action(action)
        if isinstance(action, argparse._SubParsersAction):
            text = textwrap.indent(textwrap.dedent(text.partition("\n")[2]), "  ")
        return text


class _Parser(argparse.ArgumentParser):
    """Bad arguments end in one sentence, not in the usage of a whole screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser; what it returns has ``command`` and ``run``, which takes it."""
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
    """An argument and its help, which says the default where there is a number or a word of it."""
    if more.get("default") and more.get("action") is None:
        text += " (default: %(default)s)"
    parser.add_argument(name, help=text, metavar=metavar, **more)


def _add_doctor(commands: Any) -> None:
    parser = _command(
        commands,
        "doctor",
        "say what is installed, and whether each device works",
        "The output is meant to be pasted into a bug report. The exit status is 1 if an\n"
        "op failed.",
        _reports.doctor,
    )
    _add_json(parser)


def _add_gpu_report(commands: Any) -> None:
    parser = _command(
        commands,
        "gpu-report",
        "check and time every kernel on this GPU, and write a report",
        "Compares every launcher with its formula, times it beside the time that its\n"
        "bytes alone take, and writes JSON and, beside it, a page to read. Compiles and\n"
        "installs nothing; the report has versions, card, clocks, hash of the kernels,\n"
        "errors and times, no names and no paths. The exit status is 1 if a check fails.",
        _gpu_report.gpu_report,
    )
    _add(parser, "--out", "the report, e.g. card.json", "FILE", required=True)
    _add(parser, "--minutes", "time for timing", "N", type=float, default=3.0)
    text = "emu: check on the emulator, where one was built; without times"
    _add(parser, "--backend", text, choices=("cuda", "emu"), default="cuda")
    _add(parser, "--only", "beginnings of names, with commas between", "OPS")


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "show the modules of an adapter: ranks, norms, bad values",
        "  norm  Frobenius norm of the update, scaling * B A\n"
        "  bad   how many values are NaN or infinite; nothing else is measured then, and\n"
        "        the exit status is 1\n\n"
        "The other columns are effective ranks: how many directions the update uses.",
        _reports.inspect,
    )
    _add(parser, "adapter", _FOLDER, "ADAPTER")
    text = f"effective ranks to show, out of {', '.join(KINDS)}"
    shown = "entropy stable threshold"
    _add(parser, "--kinds", text, "KIND", nargs="+", choices=KINDS, default=shown.split())
    text = "threshold of the kinds that count singular values"
    _add(parser, "--tau", text, "T", type=float, default=1e-2)
    _add_json(parser)


def _add_merge(commands: Any) -> None:
    parser = _command(
        commands,
        "merge",
        "make one adapter out of several of one base model",
        "The modes, with weights w and updates s B A:\n"
        "  delta      sum of w s B A, exactly; the ranks add up\n"
        "  delta_svd  the nearest to that of a smaller rank\n"
        "  factors    A and B summed each by itself; wants equal modules and ranks\n"
        "  ties       the mean of the largest values of each update that have the sign of\n"
        "             their sum (TIES), of a rank\n"
        "  dare       the sum of randomly kept, enlarged values of each update, of a rank",
        _changes.merge,
    )
    _add(parser, "adapters", _FOLDER, "ADAPTER", nargs="+")
    text = "one for each adapter (default: equal ones that sum to 1; for ties and dare 1)"
    _add(parser, "--weights", text, "W", nargs="+", type=_numbers)
    _add(parser, "--mode", "see above", choices=get_args(MergeMode), default="delta")
    text = "rank of delta_svd, ties, dare (default: the largest of the adapters')"
    _add(parser, "--rank", text, "N", type=int)
    text = "share of an update's values that ties and dare keep (default: 0.2 and 0.1)"
    _add(parser, "--density", text, "D", type=float)
    _add(parser, "--seed", "of dare (default: 0)", "N", type=int, default=0)
    _add_json(parser, out=True)


def _add_resize(commands: Any) -> None:
    parser = _command(
        commands,
        "resize",
        "give an adapter another rank, and say what that loses",
        "A smaller rank keeps the largest singular values of each update, the nearest\n"
        "that there is; `error` is the Frobenius norm of the change. A larger rank\n"
        "changes nothing, and is refused where no module gains from it: an update of I\n"
        "inputs and O outputs has rank min(I, O) at most.",
        _changes.resize,
    )
    _add(parser, "adapter", _FOLDER, "ADAPTER")
    _add(parser, "--rank", "of every module", "N", type=int, required=True)
    _add_json(parser, out=True)


_PRUNE_CHOICES = (  # option, what it may be, the default first, and help
    (
        "score",
        ("distance", "angle", "alignment"),
        "distance from the map of the update, which is mostly its size; the angle between them; "
        "or its cosine with what alignment did, below 0 where it undoes that",
    ),
    ("reference", ("population", "permutation", "released"), "what a distance is compared with"),
    ("granularity", ("module", "block"), "what a layer is"),
    ("projection", ("frobenius", "orthogonal"), "map onto the aligned directions"),
    (
        "on-zero-alignment",
        ("raise", "skip"),
        "a layer that both models have alike is an error, or is kept",
    ),
)


def _add_prune(commands: Any) -> None:
    parser = _command(
        commands,
        "prune",
        "take an adapter out of the layers that undo safety",
        "SPLoRA. Layers are scored by how far their update is from what alignment has\n"
        "changed: the difference between the weights of the aligned model, on which the\n"
        "adapter was trained, and those of its base. No data is needed, and one layer of\n"
        "the models is in memory at a time. With --project, Safe LoRA.",
        _changes.prune,
    )
    _add(parser, "adapter", _FOLDER, "ADAPTER")
    text = "folder of the base model, before alignment (safetensors)"
    _add(parser, "--base", text, "DIR", required=True)
    _add(parser, "--aligned", "folder of the aligned model", "DIR", required=True)
    amount = parser.add_mutually_exclusive_group(required=True)
    _add(amount, "--num", "prune K layers", "K", type=int)
    _add(amount, "--threshold", "prune by score: up to T, or from T on", "T", type=float)
    text = "which scores are pruned; what they mean depends on --score"
    _add(parser, "--direction", text, choices=("smallest", "largest"), required=True)
    for name, choices, text in _PRUNE_CHOICES:
        _add(parser, f"--{name}", text, choices=choices, default=choices[0])
    _add(parser, "--rank", "at most so many directions (orthogonal)", "Q", type=int)
    text = "only the directions with this share of the change (orthogonal)"
    _add(parser, "--energy", text, "E", type=float)
    text = "all scores are 0 where distances do not differ, instead of an error"
    parser.add_argument("--allow-degenerate", action="store_true", help=text)
    text = "project these layers onto the aligned directions instead (Safe LoRA)"
    parser.add_argument("--project", action="store_true", help=text)
    _add_json(parser, out=True)


def _add_diff(commands: Any) -> None:
    parser = _command(
        commands,
        "diff",
        "say how far two adapters of one base model are apart",
        "  distance  Frobenius norm of the difference of the updates\n"
        "  cosine    of the updates: 1 the same direction, 0 nothing in common\n"
        "  angles    principal angles between their column spaces, in degrees: the\n"
        "            smallest and the largest, and with --json all of them",
        _reports.diff,
    )
    _add(parser, "first", _FOLDER, "A")
    _add(parser, "second", _FOLDER, "B")
    _add_json(parser)


_SERVE_NUMBERS = (  # option, metavar, default and help
    ("port", "N", 8000, "0 is any that is free"),
    ("max-requests", "N", 64, "that wait or run; more are answered by 429"),
    ("max-rank", "N", 64, "of an adapter"),
    ("context", "N", 4096, "tokens of prompt and answer of a request"),
    ("max-body", "BYTES", 1 << 20, "of a request"),
)


def _add_serve(commands: Any) -> None:
    parser = _command(
        commands,
        "serve",
        "answer OpenAI's API over HTTP, where `model` names an adapter",
        "Chats and completions of a causal LM by continuous batching, or embeddings of an\n"
        "embedding model. An adapter is read at its first request. There is no\n"
        "authentication: serve the loopback, or stand behind a proxy. Ctrl-C stops it.",
        servers.serve,
    )
    _add(parser, "--model", "folder of the base model and its tokenizer", "DIR", required=True)
    _add(parser, "--adapters", "folder of all adapters' folders", "DIR", required=True)
    parser.add_argument("--host", default="127.0.0.1", help="(default: %(default)s)")
    for name, metavar, default, text in _SERVE_NUMBERS:
        _add(parser, f"--{name}", text, metavar, type=int, default=default)
    _add(parser, "--device", "as torch calls it (default: cuda where there is one)", "NAME")
    text = (
        "keep no packed copy of the base, which makes decoding on a CPU faster; it is kept "
        "where it takes at most a quarter of the memory that is free"
    )
    parser.add_argument("--no-pack", action="store_false", dest="pack", help=text)
    text = "let scripts of this origin's web pages ask; may be given again"
    _add(parser, "--allow-origin", text, "URL", action="append", default=[], dest="origins")


def _add_json(parser: argparse.ArgumentParser, out: bool = False) -> None:
    """Add ``--json``, and before it ``--out`` to a command that writes a folder."""
    if out:
        text = "folder to write; an adapter that is there is replaced"
        _add(parser, "--out", text, "DIR", required=True)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _numbers(text: str) -> list[float]:
    """Numbers with commas between them, or one."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers, found {text!r}") from None


def _add_distil_guide(commands: Any) -> None:
    parser = _command(
        commands,
        "distil-guide",
        "learn a guide, by which constraints look ahead, from what a model writes",
        "Writes DIR/guide.safetensors for lora_ext.control.Guide.load, with the head that reads\n"
        "the guide's state off the model. The measures are nats a token on texts that were\n"
        "held out: of the guide, of the model itself, and of the guide behind its head.",
        _guides.distil_guide,
    )
    _add(parser, "model", "folder of a causal LM and its tokenizer", "MODEL")
    _add(parser, "--states", "states", "N", type=int, default=512)
    _add(parser, "--prompts", "a prompt a line (default: a few plain requests)", "FILE")
    _add(parser, "--samples", "texts", "N", type=int, default=4096)
    _add(parser, "--length", "tokens of each", "N", type=int, default=32)
    _add(parser, "--seed", "(default: 0)", "N", type=int, default=0)
    _add_json(parser, out=True)
