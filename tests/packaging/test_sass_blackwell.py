"""The gate on machine code for Blackwell, whose lock CI checks without compiling."""

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from scripts import tool

gate = tool("sass_gate")
blackwell = tool("sass_blackwell")

HEADER = "// A header.\nconstexpr int kOne = 1;\n"
SOURCE = '#include "sum.cuh"  // a header\nint two() { return kOne + 1; }\n'
SPILLS = """
namespace lora_ext {
__global__ void kept_kernel(float* y) { y[threadIdx.x] += 1; }
__global__ void spilled_kernel(float* y, int n) {
    float a[64];
    for (int i = 0; i < 64; ++i) a[i] = y[i];
    for (int k = 0; k < n; ++k) a[(k * 37 + n) & 63] += a[k & 63];
    for (int i = 0; i < 64; ++i) y[i] = a[i];
}
}
"""


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """Return a repository of the sources a.cu and b.cu, with `a_kernel` and `b_kernel` in locks."""
    cuda = tmp_path / "csrc/cuda"
    cuda.mkdir(parents=True)
    (cuda / "sum.cuh").write_text(HEADER)
    (cuda / "a.cu").write_text(SOURCE)
    (cuda / "b.cu").write_text("int three();\n")
    gate_lock = tmp_path / "kernels.lock"
    names = ("a_kernel", "b_kernel")
    rows = [f"{arch}  64  0  5040  {name}  inflight 64" for name in names for arch in ("sm_80",)]
    gate_lock.write_text("\n".join(rows) + "\n")
    for module, name, value in (
        (blackwell, "ROOT", tmp_path),
        (blackwell, "LOCK", tmp_path / "kernels_blackwell.lock"),
        (gate, "LOCK", gate_lock),
        (gate, "compiler", lambda command="": "# nvcc 13.0.88"),
        (blackwell, "compiled", lambda wanted: [(one, Path(one)) for one in wanted]),
        (blackwell, "kernels_of", lambda path: kernels(f"{path.stem}_kernel")),
    ):
        monkeypatch.setattr(module, name, value)
    assert blackwell.main([], update=True) == 0
    return tmp_path


def kernels(name: str, **numbers: int) -> list:
    return [gate.Kernel(arch, name, name, **numbers) for arch in blackwell.ARCHS]


def test_locks_of_the_repository_list_the_same_kernels_and_no_new_spill() -> None:
    rows = blackwell.Lock.read(blackwell.LOCK).rows
    names = blackwell.locked_names(gate.LOCK)
    assert len(names) > 200
    assert blackwell.uncovered(names, rows, "kernels_blackwell.lock") == []
    stacks = {
        key: int(row.split()[3]) for key, row in rows.items() if row.split()[3:5] != ["0"] * 2
    }
    assert stacks == blackwell.ALLOWED


def test_only_code_changes_the_digest_of_a_source(repository) -> None:
    lock, header = blackwell.Lock.read(blackwell.LOCK), repository / "csrc/cuda/sum.cuh"
    assert blackwell.changed(lock, repository) == []
    header.write_text('/* Another\n comment. */ constexpr int  kOne = 1;  // "\n')
    assert blackwell.changed(lock, repository) == []
    header.write_text(HEADER.replace("1", "2"))
    assert blackwell.changed(lock, repository) == ["csrc/cuda/a.cu"]
    header.write_text(HEADER)
    (repository / "csrc/cuda/b.cu").rename(repository / "csrc/cuda/c.cu")
    assert blackwell.changed(lock, repository) == ["csrc/cuda/b.cu", "csrc/cuda/c.cu"]


def test_literal_that_looks_like_a_comment_is_part_of_the_digest(repository) -> None:
    source = repository / "csrc/cuda/b.cu"
    digests = set()
    for text in ('f("// a");', 'f("// b");', "f('\\\"'); // b", "f('\\\"'); // c"):
        source.write_text(text)
        digests.add(blackwell.digest("csrc/cuda/b.cu", repository))
    assert len(digests) == 3


def test_ci_reports_changed_sources_and_fails_for_another_kernel(repository, capsys) -> None:
    def covered(*names):
        return blackwell.covered(names, blackwell.LOCK, repository)

    assert covered("a_kernel", "b_kernel") == ([], 0) and capsys.readouterr().out == ""
    (repository / "csrc/cuda/sum.cuh").write_text("constexpr int kOne = 3;")
    assert covered("a_kernel", "b_kernel") == ([], 1)
    assert "csrc/cuda/a.cu" in capsys.readouterr().out
    wrong, _ = covered("a_kernel", "c_kernel")
    assert wrong[0] == "kernels_blackwell.lock has no c_kernel for sm_100f"
    assert "kernels.lock has no b_kernel, kernels_blackwell.lock has" in wrong


def test_release_fails_if_sources_have_changed_until_they_are_compiled(
    repository, capsys, monkeypatch
) -> None:
    assert blackwell.main([], update=False) == 0
    (repository / "csrc/cuda/a.cu").write_text("int four();")
    assert blackwell.main([], update=False) == 1
    assert "FAIL csrc/cuda/a.cu has changed since" in capsys.readouterr().out
    compiled = []
    monkeypatch.setattr(
        blackwell,
        "compiled",
        lambda wanted: [(w, Path(w)) for w in wanted if not compiled.append(w)],
    )
    assert blackwell.main([], update=True) == 0
    assert compiled == ["csrc/cuda/a.cu"]  # b.cu has the recorded digest
    assert blackwell.main([], update=False) == 0


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ({"stack": 8}, "uses 8 bytes of stack and 0 of local memory"),
        ({"registers": 9}, "kernels_blackwell.lock differs; found sm_100f       9"),
    ],
)
def test_new_spill_or_other_number_fails(repository, capsys, monkeypatch, numbers, reason) -> None:
    def found(path):
        return kernels(f"{path.stem}_kernel", **numbers)

    monkeypatch.setattr(blackwell, "kernels_of", found)
    assert blackwell.main([], update=False) == 1
    assert reason in capsys.readouterr().out
    assert blackwell.main([], update=True) == 0  # unchanged sources are not compiled


def test_allowed_spill_passes_until_it_grows_or_is_mended(monkeypatch) -> None:
    monkeypatch.setattr(blackwell, "ALLOWED", {("sm_120", "a_kernel"): 8})
    for stack, reason in ((0, "no longer spills"), (8, ""), (16, "uses 16 bytes of stack")):
        wrong = blackwell.judge(kernels("a_kernel", stack=stack)[1])
        assert reason in "".join(wrong) and len(wrong) == bool(reason)


def test_missing_kernel_fails(repository, capsys, monkeypatch) -> None:
    monkeypatch.setattr(blackwell, "kernels_of", lambda path: kernels("a_kernel"))
    assert blackwell.main([], update=False) == 1
    assert "FAIL the build has no b_kernel for sm_120" in capsys.readouterr().out


@pytest.mark.slow
def test_kernels_of_a_wheel_are_read_and_a_spill_is_found(tmp_path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    (tmp_path / "t.cu").write_text(SPILLS)
    targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in blackwell.ARCHS]
    targets.append("-gencode=arch=compute_80,code=sm_80")
    subprocess.run([nvcc, "-O3", *targets, "-c", "t.cu", "-o", "t.o"], cwd=tmp_path, check=True)
    with zipfile.ZipFile(tmp_path / "t.whl", "w") as wheel:
        wheel.write(tmp_path / "t.o", "lora_ext/_C.cpython-311-x86_64-linux-gnu.so")
    for path in (tmp_path / "t.o", tmp_path / "t.whl"):
        found = {(one.arch, one.name): one for one in blackwell.kernels_of(path)}
        names = ("kept_kernel", "spilled_kernel")
        assert set(found) == {(arch, name) for arch in blackwell.ARCHS for name in names}
        wrong = [reason for one in found.values() for reason in blackwell.judge(one)]
        assert {reason.split(":")[0] for reason in wrong} == {
            f"{arch} spilled_kernel" for arch in blackwell.ARCHS
        }
        assert any("256 bytes of stack" in reason for reason in wrong)
