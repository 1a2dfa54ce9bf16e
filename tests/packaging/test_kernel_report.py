"""The page of estimated kernel times: it agrees with kernels.lock and is complete."""

import json
from dataclasses import replace

import pytest
from scripts import ROOT, tool

loops, gate = tool("sass_loops"), tool("sass_gate")  # The second module imports the first one.
report = tool("kernel_report")
RULES = gate.load_rules(gate.RULES)


@pytest.fixture(scope="module")
def lock():
    return report.read_lock((ROOT / "kernels.lock").read_text(), RULES)


def test_page_agrees_with_the_lock_file() -> None:
    assert report.main(["--check"]) == 0, "run `python tools/kernel_report.py`"


def test_rows_of_the_json_output_have_the_documented_keys(capsys) -> None:
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


def test_trips_and_instructions_cost_what_the_model_predicts(lock) -> None:
    """Check that ten more round trips to memory cost 2 us at a shape bound by memory latency."""
    case = next(c for c in report.CASES if c.shape.startswith("D1") and "shrink" in c.kernel)
    code = lock[case.kernel]
    longer = replace(code, trips=(code.trips or 0) + 10)
    gap = report.launch_us(case, longer) - report.launch_us(case, code)
    assert gap == pytest.approx(10 * report.L2)
    leaf = next(c for c in report.CASES if "circuit_leaf" in c.kernel)
    slow = replace(lock[leaf.kernel], each=64.0)
    cycles = leaf.values * 64 / 32 / (4 * report.SMS)  # cycles per scheduler
    assert report.launch_us(leaf, slow) >= cycles / report.CLOCK


def test_estimate_of_a_chain_has_all_its_launches_or_a_wait_per_step(lock) -> None:
    chain = next(c for c in report.CASES if "2048 states" in c.shape and "forward, fp32" in c.shape)
    each = [report.launch_us(c, lock[c.kernel]) for c in (chain, *chain.beside)]
    saved = 2 * (report.NULL - report.HANDOFF)  # Each kernel starts before the other ends.
    assert all(lock[c.kernel].dependent for c in (chain, *chain.beside))
    assert report.estimate_us(chain, lock) == pytest.approx(31 * (sum(each) - saved))
    assert report.floor_us(chain) == pytest.approx(31 * 2 * 2048**2 * 512 / report.TENSOR)
    # A float32 product consists of six 16-bit products, each at most as fast as tensor cores allow.
    assert each[0] > 6 * chain.flops / report.TENSOR
    chain = next(c for c in report.CASES if c.steps > 1)
    code = lock[chain.kernel]
    longer = replace(chain, steps=chain.steps + 10)
    gap = report.launch_us(longer, code) - report.launch_us(chain, code)
    assert gap > 10 * (report.STEP + chain.hops * report.L2)
    assert report.floor_us(chain) == pytest.approx(chain.steps * report.STEP)
    assert report.layers_run(3, 2048, 512, 31) is None  # 64 rows of weights are 768 KiB


def test_only_rows_with_an_estimate_above_twice_the_lower_bound_are_red() -> None:
    row = {"name": "k", "shape": "s", "estimate_us": 1.0, "floor_us": 1.0, "trips": 3}
    row |= {"mma_share": None, "instructions_per_element": 1.5, "bytes": 2_500_000}
    row |= {"registers": 40, "blocks_per_sm": 6}
    slow, fast = (report.table([{**row, "ratio": ratio}]) for ratio in (2.5, 2.0))
    assert 'style="color:red">**2.5**' in slow and "red" not in fast
    assert fast.endswith("| 2.5 | 1.0 | 1.0 | 2.0 | 3 |  | 1.5 | 40 | 6 |")


def test_red_rows_and_reasons_match(lock) -> None:
    found = report.rows(lock)
    said = report.reasons(found)
    assert all(f"* {reason.said_of}: " in said for reason in report.WHY)
    planted = next(row for row in found if row["ratio"] <= report.RED)
    with pytest.raises(SystemExit, match="no entry of WHY explains it"):
        report.reasons([*found, {**planted, "ratio": 2.1}])
    gone = report.WHY[0]
    with pytest.raises(SystemExit, match=f"WHY explains {gone.said_of}, but no row is red"):
        report.reasons([row for row in found if not gone.speaks_of(row)])


def test_threads_equal_the_rules_and_blocks_fit_the_multiprocessor(lock) -> None:
    every = [one for case in report.CASES for one in (case, *case.beside)]
    for case in every:
        told = report.most_of(RULES, case.kernel, "threads")
        assert told in (0, case.threads), case.kernel
        assert lock[case.kernel].per_multiprocessor(case.threads) >= report.most_of(
            RULES, case.kernel, "min_blocks"
        )
    code = report.Code(64, 1024 + 2048, (), None, None, None, dynamic=100_000)
    assert code.per_multiprocessor(256) == 2  # limited by shared memory; registers allow 4
    assert replace(code, dynamic=0).per_multiprocessor(256) == 4


def test_loop_for_underflowing_sums_is_not_timed_and_a_missing_kernel_is_named(lock) -> None:
    case = next(c for c in report.CASES if c.loop is not None)
    code = replace(lock[case.kernel], inflight=(64, 6))
    assert report.launch_us(case, code) < report.launch_us(replace(case, loop=None), code)
    case = replace(report.CASES[0], kernel="gone_kernel<float>")
    with pytest.raises(SystemExit, match=r"kernels\.lock has no gone_kernel<float>"):
        report.rows(lock, [case])
