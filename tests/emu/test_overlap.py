"""Launches that overlap, as dependent launches do on a GPU, give the same bits. Kernels that access
memory before their wait give other bits, and are reported."""

import numpy as np
import pytest

pytestmark = pytest.mark.slow

WAIT, RELEASE = "    lx::grid_dependency_wait();\n", "    lx::grid_dependency_launch();\n"
NO_RANK = "    if (ranks <= 0) return;\n"
PRODUCTS = "    float acc[kGroupPages][4] = {};\n"
SUMS = "    // sums[warp][row][rank of the group]\n"
WORK = "    const Work work(args, found[0], end, page_of, row_of);\n"
LATE = {WAIT + RELEASE: "", NO_RANK: f"    if (ranks <= 0) {{ {WAIT} return; }}\n"}
FIRST_BLOCK = (
    "    if (blockIdx.x + blockIdx.y == 0) modules.each[0].v.data[lx::thread_rank()] = 0;\n"
)
# Each mistake replaces texts of lora_shrink_decode.cu or lora_expand.cu by others.
MISTAKES = {
    "shrink_reads_plan": LATE | {PRODUCTS: WAIT + RELEASE + PRODUCTS},
    "shrink_reads_x": LATE | {SUMS: WAIT + RELEASE + SUMS},
    "shrink_writes_v": {WAIT + RELEASE: FIRST_BLOCK + WAIT + RELEASE},
    "shrink_lets_expand_start": {WAIT + RELEASE: RELEASE + WAIT},
    "expand_reads_v": {WAIT + "    build_": "    build_", WORK: WAIT + WORK},
}
ALONE, DEEP, SHALLOW = range(3)


@pytest.fixture(scope="module")
def chains(build_with_mistakes):
    """Return libraries by the mistake that they contain ("" for none) and the flavour."""
    return build_with_mistakes(MISTAKES)


def outputs(emulator, overlapping: int, planned: bool, seed: int) -> tuple[int, bytes]:
    out = np.zeros(2 * 20 * 1024, np.uint16)
    status = emulator.call("overlap_chain", overlapping, int(planned), out, seed=seed)
    return status, out.tobytes()


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("flavour", ["fast", "check"])
def test_overlapping_calls_change_no_bit(chains, flavour, planned):
    emulator = chains["", flavour]
    alone = outputs(emulator, ALONE, planned, 0)
    assert alone[0] == 0 and any(alone[1])
    for overlapping in (DEEP, SHALLOW):
        for seed in range(3):
            assert outputs(emulator, overlapping, planned, seed) == alone, emulator.reports


@pytest.mark.parametrize("mistake", MISTAKES)
def test_access_before_the_wait_changes_bits(chains, mistake):
    """Check also that the mistake changes nothing if launches run one after the other."""
    for planned in (True, False):
        _, expected = outputs(chains["", "fast"], ALONE, planned, 0)
        _, *found = (outputs(chains[mistake, "fast"], how, planned, 0)[1] for how in range(3))
        assert outputs(chains[mistake, "fast"], ALONE, planned, 0)[1] == expected
        assert any(each != expected for each in found)


@pytest.mark.parametrize("overlapping", [ALONE, DEEP, SHALLOW])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_access_before_the_wait_is_reported(chains, mistake, overlapping):
    emulator = chains[mistake, "check"]
    status, _ = outputs(emulator, overlapping, True, 0)
    assert status == 719
    assert "dependency" in {report.split(":")[0] for report in emulator.reports}
