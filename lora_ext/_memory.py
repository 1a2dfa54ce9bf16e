"""How much memory a device has left."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch


def free_bytes(device: torch.device | str | None = None) -> int | None:
    """Bytes that a device can still give out; None where nobody can say (``meta``).

    Of the CPU, what the system counts as available, and no more than a control group's limit
    leaves, as containers have it. The default is torch's default device.
    """
    device = torch.empty(0, device=device).device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    found: list[int] = []
    with contextlib.suppress(OSError):
        line = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        found += [int(line[1]) << 10] if line else []
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no group, or "max"
        limit = int((group / "memory.max").read_text())
        found.append(limit - int((group / "memory.current").read_text()))
    return max(0, min(found)) if found else None
