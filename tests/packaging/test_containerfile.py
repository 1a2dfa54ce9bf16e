"""The Containerfile, checked without building an image: its steps, files and command."""

import json
import re
import subprocess

from scripts import ROOT

from lora_ext.cli._arguments import make_parser

KNOWN = {"FROM", "RUN", "WORKDIR", "COPY", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "STOPSIGNAL"}
KNOWN |= {"ENTRYPOINT", "CMD"}


def steps() -> list[tuple[str, str]]:
    text = (ROOT / "Containerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"]
    return [tuple(line.split(maxsplit=1)) for line in lines]  # pyright: ignore[reportReturnType]


def test_every_step_is_known_and_copies_what_a_build_needs() -> None:
    assert {name for name, _ in steps()} <= KNOWN and steps()[0][0] == "FROM"
    images = [rest.split()[0] for name, rest in steps() if name == "FROM"]
    assert all(re.search(r":\d", image) and image.count("/") == 2 for image in images)
    copied: set[str] = set()
    for name, rest in steps():
        if name == "COPY" and not rest.startswith("--from="):
            copied.update(rest.split()[:-1])
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    files = tracked.stdout.split()
    assert all(any(f == each or f.startswith(f"{each}/") for f in files) for each in copied)
    needed = {"setup.py", "pyproject.toml", "MANIFEST.in", "CMakeLists.txt", "csrc", "lora_ext"}
    assert needed | {"LICENSE", "README.md", "tools"} <= copied


def test_container_runs_without_root_and_with_valid_arguments() -> None:
    last = [rest for name, rest in steps() if name == "USER"]
    assert last and last[-1] != "root"
    whole = {name: json.loads(rest) for name, rest in steps() if name in ("ENTRYPOINT", "CMD")}
    program, *arguments = [*whole["ENTRYPOINT"], *whole["CMD"]]
    parsed = make_parser().parse_args(arguments)
    assert program == "lora-ext" and parsed.command == "serve" and parsed.host == "0.0.0.0"
    exposed = [rest for name, rest in steps() if name == "EXPOSE"]
    assert exposed == [str(parsed.port)]
