"""Train MiniLM with LEGEND on Flower, on twelve devices of three speeds.

The devices learn which of the twenty sections of Debian's packages a text belongs to. LEGEND
estimates their speeds from their reports. Each device trains as many of the last blocks as it can
in the time of the fastest device. In the middle of the run, one fast device is five times slower
for a few rounds. Seconds are simulated, and all devices run in this process. The example takes two
minutes on two cores: `python examples/legend.py`, if `.[fed,bench]` and the packages in
benchmarks/claims/material.py are installed. `--quick` trains a tiny random model for a few rounds
and only checks that the code runs.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import matplotlib
import torch
from claims import section_texts
from federated_digits import accuracy, client_spec, shared_state
from matplotlib import pyplot
from tqdm import tqdm

from lora_ext.federated import Client, LayerPlan, LoraLayerManager
from lora_ext.federated.flower import LocalGrid, from_arrays, make_client_app, to_arrays
from lora_ext.federated.flower._client import adamw
from lora_ext.methods.legend import Configuration, Estimate, LegendConfig, SimulatedClock
from lora_ext.methods.legend._flower import Legend

matplotlib.use("Agg")
OUT = Path(__file__).resolve().parents[1] / "out" / "legend"
SPEEDS = (Estimate(1.0, 0.2, 4e-6), Estimate(1.3, 0.3, 1e-5), Estimate(1.8, 0.5, 2e-5))
SLOW = range(8, 13)  # rounds in which device 0 is five times as slow


def main() -> None:
    """Train the devices, print their estimates, and draw depths and times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="check the code in a few rounds")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    sizes, rounds = (section_texts.QUICK, 3) if args.quick else (section_texts.EXAMPLE, 20)
    world = section_texts.make_world(0, sizes, args.quick)
    shares = world.shares("iid")
    config = LegendConfig(total=21, mode="balanced", k_min=2)
    ranks = config.ranks(sizes.blocks)
    manager = LoraLayerManager(world.adapted(ranks))
    state, head = manager.state_slice(), shared_state(world, manager.model)
    speeds = {device: SPEEDS[3 * device // sizes.clients] for device in range(sizes.clients)}
    clock = SimulatedClock(speeds, state)

    def batches(device: int) -> list[Any]:
        return list(client_spec(world, shares[device], device, round=0).batches)

    def train(model: Any, data: list[Any], settings: Any) -> dict[str, float]:
        device, round = int(settings["client"]), int(settings["server-round"])
        found = clock.report(device, LayerPlan(tuple(settings["layers"])))
        factor = 5 if device == 0 and round in SLOW else 1
        times = {"train-time-s": factor * found.train_time, "down-time-s": found.down_time}
        return {**adamw(model, data, settings), **times}

    bar = tqdm(total=rounds, desc="federate", unit="round")
    strategy = Legend(config, shared=tuple(head))

    def evaluate(round: int, arrays: Any) -> None:
        found = from_arrays(arrays)
        manager.load_slice({name: found[name] for name in state})
        with torch.no_grad():
            for name in head:
                manager.model.get_parameter(name).copy_(found[name])
        if round:
            bar.update()
            bar.set_postfix(accuracy=f"{accuracy(manager.model, world.testing):.3f}")

    app = make_client_app(lambda: world.adapted(ranks), batches, train)
    grid = LocalGrid(app, sizes.clients)
    strategy.start(grid, to_arrays(state | head), rounds, evaluate_fn=evaluate)
    bar.close()
    last = strategy.allocator.last
    print(f"ranks from input to output: {ranks}")
    for device, depth in last.depths.items():
        speed, time = strategy.allocator.tracker.estimate(device), last.times[device]
        print(f"device {device:2}: f {speed.f:.2f} s, mu {speed.mu:.2f} s, k {depth}, {time:.2f} s")
    print(f"bytes: {strategy.comm.share:.0%} of all layers on all devices")
    print(f"picture: {draw(strategy, sizes.blocks, args.out / 'legend.png')}")


def draw(strategy: Legend, layers: int, path: Path) -> Path:
    """Draw the depths over the rounds, and the times of the last round."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    draw_depths([log.plans for log in strategy.history], layers, left)
    draw_times(strategy.allocator.last, right)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def draw_depths(rounds: Sequence[Mapping[Client, LayerPlan]], layers: int, axes: Any) -> None:
    """Draw the number of layers of each device and round; rounds without the device stay empty."""
    devices = sorted({d for plans in rounds for d in plans}, key=lambda d: (isinstance(d, str), d))
    depths = [
        [len(plans[device].layers) if device in plans else float("nan") for plans in rounds]
        for device in devices
    ]
    extent = (0.5, len(rounds) + 0.5, len(devices) - 0.5, -0.5)
    image = axes.imshow(depths, cmap="cividis", aspect="auto", vmin=0, vmax=layers, extent=extent)
    axes.figure.colorbar(image, ax=axes, label="layers trained")
    axes.set_yticks(range(len(devices)), [str(device) for device in devices])
    axes.set(xlabel="round", ylabel="device")


def draw_times(configuration: Configuration, axes: Any) -> None:
    """Draw each device's predicted time at its depth, its waiting time, and the target."""
    times = list(configuration.times.values())
    places = range(len(times))
    waits = [configuration.seconds - value for value in times]
    bars = axes.bar(places, times, color="#0072B2", label="trains (number of layers) and sends")
    depths = [str(depth) for depth in configuration.depths.values()]
    axes.bar_label(bars, depths, label_type="center", color="white")
    axes.bar(places, waits, bottom=times, color="0.85", label="waits")
    axes.axhline(configuration.target, color="#D55E00", label="target")
    axes.set_xticks(places, [str(device) for device in configuration])
    axes.set(xlabel="device", ylabel="seconds", ylim=(0, 1.35 * configuration.seconds))
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
