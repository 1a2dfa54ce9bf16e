"""Tasks as token ids: each hash has one id, and the model ignores order and padding."""

import pytest
import torch

from lora_ext.methods.reasoning import (
    HashChain,
    HashHop,
    SymbolModel,
    collate_symbols,
    encode_symbols,
)
from lora_ext.nn import IGNORE

HOPS = HashHop(50, chain_length=6, max_hops=3, seed=1)
CHAINS = HashChain(50, chains=(2, 3, 4), num_chains=2, seed=1)


@pytest.mark.parametrize("task", [HOPS, CHAINS], ids=["hops", "chains"])
def test_ids_represent_hashes_one_to_one(task):
    for instance in task:
        found = encode_symbols(instance, 32)
        names = {
            hash_: i
            for e, k, v in zip(instance.edges, found["keys"], found["values"], strict=True)
            for hash_, i in zip(e, (int(k), int(v)), strict=True)
        }
        assert len(set(names.values())) == len(names) and set(names.values()) <= set(range(32))
        assert [(names[k], names[v]) for k, v in instance.edges] == list(
            zip(found["keys"].tolist(), found["values"].tolist(), strict=True)
        )
        assert found["start"] == names[instance.start]
        assert found["target"] == names[instance.target]
        assert found["aux"] == (instance.hops or 0)


def test_ids_depend_only_on_the_instance_and_cover_the_vocabulary():
    found = [encode_symbols(instance, 32)["start"] for instance in HOPS]
    assert found == [encode_symbols(instance, 32)["start"] for instance in HOPS]
    assert len(set(found)) > 20


def test_too_few_ids_are_refused():
    assert len(set(encode_symbols(HOPS[0], 6)["keys"].tolist())) == 5
    with pytest.raises(
        ValueError, match=r"encode_symbols: vocab: .* 6, the number of hashes .*, found 5"
    ):
        encode_symbols(HOPS[0], 5)


def test_batch_is_padded_after_the_edges():
    batch = collate_symbols([CHAINS[i] for i in range(8)] + [HOPS[0]], 32)
    assert batch["keys"].shape == batch["values"].shape == (9, 5)
    real = (batch["keys"] != IGNORE).sum(1).tolist()
    assert real == [len(CHAINS[i].edges) for i in range(8)] + [5]
    assert batch["aux"].tolist()[:8] == [0] * 8


def test_model_is_invariant_to_order_and_padding():
    torch.manual_seed(0)
    model = SymbolModel(width=16, layers=2, heads=2).double()
    one = collate_symbols([CHAINS[0]], 32)
    wide = collate_symbols([CHAINS[0], HOPS[0]], 32)
    wide["keys"] = torch.nn.functional.pad(wide["keys"], (0, 3), value=IGNORE)
    wide["values"] = torch.nn.functional.pad(wide["values"], (0, 3), value=IGNORE)
    expected = model(**one)
    assert expected.shape == (1, 32)
    torch.testing.assert_close(model(**wide)[:1], expected, rtol=1e-9, atol=1e-12)
    turned = one | {name: one[name].flip(1) for name in ("keys", "values")}
    torch.testing.assert_close(model(**turned), expected, rtol=1e-9, atol=1e-12)
