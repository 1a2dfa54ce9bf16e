"""Fixtures of the integration tests: one thread for torch, and a running ``lora-ext serve``."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Run tests with one thread, since their matrices are too small to gain from more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from served import serving

    with serving(tmp_path_factory.mktemp("serve")) as found:
        yield found
