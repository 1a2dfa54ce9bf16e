"""The gate on kernels for Blackwell compiles only if the kernels' code has changed."""

from pathlib import Path

import pytest
from scripts import tool

tool("sass_loops")
tool("sass_gate")  # The gate imports these modules.
gate = tool("blackwell_gate")


def write(root: Path, code: str) -> str:
    for folder in gate.FOLDERS:
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "csrc/cuda/one.cu").write_text(code)
    return gate.digest(root)


def test_digest_depends_on_code_and_not_on_comments_or_spaces(tmp_path: Path) -> None:
    first = write(tmp_path, "int a = 1;\n")
    assert write(tmp_path, "// A comment.\nint a =\n    1;  // another\n") == first
    assert write(tmp_path, "int a = 2;\n") != first
    write(tmp_path, "int a = 1;\n")
    (tmp_path / "csrc/device/two.h").write_text("int b;\n")
    assert gate.digest(tmp_path) != first


@pytest.mark.parametrize(
    ("sources", "found", "status"),
    [("same", None, 0), ("other", ["head", "sm_120  4 0  f"], 0), ("other", ["head"], 1)],
)
def test_gate_compiles_only_changed_code_and_compares_every_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sources: str,
    found: list[str] | None,
    status: int,
) -> None:
    def table() -> list[str]:
        assert found is not None, "nothing should be compiled"
        return found

    lock = tmp_path / "lock"
    monkeypatch.setattr(gate, "LOCK", lock)
    monkeypatch.setattr(gate, "digest", lambda: "same")
    monkeypatch.setattr(gate, "table", table)
    monkeypatch.setattr(gate.sass_gate, "compiler", lambda: "# nvcc 1, -O3")
    lock.write_text(f"# nvcc 1, sources {sources}\nhead\nsm_120  4 0  f\n")
    assert gate.main([]) == status
    if found:
        assert gate.main(["--update"]) == 0
        assert lock.read_text().splitlines() == ["# nvcc 1, sources same", *found]
        assert gate.main([]) == 0
