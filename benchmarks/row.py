"""Row of benchmarks/results/lora_<device>.csv."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from common import Timing, machine_columns


@dataclass(frozen=True)
class Row:
    """Measurement of one case. Empty columns do not apply to the case."""

    matrix: str
    case: str
    provider: str
    dtype: str = "float32"
    tokens: int | str = ""
    adapters: int | str = ""
    in_features: int | str = ""
    out_features: int | str = ""
    rank: int | str = ""
    unit: str = "us"
    median: float | str = ""
    p20: float | str = ""
    p80: float | str = ""
    mbytes: float | str = ""  # compulsory traffic: adapters at true rank once, x once, y twice
    gbytes_per_s: float | str = ""
    of_copy: float | str = ""  # gbytes_per_s / the machine's copy bandwidth in the same rounds
    over_base: float | str = ""  # time / that without adapters, or of plain GEMMs; same rounds
    over_peft: float | str = ""  # PEFT's time / this time in the same rounds
    over_full: float | str = ""  # time / that of the case in which all ranks are the largest
    worst_error: float | str = ""  # largest error / its bound, checked before timing

    def columns(self, device: str) -> dict[str, object]:
        """Return the columns of the csv file: those of the machine, then those of the row."""
        values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {**machine_columns(device), **values}


def timing_columns(timing: Timing, unit: str = "us") -> dict[str, str | float]:
    """Return ``unit``, ``median``, ``p20`` and ``p80`` of a row."""
    scale = {"us": 1e6, "ms": 1e3}[unit]
    return {
        "unit": unit,
        "median": timing.median * scale,
        "p20": timing.p20 * scale,
        "p80": timing.p80 * scale,
    }
