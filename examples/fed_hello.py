"""Train MiniLM with Fed-HeLLo on twelve clients that can train 3, 4 or 6 blocks.

The clients learn which of the twenty sections of Debian's packages a text belongs to; each client
has texts of four sections. Fed-HeLLo gives every client as many blocks as it can train, and all
clients train in one batch on one base model. A second run trains the strong clients alone. The
example takes two minutes on two cores: `python examples/fed_hello.py`, if the packages that
benchmarks/claims/material.py names are installed. `--quick` uses a tiny random model; it takes
seconds and only checks that the code runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import numpy as np
from claims import section_texts
from federated_digits import Plans, Run, federate
from federated_pictures import draw_accuracy, draw_bytes, draw_heights
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lora_ext.methods.fed_hello import HLA

OUT = Path(__file__).resolve().parents[1] / "out" / "fed_hello"
console = Console()


def main() -> None:
    """Train both federations, print a table and draw the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="check the code in seconds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    sizes = section_texts.QUICK if args.quick else section_texts.EXAMPLE
    world = section_texts.make_world(0, sizes, args.quick)
    shares = world.shares("4 classes")
    hla = HLA("bottleneck", sizes.blocks, kind="rgd", seed=0)
    console.print(f"{hla!r}", soft_wrap=True)

    def planner(round: int, drawn: list[int]) -> Plans:
        return {client: hla.plan(round, client, sizes.capability(client)) for client in drawn}

    strong = [c for c in range(sizes.clients) if sizes.capability(c) == sizes.blocks]
    runs: dict[str, Run] = {}
    with tqdm(total=2 * sizes.rounds, unit="round") as bar:
        for name, clients in (("all, as they can", None), ("strong clients alone", strong)):
            bar.set_description(name)
            runs[name] = federate(world, shares, planner, clients=clients, tick=bar.update)
    tell(runs, shares, world.training[1].numpy(), strong)
    console.print(f"picture: {draw(runs, args.out / 'fed_hello.png')}", soft_wrap=True)


def tell(
    runs: Mapping[str, Run], shares: list[np.ndarray], labels: np.ndarray, strong: list[int]
) -> None:
    """Print how many sections the strong clients have, and a table of both runs."""
    seen = {int(label) for client in strong for label in labels[shares[client]]}
    console.print(f"sections that some strong client has: {len(seen)} of {section_texts.CLASSES}")
    table = Table("clients", "best accuracy", "last", "MB sent", "share of all layers' bytes")
    for name, run in runs.items():
        up = run.comm.total("up")
        numbers = f"{run.best:.3f}", f"{run.accuracy[-1]:.3f}", f"{up / 1e6:.2f}"
        table.add_row(name, *numbers, f"{up / (run.comm.total('full') / 2):.2f}")
    console.print(table)


def draw(runs: Mapping[str, Run], path: Path) -> Path:
    """Draw accuracy, clients per layer and sent bytes over the rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    draw_accuracy({name: run.accuracy for name, run in runs.items()}, axes[0])
    first = next(iter(runs.values()))
    draw_heights([log.heights for log in first.history], axes[1])
    sent = {name: [*run.comm.cumulative("up").values()] for name, run in runs.items()}
    draw_bytes(sent, axes[2])
    for axis, title in zip(axes, ("accuracy", "clients per layer", "bytes uploaded"), strict=True):
        axis.set_title(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
