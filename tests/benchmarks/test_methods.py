"""The page of reproductions contains every study, with the figures of its result rows."""

import importlib.util
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
    """Run a study with its smallest sizes. All functions that a study must define are called, and
    must use the same columns."""
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
        for words in (claim.claim, claim.gate, claim.headline, claim.use, claim.earlier):
            assert " ".join(words.split()) in flat
        own = " ".join(path.parents[1].joinpath(f"docs/{name}.md").read_text().split())
        assert f"**Use it when** {claim.use}. **Not when** {claim.avoid}." in own
    assert text.count("not run yet. Earlier protocol") == len(methods.studies())


ROWS: dict[str, list[study.Row]] = {}


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
