"""Run everything that CI runs (`make check`). Kernels are compiled unless LORA_EXT_CUDA is 0."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from legs import ROOT, Leg, run

PY = sys.executable
BIN = str(Path(PY).parent)  # no resolve(): the link leads out of the virtual environment


def main() -> int:
    cuda = os.environ.get("LORA_EXT_CUDA", "1")
    os.environ.update(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", LORA_EXT_CUDA=cuda)
    share_compilations()
    tests = [PY, "-m", "pytest", "-q", "--durations=15", "--require-emu", "tests"]
    tests += ["-n", "2", "--dist", "worksteal"]  # keeps tests that share fixtures on one worker
    # The leg "pages" runs this test.
    tests += ["--deselect", "tests/docs/test_pages.py::test_code_of_the_page_runs"]
    tests.append("--hypothesis-profile=ci")  # fixed examples; `make test` draws new ones
    if os.environ.get("FULL") != "1":
        tests.append("--pairs")  # `make check FULL=1`, before a release, runs every combination
    if os.environ.get("CHECK_REST") == "1":
        tests += ["--rest", "1"]  # `make test` has run the other tests in this build
    docs = [BIN + "/mkdocs", "build", "--strict", "--site-dir", "out/docs"]
    # The pages run on the output of `make demo`; the tests use a small replacement.
    demo = [PY, "examples/demo.py", "--tokens", "4", "--rounds", "1", "--adapters", "2"]
    pages = [PY, "-m", "pytest", "-q", "tests/docs/test_pages.py", "-k", "code_of_the_page"]
    legs = [
        Leg("build", [PY, "setup.py", "build_ext", "--inplace"], 1800, env={"LORA_EXT_EMU": "1"}),
        Leg("doctor", [PY, "-m", "lora_ext.doctor"], 120, after="build"),
        Leg("demo", demo, 900, after="build"),
        Leg("tests", tests, 3600, after="build"),
        # The leg "tests" runs these tests too, with the code paths of this processor.
        Leg("hosts", [PY, "tools/hosts.py", "this processor"], 1200, after="build"),
    ]
    if cuda == "1" and os.environ.get("SKIP_CUDA_TORCH") != "1":
        # This leg runs in parallel with the tests, because its download needs no core.
        command = [PY, "tools/cuda_torch_check.py"]
        legs.append(Leg("cuda torch", command, 2400, after="build", beside=True))
    lowest = [PY, "tools/lowest_check.py"]
    legs.append(Leg("lowest versions", [*lowest, "demo", "serve"], 900, after="build", beside=True))
    legs.append(Leg("quantisers", [*lowest, "quant"], 900, after="build", beside=True))
    command = [*pages, "--demo", "out/demo"]
    legs.append(Leg("pages", command, 1800, after="demo", beside=True))
    lint = ["pre-commit", "run", "--all-files", "--show-diff-on-failure"]
    legs.append(Leg("lint", lint, 600, beside=True))
    legs.append(Leg("prose", [PY, "tools/prose.py"], 120, beside=True))
    legs.append(Leg("docs", docs, 600, env={"NO_MKDOCS_2_WARNING": "1"}, beside=True))
    if cuda == "1":
        sass = [PY, "tools/sass_gate.py"]
        legs.append(Leg("machine code", sass, 1200, after="build", beside=True))
    return 1 if run(legs, ROOT / "out" / "check", show=True) else 0


def share_compilations() -> None:
    """Make later builds (of the wheel, and for a CUDA torch) reuse objects of earlier ones.

    Twins and kernels do not include torch's headers, so their objects fit every torch. Without
    ccache, each build compiles everything.
    """
    if shutil.which("ccache"):
        for language in ("CXX", "CUDA"):
            os.environ.setdefault(f"CMAKE_{language}_COMPILER_LAUNCHER", "ccache")


if __name__ == "__main__":
    sys.exit(main())
