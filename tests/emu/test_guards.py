"""Broken kernels: each mistake is reported by the right check, and the same seed reproduces it."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow

# For each mistake, the check that must report it, and other checks that may report it in some
# thread orders.
GUARDS = {
    "wait_one_fewer": "asynchrony",
    "no_barrier_after_wait": "race initialisation asynchrony",
    "no_barrier_before_refill": "race asynchrony",
    "no_commit": "asynchrony",
    "partial_sums": "race initialisation",
    "column_guard": "bounds",
    "row_guard": "bounds",
    "blocks_share_a_counter": "race",
    "neighbour": "race initialisation",
    "half_warp": "race initialisation",
    "shared_past_end": "bounds",
    "divergent_barrier": "divergence",
    "mixed_collectives": "divergence",
    "misaligned": "alignment",
    "read_only": "permission",
    "unwritten_shared": "initialisation",
    "unwritten_output": "initialisation",
    "named_barrier_count": "deadlock",
    "named_barrier_refill": "race",
    "read_before_wait": "dependency",
    "never_waits": "dependency",
    "constant_of_a_neighbour": "dependency",
    "released_before_the_wait": "dependency",
    "last_block": "race",
    "hand_on_unfenced": "race",
    "hand_on_unread": "race",
    "hand_on_too_few": "race",
    "hand_on_too_many": "deadlock",
    "hand_on_in_turn": "deadlock",
    "too_much_shared": "resources",
    "struct_copy": "bounds",
    "ldmatrix_row": "alignment",
    "deep_stack": "resources",
    "trap": "trap",
}
LAUNCH_FAILURE = 719


def buffers() -> tuple[np.ndarray, np.ndarray]:
    memory = np.zeros(2 * 1024 + 8, np.float32)
    start = -memory.ctypes.data % 16 // 4
    values = np.random.default_rng(0).integers(-4, 5, 1024)
    memory[start : start + 1024] = values
    return memory[start : start + 1024], memory[start + 1024 : start + 2048]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", [*GUARDS, "swapped_registers"])
def test_correct_kernel_has_no_reports(emulator, name, seed):
    emulator.run(f"guard_{name}", 0, *buffers(), seed=seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("name", "category"), GUARDS.items())
def test_mistake_in_a_kernel_is_reported(check, name, category, seed):
    status = check.call(f"guard_{name}", 1, *buffers(), seed=seed)
    assert status == LAUNCH_FAILURE
    expected, *also = category.split()
    found = {report.split(":")[0] for report in check.reports}
    assert expected in found and found <= {expected, *also}, check.reports


@pytest.mark.parametrize("seed", range(4))
def test_concurrent_blocks_can_pass_numbers_to_each_other(emulator, seed):
    values, out = buffers()
    emulator.run("guard_hand_on_unfenced", 0, values, out, seed=seed)
    assert out[:1].view(np.uint32)[0] == 10
    np.testing.assert_array_equal(out[11:16], np.roll(values[:5], -2) + 2)


def test_more_concurrent_blocks_than_the_machine_runs_raise(check):
    values, out = buffers()
    check.run("guard_hand_on_too_wide", 0, values, out)
    # cudaErrorCooperativeLaunchTooLarge
    assert check.call("guard_hand_on_too_wide", 1, values, out) == 720
    assert check.reports[0].startswith("resources: ") and "133 blocks at once" in check.reports[0]


def test_swapped_fragment_registers_give_wrong_numbers(fast):
    results = []
    for broken in (0, 1):
        values, out = buffers()
        fast.run("guard_swapped_registers", broken, values, out)
        results.append(out.copy())
    assert not np.array_equal(*results)


def test_access_out_of_bounds_is_prevented_and_a_deadlock_is_located(check):
    values, out = buffers()
    out[:] = 5
    check.call("guard_row_guard", 1, values, out)
    assert (out[7 * 16 :] == 5).all()
    assert len(check.reports) == 1
    report = check.reports[0]
    assert "thread (112,0,0) of block (0,0,0) writes 4 bytes at out + 448" in report
    assert "guards.cu:" in report
    check.call("guard_named_barrier_count", 1, *buffers())
    assert "waits in bar_sync at guards.cu:" in check.reports[0]


def test_launch_after_an_aborted_launch_has_no_reports(check):
    assert check.call("guard_shared_past_end", 1, *buffers()) == LAUNCH_FAILURE
    check.run("guard_shared_past_end", 0, *buffers())


pytestmark = pytest.mark.slow


def broken_run(emulator, seed: int) -> tuple[list[float], list[str]]:
    values, out = buffers()
    emulator.call("guard_no_barrier_after_wait", 1, values, out, seed=seed)
    return out.tolist(), list(emulator.reports)


def test_same_seed_reproduces_the_run(check):
    for seed in (0, 1, 2, 12345):
        first, again = broken_run(check, seed), broken_run(check, seed)
        np.testing.assert_array_equal(first[0], again[0])
        assert first[1] == again[1]


def test_seeds_give_different_reports_and_their_number_is_limited(check):
    assert len({tuple(broken_run(check, seed)[1]) for seed in range(6)}) > 1
    _, reports = broken_run(check, 0)
    assert 0 < len(reports) == len(set(reports)) <= 20
