"""Values shared by layers with equal shape, device and stream; a captured graph shares none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from two_layers import RANKS, adapter, inputs, make

import lora_ext
from lora_ext.rows import _context
from lora_ext.rows._assignment import Assignment, Layout
from lora_ext.rows._rows import Kept, repeated, rows_of

CUDA = torch.device("cuda", 0)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the state of the fake ``torch.cuda`` streams, which a test can change."""
    state = SimpleNamespace(stream=1, capturing=False)

    def current(_device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(cuda_stream=state.stream)

    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


def test_values_are_not_shared_between_streams(streams: SimpleNamespace) -> None:
    kept, made = Kept(8), iter(range(9))

    def get() -> int:
        return kept.get("key", CUDA, lambda: next(made) + 1)

    assert get() == get() == 1
    streams.stream = 2
    assert get() == get() == 2
    streams.stream = 1
    assert get() == 1
    streams.capturing = True  # A graph must own the tensors it reads, so no value is shared.
    assert (get(), get()) == (3, 4)
    streams.capturing = False
    assert get() == 1 and len(kept) == 2


def test_oldest_value_is_dropped_first() -> None:
    kept = Kept(2)
    device = torch.device("cpu")
    assert [kept.get(key, device, lambda k=key: k) for key in "abca"] == list("abca")
    assert len(kept) == 2


def test_rows_of_a_block_are_kept_by_names_shape_and_device(streams: SimpleNamespace) -> None:
    # `Kept` adds the stream to the key, see test_values_are_not_shared_between_streams.
    keys: list[Any] = []

    class Spy(Kept):
        def get(self, key: Any, device: torch.device, make: Any, *args: Any) -> Any:
            keys.append((key, device.type))
            return super().get(key, device, make, *args)

    assignment = Assignment.of(["red", None])
    assignment.kept = Spy(8)
    for leading, tokens_first in (([2, 3], False), ([2, 2], False), ([2, 2], True)):
        layout = Layout(torch.Size(leading), torch.device("cpu"), tokens_first)
        assignment.rows_among(("red",), layout)
    assert {device for _, device in keys} == {"cpu"}
    assert [key[:2] for key, _ in keys] == [(("red",), (2, 3)), *[(("red",), (2, 2))] * 2]
    assert len({key for key, _ in keys}) == 3  # A square layout differs from its transpose.
    ids = torch.tensor([0, -1])
    assert rows_of(ids, 1) is rows_of(ids, 1)


def test_capture_copies_nothing_from_the_host(streams: SimpleNamespace) -> None:
    # Ids are filled on the device, with one call per sequence of equal values.
    for values, times in (([3, 3, -1, 0, 0], 2), ([5], 7), ([1, 2], 0)):
        expected = torch.tensor(values, dtype=torch.int32).repeat_interleave(times)
        assert torch.equal(repeated(values, times, torch.int32, torch.device("cpu")), expected)
    assignment = Assignment.of(["red", None, "red"])
    layout = Layout(torch.Size([3, 2]), torch.device("meta"))
    streams.capturing = True
    # Meta tensors have no values. The test checks only that nothing is copied.
    with torch.device("meta"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lora_ext.rows._assignment.capturing", lambda _device: True)
            ids = assignment.ids([4], layout)
            tokens = Assignment.of(["red"], torch.zeros(3, 2, dtype=torch.int64, device="cpu"))
            with pytest.raises(RuntimeError, match=r"token_ids: .* while a CUDA graph is captured"):
                tokens.ids([4], layout)
    assert ids.shape == (6,) and ids.dtype == torch.int32


def test_error_of_a_capture_with_dora_rows_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, state = adapter("red")
    vectors = {
        f"base_model.model.{name}.lora_magnitude_vector.weight": torch.ones(size)
        for name, size in (("up", 40), ("down", 9))
    }
    model = make()
    model.up.pool.load("dora", (config | {"use_dora": True}, state | vectors))
    monkeypatch.setattr(_context, "capturing", lambda _device: True)
    with torch.no_grad(), lora_ext.adapters("red"):
        model(inputs(2, 3))
    with torch.no_grad(), lora_ext.adapters("dora"):
        with pytest.raises(
            RuntimeError,
            match="adapters that neither scale outputs nor replace modules while a graph is",
        ):
            model(inputs(2, 3))


def test_forward_with_fake_tensors_keeps_no_values() -> None:
    model, x = make(), inputs(2, 3)
    names = list(RANKS)[:2]
    with torch.no_grad(), lora_ext.adapters(names):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(x)).shape == (2, 3, 9)
        y = model(x)
    assert type(y) is torch.Tensor and bool(torch.isfinite(y).all())
