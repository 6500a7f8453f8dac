"""The quickstart: its pieces, and one short run from text to table."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from torch import nn

from cognexis.artifacts.tokenizer_training import train_tokenizer
from cognexis.cli import main
from cognexis.errors import CheckpointError, CognexisError, InvalidConfigError
from cognexis.training.curriculum import LoopCurriculum
from cognexis.training.quickstart import DepthResult, QuickstartResult, check_same_loss, run_quickstart
from cognexis.training.quickstart_reload import bytes_per_token, mean_loss, pack_rows, spread_rows
from cognexis.training.quickstart_training import (
    QuickstartSettings,
    TrainingResult,
    build_model,
    learning_rate_share,
    loop_counts,
    row_loader,
    train,
)

TEXT = Path(__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 500)


@pytest.fixture
def small(tmp_path):
    """Seconds instead of minutes: little text, few rows, two steps."""
    return QuickstartSettings(
        output_dir=tmp_path / "out",
        steps=2,
        corpus_characters=400_000,
        held_out_share=0.3,
        tokenizer_characters=50_000,
        vocab_size=500,
        row_length=32,
        rows_per_step=4,
        held_out_rows=8,
        num_new_tokens=4,
    )


def test_rows_are_the_documents_one_after_another(tokenizer):
    documents = ["first <s> text\n" * 9, "the second\n" * 5]
    rows = pack_rows(documents, tokenizer, 8)
    stream = [
        token
        for document in documents
        for token in (0, *tokenizer.encode(document, add_special_tokens=False, split_special_tokens=True), 4)
    ]
    assert rows.flatten().tolist() == stream[: len(stream) // 8 * 8]
    assert (rows == 0).sum() == 2  # the "<s>" inside the text is no control token


def test_text_shorter_than_a_row_gives_no_rows(tokenizer):
    assert pack_rows(["a"], tokenizer, 64).shape == (0, 64)


def test_spread_rows_reaches_from_start_to_end():
    rows = torch.arange(100)[:, None]
    assert spread_rows(rows, 4).flatten().tolist() == [0, 25, 50, 75]
    assert spread_rows(rows, 100) is rows


def test_bytes_per_token_counts_text_and_not_control_tokens(tokenizer):
    ids = [*tokenizer.encode("return é\n"), tokenizer.convert_tokens_to_ids("<eod>")]
    assert bytes_per_token(tokenizer, torch.tensor([ids])) * (len(ids) - 1) == pytest.approx(
        len("return é\n".encode())
    )


def test_loop_counts_cover_all_depths_around_their_mean():
    curriculum = LoopCurriculum(loop_counts(QuickstartSettings(), cap=8), seed=0)
    drawn = torch.tensor([curriculum.sample(step).sampled_loops for step in range(4000)], dtype=torch.double)
    assert drawn.unique().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert abs(drawn.mean() - 3) < 0.15  # the cap takes about 0.03, four standard errors are 0.12


def test_every_epoch_takes_each_row_once_in_another_order():
    def first_batches():
        batches = islice(row_loader(torch.arange(12)[:, None], 4, seed=3), 6)
        return [batch["input_ids"].flatten().tolist() for batch in batches]

    batches = first_batches()
    first, second = list(chain(*batches[:3])), list(chain(*batches[3:]))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second
    assert batches == first_batches()


def test_fewer_rows_than_a_batch_are_refused():
    with pytest.raises(InvalidConfigError, match="yields 3 rows and a batch needs 4"):
        row_loader(torch.zeros(3, 8), 4, seed=0)


def test_learning_rate_warms_up_and_ends_at_zero():
    shares = [learning_rate_share(step / 100, 0.1) for step in range(101)]
    assert shares[0] < 0.02
    assert max(shares) == shares[10] > 0.97
    assert sorted(shares[10:], reverse=True) == shares[10:]
    assert shares[-1] == pytest.approx(0, abs=1e-12)


def test_training_is_repeatable_when_steps_are_given_and_lowers_the_loss(tokenizer, small):
    settings = replace(small, steps=12, learning_rate=3e-3)
    rows = pack_rows([TEXT], tokenizer, 32)
    runs = []
    for _ in range(2):
        model = build_model(tokenizer, settings)
        before = mean_loss(model, rows[:8], 2)
        record = train(model, rows, settings, seconds=60)
        assert record.steps == sum(record.loop_histogram.values()) == 12
        runs.append((record.loss, mean_loss(model, rows[:8], 2)))
    assert runs[0] == pytest.approx(runs[1], rel=1e-3)  # another thread count sums in another order
    assert runs[0][1] < before - 0.3


def test_training_without_time_takes_one_step(tokenizer, small):
    rows = pack_rows([TEXT], tokenizer, 32)
    assert train(build_model(tokenizer, small), rows, replace(small, steps=None), seconds=1e-3).steps == 1


def test_loss_is_the_mean_over_all_predicted_tokens(tokenizer, small):
    model = build_model(tokenizer, small).eval()
    rows = pack_rows([TEXT], tokenizer, 16)[:35]  # more than one call, and a last one that is not full
    logits = model(input_ids=rows, num_loops=3).logits
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    assert mean_loss(model, rows, 3) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.slow
def test_run_ends_with_a_checked_table_and_all_files(small):
    small.output_dir.mkdir()
    (small.output_dir / "quickstart.json").write_text("{}")  # an earlier run's folder may be used again
    said: list[str] = []
    result = run_quickstart(small, report=said.append)
    assert [depth.num_loops for depth in result.depths] == [1, 2, 4, 8]
    assert [depth.effective_depth for depth in result.depths] == [3, 4, 6, 10]
    flops = [depth.flops_per_token for depth in result.depths]
    assert flops[1] - flops[0] == pytest.approx((flops[3] - flops[2]) / 4)  # every loop costs the same
    assert result.model_class.startswith("transformers_modules.")
    for depth in result.depths:
        assert depth.loss == pytest.approx(result.loss_before_saving[depth.num_loops], rel=1e-5)

    names = {path.name for path in small.output_dir.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "modeling_cognexis.py"}
    manifest = json.loads((small.output_dir / "data_manifest.json").read_text())
    assert manifest["training"]["licence"] == "PSF-2.0" and manifest["training"]["sha256"]
    written = json.loads((small.output_dir / "quickstart.json").read_text())
    assert [row["loss"] for row in written["depths"]] == [depth.loss for depth in result.depths]
    text = "\n".join(said)
    for part in ("Python standard library", "PSF-2.0", result.table(), str(small.output_dir)):
        assert part in text


def result_with(loss: float, expected: float) -> QuickstartResult:
    depth = DepthResult(2, 4, loss, 1.0, 1.0, 1e6, 10.0, "")
    record = TrainingResult(1, 1, 1.0, 1.0, {}, 1)
    return QuickstartResult("", {}, 1, record, {2: expected}, "", [depth], "", {})


@pytest.mark.parametrize("loss", [3.0001, float("nan")])
def test_reloaded_model_with_another_loss_is_an_error(loss):
    check_same_loss(result_with(3.00001, 3.0))
    with pytest.raises(CheckpointError, match="at 2 loops the reloaded model has a held-out loss of"):
        check_same_loss(result_with(loss, 3.0))


def test_file_in_the_place_of_the_folder_is_refused(small):
    small.output_dir.write_text("a file")
    with pytest.raises(InvalidConfigError, match="cannot be used: File exists"):
        run_quickstart(small)


def test_folder_with_other_files_is_refused(small):
    small.output_dir.mkdir()
    (small.output_dir / "thesis.txt").write_text("keep me")
    with pytest.raises(InvalidConfigError, match="holds other files"):
        run_quickstart(small)


@pytest.mark.parametrize(
    "setting",
    [
        {"minutes": 0.0},
        {"minutes": float("nan")},
        {"minutes": float("inf")},
        {"seed": -1},
        {"seed": 2**32},
        {"steps": 0},
        {"row_length": 1},
        {"mean_loops": 1.0},
        {"depths": ()},
        {"depths": (0, 1)},
    ],
)
def test_setting_out_of_range_is_refused(setting):
    (name,) = setting
    with pytest.raises(InvalidConfigError, match=name):
        QuickstartSettings(**setting)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["quickstart", "--minutes", "0"], 2, "error: minutes must be positive, got 0.0\n"),
        (["quickstart", "--speed", "1"], 2, "No such option"),
        (["quickstart", "--help"], 0, ""),
    ],
)
def test_command_line_exit_codes(arguments, code, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cognexis", *arguments])
    with pytest.raises(SystemExit) as exit_of:
        main()
    assert exit_of.value.code == code
    assert message in capsys.readouterr().err


def test_debug_shows_where_an_error_was_raised(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cognexis", "--debug", "quickstart", "--seed", "-1"])
    with pytest.raises(CognexisError, match="seed must be in"):
        main()


@pytest.mark.slow
def test_command_trains_and_compares_loop_counts(tmp_path):
    command = [sys.executable, "-m", "cognexis", "quickstart", "--out", str(tmp_path / "model"), "--minutes", "0.2"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stderr
    assert "bits/byte" in process.stdout
    result = json.loads((tmp_path / "model" / "quickstart.json").read_text())
    assert result["training"]["steps"] >= 1
    assert [row["num_loops"] for row in result["depths"]] == [1, 2, 4, 8]
    assert max(row["loss"] for row in result["depths"]) < 9  # a model that knows nothing has ln(4096) = 8.3
