"""The page of reproductions contains every study, with the figures of its result rows."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import study
from scripts import module_of, needs

# The module is loaded under another name, because `methods` is already the package tests/methods.
path = Path(study.__file__).with_name("methods.py")
methods = module_of(path, "reproductions")

pytestmark = needs("matplotlib", "peft", "rich", "sklearn", "tqdm", "transformers")


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.studies())
def test_verdict_from_results_equals_the_verdict_of_the_run(name, tmp_path, capsys):
    """Run a study at its smallest sizes, then print the verdict again from its saved rows. This
    calls every function that a study must define, so their columns must agree."""
    module = importlib.import_module(name)
    arguments = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    assert study.run(module, arguments) == 0
    of_the_run = capsys.readouterr().out
    picture = tmp_path / "a.png"
    assert study.run(module, [*arguments, "--from-results", "--picture", str(picture)]) == 0
    assert of_the_run.endswith(capsys.readouterr().out)
    assert picture.stat().st_size > 5_000
    claim = module.CLAIM
    assert claim.claim.endswith(".") and claim.earlier
    assert "(headline) " in of_the_run


def test_page_contains_every_study(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setattr(methods, "found_rows", lambda name, module: (ROWS.get(name, []), 0))
    assert methods.main(["--from-results", "--page", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    flat = " ".join(text.split())  # The page has line breaks.
    for name in methods.studies():
        claim = importlib.import_module(name).CLAIM
        assert f"\n## {name}\n" in text
        for words in (claim.claim, claim.gate, claim.headline, claim.earlier):
            assert " ".join(words.split()) in flat
        own = " ".join(path.parents[1].joinpath(f"docs/{name}.md").read_text().split())
        assert f"**Use when** {claim.use}. **Avoid when** {claim.avoid}." in own
    assert text.count("none yet. Earlier protocol") == len(methods.studies())


ROWS: dict[str, list[study.Row]] = {}


def test_every_study_has_a_gate_and_a_duration_for_every_run():
    for name in methods.studies():
        module = importlib.import_module(name)
        assert callable(module.gate) and module.CLAIM.gate and module.CLAIM.seeds >= 3
        trials = study.trials_of(module, [], quick=False)
        assert trials and all(arm["seed"] >= study.TRIALS for arm in trials)
        for arm in (*trials, *study.arms_of(module, range(module.CLAIM.seeds), quick=False)):
            assert 0 < module.minutes(arm) <= 100, (name, arm)


def test_minutes_and_verdicts_of_all_studies_are_printed(monkeypatch, capsys):
    monkeypatch.setattr(methods, "found_rows", lambda name, module: ([], 0))
    assert methods.main(["--left"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == [*methods.studies(), "all"]
    assert int(printed[-1].split()[1]) > 0
    assert methods.main(["--json", "--only", "copra", "mod"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["mod"] == {
        "verdict": "not run yet",
        "seeds": [],
        "figure": "",
        "gate": [],
        "criteria": [],
    }


def test_page_in_docs_is_that_of_the_rows(tmp_path, monkeypatch):
    # Debian's texts change, so their hash can differ from that of the rows.
    of_last = classmethod(lambda cls, path, study, quick: cls.of_last(path))
    monkeypatch.setattr(study.Store, "of", of_last)
    assert methods.main(["--from-results", "--page", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert text == methods.PAGE.read_text()
    assert len(re.findall(r"[^\s|]*\w[^\s|]*", text)) <= 2500


def test_named_checks_run_and_determine_the_status(tmp_path, monkeypatch, capsys):
    run: list[tuple[str, int | None]] = []

    def check(name, seeds):
        run.append((name, seeds))
        return name != "mtpc"

    monkeypatch.setattr(methods, "check", check)
    monkeypatch.setattr(methods, "page", lambda names: "a page")
    page = ["--page", str(tmp_path / "page.md")]
    assert methods.main(["--only", "lora_init", "--seeds", "1", *page]) == 0
    assert run == [("lora_init", 1)]
    assert methods.main(["--only", "lora_init", "mtpc", *page]) == 1
    assert "headline not met, or no result: mtpc" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        methods.main(["--only", "nothing", *page])
