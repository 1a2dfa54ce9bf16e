"""Fixtures that run commands of ``lora-ext`` in this process, and adapter folders for them."""

import json

import pytest
from made_adapters import adapter

from lora_ext import cli


@pytest.fixture
def run(capsys):
    """Return a function that runs a command and returns its status, output and error output."""

    def run(*arguments):
        try:
            status = cli.main([str(each) for each in arguments])
        except SystemExit as error:
            status = error.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def run_json(run):
    def run_json(*arguments):
        status, out, err = run(*arguments, "--json")
        assert (status, err) == (0, "")
        return json.loads(out)

    return run_json


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate(("one", "two")):
        adapter(seed).save(tmp_path / name)
    return tmp_path / "one", tmp_path / "two"
