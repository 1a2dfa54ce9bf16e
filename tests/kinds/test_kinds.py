"""Every kind of adapter: files that PEFT saved, in a pool and as a value, against PEFT's layers."""

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_ext
from lora_ext import AdapterPool
from lora_ext.adapter import LoraAdapter, merge_adapters, prune_adapter, resize_adapter
from lora_ext.cli import main
from lora_ext.federated import LoraLayerManager
from lora_ext.interop.peft import report, to_peft
from lora_ext.kinds import Factors, Kind, Part, kind_of, register_kind

IN, H, OUT = 64, 96, 48
T: dict[str, Any] = {"target_modules": ["up", "down"]}
CASES: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=6, lora_alpha=9, **T),
    "dora": lambda: peft.LoraConfig(r=6, lora_alpha=9, use_dora=True, **T),
    "adalora": lambda: peft.AdaLoraConfig(init_r=6, target_r=4, lora_alpha=9, total_step=9, **T),
    "vera": lambda: peft.VeraConfig(r=12, **T),
    "pvera": lambda: peft.PveraConfig(r=6, **T),
    "miss": lambda: peft.MissConfig(r=10, **T),
    "miss mini": lambda: peft.MissConfig(r=8, init_weights="mini", mini_r=8, **T),
    "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=20, vector_length=16, **T),
    "vblora top": lambda: peft.VBLoRAConfig(
        r=4, num_vectors=20, vector_length=16, save_only_topk_weights=True, **T
    ),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, rank_pattern={"up": 3}, **T),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, **T),
    "lokr both": lambda: peft.LoKrConfig(r=2, alpha=3, decompose_both=True, **T),
    "delora": lambda: peft.DeloraConfig(r=6, **T),
    "gralora": lambda: peft.GraloraConfig(r=8, gralora_k=2, hybrid_r=3, alpha=6, **T),
    "tinylora": lambda: peft.TinyLoraConfig(r=3, u=5, save_projection=True, **T),
    "unilora": lambda: peft.UniLoraConfig(r=4, theta_d_length=64, save_indices=True, **T),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["down"], **T),
}
#: Kinds whose file does not contain all sizes of the modules, or the order of the modules.
INCOMPLETE = {"vera", "pvera", "miss", "miss mini", "tinylora", "ia3"}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(IN, H), nn.Linear(H, OUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def mlp() -> Mlp:
    torch.manual_seed(7)
    return Mlp()


def saved(case: str, folder: Path) -> Any:
    """Return a PEFT model with random parameters of an adapter that was saved to ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(mlp(), CASES[case]()).eval()
    torch.manual_seed(len(case))
    with torch.no_grad():
        for name, p in model.named_parameters():
            ours = "base_layer" in name or "ranknum" in name or name.endswith((".bias",))
            if not ours and not name.endswith(("up.weight", "down.weight")):
                p.copy_(torch.randn_like(p) * 0.3 + (case == "ia3"))
    model.save_pretrained(folder)
    return model


def inputs() -> torch.Tensor:
    return torch.randn(33, IN, generator=torch.Generator().manual_seed(1))


def close(y: torch.Tensor, wide: torch.Tensor) -> bool:
    """Return whether y is close to a float64 result, for float32 sums of up to 110 products."""
    return bool(((y - wide).abs() <= 110 * 2**-23 * (1 + wide.abs().amax())).all())


@pytest.mark.parametrize("case", CASES)
def test_pool_computes_peft_s_layers_from_the_file_alone(case: str, tmp_path: Path) -> None:
    model, base = saved(case, tmp_path), mlp()
    pool = AdapterPool(base, max_slots=2, max_rank=64)
    pool.load("a", tmp_path)
    lora_ext.attach(base, pool)
    x = inputs()
    with torch.no_grad(), lora_ext.adapters("a"):
        y = base(x)
    with torch.no_grad():
        wide = model.double()(x.double())
        assert close(y, wide)
        assert not close(mlp()(x), wide), "the adapter has no effect"


def test_all_kinds_share_a_batch_and_plain_rows_keep_their_bits(tmp_path: Path) -> None:
    base = mlp()
    plain = base(inputs())
    pool = AdapterPool(base, max_slots=len(CASES), max_rank=64)
    models = {}
    for case in CASES:
        models[case] = saved(case, tmp_path / case).double()
        pool.load(case, tmp_path / case)
    lora_ext.attach(base, pool)
    names = [*CASES, None, *reversed(CASES)]
    x = inputs()[:1].expand(len(names), IN).contiguous()
    with torch.no_grad(), lora_ext.adapters(names):
        y = base(x)
        for row, name in enumerate(names):
            if name is None:
                assert torch.equal(y[row], plain[0])
            else:
                assert close(y[row], models[name](x[row : row + 1].double())[0]), name
    with torch.no_grad(), lora_ext.adapters(names):
        assert torch.equal(torch.compile(base, backend="aot_eager")(x), y)


def test_scales_are_evicted_to_the_host_and_captured(tmp_path: Path) -> None:
    saved("ia3", tmp_path / "ia3")
    saved("dora", tmp_path / "dora")
    base, x = mlp(), inputs()[:2]
    pool = AdapterPool(base, max_slots=1, max_rank=8)
    lora_ext.attach(base, pool)
    for name in ("ia3", "dora"):
        pool.load(name, tmp_path / name)
    found = {}
    for name in ("ia3", "dora", "ia3", "dora"):
        with torch.no_grad(), lora_ext.adapters(name):
            assert torch.equal(found.setdefault(name, base(x)), base(x))
    pool.unload("dora")
    with torch.no_grad(), lora_ext.adapters(["ia3", None]):
        assert torch.equal(base(x)[1], mlp()(x)[1])
    step = lora_ext.capturable(pool, max_rows=2)
    with torch.no_grad(), step, lora_ext.adapters([None, "ia3"]):
        y = base(x)
    torch.testing.assert_close(y[1], found["ia3"][1])
    assert torch.equal(y[0], mlp()(x)[0])


@pytest.mark.parametrize("case", CASES)
def test_value_is_saved_unchanged_and_reshaped_to_lora(case: str, tmp_path: Path) -> None:
    saved(case, tmp_path / "peft")
    adapter = LoraAdapter.load(tmp_path / "peft")
    assert adapter.kind == CASES[case]().peft_type.value
    adapter.save(tmp_path / "ours")
    ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "peft"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert LoraAdapter.load(tmp_path / "ours") == adapter
    config = [
        json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "peft")
    ]
    assert adapter.kind == "LORA" or config[0] == config[1]
    if case in INCOMPLETE:
        with pytest.raises(NotImplementedError, match=r"in_features|order|out_features"):
            adapter.modules["up"]
        return
    pruned = prune_adapter(adapter, ["up"])
    assert pruned.kind == "LORA" and pruned.modules.keys() == {"up"}
    resized, errors = resize_adapter(adapter, 64)
    assert resized.kind == "LORA" and max(errors.values()) < 1e-5
    if case == "dora":
        return
    merged = merge_adapters([adapter, adapter], [0.5, 0.25])
    assert merged.kind == "LORA"
    a, b, scaling, *_ = merged.modules["up"]
    first = adapter.modules["up"]
    torch.testing.assert_close(
        scaling * b @ a, 0.75 * first.scaling * first.b @ first.a, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("case", sorted(INCOMPLETE - {"tinylora", "ia3"}))
def test_sizes_are_taken_from_other_adapters(case: str, tmp_path: Path) -> None:
    model = saved(case, tmp_path / case)
    saved("lora", tmp_path / "lora")
    merged = merge_adapters([tmp_path / case, tmp_path / "lora"], [1.0, 0.0])
    with pytest.raises(NotImplementedError, match=r"in_features|out_features"):
        merge_adapters([tmp_path / case], [0.5])
    layer, f, x = model.base_model.model.up, merged.modules["up"], inputs()
    with torch.no_grad():
        y = layer(x) - layer.get_base_layer()(x)
        torch.testing.assert_close(f.scaling * x @ f.a.T @ f.b.T, y, rtol=1e-4, atol=1e-4)


def test_scales_are_not_summed_and_the_order_of_modules_is_asked_for(tmp_path: Path) -> None:
    for case in ("ia3", "tinylora", "lora"):
        saved(case, tmp_path / case)
    with pytest.raises(NotImplementedError, match="IA3"):
        merge_adapters([tmp_path / "ia3", tmp_path / "lora"], [1.0, 1.0])
    with pytest.raises(NotImplementedError, match="order"):
        merge_adapters([tmp_path / "tinylora", tmp_path / "lora"], [1.0, 1.0])


@pytest.mark.parametrize("case", CASES)
def test_from_peft_computes_outputs_and_gradients(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = saved(case, tmp_path)
    for name, p in theirs.named_parameters():
        p.requires_grad_("base_layer" not in name and "ranknum" not in name)
    ours, x = lora_ext.from_peft(copy.deepcopy(theirs)), inputs()
    for training in (False, True):
        found = []
        for model in (ours, theirs):
            torch.manual_seed(3)
            y = model.train(training)(x)
            model.zero_grad()
            (y * y).sum().backward()
            found.append((y, [p.grad for p in model.parameters()]))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=5e-5)
        for a, b in zip(found[0][1], found[1][1], strict=True):
            scale = 1.0 if b is None else float(b.abs().max())
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * scale)
    kind = type(theirs.base_model.model.up)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", None)  # PEFT's layers are not called
        ours.eval()(x)
    assert len(report(ours).taken) == 2
    assert type(to_peft(ours).base_model.model.up) is kind
    AdapterPool(mlp(), max_rank=64).load("live", theirs)


@pytest.mark.parametrize("case", ["vera", "loha", "ia3"])
def test_from_peft_computes_adapters_that_are_added_later(case: str) -> None:
    theirs: Any = peft.get_peft_model(mlp(), CASES[case](), "a").eval()
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    for model in (theirs, ours):
        model.add_adapter("b", CASES[case]())
    generator = torch.Generator().manual_seed(3)
    changed = {k: torch.randn(v.shape, generator=generator) for k, v in theirs.state_dict().items()}
    for model in (theirs, ours):
        model.load_state_dict(changed)
        model.eval().set_adapter("b")
    y = theirs(inputs())
    assert (ours(inputs()) - y).abs().max() < 1e-5 * y.abs().max()
    assert torch.equal(pickle.loads(pickle.dumps(ours))(inputs()), ours(inputs()))
    theirs.set_adapter("a")
    assert not close(theirs(inputs()), y), "the adapters are equal"


def test_from_peft_keeps_all_kinds_of_a_mixed_model() -> None:
    lora = peft.LoraConfig(r=4, init_lora_weights=False, **T)
    theirs: Any = peft.get_peft_model(mlp(), lora, "lora", mixed=True)
    theirs.add_adapter("loha", peft.LoHaConfig(r=2, init_weights=False, **T))
    theirs.set_adapter(["lora", "loha"])
    ours = lora_ext.from_peft(copy.deepcopy(theirs).eval())
    torch.testing.assert_close(ours(inputs()), theirs.eval()(inputs()), rtol=1e-5, atol=1e-4)


class Doubled(Kind):
    """Kind of adapter that a user defines; its B is twice a parameter."""

    name = "DOUBLED"
    reads = frozenset({"r"})

    def parts(self, config: Any, spec: Any) -> dict[str, Part]:
        r = config.get("r")
        return {"first": Part((r, spec.in_features)), "last": Part((spec.out_features, r))}

    def factors(self, parts: Any, config: Any, spec: Any, weight: Any = None) -> Factors:
        return Factors(parts["first"], 2 * parts["last"], 1.0)


def test_a_kind_in_one_file_is_trained_served_merged_and_saved(tmp_path: Path) -> None:
    register_kind(Doubled())
    config = {"peft_type": "DOUBLED", "r": 3, "target_modules": ["up"]}
    parts = {"first": torch.randn(3, IN) / 8, "last": torch.zeros(H, 3)}
    leaves = {stem: t.requires_grad_() for stem, t in parts.items()}
    base, x = mlp(), inputs()
    spec = lora_ext.AdapterPool(base).index.linear["up"]
    ids = torch.zeros(33, dtype=torch.int32)
    optimizer = torch.optim.Adam(leaves.values(), lr=0.05)
    losses = []
    for _ in range(20):
        f = kind_of("DOUBLED").factors(leaves, config, spec)
        up = base.up
        y = lora_ext.ops.lora_linear(
            x, up.weight.detach(), up.bias.detach(), f.a[None], f.b[None], ids
        )
        loss = (y - 1).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    state = {f"base_model.model.up.{stem}": t.detach() for stem, t in leaves.items()}
    adapter = LoraAdapter.load((config, state))
    assert adapter.kind == "DOUBLED"
    adapter.save(tmp_path / "doubled")
    saved("vera", tmp_path / "vera")
    pool = AdapterPool(base, max_slots=3, max_rank=16)
    pool.load("doubled", tmp_path / "doubled")
    pool.load("vera", tmp_path / "vera")
    merged = merge_adapters([adapter], [2.0])
    pool.load("merged", merged)
    lora_ext.attach(base, pool)
    with torch.no_grad(), lora_ext.adapters(["doubled", "merged", "vera", None]):
        found = base.up(x[:4])
    with torch.no_grad():
        plain = mlp().up(x[:4])
        delta = x[:4] @ (2 * leaves["last"] @ leaves["first"]).T
    torch.testing.assert_close(found[:2], plain[:2] + torch.tensor([[1.0], [2.0]]) * delta[:2])
    assert torch.equal(found[3], plain[3]) and not torch.equal(found[2], plain[2])


@pytest.mark.parametrize(
    ("case", "fields", "named"),
    [
        ("miss", {"init_weights": "bat"}, "bat"),
        ("vera", {"save_projection": False}, "save_projection.*save_as_lora"),
        ("tinylora", {"save_projection": False}, "save_projection"),
        ("unilora", {"save_indices": False}, "save_indices"),
        ("pvera", {"sample_at_inference": True}, "sample_at_inference"),
        ("adalora", {"use_dora": True}, "use_dora"),
        *(("vera", {"peft_type": name}, name) for name in ("RANDLORA", "HIRA", "OFT", "X-NEW")),
        ("vera", {"peft_type": "C3A"}, "C3A.*no low rank.*save_as_lora"),
    ],
)
def test_refusals_name_the_field_and_the_reason(
    case: str, fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    saved(case, tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(NotImplementedError, match=named):
        LoraAdapter.load(tmp_path)
    with pytest.raises(NotImplementedError, match=named):
        AdapterPool(mlp()).load("a", tmp_path)


def test_lokr_with_a_full_second_matrix_is_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(mlp(), peft.LoKrConfig(r=40, **T))
    model.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="lokr_w2"):
        LoraAdapter.load(tmp_path)
    with pytest.raises(NotImplementedError, match="lokr_w2"):
        AdapterPool(mlp(), max_rank=1024).load("a", tmp_path)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("lora", "dora")])
def test_damaged_files_are_refused_by_key(case: str, tmp_path: Path) -> None:
    saved(case, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    state = load_file(tmp_path / "adapter_model.safetensors")
    pool = AdapterPool(mlp(), max_rank=64)
    for key, value in state.items():
        stem = key.removeprefix("base_model.").removeprefix("model.").removesuffix(".weight")
        stem = stem.removeprefix("up.").removeprefix("down.")
        without = {k: t for k, t in state.items() if k != key}
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            pool.load("x", (raw, without))
        assert stem in str(caught.value), key
        with pytest.raises((ValueError, NotImplementedError)) as caught:
            pool.load("x", (raw, {**state, key: value[None]}))
        assert key.removeprefix("base_model.model.") in str(caught.value)
    foreign = {**state, "base_model.model.up.other": torch.ones(2)}
    with pytest.raises(ValueError, match=r"up\.other"):
        pool.load("x", (raw, foreign))
    with pytest.raises(ValueError, match="new_field"):
        pool.load("x", ({**raw, "new_field": 1}, state))
    assert not pool.names
    pool.load("x", (raw, state))


@pytest.mark.parametrize(
    ("case", "fields", "halved", "found"),
    [
        ("adalora", {"rank_pattern": True}, "", "rank_pattern: expected .*found True"),
        ("adalora", {"rank_pattern": {"up.lora_E": 5}}, "", "rank_pattern: expected .*lora_E': 5"),
        ("loha", {"rank_pattern": {1: 2}}, "", "rank_pattern: expected an object, found {1: 2}"),
        ("vblora", {"topk": 10**9}, "", "VB-LoRA adapter; torch raised .* range"),
        ("lokr both", {}, "up.lokr_w1_a", "up: expected .* LoKr adapter; torch raised .*Half"),
        ("delora", {}, "-up.delora_w_norm", "up: expected .* DeLoRA adapter; torch raised "),
    ],
)
def test_inconsistent_files_raise_value_errors(
    case: str, fields: dict[Any, Any], halved: str, found: str, tmp_path: Path
) -> None:
    saved(case, tmp_path)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    state = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model." + halved.removeprefix("-")
    if halved:
        state[key] = state[key].new_zeros(0) if halved.startswith("-") else state[key].half()
    pool, changed = AdapterPool(mlp(), max_rank=64), ({**raw, **fields}, state)
    with pytest.raises(ValueError, match=found):
        LoraAdapter.load(changed)
    with pytest.raises(ValueError):
        pool.load("x", changed)


def test_plans_follow_configurations_and_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: Any = peft.get_peft_model(mlp(), peft.LoHaConfig(r=4, init_weights=False, **T)).eval()
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    ours(inputs())
    monkeypatch.setattr(type(ours.peft_config["default"]), "to_dict", None)  # read only once
    monkeypatch.setattr(type(theirs.base_model.model.up), "forward", None)
    ours(inputs())
    monkeypatch.undo()
    for model in (theirs, ours):
        model.base_model.model.up.scale_layer(3.0)
    assert close(ours(inputs()), theirs(inputs()).double())
    config = peft.LoHaConfig(r=7, alpha=2, init_weights=False, **T)
    for model in (theirs, ours):
        model.add_adapter("other", peft.LoHaConfig(r=2, **T))
        model.set_adapter("other")
        model.delete_adapter("default")
        torch.manual_seed(4)
        model.add_adapter("default", config)
        model.set_adapter("default")
        model.eval()
    assert close(ours(inputs()), theirs(inputs()).double())
    assert "plans" in vars(ours.base_model.model.up)
    assert "plans" not in vars(to_peft(ours).base_model.model.up)


@pytest.mark.parametrize("alpha", [9, -1])
def test_adalora_keeps_its_scale_when_ranks_are_removed_or_a_layer_is_scaled(
    alpha: int, tmp_path: Path
) -> None:
    theirs = saved("adalora", tmp_path)
    config, kept = theirs.peft_config["default"], {"up": 2, "down": 0}
    config.rank_pattern = {
        f"{name}.lora_E.default": [i < kept[name] for i in range(6)] for name in kept
    }
    config.lora_alpha = alpha
    theirs.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(mlp(), tmp_path).eval()
    base = mlp()
    pool = AdapterPool(base, max_slots=2, max_rank=8)
    pool.load("file", tmp_path)
    pool.load("live", theirs)
    lora_ext.attach(base, pool)
    for name in pool.names:
        with lora_ext.adapters(name):
            assert close(base(inputs()), theirs(inputs()).double()), name
    ours = lora_ext.from_peft(copy.deepcopy(theirs))
    for scale in (1.0, 3.0, 0.0):
        for model in (theirs, ours):
            model.base_model.model.up.scale_layer(scale)
        assert close(ours(inputs()), theirs(inputs()).double()), scale


def test_report_names_layers_that_are_not_called_or_need_peft() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.last = nn.MultiheadAttention(16, 2), nn.Linear(16, 16)

    config = peft.LoHaConfig(r=2, target_modules=["out_proj", "last"])
    model = lora_ext.from_peft(peft.get_peft_model(Attention(), config))
    name = "base_model.model.attention.out_proj"
    assert report(model).taken == ("base_model.model.last",)
    assert report(model).left == {name: "nn.MultiheadAttention reads its weight and never calls it"}
    assert type(model.get_submodule(name)).__module__ == "peft.tuners.loha.layer"
    full = lora_ext.from_peft(peft.get_peft_model(mlp(), peft.LoKrConfig(r=40, **T)))
    assert not report(full).taken and "lokr_w2" in report(full).left["base_model.model.up"]
    bat = peft.MissConfig(r=8, init_weights="bat", **T)
    x, theirs = inputs(), peft.get_peft_model(mlp(), bat)
    assert torch.equal(lora_ext.from_peft(copy.deepcopy(theirs))(x), theirs(x))
    config = peft.PveraConfig(r=6, sample_at_inference=True, **T)
    samples = lora_ext.from_peft(peft.get_peft_model(mlp(), config)).eval()
    assert "sample_at_inference" in report(samples).left["base_model.model.up"]


@pytest.mark.parametrize("case", CASES)
def test_command_line_takes_every_kind_or_refuses_it_by_name(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base").mkdir()
    save_file(mlp().state_dict(), tmp_path / "base" / "model.safetensors")
    (tmp_path / "aligned").mkdir()
    other = {name: t + 0.1 * t.roll(1) for name, t in mlp().state_dict().items()}
    save_file(other, tmp_path / "aligned" / "model.safetensors")
    own, lora, out = (str(tmp_path / name) for name in ("own", "lora", "out"))
    saved(case, tmp_path / "own")
    saved("lora", tmp_path / "lora")
    models = ["--base", str(tmp_path / "base"), "--aligned", str(tmp_path / "aligned")]
    models += ["--direction", "smallest", "--num", "1", "--reference", "permutation"]
    kind = kind_of(LoraAdapter.load(own).kind, {"use_dora": case == "dora"})
    scaled, sizes = not kind.sums, case not in INCOMPLETE
    for command, works in (
        (["inspect", own], sizes),
        (["diff", own, lora], sizes),
        (["resize", own, "--rank", "3", "--out", out], sizes),
        (["prune", own, *models, "--out", out], sizes and not scaled),
        (["merge", own, lora, "--out", out], not scaled and case != "tinylora"),
    ):
        status, error = main(command), capsys.readouterr().err
        assert status == (0 if works else 2), (command[0], error)
        assert works or (kind.title in error and "Traceback" not in error), (command[0], error)
        if works and "--out" in command:
            assert LoraAdapter.load(out).kind == "LORA"


@pytest.mark.parametrize("case", ["lora", "vera"])
def test_live_adapters_are_read_without_the_hub_or_warnings(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, config = mlp(), peft.LoraConfig(lora_bias=True, **T) if case == "lora" else CASES[case]()
    base.name_or_path = "owner/model"  # pyright: ignore
    model = peft.get_peft_model(base, config)
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert LoraAdapter.from_model(model).modules.keys() == {"up", "down"}


@pytest.mark.parametrize(
    ("name", "error", "found"),
    [(["x"], TypeError, r"\['x'\]"), (None, TypeError, "None"), ("X", NotImplementedError, "'X'")],
)
def test_kind_of_names_its_argument(name: Any, error: type[Exception], found: str) -> None:
    with pytest.raises(error, match=f"kind_of: name: expected .*, found {found}$"):
        kind_of(name)


def test_federation_refuses_other_kinds_by_name() -> None:
    model = peft.get_peft_model(mlp(), CASES["ia3"]())
    with pytest.raises(ValueError, match=r"adapter_name: .*, found 'default' with peft_type='IA3'"):
        LoraLayerManager(model)
