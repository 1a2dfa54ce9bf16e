"""The weight of a base layer as an (out, in) matrix, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from lora_ext.layers.base._weight import BaseWeight, ConvWeight, EmbeddingWeight, LinearWeight
from lora_ext.nn import LoraConv, LoraEmbedding, LoraLinear

KINDS = {
    "linear": lambda: LinearWeight(nn.Linear(6, 4)),
    "conv1d": lambda: LinearWeight(Conv1D(4, 6)),
    "patches": lambda: ConvWeight(nn.Conv2d(3, 4, 2, 2)),
    "line": lambda: ConvWeight(nn.Conv1d(3, 4, 2, 2)),
    "embedding": lambda: EmbeddingWeight(nn.Embedding(6, 4)),
}
every_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS.keys())


@every_kind
def test_weight_is_an_out_by_in_matrix_and_is_restored(make):
    base: BaseWeight = make()
    in_features, out_features = base.features
    matrix = base.matrix()
    assert matrix.shape == (out_features, in_features)
    assert torch.equal(base.as_stored(matrix), base.weight)
    assert torch.equal(base.as_matrix(base.weight), matrix)


@every_kind
def test_factors_multiply_to_an_update_of_the_weight(make):
    base: BaseWeight = make()
    shape_a, shape_b = base.factor_shapes(2)
    a, b = base.factors(torch.ones(shape_a), torch.ones(shape_b), None)
    a, b = (getattr(f, "weight", f) for f in (a, b))
    assert base.as_stored(b.flatten(1) @ a.flatten(1)).shape == base.weight.shape
    assert base.magnitude(torch.ones(base.features[1])).numel() == base.features[1]


@every_kind
def test_writing_a_weight_keeps_its_memory(make):
    base: BaseWeight = make()
    memory = base.weight.data_ptr()
    base.write(base.as_stored(torch.full_like(base.matrix(), 3.0)), None)
    assert base.weight.data_ptr() == memory and bool((base.weight == 3).all())


def test_weight_that_a_parametrization_computes_cannot_be_written():
    base = LinearWeight(parametrizations.weight_norm(nn.Linear(6, 4)))
    assert base.matrix().shape == (4, 6)
    with pytest.raises(ValueError, match=r"merge: base_layer.weight: expected a parameter or buf"):
        base.check_writable("merge")


def test_layer_uses_its_current_base_layer():
    for layer, other in (
        (LoraLinear(nn.Linear(6, 4)), nn.Linear(6, 4)),
        (LoraConv(nn.Conv2d(3, 4, 2, 2)), nn.Conv2d(3, 4, 2, 2)),
        (LoraEmbedding(nn.Embedding(6, 4)), nn.Embedding(6, 4)),
    ):
        layer.base_layer = other
        assert layer.base_weight.weight is layer.weight is other.weight
