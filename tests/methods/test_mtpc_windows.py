"""Windows of labels: values, ends of documents and packing."""

from __future__ import annotations

import pytest
import torch

from lora_ext.methods.mtpc import (
    frequent_tokens,
    pack_documents,
    shift_labels,
    unfold_teacher,
    unfold_windows,
)

X = -100


def test_window_is_the_next_tokens_and_ignores_positions_beyond_the_end():
    windows = unfold_windows(torch.tensor([[5, 6, 7]]), 3)
    assert windows.tolist() == [[[5, 6, 7], [6, 7, X], [7, X, X]]]
    assert unfold_windows(torch.tensor([[5, 6, 7]]), 1).tolist() == [[[5], [6], [7]]]


def test_no_window_crosses_the_end_of_a_document():
    eos = 9
    windows = unfold_windows(torch.tensor([[5, 9, 6, 9, 9, 7]]), 4, eos)
    assert windows.tolist() == [
        [[5, 9, X, X], [9, X, X, X], [6, 9, X, X], [9, X, X, X], [9, X, X, X], [7, X, X, X]]
    ]


def test_ignored_labels_stay_ignored():
    assert unfold_windows(torch.tensor([[X, 6]]), 2).tolist() == [[[X, 6], [6, X]]]
    assert unfold_windows(torch.tensor([[-1, 6]]), 2, ignore=-1).tolist() == [[[-1, 6], [6, -1]]]


def test_teacher_windows_are_aligned_with_label_windows():
    labels = torch.randint(0, 7, (2, 5))
    logits = torch.nn.functional.one_hot(labels, 7).double()
    windows, teacher = unfold_windows(labels, 3), unfold_teacher(logits, 3)
    assert teacher.shape == (2, 5, 3, 7)
    inside = windows != X
    assert torch.equal(teacher.argmax(-1)[inside], windows[inside])
    # The windows are views of one copy of the padded logits.
    assert teacher.untyped_storage().nbytes() == 2 * (5 + 2) * 7 * 8


def test_shifted_labels_are_aligned_with_their_predictions():
    assert shift_labels(torch.tensor([[1, 2, 3]])).tolist() == [[2, 3, X]]


def test_packed_documents_are_separated_by_the_end_token():
    packed = pack_documents([[1, 2], [], [3, 4, 5]], 4, eos_id=9)
    assert packed.tolist() == [[1, 2, 9, 9], [3, 4, 5, 9]]
    assert pack_documents([[1]], 4, eos_id=9).shape == (0, 4)


def test_frequent_tokens_are_the_most_frequent_in_ascending_order():
    ids = torch.tensor([[7, 7, 2, 5, -100], [2, 7, 9, -100, 4]])
    assert frequent_tokens(ids, 3).tolist() == [2, 4, 7]
    assert frequent_tokens(ids, 99).tolist() == [2, 4, 5, 7, 9]
    with pytest.raises(ValueError, match="frequent_tokens: size: expected at least 1, found 0"):
        frequent_tokens(ids, 0)
    with pytest.raises(TypeError, match=r"ids: expected int64, found torch.int32"):
        frequent_tokens(ids.int(), 3)


def test_errors_name_invalid_arguments():
    for call, name in (
        (lambda: unfold_windows(torch.zeros(1, 2), 0), "n: expected"),
        (lambda: unfold_windows(torch.zeros(2), 1), "labels: expected shape"),
        (lambda: pack_documents([], 0, 1), "length: expected"),
    ):
        with pytest.raises(ValueError, match=name):
            call()
