"""One circuit for ten digits: train it, draw from it, mend what is missing, tell classes apart.

scikit-learn's digits, 8 x 8 pixels of 17 greys. Each class is a root of the circuit, above a tree
of latents that follows the class's own data. EM over mini-batches; half a minute on two cores:
`python examples/circuits_digits.py`; `--quick` shows nothing but that it works. Needs scikit-learn,
matplotlib and tqdm; pictures in out/circuits_digits/.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from lora_ext.circuits import Binomial, Circuit, RegionGraph, chow_liu_parents, train_em

OUT = Path(__file__).resolve().parents[1] / "out" / "circuits_digits"
GREYS, SIDE, HELD_OUT = 17, 8, 360


def main() -> None:
    """Train, sample, mend, classify."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of half a minute")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    digits = load_digits()
    order = torch.randperm(len(digits.data))
    x, label = torch.tensor(digits.data).long()[order], torch.tensor(digits.target)[order]
    train, test = TensorDataset(x[HELD_OUT:], label[HELD_OUT:]), (x[:HELD_OUT], label[:HELD_OUT])

    circuit = Circuit(
        RegionGraph.join([tree(x[HELD_OUT:][label[HELD_OUT:] == c]) for c in range(10)])
    )
    history = train_em(
        circuit,
        DataLoader(train, batch_size=100, shuffle=True),
        epochs=1 if args.quick else 12,
        held_out=test,
        progress=partial(tqdm, unit="batch"),
    )
    nats = -(history[-1].held_out or 0)
    print(f"held out: {nats:.1f} nats an image, {nats / SIDE**2:.2f} a pixel")

    posterior = circuit.log_prob(test[0]).softmax(1)  # classes are equally frequent
    right = (posterior.argmax(1) == test[1]).double().mean()
    print(f"classes of {HELD_OUT} held-out images, told by the roots: {right:.1%} right")

    samples = circuit.sample(10, root=torch.arange(10)).transpose(0, 1).flatten(0, 1)
    picture(samples, args.out / "samples.png", "samples, one column a class")
    mend(circuit, *(t[:10] for t in test), args.out / "mended.png")
    print(f"pictures in {args.out}")


def tree(x: Tensor) -> RegionGraph:
    """A tree of latents with four states, over the pixels of one class."""
    return RegionGraph.hclt(chow_liu_parents(x // 4, 5), rank=4, leaf=Binomial(GREYS - 1))


def mend(circuit: Circuit, x: Tensor, label: Tensor, path: Path) -> None:
    """Take the lower half away; show the mean of what it may be, and three samples of it."""
    evidence = x.clone()
    evidence[:, SIDE * SIDE // 2 :] = -1
    root = circuit.log_prob(evidence).argmax(1)  # the class that the upper half suggests
    mean = circuit.univariate_marginals(evidence, root=root).mean
    drawn = circuit.sample(3, evidence, root=root).transpose(0, 1)
    told = (root == label).sum()
    title = f"images, upper halves, their means, three samples; {told} of {len(x)} classes told"
    picture(torch.cat([x, evidence, mean, *drawn]), path, title)


def picture(images: Tensor, path: Path, title: str) -> None:
    """Images in rows of ten; what is missing is blue."""
    grid = images.double().view(-1, 10, SIDE, SIDE)
    grid = torch.nn.functional.pad(grid, (0, 1, 0, 1), value=4)
    figure = Figure(figsize=(grid.shape[1] * 0.8, grid.shape[0] * 0.8 + 0.4))
    axes = figure.subplots()
    colours = colormaps["gray_r"].with_extremes(under="lightsteelblue")
    pixels = grid.transpose(1, 2).flatten(0, 1).flatten(1).numpy()
    axes.imshow(pixels, cmap=colours, vmin=0, vmax=GREYS - 1)
    axes.set_title(title, fontsize=9)
    axes.axis("off")
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
