"""Rows of a data file: their two forms, their faults, their splits."""

import json

import pytest
import torch

from cognexis.artifacts.tokenizer_training import byte_reference_tokenizer
from cognexis.errors import InvalidConfigError
from cognexis.training.scheduler.rows import DataRow, make_batch, read_rows, rows_of_split


@pytest.fixture
def written(tmp_path):
    def write(*lines):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
        return path

    return write


def test_labels_stand_at_their_position_and_without_them_the_next_token_is_the_target(written):
    path = written({"input_ids": [5, 6, 7]}, {"input_ids": [5, 6, 7], "labels": [-100, 1, 0], "task": "parity"})
    plain, labelled = read_rows(path, vocab_size=8).rows
    assert plain == DataRow("line-1", (5, 6, 7), (6, 7, -100))
    assert labelled == DataRow("line-2", (5, 6, 7), (-100, 1, 0), "parity")


def test_text_is_tokenised_as_untrusted_and_long_rows_are_cut(written):
    tokenizer = byte_reference_tokenizer()
    path = written({"text": "abc<s>"}, {"text": "abcdefgh"})
    rows = read_rows(path, vocab_size=len(tokenizer), tokenizer=tokenizer, max_length=8).rows
    expected = tokenizer.encode_untrusted("abc<s>")
    assert list(rows[0].input_ids) == expected[:8] and list(rows[0].targets) == [*expected[1:8], -100]
    assert len(rows[1].input_ids) == 8 and rows[1].targets[-1] == -100


def test_empty_lines_are_no_rows_and_a_sample_is_drawn_by_its_seed(written):
    path = written(*[{"input_ids": [i, 1]} for i in range(20)], "", "")
    assert len(read_rows(path, vocab_size=32).rows) == 20
    first, again, other = (read_rows(path, vocab_size=32, num_rows=5, seed=seed).rows for seed in (1, 1, 2))
    assert first == again != other and len(first) == 5
    assert [row.name for row in first] == sorted((row.name for row in first), key=lambda name: int(name[5:]))


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 1: not valid JSON"),
        ("[1]", "line 1: must be one object"),
        ({"input_ids": [1, 2], "label": [1, 2]}, r"unknown key 'label' \(did you mean 'labels'\?\)"),
        ({"labels": [1]}, "needs either text or input_ids"),
        ({"text": "a", "input_ids": [1]}, "needs either text or input_ids"),
        ({"text": "a"}, "holds text, and the checkpoint has no tokenizer"),
        ({"input_ids": [1, 8]}, "input_ids holds 8; ids lie in 0 to 7"),
        ({"input_ids": [1, -100]}, "input_ids holds -100; ids lie in 0 to 7$"),
        ({"input_ids": [1, True]}, "input_ids holds True"),
        ({"input_ids": "12"}, "input_ids must be a list"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels must be as many as input_ids, 2, got 1"),
        ({"input_ids": [1, 2], "labels": [1, -1]}, "labels holds -1; ids lie in 0 to 7, or are -100"),
        ({"input_ids": [1, 2], "labels": [-100, -100]}, "has no position with a target"),
        ({"input_ids": [1]}, "has no position with a target"),
        ({"input_ids": [1, 2], "task": 3}, "task=3: must be a string"),
    ],
)
def test_bad_row_is_refused_by_line(written, line, message):
    with pytest.raises(InvalidConfigError, match=f"rows.jsonl line 1.*{message}|{message}"):
        read_rows(written(line), vocab_size=8)


def test_missing_and_empty_files_are_refused(written, tmp_path):
    with pytest.raises(InvalidConfigError, match="no such file"):
        read_rows(tmp_path / "nothing.jsonl", vocab_size=8)
    with pytest.raises(InvalidConfigError, match="holds no row"):
        read_rows(written(""), vocab_size=8)


def test_splits_are_disjoint_cover_everything_and_depend_on_the_ids_alone():
    rows = [DataRow(f"line-{i}", (i % 500, i // 500), (1, 1)) for i in range(2000)]
    parts = {name: rows_of_split(rows, name) for name in ("train", "validation", "test")}
    assert sum(map(len, parts.values())) == 2000
    assert [round(len(part) / 2000, 1) for part in parts.values()] == [0.8, 0.1, 0.1]
    assert all(DataRow("other", row.input_ids, (0, 0)).split == row.split for row in rows[:50])
    with pytest.raises(InvalidConfigError, match="none of the 1 rows falls into the"):
        rows_of_split(rows[:1], "test" if rows[0].split != "test" else "train")


def test_batch_is_padded_on_the_right():
    batch = make_batch([DataRow("a", (5,), (1,)), DataRow("b", (6, 7), (-100, 2))], pad_id=3)
    assert batch.input_ids.tolist() == [[5, 3], [6, 7]]
    assert batch.targets.tolist() == [[1, -100], [-100, 2]]
    assert torch.equal(batch.is_real, torch.tensor([[True, False], [True, True]]))
