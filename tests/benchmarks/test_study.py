"""The harness of the small reproductions: rows, criteria, exit status, the same from its file."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import study
from study import Claim, Criterion, Verdict


@pytest.fixture
def coin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """A study that asks its seeds for heads, and writes beside the test."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    module = ModuleType("coin")
    module.__doc__ = "A coin."
    module.__file__ = "benchmarks/coin.py"

    def measure(seeds, quick):
        for seed in seeds:
            yield {"seed": seed, "kind": "flip", "heads": seed < 2, "share": 1 / 3}
        yield {"seed": "0+1", "kind": "pair", "quick": quick}

    def criteria(rows):
        share = study.mean(rows, "heads", kind="flip")
        return [Criterion("heads", "all", f"{share:.2f}", share == 1)]

    def verdict(rows):
        share = study.mean(rows, "share", kind="flip")
        return Verdict(f"{share} over {len(rows)} rows", study.DIRECTION)

    module.CLAIM = Claim("a paper", "coins fall on heads", "a coin", seeds=2)
    module.measure, module.criteria, module.verdict = measure, criteria, verdict
    return module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_criteria_are_printed_and_decide_the_status_only_where_asked(coin, capsys):
    assert study.run(coin, ["--check"]) == 0
    assert study.run(coin, ["--seeds", "3"]) == 0
    assert study.run(coin, ["--seeds", "3", "--check"]) == 1
    printed = capsys.readouterr().out
    assert "| heads     | all   | 1.00  | yes |" in printed
    assert "| heads     | all   | 0.67  | **no** |" in printed


def test_rows_say_where_they_come_from_and_have_all_columns(coin, tmp_path):
    study.run(coin, [])
    first, second, pair = rows_of(tmp_path / "coin.csv")
    assert first["date"] and first["device"] and first["torch"] and "revision" in first
    assert (first["seed"], first["heads"], first["share"], first["quick"]) == (
        "0",
        "1",
        "0.333333",
        "",
    )
    assert second["seed"] == "1" and (pair["seed"], pair["quick"]) == ("0+1", "0")


def test_the_file_is_judged_as_the_run_was(coin, capsys, monkeypatch, tmp_path):
    study.run(coin, ["--seeds", "3"])
    of_the_run = capsys.readouterr().out.split("\n", 1)[1]
    with monkeypatch.context() as patch:
        patch.setattr(coin, "measure", None)
        assert study.run(coin, ["--from-results", "--check"]) == 1
    assert capsys.readouterr().out == of_the_run
    lines = (tmp_path / "coin.csv").read_text().splitlines()
    earlier = [line.replace(lines[1].partition(",")[0], "2000-01-01") for line in lines[1:]]
    (tmp_path / "coin.csv").write_text("\n".join([lines[0], *earlier, *lines[1:]]))
    assert len(study.last_run(tmp_path / "coin.csv")) == 4  # of the last date alone


def test_a_revision_that_looks_like_a_number_stays_what_it_is(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("date,revision,share\n2026-11-26,067e688,0.5\n")
    (row,) = study.last_run(path)
    assert (row["revision"], row["share"]) == ("067e688", 0.5)


def test_a_quick_run_leaves_no_rows_unless_a_folder_is_given(coin, tmp_path):
    study.run(coin, ["--quick"])
    assert not (tmp_path / "coin.csv").exists()
    study.run(coin, ["--quick", "--out", str(tmp_path / "other")])
    assert rows_of(tmp_path / "other" / "coin.csv")[-1]["quick"] == "1"


def test_what_makes_no_sense_is_named(coin, capsys, tmp_path):
    with pytest.raises(SystemExit, match=r"coin\.csv: expected rows of an earlier run"):
        study.run(coin, ["--from-results"])
    for arguments, text in (
        (["--seeds", "0"], "at least 1, found 0"),
        (["--picture", "a"], "none"),
    ):
        with pytest.raises(SystemExit):
            study.run(coin, arguments)
        assert text in capsys.readouterr().err
    with pytest.raises(ValueError, match="found 'perhaps'"):
        Verdict("", "perhaps")
    with pytest.raises(ValueError, match="each with a seed"):
        study.as_text([{"share": 1}])
    with pytest.raises(ValueError, match="'kind': 'none'"):
        study.mean([{"kind": "flip", "share": 1}], "share", kind="none")


def test_a_study_may_measure_more_than_is_judged(coin, tmp_path):
    with pytest.raises(SystemExit):
        study.run(coin, ["--full"])  # this one has nothing more
    coin.measure_full = lambda seeds, quick: [
        *coin.measure(seeds, quick),
        {"seed": 0, "kind": "edge"},
    ]
    study.run(coin, [])
    study.run(coin, ["--full", "--out", str(tmp_path / "full")])
    assert [row["kind"] for row in rows_of(tmp_path / "coin.csv")] == ["flip", "flip", "pair"]
    assert rows_of(tmp_path / "full" / "coin.csv")[-1]["kind"] == "edge"
