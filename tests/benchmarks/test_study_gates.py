"""Gates of the reproductions, learning rates inside their grid, and runs that can be resumed."""

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import study
import torch
from claims import language
from study import Claim, Criterion, Gate, Grid

GRID = Grid((0.1, 1.0), most=2)


@pytest.fixture
def slope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """Return a toy study that chooses a learning rate, judges a gate and compares two arms."""
    monkeypatch.setattr(study, "RESULTS", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module = ModuleType("slope")
    module.__doc__, module.__file__ = "A slope.", "benchmarks/slope.py"
    module.asked, module.best, module.learns = [], 1.0, True

    def trials(rows, quick):
        tried = {r["rate"]: r["loss"] for r in rows if r["arm"] == "rate"}
        for rate in GRID.asked(tried):
            yield {"seed": 100, "arm": "rate", "rate": rate}
        yield {"seed": 101, "arm": "ours"}

    def measure(arm, quick, rows):
        module.asked.append((arm["seed"], arm["arm"]))
        if arm["arm"] == "rate":
            yield {"loss": abs(math.log10(arm["rate"] / module.best))}
        else:
            tried = {r["rate"]: r["loss"] for r in rows if r["arm"] == "rate"}
            yield {"rate": GRID.best(tried), "gain": 1.0 if module.learns else 0.0}

    def gate(rows):
        gain = study.mean(rows, "gain", arm="ours")
        tried = {r["rate"]: r["loss"] for r in rows if r["arm"] == "rate"}
        return [Gate("gain", "at least 0.5", f"{gain:g}", gain >= 0.5), GRID.gate(tried)]

    def criteria(rows):
        gain = study.mean(rows, "gain", arm="ours")
        return [Criterion("gain", "above 0", f"{gain:g}", gain > 0, headline=True)]

    module.CLAIM = Claim("a paper", "it falls.", "a hill", "gain", "you ski", "you do not", 2)
    module.arms = lambda seeds, quick: [{"seed": s, "arm": a} for s in seeds for a in ("ours", "x")]
    module.minutes = lambda arm: 3.0 if arm["arm"] == "rate" else 10.0
    module.trials, module.measure, module.gate, module.criteria = trials, measure, gate, criteria
    module.figure = lambda rows: f"{study.mean(rows, 'gain'):g} over {len(rows)} rows"
    return module


def judged(module: ModuleType) -> study.Judged:
    return study.judge(module, store(module).rows())


def store(module: ModuleType) -> study.Store:
    return study.Store.of(study.RESULTS / "slope.csv", module, quick=False)


def test_gate_is_judged_before_the_criterion(slope):
    assert study.run(slope, ["--check"]) == 0
    assert slope.asked[:3] == [(100, "rate"), (100, "rate"), (100, "rate")]
    assert slope.asked[3:5] == [(101, "ours"), (0, "ours")]
    found = judged(slope)
    assert found.word == study.REPRODUCED and all(gate.met for gate in found.gate)
    assert found.figure == "1 over 4 rows"  # without the rows of the trials


def test_failed_gate_makes_the_claim_not_testable_and_stops_the_run(slope, capsys):
    slope.learns, slope.panels = False, lambda rows: pytest.fail("panels was called")
    assert study.run(slope, ["--check"]) == 1
    assert {seed for seed, _ in slope.asked} == {100, 101}  # No judged seed was run.
    found = judged(slope)
    assert found.word == study.NOT_TESTABLE and not found.criteria
    assert found.reason == "gain: expected at least 0.5, found 0"
    assert "not testable here: gain: expected at least 0.5, found 0" in capsys.readouterr().out


def test_gate_cannot_be_judged_from_criterion_seeds(slope):
    study.run(slope, [])
    rows = [row for row in store(slope).rows() if row["seed"] != 101]
    assert study.judge(slope, rows).word == study.NOT_RUN  # although the seeds 0 and 1 have rows
    slope.gate = lambda rows: [Gate("a", "b", "c", bool(study.column(rows, "gain", seed=0)))]
    with pytest.raises(ValueError, match="'seed': 0"):
        judged(slope)
    slope.trials = lambda rows, quick: [{"seed": 1, "arm": "ours"}]
    with pytest.raises(ValueError, match="trials: expected seeds from 100 on, found 1"):
        judged(slope)


def test_without_a_gate_nothing_is_judged_or_measured(slope):
    study.run(slope, [])
    slope.gate, gate = lambda rows: [], slope.gate
    with pytest.raises(ValueError, match="slope: gate: expected at least one"):
        judged(slope)
    del slope.gate
    assert judged(slope).word == study.NOT_RUN
    with pytest.raises(ValueError, match="slope: expected a function `gate`"):
        study.run(slope, [])
    slope.gate = gate
    assert judged(slope).word == study.REPRODUCED


@pytest.mark.parametrize("best, rates", [(1.0, [0.1, 1.0, 10.0]), (0.02, [0.001, 0.01, 0.1, 1.0])])
def test_best_rate_at_an_edge_widens_the_grid(slope, best, rates):
    slope.best = best
    study.run(slope, ["--seeds", "1"])
    rows = store(slope).rows()
    assert sorted(study.column(rows, "rate", arm="rate")) == rates
    chosen = study.column(rows, "rate", seed=0)[0]
    assert chosen == rates[1] and rates[0] < chosen < rates[-1]


def test_grid_stops_after_some_rates_and_its_gate_then_fails():
    tried = {0.1: 4.0, 1.0: 3.0, 10.0: 2.0, 100.0: 1.0}
    assert GRID.asked(tried) == [0.1, 1.0, 10.0, 100.0]
    found = GRID.gate(tried)
    assert not found.met and found.found == "100 of 0.1 to 100"
    assert GRID.best({0.1: float("nan"), 1.0: 5.0}) == 1.0
    assert GRID.asked({0.1: float("nan"), 1.0: float("nan")}) == [0.01, 0.1, 1.0]
    halves = Grid((2**-1.5, 0.5))
    assert len(halves.asked({2**-1.5: 2.0, 0.5: 1.0, 2**-0.5: 0.5, 1.0: 0.0})) == 5


def test_json_has_the_gate_beside_the_criteria(slope, capsys):
    study.run(slope, [])
    capsys.readouterr()
    study.run(slope, ["--from-results", "--json"])
    (name, found), *others = json.loads(capsys.readouterr().out).items()
    assert name == "slope" and not others and found["verdict"] == "reproduced"
    assert found["gate"][0] == {"name": "gain", "asked": "at least 0.5", "found": "1", "met": True}
    keys = {"name", "asked", "found", "met", "headline"}
    assert [set(each) for each in found["criteria"]] == [keys]


def test_minutes_left_are_declared_then_measured(slope, capsys):
    assert study.minutes_left(slope, [], 2) == pytest.approx(3 + 3 + 10 + 4 * 10)
    study.run(slope, ["--seeds", "1"])
    assert "about 36 minutes" in capsys.readouterr().out.splitlines()[0]
    rows = store(slope).rows()
    assert study.minutes_left(slope, rows, 1) == 0
    for row in rows:
        row["seconds"] = 120.0  # per run, as measured
    assert study.minutes_left(slope, rows, 2) == pytest.approx(2 * 2)


class Killed(Exception):
    pass


class Noisy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(4))
        self.last_step = math.inf

    def forward(self, x):
        self.last_step -= 1
        if self.last_step < 0:
            raise Killed
        return torch.dropout(x, 0.5, self.training) @ self.weight


def test_killed_and_resumed_run_has_the_rows_of_an_undisturbed_run(slope, monkeypatch):
    monkeypatch.setattr(study, "SAVE_SECONDS", 0.0)
    last_step, steps = [math.inf], []

    def measure(arm, quick, rows):
        found = {}
        for part in ("first", "second"):  # two models in one run
            torch.manual_seed(arm["seed"])
            model = Noisy()
            model.last_step = last_step[0]
            data = torch.randn(8, 3, 4)
            batches = [{"x": x} for x in data]

            def loss(model, batch, part=part):
                steps.append(part)
                return (model(batch["x"]) - 1).square().mean()

            groups = [{"params": [model.weight], "lr": 0.1}]
            language.train(
                model, batches, groups, loss=loss, part=part, schedule=lambda p: 1 - p / 2
            )
            found[part] = model.weight.sum().item()
        yield found

    slope.trials, slope.measure = (lambda rows, quick: []), measure
    slope.gate = lambda rows: [Gate("a", "b", "c", True)]
    slope.criteria = lambda rows: [Criterion("a", "b", "c", True, headline=True)]
    slope.figure = lambda rows: "a"
    study.run(slope, ["--seeds", "1"])
    expected = [(row["first"], row["second"]) for row in store(slope).rows()]
    (study.RESULTS / "slope.csv").unlink()
    steps.clear()
    last_step[0] = 5
    with pytest.raises(Killed):
        study.run(slope, ["--seeds", "1"])
    assert not (study.RESULTS / "slope.csv").exists()
    last_step[0] = 6  # The second model's run is killed, the first one's is resumed.
    with pytest.raises(Killed):
        study.run(slope, ["--seeds", "1"])
    last_step[0] = math.inf
    study.run(slope, ["--seeds", "1"])
    assert [(row["first"], row["second"]) for row in store(slope).rows()] == expected
    first_arm = steps[: 8 + 1 + 8 + 1]  # Killed steps are repeated, all others are not.
    assert (first_arm.count("first"), first_arm.count("second")) == (9, 9)
    cache = study.RESULTS / "cache"
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_checkpoints_are_saved_after_some_minutes(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(study.time, "monotonic", lambda: now[0])
    found = study.Checkpoint(tmp_path / "a" / "part.pt")
    found.offer(lambda: {"step": 1})
    assert found.restored() is None
    now[0] = study.SAVE_SECONDS + 1
    found.offer(lambda: {"step": 2})
    found.offer(lambda: {"step": 3})
    assert study.Checkpoint(tmp_path / "a" / "part.pt").restored() == {"step": 2}
    assert not list(tmp_path.rglob("*.part"))
    study.Checkpoint(None).offer(lambda: 1 / 0)  # outside of a run, nothing is saved
