"""Sources that contain no adapter: the error states what was expected and what was found."""

import pytest
from pool_support import Base, config, state

from lora_ext.adapter import save_adapter
from lora_ext.pool import AdapterPool


@pytest.fixture
def pool():
    return AdapterPool(Base(), max_slots=2, max_rank=8)


def test_names_on_the_hub_are_not_downloaded(pool):
    with pytest.raises(
        ValueError,
        match=r"org/name: cannot be opened: expected a directory .*found No such file.*; nothing "
        r"is downloaded here: pass the result of huggingface_hub.snapshot_download\('org/name'\)$",
    ):
        pool.load("a", "org/name")


def test_error_for_a_path_without_an_adapter_names_its_content(pool, tmp_path):
    with pytest.raises(ValueError, match=r"found No such file or directory$"):
        pool.load("a", tmp_path / "nowhere")
    for name in ("red", "blue"):
        save_adapter(tmp_path / name, config(), state(0))
    with pytest.raises(ValueError, match=r"json, found one with adapters in blue, red$"):
        pool.load("a", tmp_path)
    with pytest.raises(ValueError, match="found a file; pass its directory"):
        pool.load("a", tmp_path / "red" / "adapter_model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"json, found one without this file$"):
        pool.load("a", tmp_path / "empty")


@pytest.mark.parametrize("source", [None, {}, [config(), state(0)], 3, b"adapters/red"])
def test_sources_of_other_types_are_refused(pool, source):
    with pytest.raises(TypeError, match=f"expected a directory .* found {type(source).__name__}"):
        pool.load("a", source)
    assert pool.names == []
