"""`make hosts` runs one leg per setting and prints why it skips one this processor lacks."""

from types import ModuleType

import pytest
from scripts import load_script

import lora_ext


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(monkeypatch, "tools", "hosts")


def test_two_settings_run_side_by_side_and_a_failed_one_fails_all(hosts, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(hosts, "run", lambda legs, logs: ran.extend(legs) or 1)
    monkeypatch.setattr(hosts, "lacking", lambda env: None)
    monkeypatch.setattr(hosts, "processor", lambda: "Xeon")
    assert hosts.main() == 1
    assert "processor: Xeon" in capsys.readouterr().out
    assert [leg.name for leg in ran] == list(hosts.SETTINGS)
    assert abs(sum(leg.beside for leg in ran) - len(ran) / 2) < 1
    assert {leg.env["OMP_NUM_THREADS"] for leg in ran} == {"1", "3"}


def test_a_setting_that_the_processor_lacks_is_skipped_with_its_reason(hosts, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(hosts, "SETTINGS", {"plain": {}, "strange": {"LX_ISA": "avx1024"}})
    monkeypatch.setattr(hosts, "run", lambda legs, logs: ran.extend(legs) or 0)
    before = lora_ext._C.cpu_isa()
    assert hosts.main() == 0
    assert [leg.name for leg in ran] == ["plain"] and lora_ext._C.cpu_isa() == before
    assert "strange: skipped: set_cpu_isa: isa: expected" in capsys.readouterr().out
