"""Kernels of single hardware instructions, compared with formulas and, if present, a dump of a
GPU."""

import ctypes
import json
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "wrappers.json"
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


def golden_input() -> np.ndarray:
    """Return 4096 words which, read as pairs of bf16 or f16 numbers, are finite and of moderate
    size."""
    words = np.random.default_rng(1).integers(0, 1 << 32, 4096, dtype=np.uint32)
    return words & np.uint32(0xBFFFBFFF)  # clears the upper bit of the exponent


def run(emulator, name: str, words: np.ndarray, seed: int = 0) -> np.ndarray:
    names: list[str] = []
    function = emulator.library.wrapper_name
    function.restype = ctypes.c_char_p
    while (found := function(ctypes.c_int64(len(names)))) is not None:
        names.append(found.decode())
    out = np.zeros(4096, np.uint32)
    emulator.run("wrapper", names.index(name), words, out, seed=seed)
    return out


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("matrices", [1, 2, 4])
def test_ldmatrix_gives_each_lane_the_expected_pair(emulator, matrices, transposed, seed):
    words = golden_input()
    m = words[:128].view(np.uint16).reshape(4, 8, 8)[:matrices]
    if transposed:
        m = m.transpose(0, 2, 1)
    name = f"ldmatrix_x{matrices}" + ("_trans" if transposed else "")
    out = run(emulator, name, words, seed)[: 32 * matrices].reshape(32, matrices)
    for i in range(matrices):
        np.testing.assert_array_equal(out[:, i] & 0xFFFF, m[i, G, 2 * T])
        np.testing.assert_array_equal(out[:, i] >> 16, m[i, G, 2 * T + 1])


def one_of(kind: str) -> int:
    return {"bf16": 0x3F80, "f16": 0x3C00, "tf32": 0x3F800000}[kind]


def a_register(kind: str, row: int, column: int) -> tuple[int, int, int]:
    """Return (lane, register, half) of an element of A, by inverting the tables of the PTX ISA."""
    if kind == "tf32":
        return row % 8 * 4 + column % 4, row // 8 + 2 * (column // 4), 0
    return row % 8 * 4 + column % 8 // 2, row // 8 + 2 * (column // 8), column % 2


def b_register(kind: str, row: int, column: int) -> tuple[int, int, int]:
    if kind == "tf32":
        return column * 4 + row % 4, row // 4, 0
    return column * 4 + row % 8 // 2, row // 8, row % 2


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma_of_one_hot_operands_changes_one_accumulator(fast, kind):
    depth = 8 if kind == "tf32" else 16
    rng = np.random.default_rng(3)
    triples = [(i, k, j) for i in range(16) for k in range(depth) for j in range(8)]
    for index in rng.permutation(len(triples))[:256]:
        i, k, j = triples[index]
        words = np.zeros(4096, np.uint32)
        lane, register, half = a_register(kind, i, k)
        words[lane * 4 + register] = one_of(kind) << 16 * half
        lane, register, half = b_register(kind, k, j)
        words[128 + lane * 2 + register] = one_of(kind) << 16 * half
        words[192:320] = np.float32(2).view(np.uint32)  # The accumulator is 2 everywhere.
        d = run(fast, f"mma_{kind}", words)[:128].view(np.float32).reshape(32, 4)
        expected = np.full((32, 4), 2, np.float32)
        expected[i % 8 * 4 + j // 2, j % 2 + i // 8 * 2] = 3
        np.testing.assert_array_equal(d, expected)


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_cp_async_zero_fills_beyond_the_source_size(emulator, size, seed):
    words = golden_input()
    out = run(emulator, f"cp_async_{size}", words, seed).view(np.uint8)[: 32 * size]
    expected = words.view(np.uint8)[: 32 * size].reshape(32, size).copy()
    expected[np.arange(size)[None, :] >= (LANES % (size + 1))[:, None]] = 0
    np.testing.assert_array_equal(out.reshape(32, size), expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_shuffles_exchange_values_only_within_their_segment(emulator, seed):
    words = golden_input()
    out = run(emulator, "shuffle", words, seed)[: 12 * 32].reshape(3, 4, 32)
    for row, width in enumerate((8, 16, 32)):
        first = LANES // width * width
        last = first + width - 1
        sources = (
            first + (LANES * 3 + 1) % width,
            np.where(LANES - 3 < first, LANES, LANES - 3),
            np.where(LANES + 3 > last, LANES, LANES + 3),
            np.where((LANES ^ 9) > last, LANES, LANES ^ 9),
        )
        for column, source in enumerate(sources):
            np.testing.assert_array_equal(out[row, column], words[source])


@pytest.mark.parametrize("seed", [0, 1])
def test_votes_matches_and_reductions_equal_the_formula(emulator, seed):
    words = golden_input()
    x = words[:32]
    few = x % 5
    out = run(emulator, "vote", words, seed)[: 11 * 32].reshape(11, 32)

    def ballot(votes: np.ndarray) -> int:
        return sum(1 << int(lane) for lane in np.flatnonzero(votes))

    uniform = [
        ballot(few < 2),
        0,
        1,
        None,
        int(x.sum(dtype=np.uint32)),
        int(x.min()),
        int(x.max()),
        int(x.view(np.int32).min()) & 0xFFFFFFFF,
        int(np.bitwise_and.reduce(x | 0xFFFF0000)),
        int(np.bitwise_or.reduce(x & 0xFFFF)),
        int(np.bitwise_xor.reduce(x)),
    ]
    for row, value in zip(out, uniform, strict=True):
        expected = [ballot(few == f) for f in few] if value is None else value
        np.testing.assert_array_equal(row, expected)


def test_bits_and_conversions_equal_the_formula(emulator):
    words = golden_input()
    out = run(emulator, "bits", words)[: 13 * 32].reshape(13, 32)
    for lane in range(32):
        x, y = int(words[lane]), int(words[32 + lane])
        assert list(out[:6, lane]) == [
            x.bit_count(),
            (x & -x).bit_length(),
            32 - x.bit_length(),
            int(f"{x:032b}"[::-1], 2),
            (y << 32 | x) << 7 >> 32 & 0xFFFFFFFF,
            (y << 32 | x) >> 7 & 0xFFFFFFFF,
        ]
    f = words[:32].view(np.int32).astype(np.float32) * np.float32(2.0**-20)
    bits = f.view(np.uint32).astype(np.uint64)
    np.testing.assert_array_equal(out[6], bits + 0x1000 & ~np.uint64(0x1FFF))
    low = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # bf16, nearest even
    np.testing.assert_array_equal(out[7], low | (low ^ 0x8000) << 16)
    low = f.astype(np.float16).view(np.uint16).astype(np.uint64)
    np.testing.assert_array_equal(out[8], low | (low ^ 0x8000) << 16)
    each = words[:64].view(np.uint8).reshape(2, 32, 4).transpose(1, 0, 2).reshape(32, 8)
    for row, chosen in ((9, [0, 4, 1, 5]), (10, [3, 6, 7, 2])):
        np.testing.assert_array_equal(out[row].view(np.uint8).reshape(32, 4), each[:, chosen])
    pairs = (words[:64] & np.uint32(0xBFFFBFFF)).view(np.uint16).reshape(2, 32, 2)
    wide = (pairs.astype(np.uint32) << 16).view(np.float32)
    bits = (wide[0] - wide[1]).view(np.uint32).astype(np.uint64)
    low = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    np.testing.assert_array_equal(out[11], low[:, 0] | low[:, 1] << 16)
    halves = pairs.view(np.float16)
    low = (halves[0] - halves[1]).view(np.uint16).astype(np.uint64)
    np.testing.assert_array_equal(out[12], low[:, 0] | low[:, 1] << 16)


def check_exponentials(found: np.ndarray) -> None:
    """Check that errors against float64 are at most two roundings of x log2(e) and two ulp."""
    x = golden_input()[:512].view(np.int32).astype(np.float32).astype(float) * 2.0**-24
    exact, tiny = np.exp(x), 2.0**-126
    bound = exact * (1.23 * np.abs(x) + 4) * 2.0**-24
    flushed = exact + bound < tiny  # must be 0; others may be 0 if exact - bound is below 2^-126
    assert 64 < flushed.sum() < 256 and (found[flushed] == 0).all()
    wrong = np.abs(found - exact) > bound
    assert not (wrong & ~flushed & ((found != 0) | (exact - bound >= tiny))).any()


def test_exponentials_are_within_their_bound_and_flush_denormal_results(fast):
    check_exponentials(run(fast, "exp", golden_input())[:512].view(np.float32).astype(float))


def test_emulator_agrees_with_the_dump_of_a_gpu(fast):
    if not GOLDEN.exists():
        pytest.skip(f"no {GOLDEN.name} yet: run tools/wrapper_goldens.py --update on a GPU")
    golden = json.loads(GOLDEN.read_text())
    for name, words in golden["dumps"].items():
        expected = np.array(words, np.uint32)
        out = run(fast, name, golden_input())[: len(expected)]
        if name == "exp":
            check_exponentials(expected.view(np.float32).astype(float))
        elif name.startswith("mma"):  # The order of a tensor core's sum is not documented.
            actual, wanted = out.view(np.float32), expected.view(np.float32)
            scale = np.abs(wanted).max()
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=16 * 2.0**-23 * scale)
        else:
            np.testing.assert_array_equal(out, expected, err_msg=name)
