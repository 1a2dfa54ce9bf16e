"""Run tests with the lowest versions that pyproject.toml allows, in separate environments.

In each environment the requirements of some extras have the version of their lower bound. torch and
its requirements are links to those of the current Python, because the build in place was made for
that torch. tools/cuda_torch_check.py installs the oldest torch.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from install_extras import install, listed, lowest

ROOT = Path(__file__).resolve().parents[1]
# Extras and tests of each environment.
ENVIRONMENTS = {
    "demo": (
        ["demo", "fed"],
        [
            "tests/integration/test_from_peft_activated.py",
            "tests/integration/test_from_peft_dora.py",
            "tests/federated/test_flower_messages.py",
        ],
    ),
    "quant": (
        ["quant"],
        [
            "tests/integration/test_from_peft_quantised.py",
            "tests/integration/test_quantisers.py",
        ],
    ),
    "serve": (["serve", "tenants", "control"], ["tests/integration/test_serve_formats.py"]),
}
TOOLS = ["pytest", "hypothesis", "httpx", "peft"]  # for the tests; extras take precedence


def borrow(name: str, folder: Path) -> None:
    """Link an installed distribution and its requirements into a folder."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return  # a requirement of another platform
    for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
        if (folder / top).is_symlink():
            if top.endswith(".dist-info"):
                return
            continue
        (folder / top).symlink_to(str(found.locate_file(top)))
    for requirement in found.requires or ():
        if "extra ==" not in requirement:
            borrow(re.split(r"[^\w.-]", requirement, maxsplit=1)[0], folder)


def check(name: str, folder: Path) -> None:
    """Create an environment in a folder if it does not exist, and run its tests."""
    extras, tests = ENVIRONMENTS[name]
    home, borrowed = folder / name, folder / f"{name}-borrowed"
    python = str(home / "bin" / "python")
    if not home.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        borrowed.mkdir()
        borrow("torch", borrowed)
        # pip does not change or remove files outside its environment.
        packages = next(home.glob("lib/python*/site-packages"))
        (packages / "borrowed.pth").write_text(f"{borrowed}\n")
        pins = lowest(listed(extras))
        known = {re.split(r"[^\w-]", pin)[0] for pin in pins}
        install([*pins, *(tool for tool in TOOLS if tool not in known)], python)
    subprocess.run([python, "-m", "pip", "list"], check=True)
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    needs = {"LORA_EXT_QUANTISERS": "1"} if "quant" in extras else {}  # no test may skip
    env = {**os.environ, **needs, "OMP_NUM_THREADS": "2"}
    subprocess.run(command, check=True, cwd=ROOT, env=env)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="environment", help=", ".join(ENVIRONMENTS))
    parser.add_argument("--keep", type=Path, help="folder of environments to create or reuse")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora_ext_lowest_") as temporary:
        for name in given.names or ENVIRONMENTS:
            check(name, (given.keep or Path(temporary)).resolve())
    return 0


if __name__ == "__main__":
    sys.exit(main())
