"""vLLM engines for the tests. `make vllm` installs vLLM in an environment and runs the tests
there."""

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # tests/ is in sys.path for its helpers, so this folder would be imported as a package named
    # vllm.
    spec = importlib.util.find_spec("vllm")
    if spec is not None and spec.origin is not None:
        return
    reason = "vllm is not installed; `make vllm` makes an environment that has it"
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the base model ``base``, a classifier, and adapters."""
    import served_llama

    made = tmp_path_factory.mktemp("llama")
    served_llama.make(made)
    return made


@pytest.fixture(scope="session")
def peft_model(folder: Path) -> Any:
    """Return a PEFT model with the adapters of ``folder``, whose answers vLLM must reproduce."""
    import served_llama

    return served_llama.Reference(folder)


@contextlib.contextmanager
def _environment(processes: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(processes)))
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("LORA_EXT_VLLM", raising=False)
        yield


@pytest.fixture(scope="module")
def make_engine(folder: Path) -> Iterator[Callable]:
    """Yield a function that returns a context manager. It starts an engine in this process, with
    the kernels that LORA_EXT_VLLM selects by default."""
    import served_llama

    with _environment(processes=False):
        yield functools.partial(served_llama.started, folder)


@pytest.fixture
def make_processes(folder: Path) -> Iterator[Callable]:
    """Yield a function like ``make_engine`` for engines in separate processes, vLLM's default."""
    import served_llama

    with _environment(processes=True):
        yield functools.partial(served_llama.started, folder)


@pytest.fixture(scope="module")
def engine(make_engine: Callable) -> Iterator[Any]:
    """Yield an engine with four slots, fewer than adapters, and a maximum rank of 16."""
    with make_engine() as made:
        yield made
