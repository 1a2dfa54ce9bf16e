"""Labels of language models: the shift to the position that predicts them, and ignored labels."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lora_ext.nn import IGNORE, shift_labels


def test_each_position_gets_the_label_of_the_next_and_the_last_is_ignored():
    labels = torch.tensor([[1, 2, 3], [4, IGNORE, 6]])
    assert shift_labels(labels).tolist() == [[2, 3, IGNORE], [IGNORE, 6, IGNORE]]


def test_any_leading_shape_and_ignore_index_is_supported():
    assert shift_labels(torch.tensor([1, 2]), ignore=-1).tolist() == [2, -1]
    assert shift_labels(torch.arange(8).view(2, 2, 2))[1, 1].tolist() == [7, IGNORE]


def test_loss_of_shifted_labels_equals_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator)
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, 2] = IGNORE
    ours = F.cross_entropy(logits.flatten(0, 1), shift_labels(labels).flatten())
    theirs = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(ours, theirs)
