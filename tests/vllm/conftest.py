"""Engines of vLLM, where it is installed: `make vllm` makes an environment and runs these tests."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


def _missing() -> str | None:
    """Why the tests here cannot run. This folder, on the path as one of the tests' helpers, would
    itself pass for a package named vllm."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return "vllm is not installed; `make vllm` makes an environment that has it"
    if not [
        e for e in importlib.metadata.entry_points(group="vllm.general_plugins", name="lora_ext")
    ]:
        return "lora_ext is not installed, so that vLLM does not find its plug-in; see `make vllm`"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := _missing():
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `base` and its adapters."""
    import served_llama

    made = tmp_path_factory.mktemp("llama")
    served_llama.make(made)
    return made


@pytest.fixture(scope="session")
def peft_model(folder: Path):
    """The same through transformers and PEFT."""
    import served_llama

    return served_llama.Reference(folder)


@pytest.fixture(scope="module")
def make_engine(folder: Path) -> Iterator[Callable]:
    """Start an engine in this process, with the kernels that LORA_EXT_VLLM chooses by default."""
    patch = pytest.MonkeyPatch()
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    patch.delenv("LORA_EXT_VLLM", raising=False)
    import served_llama

    with contextlib.ExitStack() as running:
        yield lambda **options: running.enter_context(served_llama.started(folder, **options))
    patch.undo()


@pytest.fixture(scope="module")
def engine(make_engine: Callable):
    """Four slots, six adapters and more, rank 16 at most."""
    return make_engine()
