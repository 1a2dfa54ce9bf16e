"""What a release says of itself, and the wheel that names its torch."""

import re
import zipfile
from pathlib import Path

import pytest
from scripts import ROOT, tool

import lora_ext


def test_the_version_is_one_everywhere() -> None:
    for file, pattern in (
        ("pyproject.toml", r'^version = "(.+)"$'),
        ("CITATION.cff", r"^version: (.+)$"),
        ("CHANGELOG.md", r"^## (\S+)"),
    ):
        found = re.search(pattern, (ROOT / file).read_text(), re.M)
        assert found and found[1] == lora_ext.__version__, file


def test_the_newest_changes_stand_in_order() -> None:
    newest = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert re.findall(r"^### (\w+)$", newest, re.M) == ["Added", "Changed", "Fixed"]


def test_the_recipe_has_a_command_for_each_step_that_make_or_git_knows() -> None:
    page = (ROOT / "docs/releasing.md").read_text().split("\n## A release\n")[1].split("\n## ")[0]
    steps = re.findall(r"^\d+\. .*?(?=^\d+\. |\Z)", page, re.M | re.S)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert len(steps) > 4
    for step in steps:
        (command,) = re.findall(r"^ *\$ (.+)$", step, re.M)
        name, first = command.split()[:2]
        assert name in ("git", "$EDITOR", "python", "pip") or (name == "make" and first in targets)


@pytest.mark.parametrize(("cuda", "local"), [(None, "torch2.13.cpu"), ("13.0", "torch2.13.cu130")])
def test_a_wheel_names_its_torch(tmp_path: Path, cuda: str | None, local: str) -> None:
    wheel = tmp_path / "lora_ext-0.2.0-cp311-cp311-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as out:
        out.writestr("lora_ext/_C.so", b"\0" * 9)
        requires = "Requires-Dist: torch>=2.11\nRequires-Dist: numpy\n"
        metadata = f"Name: lora_ext\nVersion: 0.2.0\n{requires}"
        out.writestr("lora_ext-0.2.0.dist-info/METADATA", metadata)
        out.writestr("lora_ext-0.2.0.dist-info/RECORD", "")
    made = tool("wheels").for_torch(wheel, "2.13.1+cpu", cuda)
    assert made.name == f"lora_ext-0.2.0+{local}-cp311-cp311-linux_x86_64.whl"
    assert not wheel.exists()
    found = zipfile.ZipFile(made)
    info = f"lora_ext-0.2.0+{local}.dist-info"
    assert found.namelist() == ["lora_ext/_C.so", f"{info}/METADATA", f"{info}/RECORD"]
    text = found.read(f"{info}/METADATA").decode()
    assert f"Version: 0.2.0+{local}\nRequires-Dist: torch==2.13.*\nRequires-Dist: numpy" in text
    record = found.read(f"{info}/RECORD").decode().splitlines()
    # of nine zero bytes, by openssl
    assert record[0] == "lora_ext/_C.so,sha256=PnB3_S9m1ongzuanz1s3vy3KfJea81bQoxy8XIVgXH0,9"
    assert record[2] == f"{info}/RECORD,,"
