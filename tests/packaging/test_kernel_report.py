"""The page of estimates: what it says is what the lock says, and what it hides is nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scripts import tool

ROOT = Path(__file__).resolve().parents[2]
report = tool("kernel_report")


@pytest.fixture(scope="module")
def lock():
    return report.read_lock((ROOT / "kernels.lock").read_text())


def test_the_page_is_what_the_lock_says() -> None:
    assert report.main(["--check"]) == 0, "run `python tools/kernel_report.py`"


def test_objects_have_the_promised_keys(capsys) -> None:
    assert report.main(["--json"]) == 0
    keys = {"name", "shape", "estimate_us", "floor_us", "ratio"}
    blanks = {"trips", "mma_share", "instructions_per_element"}
    found = json.loads(capsys.readouterr().out)
    assert len(found) == len(report.CASES)
    for row in found:
        assert keys | blanks <= row.keys()
        assert row["estimate_us"] > 0 and row["floor_us"] >= report.NULL
        assert row["ratio"] == pytest.approx(row["estimate_us"] / row["floor_us"], abs=0.006)
    for key in blanks:
        assert any(row[key] is not None for row in found)


def test_trips_and_instructions_cost_what_the_model_says(lock) -> None:
    """Ten trips more are 2 us more at a shape that waits for memory."""
    case = next(c for c in report.CASES if c.shape.startswith("D1") and "shrink" in c.kernel)
    code = lock[case.kernel]
    longer = replace(code, trips=(code.trips or 0) + 10)
    gap = report.launch_us(case, longer) - report.launch_us(case, code)
    assert gap == pytest.approx(10 * report.L2)
    leaf = next(c for c in report.CASES if "circuit_leaf" in c.kernel)
    slow = replace(lock[leaf.kernel], each=64.0)
    cycles = leaf.values * 64 / 32 / (4 * report.SMS)  # of a scheduler
    assert report.launch_us(leaf, slow) >= cycles / report.CLOCK


def test_a_chain_is_all_its_launches_and_its_floor_has_no_launch_in_it(lock) -> None:
    chain = next(c for c in report.CASES if "2048 states" in c.shape and "forward, fp32" in c.shape)
    each = [report.launch_us(c, lock[c.kernel]) for c in (chain, *chain.beside)]
    saved = 2 * (report.NULL - report.HANDOFF)  # both kernels overlap the end of the other
    assert all(lock[c.kernel].dependent for c in (chain, *chain.beside))
    assert report.estimate_us(chain, lock) == pytest.approx(31 * (sum(each) - saved))
    assert report.floor_us(chain) == pytest.approx(31 * 2 * 2048**2 * 512 / report.TENSOR)
    # Six products of 16 bits for each of float32: no faster than tensor cores are at that.
    assert each[0] > 6 * chain.flops / report.TENSOR


def test_what_is_above_twice_its_floor_is_red_and_nothing_else() -> None:
    row = {"name": "k", "shape": "s", "estimate_us": 1.0, "floor_us": 1.0, "trips": 3}
    row |= {"mma_share": None, "instructions_per_element": 1.5}
    slow, fast = (report.table([{**row, "ratio": ratio}]) for ratio in (2.5, 2.0))
    assert 'style="color:red">**2.5**' in slow and "red" not in fast
    assert fast.endswith("| 2.0 | 3 |  | 1.5 |")


def test_a_kernel_that_the_lock_lacks_is_named(lock) -> None:
    case = replace(report.CASES[0], kernel="gone_kernel<float>")
    with pytest.raises(SystemExit, match=r"kernels\.lock has no gone_kernel<float>"):
        report.rows(lock, [case])
