"""Merge reports of `lora-ext gpu-report` into docs/gpu.md, one column per GPU and build.

    python tools/gpu_page.py REPORT.json ...

A build is identified by the hash of its compiled module. Reports of this tree's build come first.
The column heading of any other build contains its hash, since the kernels may differ. A report is
refused if a check failed or did not end, or if it is from the emulator, which has no times.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/gpu.md"
FORMAT, MOST_BYTES = 1, 200_000
BEGIN, END = "<!-- gpu_page: begin -->", "<!-- gpu_page: end -->"


def hashes(folder: Path = ROOT / "lora_ext") -> set[str]:
    """Return the hashes of the compiled modules of this tree."""
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("_*.so")}


def read(path: Path) -> Mapping[str, Any]:
    """Return a report that may be merged.

    Raises:
        SystemExit: If the file is not a report, or is refused; the message gives the reason.
    """

    def refuse(expected: str, found: object) -> SystemExit:
        return SystemExit(f"gpu_page: {path.name}: expected {expected}, found {found}")

    if path.stat().st_size > MOST_BYTES:
        raise refuse(f"at most {MOST_BYTES} bytes", path.stat().st_size)
    try:
        report = json.loads(path.read_text())
        card, module, checks, times = (report[k] for k in ("card", "module", "checks", "times"))
        failed = [check["op"] for check in checks if check["ok"] is not True]
        capability = card["capability"]
        _ = [(time["op"], time["us"], time["floor_us"]) for time in times]
        running = report.get("running") or {"step": None}
        check = running["op"] if running["step"] == "check" else None
    except (ValueError, KeyError, TypeError) as error:
        raise refuse("a report of lora-ext gpu-report", repr(error)) from None
    if report.get("format") != FORMAT:
        raise refuse(f"format {FORMAT}", report.get("format"))
    if not re.fullmatch("[0-9a-f]{64}", str(module)):
        raise refuse("the SHA-256 of the compiled module", repr(module))
    if check is not None:
        raise refuse("a report of all checks", f"one that ended during {check}")
    if failed or not checks:
        raise refuse("passed checks", f"failures of {', '.join(failed)}" if failed else "none")
    if capability is None:
        raise refuse("a GPU", card["name"])
    return report


def table(reports: Sequence[Mapping[str, Any]], known: set[str]) -> str:
    """Return a Markdown table of times and their ratios to the floor, with one column per report.

    ``known`` are the hashes of this tree's build, whose columns come first.
    """
    reports = sorted(reports, key=lambda report: report["module"] not in known)
    cards = [
        report["card"]["name"]
        + ("" if report["module"] in known else f", other build {report['module'][:12]}")
        for report in reports
    ]
    ops = list(dict.fromkeys(time["op"] for report in reports for time in report["times"]))
    lines = [f"| op | {' | '.join(f'{card}, us (over floor)' for card in cards)} |"]
    lines.append("|---" * (1 + len(cards)) + "|")
    for op in ops:
        cells = []
        for report in reports:
            time = next((t for t in report["times"] if t["op"] == op), {})
            us, floor = time.get("us"), time.get("floor_us")
            ratio = f" ({us / floor:.1f})" if us and floor else ""
            cells.append("" if us is None else f"{us:.1f}{ratio}")
        lines.append(f"| {op} | {' | '.join(cells)} |")
    return "\n".join(lines)


def merged(page: str, reports: Sequence[Mapping[str, Any]], known: set[str]) -> str:
    """Return the page with the table of the reports inserted between the page's marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"gpu_page: the page lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table(reports, known)}\n\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Merge all reports, or write nothing if one is refused."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reports", nargs="+", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    parsed = parser.parse_args(arguments)
    page = merged(parsed.page.read_text(), [read(path) for path in parsed.reports], hashes())
    parsed.page.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
