"""Keys and values of a decoded batch in buffers with room for what is to come."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def roomy_cache(room: int) -> Any:
    """A transformers cache whose layers write new keys and values into buffers that they keep.

    transformers' own copies a layer's whole past to append to it, at every pass. Here ``keys`` and
    ``values`` of a layer are views of buffers; one that is full grows to twice its size.

    Args:
        room: slots that a layer has from the beginning, at least 1.
    """
    from transformers.cache_utils import Cache, DynamicLayer

    class RoomyLayer(DynamicLayer):
        buffers: tuple[Tensor, Tensor] | None = None

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            start = self.get_seq_length()
            end = start + key_states.shape[-2]
            if self.buffers is None or not self.fits(end):
                past = self.keys, self.values
                size = max(room, 2 * end if start else end)
                states = key_states, value_states
                keys, values = (t.new_empty(*t.shape[:-2], size, t.shape[-1]) for t in states)
                for buffer, before in zip((keys, values), past, strict=True):
                    if start and before is not None:
                        buffer[..., :start, :] = before
                self.buffers = keys, values
            keys, values = self.buffers
            keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
            self.keys, self.values = keys[..., :end, :], values[..., :end, :]
            return self.keys, self.values

        def fits(self, end: int) -> bool:
            """Whether the buffers have room, and still are what the keys are a view of."""
            assert self.buffers is not None
            own = self.keys is not None and self.keys.data_ptr() == self.buffers[0].data_ptr()
            return own and self.buffers[0].shape[-2] >= end

    return Cache(layer_class_to_replicate=RoomyLayer)
