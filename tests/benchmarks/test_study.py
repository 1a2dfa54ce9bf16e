"""Framework of the reproductions: rows, intervals and verdicts of complete and interrupted runs."""

import csv
import statistics
from pathlib import Path
from types import ModuleType

import pytest
import study
from study import Claim, Criterion, Gate, Interval


@pytest.fixture
def coin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Return a toy study that tosses a coin and writes its results to ``tmp_path``."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    module = ModuleType("coin")
    module.__doc__ = "A coin."
    module.__file__ = "benchmarks/coin.py"
    module.asked = []
    module.sides = 2

    def arms(seeds, quick):
        return [{"seed": seed, "side": side} for seed in seeds for side in ("obverse", "reverse")]

    def measure(arm, quick, rows):
        if len(module.asked) == getattr(module, "cut", 100):
            raise KeyboardInterrupt
        module.asked.append((arm["seed"], arm["side"], len(rows)))
        extra = {"quick": True} if quick else {}
        yield {"heads": arm["seed"] < 2, "share": 1 / 3, **extra}

    def criteria(rows):
        share = study.mean(rows, "heads")
        return [
            Criterion("heads", "all", f"{share:.2f}", share == 1, True, share > 0.5),
            Criterion("weight", "light", "heavy", False),
        ]

    module.CLAIM = Claim("a paper", "coins fall.", "a coin", "heads", "you toss", "you do not", 2)
    module.settings = lambda quick: {"sides": module.sides}
    module.arms, module.measure, module.criteria = arms, measure, criteria
    module.gate = lambda rows: [Gate("coin", "round", "round", True)]
    module.minutes = lambda arm: 0.1
    module.figure = lambda rows: f"{study.mean(rows, 'share'):g} over {len(rows)} rows"
    module.panels = lambda rows: {"coins": {"share": study.interval([r["share"] for r in rows])}}
    return module


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def claimed(module: ModuleType, seeds: int) -> None:
    module.CLAIM = Claim("a paper", "coins fall.", "a coin", "heads", "you toss", "not", seeds)


def test_only_the_headline_determines_verdict_and_status(coin, capsys):
    assert study.run(coin, ["--check"]) == 0  # Only the criterion "weight" fails.
    assert "reproduced, 2 of 2 seeds: 0.333333 over 4 rows" in capsys.readouterr().out
    claimed(coin, 3)
    assert study.run(coin, ["--check"]) == 1
    printed = capsys.readouterr().out
    assert "| heads (headline) | all   | 0.67  | **no** |" in printed
    assert "direction only, 3 of 3 seeds" in printed
    claimed(coin, 5)
    study.run(coin, [])
    assert "not reproduced, 5 of 5 seeds" in capsys.readouterr().out


def test_interrupted_run_resumes_and_has_no_verdict_until_it_is_complete(coin, capsys, tmp_path):
    coin.cut = 3
    with pytest.raises(KeyboardInterrupt):
        study.run(coin, [])
    assert len(rows_of(tmp_path / "coin.csv")) == 3
    study.run(coin, ["--from-results"])
    assert "not run yet, 1 of 2 seeds: 0.333333 over 2 rows" in capsys.readouterr().out
    coin.cut = 100
    study.run(coin, [])
    assert coin.asked == [
        (0, "obverse", 0),
        (0, "reverse", 1),
        (1, "obverse", 2),
        (1, "reverse", 3),
    ]
    assert study.run(coin, ["--check"]) == 0 and len(coin.asked) == 4  # Nothing was left to do.


def test_rows_of_other_settings_are_separate(coin, capsys, tmp_path):
    study.run(coin, [])
    coin.sides = 3
    with pytest.raises(SystemExit, match=r"expected rows of settings \w+, found 4 rows of other"):
        study.run(coin, ["--from-results"])
    study.run(coin, [])
    assert "4 rows of other settings are not counted" in capsys.readouterr().out
    assert len(coin.asked) == 8 and len(rows_of(tmp_path / "coin.csv")) == 8
    study.run(coin, ["--from-results"])
    assert "over 4 rows" in capsys.readouterr().out


def test_rows_contain_their_origin_and_may_have_additional_columns(coin, tmp_path):
    study.run(coin, ["--seeds", "1"])
    first = rows_of(tmp_path / "coin.csv")[0]
    assert first["date"] and first["device"] and first["torch"] and "revision" in first
    assert (first["seed"], first["heads"], first["share"]) == ("0", "1", "0.333333")
    study.run(coin, ["--quick", "--seeds", "1"])
    assert len(rows_of(tmp_path / "coin.csv")) == 2  # Quick runs do not write to this file.
    study.run(coin, ["--quick", "--seeds", "1", "--out", str(tmp_path)])
    old, new = rows_of(tmp_path / "coin.csv")[0::3]
    assert (old["quick"], new["quick"]) == ("", "1")
    assert not list(tmp_path.glob("*.part"))


def test_study_with_an_unmeasured_criterion_has_no_verdict(coin):
    study.run(coin, [])
    rows = study.Store.of(study.RESULTS / "coin.csv", coin, quick=False).rows()
    coin.criteria = lambda rows: [Criterion("seconds", "few", "busy", None, True)]
    judged = study.judge(coin, rows)
    assert judged.word == study.NOT_RUN
    assert "left for a quiet machine" in study.criteria_table(judged.criteria)
    coin.criteria = lambda rows: [Criterion("seconds", "few", "busy", True)]
    with pytest.raises(ValueError, match="expected one with headline=True"):
        study.judge(coin, rows)


def test_interval_contains_the_figure_and_supports_groups():
    found = study.interval([1.0, 2.0, 3.0, 4.0])
    # Of the means of all 256 equally likely bootstrap draws, the 2.5 % quantile is 1.25 or 1.5.
    assert found.middle == 2.5 and 1.25 <= found.low <= 1.5 and 3.5 <= found.high <= 3.75
    assert f"{found:.1f}" == f"2.5 [{found.low:.1f}, {found.high:.1f}]"
    assert study.interval([2.0, 2.0]) == Interval(2.0, 2.0, 2.0)
    assert study.interval([1.0, 2.0, 9.0], statistics.median).middle == 2.0
    # Each group contains the values of one seed. The middle is the mean of the group means. The
    # bootstrap also draws within the groups, which widens the interval.
    grouped = study.interval([[0.0, 2.0], [1.0, 3.0]])
    assert grouped.middle == 1.5 and grouped.low < study.interval([1.0, 2.0]).low


def test_revision_that_looks_like_a_number_stays_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("date,revision,settings,share\n2026-11-26,067e688,12345678,0.5\n")
    (row,) = study.Store.of_last(path).rows()
    assert (row["revision"], row["settings"], row["share"]) == ("067e688", "12345678", 0.5)


def test_invalid_arguments_are_reported(coin, capsys):
    for arguments, text in ((["--seeds", "0"], "at least 1, found 0"), (["--full"], "--full")):
        with pytest.raises(SystemExit):
            study.run(coin, arguments)
        assert text in capsys.readouterr().err
    del coin.panels
    with pytest.raises(SystemExit):
        study.run(coin, ["--picture", "a"])
    assert "coin has no panels" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'kind': 'none'"):
        study.mean([{"kind": "flip", "share": 1}], "share", kind="none")


def test_study_may_measure_more_than_it_judges(coin, tmp_path):
    coin.more = lambda seeds, quick: [{"seed": 0, "side": side} for side in ("rim", "edge")]
    study.run(coin, ["--also", "edge:0", "rim:1"])
    assert [row["side"] for row in rows_of(tmp_path / "coin.csv")].count("rim") == 0
    assert rows_of(tmp_path / "coin.csv")[-1]["side"] == "edge"
    study.run(coin, ["--full"])
    assert rows_of(tmp_path / "coin.csv")[-1]["side"] == "rim"
