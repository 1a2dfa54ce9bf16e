"""Calls of serving and training go only to lower packages and pass through few files, each once."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import pytest
import torch
from scripts import tool
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ext
from lora_ext.rows import Block

ROOT = Path(__file__).resolve().parents[2]
# Maximum number of files through which one call may pass. from_peft has the largest number, because
# it also looks for quantised layers, routers and adapters of other kinds.
MOST_STAYS = 14
# Functions that call a function of their caller's file to make a value.
_MADE_TO_BE_KEPT = ("get", "keep", "_ordinary", "<module>")
#: Packages whose calls are recorded. Calls within the pool and the ops are not.
ROOMS = ("serving", "rows", "layers", "interop", "adapter")


def _below() -> dict[str, set[str]]:
    """Return, for each module, all modules that it imports directly or indirectly."""
    house = tool("house")
    known = house.modules(ROOT)
    shown = {m: house.names_of(m, p) for m, p in known.items() if p.name == "__init__.py"}
    direct = {m: {i.target for i in house.imports_of(m, p, known, shown)} for m, p in known.items()}
    found = {}
    for module in known:
        seen, left = set(), [module]
        while left:
            new = direct[left.pop()] - seen
            seen |= new
            left += new
        found[module] = seen
    return found


BELOW = _below()


class Way:
    """Context manager that records the calls from file to file.

    Args:
        handed: Returns whether a call adds its file to ``stays``, the list of visited files.
    """

    def __init__(self, handed: Callable[[FrameType], bool]):
        self._handed = handed
        self.stays: list[str] = []
        self.climbs: set[str] = set()
        self.returns: set[str] = set()

    def __enter__(self) -> Way:
        gc.collect()  # finalizes objects of earlier tests
        sys.setprofile(self._on)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _on(self, frame: FrameType, event: str, _: Any) -> None:
        file = _file(frame) if event == "call" else None
        # Code that runs during an import is not recorded.
        if file is None or frame.f_code.co_name == "<module>":
            return
        around = []
        outer = frame.f_back
        while outer is not None:
            # Functions in _MADE_TO_BE_KEPT are treated as part of their caller.
            if (name := _file(outer)) and outer.f_code.co_name not in _MADE_TO_BE_KEPT:
                around.append(name)
            outer = outer.f_back
        step = f"{around[0] if around else 'a user'} -> {file}.{frame.f_code.co_name}"
        if around and around[0] != file:
            if around[0] in BELOW[file]:
                self.climbs.add(step)
            if file in around:
                self.returns.add(step)
        if file not in self.stays and self._handed(frame):
            self.stays.append(file)


def _file(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(ROOT / "lora_ext"):
        return None
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__") if parts[1] in ROOMS else None


CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    attn_implementation="eager",  # Continuous batching replaces "sdpa" by a function of lora_ext.
)
LORA = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
IDS = torch.arange(8).view(2, 4)


@pytest.fixture
def model_and_pool(tmp_path: Path) -> tuple[Any, lora_ext.AdapterPool]:
    peft.get_peft_model(LlamaForCausalLM(CONFIG), LORA).save_pretrained(tmp_path)
    model = LlamaForCausalLM(CONFIG).eval()
    pool = lora_ext.AdapterPool(model, max_slots=2, max_rank=8)
    pool.load("a", tmp_path)
    pool.load("b", tmp_path)
    return model, pool


def check(way: Way) -> None:
    assert not way.climbs, sorted(way.climbs)
    assert not way.returns, sorted(way.returns)
    assert 1 < len(way.stays) <= MOST_STAYS, " ".join(way.stays)


def _knows(value: Any, pool: lora_ext.AdapterPool) -> bool:
    return value is pool or isinstance(value, Block) or getattr(value, "pool", None) is pool


def test_calls_of_attach_go_down_through_few_files(model_and_pool: Any) -> None:
    model, pool = model_and_pool
    with Way(lambda frame: any(v is pool for v in frame.f_locals.values())) as way:
        lora_ext.attach(model, pool)
    check(way)


@pytest.mark.parametrize("by", ["block", "names", "generate"])
def test_calls_of_an_attached_model_go_down_through_few_files(model_and_pool: Any, by: str) -> None:
    model, pool = model_and_pool
    lora_ext.attach(model, pool)
    with Way(lambda frame: any(_knows(v, pool) for v in frame.f_locals.values())) as way:
        if by == "block":
            with torch.no_grad(), lora_ext.adapters(["a", "b"]):
                model(IDS)
        elif by == "names":
            with torch.no_grad():
                model(IDS, adapter_names=["a", "b"])
        else:
            model.generate(IDS, adapter_names=["a", "b"], max_new_tokens=2, do_sample=False)
    check(way)


@pytest.mark.slow
def test_from_peft_and_a_training_step_go_down_through_few_files() -> None:
    model = peft.get_peft_model(LlamaForCausalLM(CONFIG), LORA)
    model.add_adapter("other", LORA)
    with Way(lambda _: True) as way:
        lora_ext.from_peft(model)
    check(way)
    model.base_model.set_adapter(["default", "other"])
    with Way(lambda _: True) as way:
        model(IDS, adapter_names=["default", "other"], labels=IDS).loss.backward()
    check(way)
