"""Pictures of depths over rounds, and of the times in one round; by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lora_ext.federated import Client, LayerPlan

from .configurator import Configuration


def draw_depths(
    rounds: Sequence[Mapping[Client, LayerPlan]], num_layers: int, axes: Any = None
) -> Any:
    """Draw how many layers each device trained in each round; empty where it was not asked.

    Args:
        rounds: the plans by device, one mapping a round. num_layers: L.
        axes: matplotlib axes, or None for new ones.

    Returns:
        The axes.
    """
    axes = _axes(axes)
    devices = sorted({d for plans in rounds for d in plans}, key=lambda d: (isinstance(d, str), d))
    nothing = float("nan")
    values = [
        [len(plans[device].layers) if device in plans else nothing for plans in rounds]
        for device in devices
    ]
    image = axes.imshow(
        values,
        cmap="cividis",
        aspect="auto",
        vmin=0,
        vmax=num_layers,
        extent=(0.5, len(rounds) + 0.5, len(devices) - 0.5, -0.5),
    )
    axes.figure.colorbar(image, ax=axes, label="layers trained")
    axes.set_yticks(range(len(devices)), [str(device) for device in devices])
    axes.set(xlabel="round", ylabel="device")
    return axes


def draw_times(configuration: Configuration, axes: Any = None) -> Any:
    """Draw the predicted time of each device of a round as a bar with its depth in it, what it
    waits on top, and the target as a line.

    Args:
        configuration: of :meth:`LegendConfigurator.configure`.
        axes: matplotlib axes, or None for new ones.

    Returns:
        The axes.
    """
    axes = _axes(axes)
    times = list(configuration.times.values())
    places = range(len(times))
    waits = [configuration.seconds - value for value in times]
    bars = axes.bar(places, times, color="#0072B2", label="trains (so many layers) and sends")
    depths = [str(depth) for depth in configuration.depths.values()]
    axes.bar_label(bars, depths, label_type="center", color="white")
    axes.bar(places, waits, bottom=times, color="0.85", label="waits")
    axes.axhline(configuration.target, color="#D55E00", label="target")
    axes.set_xticks(places, [str(device) for device in configuration])
    axes.set(xlabel="device", ylabel="seconds", ylim=(0, 1.35 * configuration.seconds))
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _axes(axes: Any) -> Any:
    if axes is not None:
        return axes
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained")[1]
