"""Fixtures that run commands of ``lora-ext`` in this process, and adapter folders for them."""

import json

import pytest
from backends import BACKENDS, closed
from made_adapters import adapter

from lora_ext import cli
from lora_ext.cli import _gpu_report


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


@pytest.fixture(scope="session")
def emulator(request):
    """Fail or skip, as the options demand, if the emulator is not built."""
    reason = closed(next(b for b in BACKENDS if b.name == "emu"))
    if reason and request.config.getoption("--require-emu"):
        pytest.fail(reason)
    elif reason:
        pytest.skip(reason)


@pytest.fixture
def emulated(emulator):
    """Yield the device on which the ops run on the emulator during a test."""
    with _gpu_report._backend("emu") as (device, _):
        yield device


@pytest.fixture
def folders(tmp_path):
    for seed, name in enumerate(("one", "two")):
        adapter(seed).save(tmp_path / name)
    return tmp_path / "one", tmp_path / "two"
