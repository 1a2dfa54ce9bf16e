"""Size of the free memory of a device."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch


def free_bytes(device: torch.device | str | None = None) -> int | None:
    """Return the free bytes of a device, or None if they are not known, as for ``meta``.

    For the CPU, this is the available memory of the system, or less if the process has a control
    group (for example, in a container) whose limit leaves less memory.

    Args:
        device: device; None is torch's default device.
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
    with contextlib.suppress(OSError, ValueError):  # no control group, or one with limit "max"
        limit = int((group / "memory.max").read_text())
        found.append(limit - int((group / "memory.current").read_text()))
    return max(0, min(found)) if found else None
