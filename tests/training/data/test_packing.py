"""Packed rows: golden cases, boundaries, masks, and the shifted view."""

import numpy as np
import pytest
import torch

from cognexis.decoder.masks import document_positions, find_documents
from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.training.data.collating import RowCollator, pad_shifted
from cognexis.training.data.packing import Packing, make_row, pack_documents, shifted_view

DOCUMENTS = [[10, 11], [20, 21, 22]]
EOD, PAD = 4, 2


def packed(**settings):
    return pack_documents(DOCUMENTS, Packing(4, PAD, **settings), EOD)


def view(rows):
    return {name: value.tolist() for name, value in shifted_view(RowCollator(PAD)(rows)).items()}


def test_two_documents_in_blocks_of_five():
    found = view(packed(mask_boundary_targets=False))
    assert found["input_ids"] == [[10, 11, 4, 20], [22, 4, 2, 2]]
    assert found["target_ids"] == [[11, 4, 20, 21], [4, 2, 2, 2]]
    assert found["loss_mask"] == [[1, 1, 1, 1], [1, 0, 0, 0]]
    assert found["document_ids"] == [[0, 0, 0, 1], [1, 1, -1, -1]]
    assert found["attention_mask"] == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert found["position_ids"][0] == [0, 1, 2, 0] and found["position_ids"][1][:2] == [0, 1]


def test_targets_across_a_boundary_are_masked_by_default():
    rows = packed()
    assert view(rows)["loss_mask"] == [[1, 1, 0, 1], [1, 0, 0, 0]]
    assert [row["labels"].tolist() for row in rows] == [[-100, 11, 4, -100, 21], [-100, 4, -100, -100, -100]]
    assert all(row["input_ids"].shape == (5,) for row in rows)


def test_positions_can_go_on_through_a_block():
    assert [row["position_ids"].tolist() for row in packed(position_reset="continue")] == [[0, 1, 2, 3, 4]] * 2


def test_padding_id_inside_a_document_is_learned_and_seen():
    row = pack_documents([[PAD, PAD, 9]], Packing(7, PAD), EOD)[0]
    assert row["attention_mask"].tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    assert row["labels"].tolist() == [-100, PAD, 9, EOD, -100, -100, -100, -100]
    assert shifted_view(row)["loss_mask"].tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_empty_documents_are_left_out_and_a_lone_last_token_too():
    assert pack_documents([[], []], Packing(4, PAD), EOD) == []
    assert len(pack_documents([[1, 2, 3, 5, 6]], Packing(4, PAD), EOD)) == 1  # the sixth token would stand alone
    assert len(pack_documents([[], [1, 2, 3, 5, 6, 7], []], Packing(4, PAD), EOD)) == 2


def test_document_longer_than_a_block_goes_on_in_the_next():
    rows = pack_documents([range(100, 119)], Packing(4, PAD), EOD)
    assert [row["document_ids"][0].item() for row in rows] == [0] * 4
    assert torch.cat([row["input_ids"] for row in rows]).tolist() == [*range(100, 119), EOD]


def test_target_mask_is_combined_with_boundaries():
    row = make_row(Packing(4, PAD), np.arange(5), np.array([0, 0, 0, 1, 1]), np.array([1, 0, 1, 1, 1], bool))
    assert row["labels"].tolist() == [-100, -100, 2, -100, 4]


def test_model_reads_the_same_documents_from_ids_and_from_positions():
    batch = RowCollator(PAD)(packed())
    by_ids = find_documents(2, 5, document_ids=batch["document_ids"], attention_mask=batch["attention_mask"])
    by_positions = find_documents(2, 5, position_ids=batch["position_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(by_ids, by_positions)
    real = batch["attention_mask"] == 1
    assert torch.equal(document_positions(by_ids)[real], batch["position_ids"][real])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0: must be a whole number of 1 or more"),
        ({"sequence_length": True}, "sequence_length=True"),
        ({"pad_token_id": -1}, "pad_token_id=-1"),
        ({"position_reset": "auto"}, "position_reset='auto': must be one of reset, continue"),
    ],
)
def test_bad_packing_is_refused(settings, message):
    with pytest.raises(InvalidConfigError, match=message):
        Packing(**{"sequence_length": 4, "pad_token_id": PAD, **settings})


def test_shifted_examples_are_padded_on_the_right():
    batch = pad_shifted([[1, 2], [4]], [[2, 3], [5]], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[1, 2], [4, 0]] and batch["target_ids"].tolist() == [[2, 3], [5, 0]]
    assert batch["loss_mask"].tolist() == [[1, 1], [1, 0]] and batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert batch["loss_mask"].dtype == torch.float32


def test_shifted_examples_must_be_equally_long():
    with pytest.raises(ShapeMismatchError, match=r"\[2, 1\] and \[2, 2\]") as caught:
        pad_shifted([[1, 2], [4]], [[2, 3], [5, 6]], 0)
    assert (caught.value.expected, caught.value.actual) == ([2, 1], [2, 2])
    with pytest.raises(InvalidConfigError, match="at least one token"):
        pad_shifted([[]], [[]], 0)


def test_collator_pads_rows_of_different_lengths():
    rows = [
        make_row(Packing(4, PAD), np.arange(5, 5 + n), np.zeros(n, np.int64), length=n) | {"domain": f"d{n}"}
        for n in (2, 4)
    ]
    batch = RowCollator(PAD, pad_to_multiple_of=3)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, PAD, PAD, PAD, PAD], [5, 6, 7, 8, PAD, PAD]]
    assert batch["labels"].tolist() == [[-100, 6, -100, -100, -100, -100], [-100, 6, 7, 8, -100, -100]]
    assert batch["document_ids"].tolist() == [[0, 0, -1, -1, -1, -1], [0, 0, 0, 0, -1, -1]]
    assert batch["attention_mask"].sum().item() == 6 and batch["domains"] == ["d2", "d4"]


def test_collator_takes_rows_of_lists_without_masks():
    batch = RowCollator(PAD)([{"input_ids": [5, PAD, 7]}, {"input_ids": [8]}])
    assert batch["labels"].tolist() == [[5, PAD, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_collator_refuses_a_batch_without_a_target_and_crooked_rows():
    row = {"input_ids": [1, 2], "labels": [-100, -100]}
    with pytest.raises(InvalidConfigError, match="labels: all of the 1 rows of a batch are masked"):
        RowCollator(PAD)([row])
    assert RowCollator(PAD, need_targets=False)([row])["labels"].tolist() == [[-100, -100]]
    with pytest.raises(ShapeMismatchError, match=r"labels of row 1 has shape \(1,\), input_ids \(2,\)"):
        RowCollator(PAD)([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2], "labels": [1]}])
    with pytest.raises(InvalidConfigError, match="equal keys"):
        RowCollator(PAD)([{"input_ids": [1, 2]}, {"input_ids": [1, 2], "position_ids": [0, 1]}])
    with pytest.raises(InvalidConfigError, match=r"row 0 has no input_ids, only \['text'\]"):
        RowCollator(PAD)([{"text": [1]}])
