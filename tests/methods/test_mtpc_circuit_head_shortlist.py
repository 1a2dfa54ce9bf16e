"""`CircuitHead` with a shortlist equals a head over a smaller vocabulary."""

from __future__ import annotations

import pytest
import torch
from circuit_heads import DOUBLE, KINDS, D, K, V, hidden, make, windows
from torch import Tensor
from torch.nn import functional as F

from lora_ext.methods.mtpc._emission import EMISSIONS
from lora_ext.methods.mtpc._shortlist import Shortlist
from lora_ext.nn import CircuitHead


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_shortlist_equals_the_head_of_a_smaller_vocabulary(kind: str, emission: str):
    shortlist = torch.tensor([4, 0, 3])  # given in any order, stored in ascending order
    small = make(kind, emission)
    head = CircuitHead(D, 5, K, KINDS[kind], kind, emission, 2, dtype=DOUBLE, shortlist=shortlist)
    head.load_state_dict({**small.state_dict(), "shortlist": shortlist.sort().values})
    x = windows()
    h, listed = hidden(1).expand(len(x), D), torch.tensor([0, 3, 4])
    torch.testing.assert_close(head.log_prob(h, listed[x]), small.log_prob(h, x))
    wide, dense = head.circuit(h[:2]).leaf, small.circuit(h[:2]).leaf
    torch.testing.assert_close(wide[..., listed], dense)
    assert (wide[..., [1, 2]] == -torch.inf).all()
    outside = listed[x]
    outside[:, 2] = 1
    log_prob = head.log_prob(h, outside)
    torch.testing.assert_close(log_prob[:, :2], small.log_prob(h, x)[:, :2])
    assert (log_prob[:, 2:] == -torch.inf).all()
    dist = head.full_conditional(h, listed[x], 1)
    torch.testing.assert_close(dist[:, listed], small.full_conditional(h, x, 1))
    assert (dist[:, [1, 2]] == -torch.inf).all()
    uniforms = torch.rand(len(x), K, 2)
    tokens = head.sample(h, uniforms=uniforms)[0]
    assert torch.equal(tokens, listed[small.sample(h, uniforms=uniforms)[0]])
    assert torch.equal(head.argmax(h)[0], listed[small.argmax(h)[0]])


def test_state_dict_restores_its_shortlist_or_is_refused():
    listed, other = (CircuitHead(D, 9, K, 3, "cp", shortlist=ids) for ids in ([8, 5], [0, 1]))
    state = listed.state_dict()
    other.load_state_dict(state)
    h, x = hidden(2).float(), torch.randint(9, (2, K))
    assert torch.equal(other.log_prob(h, x), listed.log_prob(h, x))
    with pytest.raises(ValueError, match=r"shortlist: expected ids in \[0, 7\), found 5 to 8"):
        CircuitHead(D, 7, K, 3, "cp", shortlist=[0, 1]).load_state_dict(state)
    with pytest.raises(ValueError, match="shortlist: expected ascending ids"):
        other.load_state_dict({**state, "shortlist": torch.tensor([8, 5])})
    with torch.device("meta"):
        head = CircuitHead(D, 9, K, 3, "cp", shortlist=[8, 5])
    head.load_state_dict(state, assign=True)
    assert torch.equal(head.log_prob(h, x), listed.log_prob(h, x))


@pytest.mark.parametrize("emission", EMISSIONS)
def test_state_dict_restores_list_and_parameters_after_to_empty(emission: str):
    head = make("hmm", emission, shortlist=[2, 0])
    with torch.device("meta"):
        other = CircuitHead(D, V, K, 3, "hmm", emission, 2, dtype=DOUBLE, shortlist=[0, 1])
    other.to_empty(device="cpu").load_state_dict(head.state_dict())
    h, x = hidden(3), torch.tensor([[0, 2, 1, 0]] * 3)
    assert torch.equal(other.log_prob(h, x), head.log_prob(h, x))


def test_shortlist_is_initialised_from_its_rows_of_the_lm_head():
    weight, h, listed = torch.randn(5, D, dtype=DOUBLE), hidden(3), torch.tensor([0, 3, 4])
    for emission in EMISSIONS:
        options = {"dtype": DOUBLE, "shortlist": listed}
        head = CircuitHead(D, 5, K, 3, "btree", emission, **options)
        head.init_from_lm_head(weight)
        leaf = head.circuit(h).leaf[:, 0, 0, listed]
        torch.testing.assert_close(leaf, F.linear(h, weight[listed]))


@pytest.mark.parametrize(
    ("shortlist", "error"),
    [
        (torch.tensor([1, 1]), "distinct"),
        (torch.tensor([0, 3]), r"ids in \[0, 3\), found 0 to 3"),
        (torch.tensor([-1, 0]), r"found -1 to 0"),
        (torch.tensor([1]), "L >= 2"),
        (torch.tensor([], dtype=torch.int64), "L >= 2"),
        (torch.tensor([[0, 1]]), r"found \(1, 2\)"),
    ],
)
def test_errors_name_invalid_shortlists(shortlist: Tensor, error: str):
    with pytest.raises(ValueError, match=f"CircuitHead: shortlist: .*{error}"):
        CircuitHead(D, V, K, 3, "cp", shortlist=shortlist)
    with pytest.raises(TypeError, match="CircuitHead: shortlist: expected int64"):
        CircuitHead(D, V, K, 3, "cp", shortlist=torch.tensor([0, 1], dtype=torch.int32))


def test_tokens_are_mapped_to_places_in_the_list():
    listed = Shortlist(torch.tensor([2, 5, 6]), 8)
    tokens = torch.tensor([5, 2, 6, 0, 7, -1, -9, 8])
    assert listed.places(tokens).tolist() == [1, 0, 2, -1, -1, -1, -9, 8]
    assert listed.lacks(tokens).tolist() == [False, False, False, True, True, False, False, False]
    logits = torch.arange(6.0).view(2, 3)
    wide = listed.widen(logits)
    assert wide.shape == (2, 8) and wide.isfinite().sum() == 6
    assert torch.equal(listed.narrow(wide), logits)
    whole = Shortlist(None, 8)
    assert whole.size == 8 and not whole.lacks(tokens).any()
    assert whole.places(tokens) is tokens and whole.widen(logits) is logits
