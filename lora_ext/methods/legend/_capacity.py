"""How fast each device is, from what it reports of its rounds."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

from lora_ext._checks import check_fields, number, require, within
from lora_ext.federated import Client

_log = logging.getLogger(__name__)

#: Weight of the ratio f : mu of before, against one report of weight 1. It decides where all
#: reports are of one depth, and is next to nothing where they are not.
_RATIO_WEIGHT = 1e-3


class CapacityReport(NamedTuple):
    """What a device says of one round, which nobody has checked. Every duration is measured by one
    clock, the device's."""

    device: Client
    depth: int  # k, how many layers it trained
    train_time: float  # seconds
    down_time: float  # seconds that the download of the slice took
    bytes: float  # of the slice one way
    up_time: float | None = None  # where it is known; else as long as the download


class Estimate(NamedTuple):
    """The time model of a device: ``T(k) = f + k mu + beta U(k)`` seconds.

    Nothing is checked here: what plans with an estimate refuses one that is out of range.
    """

    f: float  # seconds without any trained layer
    mu: float  # seconds for each trained layer
    beta: float  # seconds for each byte of the slice, both directions together
    trusted: bool = True  # False: its latest reports were no measurements


@dataclass(eq=False, repr=False)
class CapacityTracker:
    """Estimates of the devices' speeds, kept up to date by their reports.

    ``beta`` is smoothed, ``rho beta + (1 - rho) observed``. ``(f, mu)`` is the least squares fit of
    ``f + k mu`` to the training times, each report weighing ``forgetting`` times the next. The
    depths of one device may all be equal: then its f : mu stays, at first L : 2 (a backward costs
    two forwards).

    A training time over twice or under half of what the depth of the report before took tells of
    another speed of the whole device: what was reported before counts as if it had been so at that
    speed. This is our choice: the slope of a line through old reports of one speed and new ones of
    another means nothing.

    Args:
        L: number of layers.
        rho: weight of the old value. forgetting: lambda of the least squares.
        outlier: a report so many times off is ignored once; a second one in a row is a real
            change, and all reports of before are forgotten.
        most_seconds: what no duration is above; a report with more is no measurement.
        max_bad: after so many reports in a row that are none, a device is not trusted.
        max_timeouts: after so many timeouts in a row a device rests. cooldown: for so many rounds.
        prior: by device the speeds that are known beforehand; they count as one report of each of
            the depths L and ``ceil(L / 2)``.

    Attributes:
        dropped: by device how many reports were no measurements. ignored: how many were outliers.

    Raises:
        ValueError: a setting out of range. TypeError: an L that is no int.

    Source: LEGEND (arXiv 2412.20004): capacity estimation on the server. How it is done here is our
        choice.
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
            **dict.fromkeys(("L", "max_bad", "max_timeouts", "cooldown"), within(1)),
            "rho": within(0, below=1),
            "forgetting": within(above=0, maximum=1),
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
        """Whether there is an estimate of the device."""
        return device in self._devices and self._devices[device].count > 0  # pyright: ignore

    def update(self, report: CapacityReport) -> bool:
        """Take a report in.

        One that is no measurement (a duration or size that is not finite, not above 0, or absurdly
        large; a depth outside [1, L]) changes no estimate, and is counted. Missing figures are
        given as NaN.

        Returns:
            whether the estimate has taken it in.
        """
        state = self._device(report.device)
        up_time = report.down_time if report.up_time is None else report.up_time
        if not self._is_measurement(report._replace(up_time=up_time)):
            state.bad += 1
            self.dropped[report.device] += 1
            _log.warning("CapacityTracker: no measurement, dropped: %s", report)
            return False
        # Python's own numbers, which JSON holds.
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
                _log.info("CapacityTracker: far off, ignored once: %s", report)
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
        """A device did not reply in time: it counts as if it had trained for ``seconds``.

        That is pessimistic: the whole estimate gets slower by as much, and never faster.

        Args:
            depth: k, of its plan. seconds: the deadline.
            round: in which it was; without it no rest begins.

        Raises:
            ValueError: a depth outside [1, L], or seconds that are not finite and above 0.
        """
        where = "CapacityTracker.update_timeout"
        require(1 <= depth <= self.L, where, "depth", f"in [1, {self.L}]", depth)
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
            _log.warning("%s: %r rests until round %d", where, device, state.rests_until)

    def rests(self, device: Client, round: int) -> bool:
        """Whether ``device`` is not to be selected in ``round``, after too many timeouts in a
        row."""
        return device in self._devices and round <= self._devices[device].rests_until

    def trusted(self, device: Client) -> bool:
        """Whether the latest reports of ``device`` were not all without a measurement; so it is at
        first."""
        return device not in self._devices or self._devices[device].bad < self.max_bad

    def estimate(self, device: Client) -> Estimate:
        """The speeds of a device, none below 0.

        Raises:
            KeyError: none of its reports was a measurement so far.
        """
        where = "CapacityTracker.estimate"
        require(device in self, where, "device", "one that reported", repr(device), KeyError)
        state = self._devices[device]
        return Estimate(*state.solved(), state.beta or 0.0, self.trusted(device))

    def repeats(self, device: Client, depth: int) -> int:
        """Count how many of the latest reports of ``device``, in a row, were of this ``depth``; 0
        of none."""
        state = self._devices.get(device)
        return state.repeats if state is not None and state.last == depth else 0

    def state_dict(self) -> dict[str, Any]:
        """Return all that was learned of the devices as lists and numbers, which JSON holds."""
        return {
            "devices": [[d, asdict(state)] for d, state in self._devices.items()],
            "dropped": [list(entry) for entry in self.dropped.items()],
            "ignored": [list(entry) for entry in self.ignored.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, instead of what is here.

        Raises:
            KeyError, TypeError: another state; nothing has changed then.
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
    """One device: discounted sums of its reports, which hold all that least squares need."""

    ratio_f: float
    ratio_mu: float = 2.0  # a backward costs two forwards
    beta: float | None = None
    count: float = 0.0  # the sums of the weights,
    k: float = 0.0  # and of the weighted depths,
    kk: float = 0.0
    t: float = 0.0  # times,
    kt: float = 0.0  # and products
    last: int = 0  # depth
    repeats: int = 0  # of it in a row
    bad: int = 0
    off: bool = False
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
        """As if all reports so far had taken so many times as long."""
        self.t *= factor
        self.kt *= factor

    def forget(self) -> None:
        """Drop all reports; the ratio f : mu stays."""
        f, mu = self.solved()
        if f + mu > 0:
            self.ratio_f, self.ratio_mu = f, mu
        self.beta = None
        self.count = self.k = self.kk = self.t = self.kt = 0.0

    def solved(self) -> tuple[float, float]:
        """The f and mu of the least squares, neither below 0."""
        if not self.count:
            return 0.0, 0.0
        # The ratio is one more equation, (ratio_mu f - ratio_f mu) / norm = 0: never singular.
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
    """Refuse speeds that are negative or not finite."""
    for part, value in zip(("f", "mu", "beta"), estimate[:3], strict=True):
        number(where, f"{name}.{part}", value, 0)
