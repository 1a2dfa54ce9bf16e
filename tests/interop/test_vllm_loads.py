"""Names and ids of adapters loaded in vLLM, tested with a fake engine that records its calls."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import pytest

from lora_ext.interop.vllm._activated import in_front
from lora_ext.interop.vllm._loads import follow_loads


@dataclasses.dataclass
class Request:
    """Fields of vLLM's LoRARequest that lora_ext reads."""

    lora_name: str
    lora_int_id: int
    lora_path: str = "/nowhere"
    load_inplace: bool = False


@pytest.fixture
def engine():
    class EngineCore:
        def __init__(self):
            self.loaded, self.pinned, self.fails = {}, [], False

        def preprocess_add_request(self, request):
            return request.lora_request, 0

        def add_lora(self, lora_request):
            if self.fails:
                raise ValueError("no such file")
            self.loaded[lora_request.lora_int_id] = lora_request
            return True

        def remove_lora(self, lora_id):
            return self.loaded.pop(lora_id, None) is not None

        def pin_lora(self, lora_id):
            self.pinned.append(lora_id)
            return True

        def list_loras(self):
            return set(self.loaded)

    follow_loads(EngineCore)
    follow_loads(EngineCore)
    return EngineCore()


def asked(engine, request):
    """Return the request as the engine receives it."""
    return engine.preprocess_add_request(SimpleNamespace(lora_request=request))[0]


MIXTURES = [
    {"a": 0.7, "b": 0.3},
    ("a", 0.5),
    [Request("a", 1), Request("b", 2)],
    {Request("a", 1).lora_name: Request("a", 1)},
    Request({"a": 0.7, "b": 0.3}, 1),  # pyright: ignore[reportArgumentType]
    Request(("a", 0.5), 1),  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_mixtures_of_adapters_are_refused_by_name(engine, mixture):
    message = r"lora_request: expected .*, found .*a.* weight of 1: .*merge_adapters.*mode='delta'"
    front = in_front(None)
    for call in (
        lambda: asked(engine, mixture),
        lambda: engine.add_lora(mixture),
        lambda: front(SimpleNamespace(lora_request=mixture)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert engine.loaded == {} and asked(engine, Request("a", 1)) == Request("a", 1)


def test_requests_without_reloads_are_unchanged(engine):
    assert asked(engine, None) is None
    for request in (Request("a", 1), Request("b", 2, load_inplace=False), Request("a", 1)):
        assert asked(engine, request) == request
    assert engine.add_lora(Request("a", 1)) and engine.loaded == {1: Request("a", 1)}
    assert asked(engine, Request("a", 1)) == Request("a", 1)
    assert engine.list_loras() == {1}
    assert engine.pin_lora(1) and engine.pin_lora(7) and engine.pinned == [1, 7]
    assert engine.remove_lora(1) and not engine.remove_lora(1) and not engine.remove_lora(7)


def test_name_with_another_id_is_renamed(engine):
    # vLLM's server gives a new id after unload and load, while old requests are still running.
    old, new = asked(engine, Request("a", 1)), asked(engine, Request("a", 2))
    assert (old.lora_name, old.lora_int_id) == ("a", 1)
    assert (new.lora_name, new.lora_int_id) == ("a#2", 2)
    assert asked(engine, Request("a", 1)) == old and asked(engine, Request("a", 2)) == new
    assert asked(engine, Request("a#2", 3)).lora_name == "a#2#2"


def test_load_in_place_gives_the_engine_a_new_adapter(engine):
    first = asked(engine, Request("a", 1, "/one"))
    assert engine.add_lora(Request("a", 1, "/one", load_inplace=True))
    second = asked(engine, Request("a", 1, "/one"))
    assert engine.add_lora(Request("a", 1, "/two", load_inplace=True))
    third = asked(engine, Request("a", 1, "/two"))
    assert asked(engine, Request("a", 1, "/one")) == second, "queued before the load"
    known = [first, second, third]
    assert [each.lora_name for each in known] == ["a", "a#2", "a#3"]
    assert len({each.lora_int_id for each in known}) == 3
    assert not any(each.load_inplace for each in (*known, *engine.loaded.values()))
    assert engine.list_loras() == {1}, "the caller's id"
    assert asked(engine, third) == third, "the same request again"
    assert engine.pin_lora(1) and engine.pinned == [third.lora_int_id]
    assert engine.remove_lora(1) and not engine.loaded


def test_adapters_with_the_same_id_are_loaded_separately(engine):
    # Several servers with one engine assign ids independently.
    a, b = asked(engine, Request("a", 1, "/a")), asked(engine, Request("b", 1, "/b"))
    assert (b.lora_name, a.lora_int_id) == ("b", 1) and b.lora_int_id != 1
    assert asked(engine, Request("a", 1, "/a")) == a and asked(engine, Request("b", 1, "/b")) == b


def test_failed_load_keeps_the_previous_adapter(engine):
    first = asked(engine, Request("a", 1))
    engine.fails = True
    with pytest.raises(ValueError, match="no such file"):
        engine.add_lora(Request("a", 1, load_inplace=True))
    assert asked(engine, Request("a", 1)) == first
    assert engine.pin_lora(1) and engine.pinned == [1]


def test_adapter_loaded_again_after_its_removal_gets_a_new_name(engine):
    engine.add_lora(Request("a", 1))
    assert engine.remove_lora(1)
    assert asked(engine, Request("a", 1)).lora_name == "a#2"


def test_request_with_load_inplace_reloads_only_changed_files(engine, tmp_path):
    # vLLM's server copies the flag load_inplace into all later requests for the adapter.
    file = tmp_path / "one" / "adapter_model.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"one")
    request = Request("a", 1, str(file.parent), load_inplace=True)
    first = asked(engine, request)
    assert asked(engine, request) == first and first.lora_name == "a"
    times = os.stat(file)
    file.write_bytes(b"two")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # `cp -p` keeps the times too
    second = asked(engine, request)
    assert second.lora_name == "a#2" and asked(engine, request) == second
    file.write_bytes(b"three")
    assert asked(engine, dataclasses.replace(request, load_inplace=False)) == second
    shutil.rmtree(file.parent)
    assert asked(engine, request).lora_name == "a#3" and not os.path.exists(request.lora_path)


def test_activated_adapter_is_refused_if_vllm_is_not_prepared(engine, tmp_path):
    # vLLM would stop in a step with such an adapter, or apply it to all tokens.
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"r": 4, "alora_invocation_tokens": [7, 8]}))
    request = Request("judge", 1, str(tmp_path))
    for door in (lambda: asked(engine, request), lambda: engine.add_lora(request)):
        with pytest.raises(ValueError, match=r"'judge': alora_invocation_tokens: .* \[7, 8\]"):
            door()
    assert not engine.loaded
    for ordinary in ({"r": 4, "alora_invocation_tokens": None}, {"r": 4}, ["no configuration"]):
        config.write_text(json.dumps(ordinary))
        assert asked(engine, request) == request
