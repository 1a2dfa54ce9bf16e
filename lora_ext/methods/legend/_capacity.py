"""Estimates of each device's speed from its reports, simulated durations of rounds, and the mean
time that devices wait for the slowest device."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import Tensor

from lora_ext._checks import check_fields, number, require, within
from lora_ext.federated import PATTERN, Client, LayerPlan, check_layers, layer_pairs, plan_bytes

_log = logging.getLogger(__name__)

#: Weight of a device's previous ratio f / mu (see `Estimate`), relative to a report's weight of 1.
#: The ratio is needed if all reports have the same depth; otherwise this weight is negligible.
_RATIO_WEIGHT = 1e-3

#: Bounds of settings that are also fields of :class:`LegendConfig`.
BOUNDS = {
    "rho": within(0, below=1),
    "forgetting": within(above=0, maximum=1),
    "cooldown": within(1),
}


class CapacityReport(NamedTuple):
    """Report of a device on one round, not yet checked. The device measures the durations."""

    device: Client
    depth: int  # k, number of trained layers
    train_time: float  # seconds
    down_time: float  # seconds to download the planned layers
    bytes: float  # size of the planned layers, in one direction
    up_time: float | None = None  # seconds to upload these layers; None means down_time


class Estimate(NamedTuple):
    """Parameters of a device's time model: a round with k trained layers, which have ``U(k)``
    bytes, takes ``T(k) = f + k mu + beta U(k)`` seconds.

    The values are checked by the functions that use them.
    """

    f: float  # seconds without any trained layer
    mu: float  # seconds per trained layer
    beta: float  # seconds per byte for both directions together
    trusted: bool = True  # False if the device's latest reports were invalid


@dataclass(eq=False, repr=False)
class CapacityTracker:
    """Estimates of the devices' speeds (:class:`Estimate`), updated by the devices' reports.

    A report updates beta to ``rho beta + (1 - rho) observed``. f and mu are fitted to the training
    times ``f + k mu`` of all reports by weighted least squares: a report has ``forgetting`` times
    the weight of the next report. If all reports of a device have the same depth k, f / mu keeps
    its previous value. The initial value is L / 2, since f contains the forward of L layers, and
    the backward of a layer takes about as long as two of its forwards.

    If a report has the same depth as the previous one, but a training time above twice or below
    half of the estimate, the device is assumed to have become slower or faster. The times of all
    earlier reports are then multiplied by the ratio of the reported to the estimated time. This is
    our choice: a line fitted to reports of different speeds has a meaningless slope.

    A report is invalid if a duration or the size is not finite, not above 0, or too large, or if
    the depth is outside [1, L]. Invalid reports are counted and change no estimate.

    Args:
        L: Number of layers.
        rho: Weight of the old value of beta.
        forgetting: lambda, factor by which the weight of a report decreases with each later report.
        outlier: Largest accepted factor between a reported and an estimated value. A report with a
            larger factor is ignored. If the factor of the next report is also too large, all
            earlier reports are discarded, and the new one is used.
        most_seconds: Largest valid duration in seconds.
        max_bad: Number of consecutive invalid reports after which a device is not trusted.
        max_timeouts: Number of consecutive timeouts after which a device is paused: it must not be
            selected.
        cooldown: Number of rounds for which a device is paused.
        prior: Known f, mu and beta by device. The values of a device are used as two reports, with
            depths L and ``ceil(L / 2)``.

    Attributes:
        dropped: Number of invalid reports, by device.
        ignored: Number of ignored outliers, by device.

    Raises:
        ValueError: If a setting is out of range.
        TypeError: If L is not an int, or another setting has the wrong type.

    Source: LEGEND (arXiv 2412.20004): capacity estimation on the server. The method is our choice.
    """

    L: int
    _: KW_ONLY
    rho: float = 0.8
    forgetting: float = 0.9
    outlier: float = 20.0
    most_seconds: float = 1e6
    max_bad: int = 3
    max_timeouts: int = 3
    cooldown: int = 5
    prior: Mapping[Client, Estimate] | None = None

    def __post_init__(self) -> None:
        table = {
            **BOUNDS,
            **dict.fromkeys(("L", "max_bad", "max_timeouts"), within(1)),
            "outlier": within(above=1, maximum=math.inf),
            "most_seconds": within(above=0, maximum=math.inf),
        }
        check_fields(self, table)
        self.dropped: Counter[Client] = Counter()
        self.ignored: Counter[Client] = Counter()
        self._devices: dict[Client, _Device] = {}
        for device, speeds in (self.prior or {}).items():
            check_estimate("CapacityTracker", f"prior[{device!r}]", speeds)
            state = self._device(device)
            if speeds.f + speeds.mu > 0:
                state.ratio_f, state.ratio_mu = float(speeds.f), float(speeds.mu)
            for depth in (self.L, -(-self.L // 2)):
                state.add(depth, speeds.f + depth * speeds.mu, 1.0)
            state.beta = float(speeds.beta)

    def __contains__(self, device: object) -> bool:
        """Return whether there is an estimate for the device."""
        return device in self._devices and self._devices[device].count > 0  # pyright: ignore

    def update(self, report: CapacityReport) -> bool:
        """Update the estimate of a device with its report, in which NaN stands for a missing value.

        Returns:
            Whether the estimate was updated.
        """
        state = self._device(report.device)
        up_time = report.down_time if report.up_time is None else report.up_time
        if not self._is_measurement(report._replace(up_time=up_time)):
            state.bad += 1
            self.dropped[report.device] += 1
            _log.warning("CapacityTracker: dropped an invalid report: %s", report)
            return False
        # JSON cannot store NumPy's numbers, so they are converted to Python's.
        depth, seconds = int(report.depth), float(report.train_time)
        beta = (float(report.down_time) + float(up_time)) / float(report.bytes)
        state.bad = state.timeouts = 0
        pairs = [(seconds, state.train_time(depth))] if state.count else []
        pairs += [] if state.beta is None else [(beta, state.beta)]
        most = self.outlier
        if any(not known / most <= found <= known * most for found, known in pairs):
            if not state.off:
                state.off = True
                self.ignored[report.device] += 1
                _log.info("CapacityTracker: ignored an outlier: %s", report)
                return False
            state.forget()
        state.off = False
        expected = state.train_time(depth)
        change = seconds / expected if expected > 0 else 1.0
        if depth == state.last and not 0.5 <= change <= 2:
            state.rescale(change)
        state.add(depth, seconds, self.forgetting)
        before = beta if state.beta is None else state.beta
        state.beta = self.rho * before + (1 - self.rho) * beta
        return True

    def update_timeout(
        self, device: Client, depth: int, seconds: float, round: int | None = None
    ) -> None:
        """Record that a device did not reply in time, as if it had trained for ``seconds``.

        If ``seconds`` exceeds the estimated training time, f and mu are multiplied by the ratio of
        the two times. A smaller value changes nothing. Without an estimate, ``seconds`` is used as
        a report.

        Args:
            device: Name of the device.
            depth: k, depth of the device's plan.
            seconds: Time that the server waited (the deadline).
            round: Number of the round. If None, the device is not paused after this timeout.

        Raises:
            ValueError: If the depth is outside [1, L], or the seconds are not finite and above 0.
        """
        where = "CapacityTracker.update_timeout"
        require(1 <= depth <= self.L, where, "depth", f"a number in [1, {self.L}]", depth)
        proper = math.isfinite(seconds) and seconds > 0
        require(proper, where, "seconds", "a finite number above 0", seconds)
        state = self._device(device)
        state.timeouts += 1
        expected = state.train_time(depth)
        if not expected:
            state.add(depth, seconds, self.forgetting)
        elif expected < seconds:
            state.rescale(seconds / expected)
        if state.timeouts >= self.max_timeouts and round is not None:
            state.timeouts = 0
            state.rests_until = round + self.cooldown
            _log.warning("%s: %r is paused until round %d", where, device, state.rests_until)

    def rests(self, device: Client, round: int) -> bool:
        """Return whether ``device`` must not be selected in ``round`` because of too many
        consecutive timeouts."""
        return device in self._devices and round <= self._devices[device].rests_until

    def trusted(self, device: Client) -> bool:
        """Return whether ``device`` has sent fewer than ``max_bad`` invalid reports since its last
        valid one."""
        return device not in self._devices or self._devices[device].bad < self.max_bad

    def estimate(self, device: Client) -> Estimate:
        """Return f, mu and beta of a device, each at least 0.

        Raises:
            KeyError: If there is no estimate for the device.
        """
        where = "CapacityTracker.estimate"
        require(device in self, where, "device", "a device with reports", repr(device), KeyError)
        state = self._devices[device]
        return Estimate(*state.solved(), state.beta or 0.0, self.trusted(device))

    def repeats(self, device: Client, depth: int) -> int:
        """Return the number of consecutive reports, up to the latest, in which ``device`` had this
        ``depth``."""
        state = self._devices.get(device)
        return state.repeats if state is not None and state.last == depth else 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all devices as a dictionary that JSON can store."""
        return {
            "devices": [[d, asdict(state)] for d, state in self._devices.items()],
            "dropped": [list(entry) for entry in self.dropped.items()],
            "ignored": [list(entry) for entry in self.ignored.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state returned by :meth:`state_dict`.

        Raises:
            KeyError, TypeError: If the state has the wrong form. Nothing is changed in this case.
        """
        devices = {device: _Device(**values) for device, values in state["devices"]}
        dropped, ignored = (Counter(dict(state[key])) for key in ("dropped", "ignored"))
        self._devices, self.dropped, self.ignored = devices, dropped, ignored

    def _is_measurement(self, report: CapacityReport) -> bool:
        numbers: list[Any] = [*report[1:]]
        if any(isinstance(v, bool) or not isinstance(v, Real) for v in numbers):
            return False
        depth, *durations, size, up_time = numbers
        whole = isinstance(depth, Integral) and 1 <= int(depth) <= self.L
        timed = all(0 < value <= self.most_seconds for value in (*durations, up_time))
        return whole and timed and 0 < size < math.inf

    def _device(self, device: Client) -> _Device:
        if device not in self._devices:
            self._devices[device] = _Device(ratio_f=float(self.L))
        return self._devices[device]


@dataclass
class _Device:
    """State of one device: weighted sums over its reports, which the least squares fit needs, and
    counters."""

    ratio_f: float
    ratio_mu: float = 2.0  # a layer's backward takes about as long as two of its forwards
    beta: float | None = None
    count: float = 0.0  # sum of the weights
    k: float = 0.0  # weighted sum of depths
    kk: float = 0.0  # weighted sum of squared depths
    t: float = 0.0  # weighted sum of training times
    kt: float = 0.0  # weighted sum of the products of depth and training time
    last: int = 0  # depth of the latest report
    repeats: int = 0  # number of consecutive reports of that depth
    bad: int = 0  # number of invalid reports since the last valid one
    off: bool = False  # True if the latest valid report was an outlier
    timeouts: int = 0
    rests_until: int = -1

    def add(self, depth: int, seconds: float, forgetting: float) -> None:
        self.count = forgetting * self.count + 1
        self.k = forgetting * self.k + depth
        self.kk = forgetting * self.kk + depth**2
        self.t = forgetting * self.t + seconds
        self.kt = forgetting * self.kt + depth * seconds
        self.repeats = self.repeats + 1 if depth == self.last else 1
        self.last = depth

    def rescale(self, factor: float) -> None:
        """Multiply the training times of all reports so far by ``factor``."""
        self.t *= factor
        self.kt *= factor

    def forget(self) -> None:
        """Discard all reports, but keep the ratio f / mu."""
        f, mu = self.solved()
        if f + mu > 0:
            self.ratio_f, self.ratio_mu = f, mu
        self.beta = None
        self.count = self.k = self.kk = self.t = self.kt = 0.0

    def solved(self) -> tuple[float, float]:
        """Return f and mu of the least squares fit, each at least 0."""
        if not self.count:
            return 0.0, 0.0
        # The previous ratio adds the equation (ratio_mu f - ratio_f mu) / norm = 0 with a small
        # weight, so that the system is never singular.
        weight = _RATIO_WEIGHT / (self.ratio_f**2 + self.ratio_mu**2)
        ff = self.count + weight * self.ratio_mu**2
        fm = self.k - weight * self.ratio_f * self.ratio_mu
        mm = self.kk + weight * self.ratio_f**2
        determinant = ff * mm - fm**2
        f = (mm * self.t - fm * self.kt) / determinant
        mu = (ff * self.kt - fm * self.t) / determinant
        if f < 0:
            return 0.0, max(0.0, self.kt / mm)
        if mu < 0:
            return max(0.0, self.t / ff), 0.0
        return f, mu

    def train_time(self, depth: int) -> float:
        f, mu = self.solved()
        return f + depth * mu


def check_estimate(where: str, name: str, estimate: Estimate) -> None:
    """Raise ValueError unless ``f``, ``mu`` and ``beta`` are finite and at least 0."""
    for part, value in zip(("f", "mu", "beta"), estimate[:3], strict=True):
        number(where, f"{name}.{part}", value, 0)


def waiting_time(times: Iterable[float] | Mapping[Any, float]) -> float:
    """Return ``W = mean_i(max_j T_j - T_i)``, the mean time that devices wait for the slowest.

    Args:
        times: Seconds that each device needs for the round; of a mapping, the values are used.

    Returns:
        Seconds, exactly 0 if all times are equal.

    Raises:
        ValueError: If there are no times, or one is negative or not finite.

    Source: LEGEND (arXiv 2412.20004), which aims to let devices finish together.
    """
    found = list(times.values() if isinstance(times, Mapping) else times)
    require(bool(found), "waiting_time", "times", "at least one time", "none")
    for value in found:
        real = math.isfinite(value) and value >= 0
        require(real, "waiting_time", "times", "finite seconds >= 0", value)
    longest = max(found)
    return math.fsum(longest - value for value in found) / len(found)


class RoundTime(NamedTuple):
    """Duration of a simulated round, the result of :meth:`SimulatedClock.advance`."""

    times: dict[Client, float]  # seconds of each device
    seconds: float  # seconds of the slowest device
    waiting: float  # W, in seconds


@dataclass(eq=False, repr=False)
class SimulatedClock:
    """Clock that simulates the durations of rounds from known speeds of the devices.

    A device needs ``T = f + d mu + beta (down + up) / 2`` seconds. ``up`` is the number of bytes of
    the planned layers. ``down`` is the same number, or with ``send_frozen`` the bytes of all
    layers. d is the number of layers that the backward pass runs through, from the output to the
    lowest planned layer. If the last k layers are planned, d is k.

    Args:
        speeds: f, mu and beta by device, see :class:`Estimate`.
        state: Global adapter; only the sizes of its tensors are used.
        pattern: Regular expression for the layer's index in a name.
        send_frozen: Whether devices also receive the layers that they do not train.

    Attributes:
        seconds: Sum of the durations of all rounds so far.

    Raises:
        ValueError: If the state has no layers.
    """

    speeds: Mapping[Client, Estimate]
    state: Mapping[str, Tensor]
    pattern: str = PATTERN
    send_frozen: bool = False
    seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        pairs = layer_pairs("SimulatedClock: state", self.state, self.pattern)
        self.L = check_layers("SimulatedClock", {pair.layer for pair in pairs})
        self.speeds = dict(self.speeds)

    def report(self, device: Client, plan: LayerPlan) -> CapacityReport:
        """Return the report that ``device`` would send after a round with ``plan``. Its durations
        in seconds are computed from the device's speeds."""
        f, mu, beta = self.speeds[device][:3]
        up = plan_bytes(self.state, plan, self.pattern)
        whole = LayerPlan(tuple(range(self.L)))
        down = plan_bytes(self.state, whole, self.pattern) if self.send_frozen else up
        reach = self.L - plan.layers[0] if plan.layers else 0
        figures = f + reach * mu, beta * down / 2, up, beta * up / 2
        return CapacityReport(device, len(plan.layers), *figures)

    def advance(self, plans: Mapping[Client, LayerPlan]) -> RoundTime:
        """Simulate a round, in which the devices train in parallel. The round ends when the slowest
        device is finished, and its duration is added to :attr:`seconds`.

        Args:
            plans: Plan of each device.

        Returns:
            Seconds of the round and of each device, and the mean waiting time.
        """
        times: dict[Client, float] = {}
        for device, plan in plans.items():
            report = self.report(device, plan)
            times[device] = report.train_time + report.down_time + (report.up_time or 0.0)
        seconds = max(times.values(), default=0.0)
        self.seconds += seconds
        return RoundTime(times, seconds, waiting_time(times) if times else 0.0)
