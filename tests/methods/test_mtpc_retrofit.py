"""`retrofit`: the frozen model, the loss, the draft tail and training."""

from __future__ import annotations

import math
from typing import Any, get_args, get_type_hints

import pytest
import torch
import transformers
from methods.toy import FAMILIES, make_draft, make_model, prompts, train

from lora_ext.methods import mtpc
from lora_ext.methods.mtpc._emission import EMISSIONS
from lora_ext.methods.mtpc._trunk import run_trunk
from lora_ext.nn import CircuitHead


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gets_the_hidden_states_of_the_lm_head(family: str):
    model, (ids, mask) = make_model(family), prompts(2)
    draft = make_draft(model)
    logits, hidden = run_trunk(model, None, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(model.get_output_embeddings()(hidden), logits)
    trained = draft.hidden_states(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(trained[mask == 1], hidden[mask == 1])


def test_model_is_frozen_and_not_part_of_the_draft():
    model = make_model("llama")
    draft = make_draft(model, draft_layers=1)
    trained = {id(p) for p in draft.parameters() if p.requires_grad}
    assert trained == {id(p) for p in draft.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} <= trained
    assert all(key.startswith(("head.", "tail.factors.")) for key in draft.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_equals_that_of_the_windows(family: str):
    model, (ids, mask) = make_model(family), prompts(3, length=8)
    draft = make_draft(model, gamma=0.8)
    loss, each = draft.loss(ids, attention_mask=mask, eos_id=3)
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = draft.hidden_states(input_ids=ids, attention_mask=mask, position_ids=positions)
    total, count = torch.zeros(4, dtype=torch.float64), torch.zeros(4)
    for b in range(3):
        for t in mask[b].nonzero()[:, 0].tolist():
            window = labels[b, t + 1 : t + 5].tolist()
            window = [*window, *[-100] * (4 - len(window))]
            if 3 in window:
                window[window.index(3) + 1 :] = [-100] * (3 - window.index(3))
            x = torch.tensor(window)
            c = draft.head.conditionals(hidden[b, t], x)
            total, count = total - c, count + (x != -100)
    torch.testing.assert_close(each, total / count.clamp(min=1))
    weight = 0.8 ** torch.arange(4)
    torch.testing.assert_close(loss, (weight * total / count.clamp(min=1)).sum() / weight.sum())


def test_distillation_is_zero_at_the_first_position_and_trains_the_others():
    # At the first position, the teacher is the LM head on the same hidden state.
    model, (ids, _) = make_model("llama"), prompts(3, length=8)
    draft = make_draft(model, noise=0, beta=1.0)
    _, each = draft.loss(ids)
    assert each[0].abs() < 1e-12  # The head is initialised with the LM head.
    assert (each[1:] > 0.01).all()
    before = draft.loss(ids)[0].item()
    assert train(draft, ids, steps=30) < before - 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_draft_tail_does_not_change_the_model(family: str):
    model, (ids, mask) = make_model(family), prompts(3)
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        expected = model(**inputs).logits
        modules = dict(model.named_modules())
        draft = make_draft(model, draft_layers=2)
        assert torch.equal(model(**inputs).logits, expected)
        logits, hidden = run_trunk(model, draft.tail, **inputs)
        # Matrix products of different shapes round the verifier's and the draft's rows differently.
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(hidden, draft.hidden_states(**inputs))
        _, plain = run_trunk(model, None, **inputs)
        assert (hidden - plain).abs().max() > 1e-2
    assert draft.tail is not None
    draft.tail.remove()
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}


def test_new_draft_tail_gives_the_hidden_states_of_the_lm_head():
    model, (ids, mask) = make_model("llama"), prompts(2)
    tail = mtpc.DraftTail(model, num_layers=1)
    with torch.no_grad():
        _, hidden = run_trunk(model, tail, input_ids=ids, attention_mask=mask)
        _, plain = run_trunk(model, None, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(hidden, plain)


def test_draft_tail_trains_only_its_factors_and_lowers_the_loss():
    model, (ids, _) = make_model("llama"), prompts(4, length=12)
    ids = ids % 5
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    draft = mtpc.retrofit(model, mtpc.MtpcConfig(4, 3, "hmm", draft_layers=2, draft_rank=4))
    first, _ = draft.loss(ids)
    first.backward()
    assert draft.tail is not None
    b_factors = list(draft.tail.factors)[1::2]
    assert all(p.grad is not None and p.grad.any() for p in b_factors)
    assert train(draft, ids, steps=30) < first.item() - 0.2
    now = {n.replace(".base_layer", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(now[n], p) for n, p in frozen.items())


@pytest.mark.parametrize("layers", [0, 1])
def test_state_dict_restores_the_draft(layers: int):
    model, (ids, _) = make_model("llama"), prompts(2)
    draft = make_draft(model, draft_layers=layers)
    expected, state = draft.loss(ids)[0], draft.state_dict()
    other = make_draft(make_model("llama"), noise=0, draft_layers=layers)
    assert not torch.equal(other.loss(ids)[0], expected)
    other.load_state_dict(state)
    assert torch.equal(other.loss(ids)[0], expected)


class Loss(torch.nn.Module):
    """Module with the loss of a draft as its forward."""

    def __init__(self, draft: mtpc.Draft):
        super().__init__()
        self.draft = draft

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.draft.loss(ids)[0]


@pytest.mark.parametrize("way", ["assigned", "functional"])
def test_layers_use_assigned_and_functional_factors(way: str):
    model, (ids, _) = make_model("llama"), prompts(2, length=8)
    draft = make_draft(model, draft_layers=1)
    given = {n: 1.1 * p.detach() for n, p in draft.named_parameters()}
    with torch.no_grad():
        plain = draft.loss(ids)[0]
        for parameter in draft.parameters():
            parameter.mul_(1.1)
        expected = draft.loss(ids)[0]
        for parameter in draft.parameters():
            parameter.div_(1.1)
    assert abs(expected - plain) > 1e-4
    if way == "assigned":
        draft.load_state_dict(given, assign=True)
        loss, trained = draft.loss(ids)[0], dict(draft.named_parameters())
    else:
        trained = {n: p.requires_grad_() for n, p in given.items()}
        renamed = {f"draft.{n}": p for n, p in trained.items()}
        loss = torch.func.functional_call(Loss(draft), renamed, (ids,))
    assert torch.allclose(loss, expected, rtol=1e-12)
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    assert all(g is not None and bool(g.any()) for g in gradients)
    if way == "functional":
        assert torch.allclose(draft.loss(ids)[0], plain, rtol=1e-12)


def test_more_draft_layers_than_the_model_has_are_refused():
    with pytest.raises(ValueError, match="num_layers: expected a number from 1 to 2, found 3"):
        mtpc.retrofit(make_model("llama"), mtpc.MtpcConfig(draft_layers=3))


def test_latents_learn_a_bigram_that_factors_cannot():
    # x_1 is one of four tokens and determines the rest. The best loss is log 4 per position for the
    # factorised head (FF), and log 4 in total with latents.
    follows = torch.tensor([2, 3, 1, 0])
    x = [torch.arange(4)]
    for _ in range(3):
        x.append(follows[x[-1]])
    windows = torch.stack(x, 1)
    hidden = torch.ones(4, 2)
    found = {}
    for kind in ("ff", "hmm", "btree"):
        torch.manual_seed(0)
        head = CircuitHead(2, 4, 4, 1 if kind == "ff" else 4, kind)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
        for _ in range(300):
            optimizer.zero_grad()
            loss, _ = mtpc.window_loss(head, hidden, windows, gamma=1.0)
            loss.backward()
            optimizer.step()
        found[kind] = loss.item()
    assert found["ff"] > math.log(4) - 1e-3
    for kind in ("hmm", "btree"):
        assert found["ff"] - found[kind] > 0.5, found


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_the_loss(family: str):
    model = make_model(family)
    draft = make_draft(model)
    ids = prompts(1, length=7)[0]
    pad = torch.full((1, 3), 1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    expected = draft.loss(ids)[0]
    torch.testing.assert_close(
        draft.loss(torch.cat([pad, ids], 1), attention_mask=mask)[0], expected
    )


def test_failed_retrofit_leaves_the_model_unchanged():
    model = make_model("llama").requires_grad_(True)
    for config in (mtpc.MtpcConfig(n_token=2, rank=2, draft_layers=99),):
        with pytest.raises(ValueError, match="num_layers"):
            mtpc.retrofit(model, config)
        assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="output embeddings"):
        mtpc.retrofit(model.base_model)
    with pytest.raises(TypeError, match="shortlist: expected token ids, found 'abc'"):
        mtpc.retrofit(model, shortlist="abc")


def test_second_draft_tail_is_refused_until_the_first_is_removed():
    model, (ids, _) = make_model("llama"), prompts(1)
    first = make_draft(model, draft_layers=2)
    expected = first.loss(ids)[0]
    with pytest.raises(ValueError, match=r"without a draft tail, found a draft .*remove\(\)"):
        make_draft(model, draft_layers=1)
    assert torch.equal(first.loss(ids)[0], expected)
    first.remove()
    make_draft(model, draft_layers=1)


def test_configuration_is_checked_on_construction():
    cases: list[tuple[str, dict[str, Any]]] = [
        (r"kind: expected one of .*, found 'pcfg'", {"kind": "pcfg"}),
        ("emission: expected one of .*, found 'mlp'", {"emission": "mlp"}),
        ("rank: expected 1 for 'ff', found 32", {"kind": "ff"}),
        ("n_token: expected at least 2 for 'btree', found 1", {"n_token": 1}),
        (r"gamma: expected a number in \(0, 1\], found 0", {"gamma": 0}),
        (r"beta: expected a number in \[0, 1\], found 2.0", {"beta": 2.0}),
        ("draft_layers: expected an integer from 0, found -1", {"draft_layers": -1}),
        ("draft_rank: expected an integer from 1, found 0", {"draft_rank": 0}),
        ("draft_alpha: expected a number above 0, found 0", {"draft_alpha": 0}),
    ]
    for message, fields in cases:
        with pytest.raises(ValueError, match=f"MtpcConfig: {message}"):
            mtpc.MtpcConfig(**fields)


def test_type_hints_of_string_arguments_list_their_values():
    hints = get_type_hints(mtpc.Draft.decoder)
    assert get_args(hints["mode"]) == ("sample", "greedy")
    assert get_args(hints["window"]) == ("condition", "restart")
    assert hints.items() >= {"temperature": float, "top_p": float}.items()
    for function in (CircuitHead.__init__, mtpc.MtpcConfig):
        assert get_args(get_type_hints(function)["kind"]) == ("ff", "cp", "hmm", "btree")
    assert get_args(get_type_hints(CircuitHead.__init__)["emission"]) == tuple(EMISSIONS)
    literal, none = get_args(get_type_hints(mtpc.MtpcConfig)["emission"])
    assert get_args(literal) == tuple(EMISSIONS) and none is type(None)


@pytest.mark.parametrize(("listed", "emission"), [(None, "adapter"), (4096, "full")])
def test_default_emission_is_adapter_for_large_vocabularies(listed: int | None, emission: str):
    config = transformers.LlamaConfig(
        vocab_size=4200,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = transformers.LlamaForCausalLM(config)
    shortlist = None if listed is None else list(range(listed))
    draft = mtpc.retrofit(model, mtpc.MtpcConfig(n_token=2, rank=2), shortlist)
    assert draft.head.emission == draft.config.emission == emission
    if emission == "adapter":
        assert draft.head.unembed.data_ptr() == model.lm_head.weight.data_ptr()


def test_error_of_the_draft_tail_names_alibi():
    config = transformers.BloomConfig(vocab_size=9, hidden_size=16, n_layer=2, n_head=4)
    model = transformers.BloomForCausalLM(config).eval()
    tail = mtpc.DraftTail(model, num_layers=1)
    ids = torch.ones(1, 3, dtype=torch.int64)
    with torch.no_grad(), pytest.raises(ValueError, match=r"DraftTail: model: .* found ALiBi"):
        run_trunk(model, tail, input_ids=ids, attention_mask=torch.ones_like(ids))
    tail.remove()
