"""Tensors in messages: they arrive unchanged, and forged tensors are rejected without being
read."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from federated_rounds import key, make_state, make_update, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_ext.federated import (
    LayerPlan,
    Payload,
    pack_tensors,
    plan_bytes,
    plan_shapes,
    read_npy,
    unpack_tensors,
)

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
A0 = key(0, "A")


def npy(array: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@settings(max_examples=25, deadline=None)
@given(
    flat=st.booleans(),
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5),
    data=st.data(),
)
def test_tensors_arrive_as_sent(flat: bool, shapes: list[list[int]], data: st.DataObject):
    tensors = {
        f"layers.{i}.x": torch.randn(shape).to(data.draw(st.sampled_from(DTYPES)))
        for i, shape in enumerate(shapes)
    }
    sent = pack_tensors(tensors, flat=flat)
    arrays = {k: read_npy(npy(v)) for k, v in sent.arrays.items()}
    found = unpack_tensors(
        Payload(arrays, sent.manifest), {k: tuple(v.shape) for k, v in tensors.items()}
    )
    assert same_bits(found, tensors)
    assert all(sent.manifest.values())  # The manifest has no empty list.
    assert sent.nbytes == sum(t.nbytes for t in tensors.values())
    for value in found.values():
        value.zero_()  # writable: the tensors do not share the memory of the message


def test_plan_determines_shapes_and_bytes():
    state = make_state(dtype=torch.float32)
    plan = LayerPlan((0, 2), (1, 3))
    shapes = plan_shapes(state, plan)
    reply = make_update(1, plan.layers, plan.ranks, dtype=torch.float32)
    assert shapes == {k: tuple(v.shape) for k, v in reply.tensors.items()}
    # itemsize * sum of r (I + O), over two modules per layer
    assert (
        plan_bytes(state, plan) == 4 * (1 + 3) * 2 * (5 + 4) == pack_tensors(reply.tensors).nbytes
    )
    with pytest.raises(ValueError, match=r"plan.layers: expected layers among \[0, 1, 2\], found"):
        plan_shapes(state, LayerPlan((3,)))
    with pytest.raises(ValueError, match=r"plan.ranks: layers.0.q: expected at most 3, found 4"):
        plan_shapes(state, LayerPlan((0,), (4,)))


def test_fortran_ordered_array_arrives_contiguous():
    array = np.asfortranarray(np.arange(15.0).reshape(3, 5))
    found = unpack_tensors(Payload({A0: read_npy(npy(array))}, {}), {A0: (3, 5)})
    assert found[A0].is_contiguous()
    assert torch.equal(found[A0], torch.arange(15.0).double().reshape(3, 5))


ONES = np.ones((3, 5), np.float32)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((1, 5), np.float32), r"expected shape \[3, 5\], found shape \[1, 5\]"),
        (np.ones((5, 3), np.float32).T.T, r"expected shape \[3, 5\], found shape \[5, 3\]"),
        (np.ones((3, 5), ">f4"), "expected one of .*, found >f4"),
        (np.ones((3, 5), np.int64), "expected one of .*, found int64"),
        (np.ones((3, 5), np.uint16), "expected one of .*, found uint16"),
        (np.array([[{}] * 5] * 3, object), "expected one of .*, found object"),
        (np.ones((3, 5), np.complex64), "expected one of .*, found complex64"),
        ([[1.0]], "expected an array, found list"),
    ],
)
def test_forged_arrays_are_refused(array, message: str):
    with pytest.raises(ValueError, match=f"^node 7: {A0}: {message}"):
        unpack_tensors(Payload({A0: array}, {}), {A0: (3, 5)}, "node 7")


def test_unknown_names_and_dtypes_are_refused():
    with pytest.raises(ValueError, match="payload: x: expected a tensor of the plan"):
        unpack_tensors(Payload({"x": ONES}, {}), {A0: (3, 5)})
    with pytest.raises(ValueError, match=f"{A0}: expected uint16 for bfloat16, found float32"):
        unpack_tensors(Payload({A0: ONES}, {"bfloat16": [A0]}), {A0: (3, 5)})
    with pytest.raises(
        ValueError, match=f"^pack_tensors: {A0}: expected one of .*, found torch.int64"
    ):
        pack_tensors({A0: torch.ones(2, dtype=torch.int64)})


FLAT = {"names": [A0], "dtypes": ["float32"], "dims": [2], "sizes": [3, 5]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": [3, 6]}, "expected an end within 60 bytes, found 72"),
        ({"sizes": [3, 4]}, "packed: expected 48 bytes, found 60"),
        ({"sizes": [3, -5]}, "sizes: expected integers from 0 to 2147483647, found 1 of 2"),
        ({"sizes": [2**62, 2**62]}, "sizes: expected integers from 0 to 2147483647, found 2 of 2"),
        ({"sizes": [3]}, "sizes: expected 2 entries, found 1"),
        ({"dims": [9]}, "dims: expected integers from 0 to 8, found 1 of 1 out of"),
        ({"dims": []}, "dims: expected 1 entries, found 0"),
        ({"dims": [True]}, "dims: expected a list of int, found list"),
        ({"dtypes": ["object"]}, r"expected one of \['float16', .*, found object"),
        ({"dtypes": ["float64"]}, "expected an end within 60 bytes, found 120"),
        ({"names": [A0, A0]}, "names: expected each name once, found 1 rep"),
        ({"names": "x"}, "names: expected a list of str, found str"),
        ({"names": ["x"]}, "x: expected a tensor of the plan"),
    ],
)
def test_forged_manifests_are_refused(changes: dict, message: str):
    packed = pack_tensors({A0: torch.ones(3, 5)}, flat=True)
    assert packed.manifest == FLAT
    with pytest.raises(ValueError, match=message):
        unpack_tensors(Payload(packed.arrays, {**FLAT, **changes}), {A0: (3, 5)})
    wrong = {"packed": packed.arrays["packed"].view(np.float32)}
    with pytest.raises(ValueError, match="packed: expected a one-dimensional uint8 array"):
        unpack_tensors(Payload(wrong, FLAT), {A0: (3, 5)})
    with pytest.raises(ValueError, match="arrays: expected only 'packed'"):
        unpack_tensors(Payload({**packed.arrays, A0: ONES}, FLAT), {A0: (3, 5)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a .npy file"),
        (b"\x93NUMPY\x01\x00\x10\x00{'descr'", "not a .npy file"),
        (npy(ONES)[:-1], "data: expected 60 bytes, found 59"),
        (npy(ONES) + b"x", "data: expected 60 bytes, found 61"),
        (npy(ONES).replace(b"(3, 5)", b"(3,999"), "not a .npy file"),
        (npy(ONES).replace(b"(3, 5), } ", b"(-3, -5),}"), "shape: expected sizes of at l"),
        (npy(ONES).replace(b"(3, 5), }  ", b"(True, 15)}"), "shape: expected sizes of at l"),
        (npy(np.array([{}], object), allow_pickle=True), "dtype: expected floating.* found object"),
        (npy(np.array(["x"])), "dtype: expected floating-point .*, found <U1"),
    ],
)
def test_invalid_npy_bytes_are_refused(data: bytes, message: str):
    with pytest.raises(ValueError, match=f"^node 3: .*{message}"):
        read_npy(data, "node 3")


def test_header_with_a_huge_shape_allocates_nothing():
    data = npy(np.ones((3, 5), np.float32))
    forged = data.replace(b"(3, 5), }        ", b"(3, 99999999999),}")[:200]
    assert forged != data
    with pytest.raises(ValueError, match=r"expected \d+ bytes|expected the bytes"):
        read_npy(forged)
