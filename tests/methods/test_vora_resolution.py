"""`smart_resize`: known sizes and properties."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_ext.methods.vora import smart_resize


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((100, 200), (98, 196)),
        ((3000, 2000), (1078, 714)),
        ((14, 14), (56, 56)),
        ((56, 56), (56, 56)),
        ((63, 77), (56, 84)),  # Ties are rounded to the even multiple.
    ],
)
def test_sizes_equal_known_ones(size, expected):
    assert smart_resize(*size) == expected


@given(height=st.integers(1, 6000), width=st.integers(1, 6000), factor=st.integers(1, 32))
def test_sides_are_multiples_and_the_area_is_in_bounds(height: int, width: int, factor: int):
    assume(min(height, width) >= factor and max(height, width) <= 200 * min(height, width))
    found = smart_resize(height, width, factor)
    assert all(side % factor == 0 and side > 0 for side in found)
    assert 3136 <= found[0] * found[1]
    # Rounding up at the lower bound may exceed that bound, but never the upper one.
    assert found[0] * found[1] <= 784000
    if max(found) <= 200 * min(found):  # rounding may exceed the largest ratio: 25 x 4802, factor 2
        assert smart_resize(*found, factor) == found


@given(height=st.integers(14, 4000), width=st.integers(14, 4000))
def test_transposed_image_has_the_transposed_size(height: int, width: int):
    assume(max(height, width) <= 200 * min(height, width))
    assert smart_resize(width, height) == smart_resize(height, width)[::-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((13, 100), r"height: expected at least factor = 14, found 13"),
        ((100, 13), r"width: expected at least factor = 14, found 13"),
        ((14, 2801), r"height, width: expected a ratio of at most 200, found 14 x 2801"),
        ((100, 100, 0), r"factor: expected at least 1, found 0"),
        ((100, 100, 14, 100, 99), r"min_pixels: expected .* max_pixels = 99, found 100"),
        ((100, 20000, 14, 1, 3136), r"max_pixels: .* enough for one row of patches of side 14"),
    ],
)
def test_invalid_sizes_are_refused(arguments, message: str):
    with pytest.raises(ValueError, match=f"smart_resize: {message}"):
        smart_resize(*arguments)


def test_ratio_of_200_is_accepted():
    assert smart_resize(14, 2800) == (14, 2800)
