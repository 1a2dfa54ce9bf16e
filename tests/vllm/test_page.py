"""Run the code of docs/vllm.md."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/vllm.md"


def test_code_of_the_page_runs(folder, tmp_path, monkeypatch):
    (tmp_path / "base-model").symlink_to(folder / "base")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters/pirate").symlink_to(folder / "a")
    (tmp_path / "adapters/telegram").symlink_to(folder / "b")
    monkeypatch.chdir(tmp_path)
    for name, value in (("VLLM_ENABLE_V1_MULTIPROCESSING", "0"), ("VLLM_CPU_KVCACHE_SPACE", "1")):
        monkeypatch.setenv(name, value)
    (code,) = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    scope = {}
    exec(compile(code, str(PAGE), "exec"), scope)
    assert len({tuple(output.outputs[0].token_ids) for output in scope["outputs"]}) == 3
    del scope["llm"]

    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
