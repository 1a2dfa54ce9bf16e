"""LoraLinear, compared with PEFT's layer with the same state dict, and changes of its adapters."""

import copy
import io
import math
import pickle

import pytest
import torch
from peft_layers import CLOSE, assert_layers_agree, gradients, peft_layer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora_ext
from lora_ext.nn import LoraLinear

pytestmark = pytest.mark.hosts


def pair(*settings: dict, base: nn.Module | None = None):
    """Return PEFT's layer and a LoraLinear with the same state dict and base. All adapters are
    active."""
    torch.manual_seed(0)
    base = nn.Linear(24, 17) if base is None else base
    conv1d = isinstance(base, Conv1D)
    theirs = peft_layer(base, *({**s, "fan_in_fan_out": conv1d} for s in settings))
    ours = layer(*settings, base=copy.deepcopy(base))
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def layer(*settings: dict, base: nn.Module | None = None) -> LoraLinear:
    base = nn.Linear(24, 17) if base is None else base
    common = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
    made = LoraLinear(base, "0", **{**common, **settings[0]})
    for i, s in enumerate(settings[1:], 1):
        made.add_adapter(str(i), **{**common, **s})
    made.set_adapter([str(i) for i in range(len(settings))])
    return made


def batch(*lead: int) -> torch.Tensor:
    return torch.randn(*lead, 24, requires_grad=True)


KINDS = {
    "plain": [{}],
    "rslora": [{"use_rslora": True, "r": 3}],
    "bias": [{"lora_bias": True}],
    "several": [{}, {"r": 8, "lora_alpha": 12}, {"r": 2, "use_rslora": True}],
    "dora": [{"use_dora": True}],
    "plain, dora": [{}, {"use_dora": True}],
    "dora, plain, dora": [{"use_dora": True}, {"r": 2}, {"use_dora": True, "r": 3}],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "base",
    [nn.Linear(24, 17), nn.Linear(24, 17, bias=False), Conv1D(17, 24)],
    ids=["Linear", "no bias", "Conv1D"],
)
def test_forward_and_gradients_equal_peft(kind, base):
    ours, theirs = pair(*KINDS[kind], base=copy.deepcopy(base))
    assert ours.scaling == theirs.scaling
    assert_layers_agree(ours, theirs, batch(2, 3))


@pytest.mark.parametrize("kind", ["dora", "plain, dora"])
def test_trained_dora_equals_peft(kind):
    ours, theirs = pair(*KINDS[kind])
    x = batch(2, 3)
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.linspace(-0.5, 0.5, p.numel()).view_as(p))
    theirs.load_state_dict(ours.state_dict())
    assert_layers_agree(ours, theirs, x)


def test_dora_starts_at_the_base_model_with_the_norm_as_magnitude():
    ours = LoraLinear(nn.Linear(24, 17), use_dora=True)
    magnitude = ours.lora_magnitude_vector["default"].weight
    torch.testing.assert_close(magnitude, ours.weight.norm(dim=1), **CLOSE)
    x = batch(5)
    torch.testing.assert_close(ours(x), ours.base_layer(x), **CLOSE)


def test_each_row_uses_its_adapter():
    ours, theirs = pair({}, {"r": 2}, {"lora_bias": True, "r": 8})
    names = ["2", "__base__", "0"]
    assert_layers_agree(ours, theirs, batch(3, 4), adapter_names=names)
    x = batch(3, 4)
    expected = ours(x, names)
    with lora_ext.adapters(["2", None, "0"]):
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)
    for ids in ([2, -1, 0], [2] * 4 + [-1] * 4 + [0] * 4, [[2] * 4, [-1] * 4, [0] * 4]):
        assert torch.equal(ours(x, torch.tensor(ids)), expected)


def test_rows_of_dora_adapters_in_a_mixed_batch_equal_the_adapter_alone():
    ours = layer({}, {"use_dora": True}, {"use_dora": True, "r": 2})
    x = batch(4, 3)
    y = ours(x, ["1", None, "0", "2"])
    for row, name in enumerate(["1", None, "0", "2"]):
        ours.set_adapter([] if name is None else name)
        torch.testing.assert_close(y[row], ours(x)[row], **CLOSE)
    assert ours(x, ["0"] * 4).shape == y.shape


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_dora_with_dropout_equals_the_formula_on_the_dropped_input(p, monkeypatch):
    ours = layer({"use_dora": True, "lora_dropout": p})
    x = batch(6)
    keep = (torch.arange(6 * 24).view(6, 24) % 2).bool()
    monkeypatch.setattr(
        lora_ext.ops, "lora_dropout", lambda x, p, seed: torch.where(keep, x / (1 - p), 0)
    )
    dropped = torch.where(keep, x / (1 - p), 0) if p else x
    f = ours.factors("0")
    direction = ours.weight + f.scaling * f.b @ f.a
    scale = ours.lora_magnitude_vector["0"].weight / direction.norm(dim=1).detach()
    expected = ours.base_layer(x) + dropped @ (scale[:, None] * direction - ours.weight).T
    torch.testing.assert_close(ours(x), expected, **CLOSE)
    y, other = gradients(ours(x), ours, x), gradients(expected, ours, x)
    torch.testing.assert_close(y, other, **CLOSE)


def test_names_may_exist_in_some_layers_only():
    one, two = LoraLinear(nn.Linear(24, 24), "a"), LoraLinear(nn.Linear(24, 24), "b")
    nn.init.normal_(one.lora_B["a"].weight)
    x = batch(2)
    with lora_ext.adapters(["a", "b"]):
        assert torch.equal(one(x)[1], one.base_layer(x)[1])
        assert not torch.equal(one(x)[0], one.base_layer(x)[0])
        two(x)
    kept = LoraLinear(nn.Linear(2, 2), "zigzag")  # the only similar name in this process
    with pytest.raises(lora_ext.nn.UnknownAdapterError, match=r"'zigzig'; did you mean 'zigzag'\?"):
        lora_ext.adapters(["zigzig", None]).__enter__()
    del kept
    with pytest.raises(ValueError, match=r"found 'b'"):
        one(x, ["a", "b"])


def test_blocks_nest_and_end_after_an_exception():
    ours = layer({}, {})
    ours.set_adapter("0")
    x = batch(2)
    plain, first = ours(x), ours(x, ["1", "0"])
    with pytest.raises(ZeroDivisionError), lora_ext.adapters(["1", "0"]):
        with lora_ext.adapters([None, None]):
            assert torch.equal(ours(x), ours.base_layer(x))
        assert torch.equal(ours(x), first)
        1 / 0  # noqa: B018
    assert torch.equal(ours(x), plain)


def test_adapters_are_added_and_deleted():
    ours = LoraLinear(nn.Linear(24, 17), "a", r=2)
    ours.add_adapter("b", r=4, lora_bias=True)
    ours.add_adapter("c", r=4, use_dora=True)
    ours.delete_adapter("c")
    assert ours.adapter_names == ("a", "b") and ours.active_adapters == ["a"]
    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    base = {"base_layer.weight", "base_layer.bias"}
    assert trainable == base | {"lora_A.a.weight", "lora_B.a.weight"}
    ours.set_adapter("b")
    assert not ours.lora_A["a"].weight.requires_grad and ours.lora_B["b"].bias.requires_grad
    ours.set_adapter(["a", "b"], inference_mode=True)
    assert not ours.lora_B["b"].bias.requires_grad
    ours.delete_adapter("a")
    assert ours.active_adapters == ["b"] and not any(".a." in n for n in ours.state_dict())
    ours.delete_adapter("b")
    x = batch(3)
    assert torch.equal(ours(x), ours.base_layer(x))
    assert set(ours.state_dict()) == base


def test_set_scale_and_enable_adapters_equal_peft():
    ours, theirs = pair({"use_rslora": True})
    for scaled in (ours, theirs):
        scaled.set_scale("0", 2.5)
    assert ours.scaling["0"] == 2.5 * 6 / math.sqrt(4)
    x = batch(3)
    assert_layers_agree(ours, theirs, x)
    ours.enable_adapters(False)
    assert torch.equal(ours(x), ours.base_layer(x))
    ours.enable_adapters(True)
    assert_layers_agree(ours, theirs, x)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_layer_are_independent_and_equal(kind):
    ours = layer(*KINDS[kind])
    x = batch(2, 3)
    expected = ours(x)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    copies = [copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    copies.append(torch.load(saved, weights_only=False))
    for other in copies:
        assert torch.equal(other(x), expected)
        other.weight.data.zero_()
        assert not torch.equal(other(x), expected) and torch.equal(ours(x), expected)
        with lora_ext.adapters([None, "0"]):
            assert torch.equal(other(x)[0], other.base_layer(x)[0])
    fresh = layer(*KINDS[kind])
    fresh.load_state_dict(ours.state_dict())
    assert torch.equal(fresh(x), expected)


def test_checkpointing_recomputes_with_the_same_mask():
    ours = layer({"lora_dropout": 0.5}, {"lora_dropout": 0.2, "use_dora": True})
    x = batch(6)
    found = []
    for run in (ours, lambda x: checkpoint(ours, x, use_reentrant=False)):
        torch.manual_seed(3)
        found.append(gradients(run(x), ours, x))
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_dropout_applies_only_in_training():
    ours = layer({"lora_dropout": 0.5}).eval()
    x = batch(6)
    assert torch.equal(ours(x), ours(x))
    ours.train()
    assert not torch.equal(ours(x), ours(x))
    still = LoraLinear(nn.Linear(4, 4).eval(), lora_dropout=0.5)
    assert not any(module.training for module in still.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_break(kind):
    ours = layer(*KINDS[kind])
    x = batch(2, 3)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    expected = ours(x)
    torch.testing.assert_close(compiled(x), expected, **CLOSE)
    mine, eager = gradients(compiled(x), ours, x), gradients(expected, ours, x)
    torch.testing.assert_close(mine, eager, **CLOSE)


def test_one_compiled_graph_serves_all_blocks():
    ours = layer({}, {"r": 2})
    ours.set_adapter("0")
    x = batch(3, 4)
    graphs = []
    torch._dynamo.reset()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), ours(x), **CLOSE)
    for names in (["1", None, "0"], ["0", "1", "1"], None):
        with lora_ext.adapters(names):
            torch.testing.assert_close(compiled(x), ours(x), **CLOSE)
    torch.testing.assert_close(compiled(x), ours(x), **CLOSE)
    assert len(graphs) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layer_uses_the_block_of_its_forward(reentrant):
    ours = layer({}, {"r": 2})
    ours.set_adapter("0")
    x = batch(3)

    def run(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(ours, x, use_reentrant=reentrant)

    expected = gradients(ours(x, ["1", None, "1"]), ours, x)
    with lora_ext.adapters(["1", None, "1"]):
        found = gradients(run(x), ours, x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    y = run(x)
    with lora_ext.adapters([None, "1", "1"]):  # This is not the block of the forward pass.
        torch.testing.assert_close(gradients(y, ours, x), gradients(ours(x, ["0"] * 3), ours, x))
    with lora_ext.adapters(["1", None, "1"]):
        late = run(x)
    torch.testing.assert_close(gradients(late, ours, x), expected, rtol=0, atol=0)
    with lora_ext.adapters(["1", None, "1"]):
        first = run(x)
        with lora_ext.adapters(["0", None, "1"]):
            second = run(x)
            third = run(x)
    other = gradients(ours(x, ["0", None, "1"]), ours, x)
    # The backward passes run neither in the order of the forward passes nor in its reverse.
    torch.testing.assert_close(gradients(second, ours, x), other, rtol=0, atol=0)
    torch.testing.assert_close(gradients(first, ours, x), expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(third, ours, x), other, rtol=0, atol=0)
    torch.testing.assert_close(gradients(run(x), ours, x), gradients(ours(x), ours, x))


def test_invalid_adapter_name_leaves_the_layer_unchanged() -> None:
    made = layer({})
    before = list(made.state_dict()), made.adapter_names
    for name in ("keys", "pop", "training"):
        with pytest.raises(ValueError, match="adapter_name: expected a name that is not an"):
            made.add_adapter(name, r=4)
    assert (list(made.state_dict()), made.adapter_names) == before
    made(torch.randn(4, 24), ["0", "0", None, "0"])


def test_rows_of_an_lm_head_may_be_selected_before_it():
    head = LoraLinear(nn.Linear(24, 301, bias=False), "a", r=4, init_lora_weights=False).double()
    head.add_adapter("b", r=2, init_lora_weights=False)
    head.set_adapter(["a", "b"])
    x, ids = torch.randn(4, 6, 24, dtype=torch.double), torch.tensor([0, 1, -1, 1])
    rows = torch.tensor([3, 5, 11, 17, 23])  # indices, among 24 rows, of the requested logits
    results = []
    for chosen in (False, True):
        head.zero_grad()
        if chosen:
            y = head(x.flatten(0, 1)[rows], ids.repeat_interleave(6)[rows])
        else:
            y = head(x, ids).flatten(0, 1)[rows]
        y.square().sum().backward()
        results.append([y, *(p.grad for p in head.parameters() if p.grad is not None)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)
    # As with logits_to_keep of transformers, only the last token of each row is left.
    last = head(x[:, -1:], ["a", "b", None, "b"])
    torch.testing.assert_close(last, head(x, ids)[:, -1:])
