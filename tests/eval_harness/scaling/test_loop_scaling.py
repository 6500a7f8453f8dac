"""The command: measures a checkpoint at depths, goes on after a kill, marks failures, and makes its report again."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.artifacts.tokenizer_training import train_tokenizer
from cognexis.cli import app
from cognexis.errors import CheckpointError, InvalidConfigError, NonFiniteError
from cognexis.eval_harness.compute import matmul_flops
from cognexis.eval_harness.result_files import read_rows
from cognexis.eval_harness.scaling import loop_scaling
from cognexis.eval_harness.scaling.loop_scaling import LoopScalingOrder, run_loop_scaling
from cognexis.eval_harness.scaling.measure import measure_depth
from cognexis.eval_harness.scaling.text_rows import read_text_rows

TEXT = "The shared block runs as often as it is asked to, and each loop sees what the loop before it left. " * 30
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE |= {"head_dim": 8, "num_prelude_blocks": 1, "num_coda_blocks": 1, "trained_max_loops": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    tokenizer = train_tokenizer([TEXT], vocab_size=372)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = CognexisConfig(vocab_size=len(tokenizer), max_position_embeddings=64, max_loops=4, **SHAPE, **ids)
    CognexisForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    dataset = {"name": "prose", "type": "language_modeling", "path": str(folder / "text.txt"), "split": "validation"}
    content = {"schema_version": 1, "run": {"name": "x"}, "evaluation": {"datasets": [dataset], "batch_size": 4}}
    (folder / "eval.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(loop_scaling, "write_report", lambda folder, studies: [])


def order(place, out, **changes):
    settings = {"depths": (1, 2, 4), "max_rows": 12, "row_length": 16, "device": "cpu"} | changes
    return LoopScalingOrder(config=place / "eval.json", checkpoint=place / "model", out=out, **settings)


def measured(row):
    timing = ("latency_ms_mean", "latency_ms_p50", "latency_ms_p90", "latency_ms_p99", "tokens_per_second")
    return {key: value for key, value in row.model_dump().items() if key not in timing}


def test_command_measures_and_reports_and_reports_again(place, tmp_path):
    words = ["eval", "loop-scaling", "--config", str(place / "eval.json"), "--checkpoint", str(place / "model")]
    words += ["--depths", "4,1", "--out", str(tmp_path), "--max-rows", "12", "--row-length", "16", "--device", "cpu"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [(row.loop_count, row.metric_name) for row in rows if row.metric_name != "accuracy"] == [
        (1, "negative_log_likelihood"),
        (1, "perplexity"),
        (4, "negative_log_likelihood"),
        (4, "perplexity"),
    ]
    files = [path for path in tmp_path.rglob("*") if path.suffix in (".md", ".html", ".png", ".csv", ".json")]
    assert len(files) >= 10
    before = {path: path.read_bytes() for path in files}
    for path in files:
        if path.name != "study.json":
            path.unlink()
    result = CliRunner().invoke(app, ["eval", "report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in files} == before


def test_values_are_those_of_the_model(place, tmp_path, no_pictures):
    run_loop_scaling(order(place, tmp_path), print)
    rows = {(row.metric_name, row.loop_count): row for row in read_rows(tmp_path / "rows.jsonl")}
    model = CognexisForCausalLM.from_pretrained(place / "model").eval()
    from cognexis import CognexisTokenizer

    tokenizer = CognexisTokenizer.from_pretrained(place / "model")
    text = read_text_rows(place / "text.txt", tokenizer, 16, model.config.vocab_size)
    text = text[torch.arange(12) * len(text) // 12]
    with torch.no_grad():
        logits = model(input_ids=text[:, :-1], num_loops=2, use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item()
    row = rows["negative_log_likelihood", 2]
    assert row.metric_value == pytest.approx(nats, rel=1e-5)
    assert rows["perplexity", 2].metric_value == pytest.approx(math.exp(nats), rel=1e-5)
    assert rows["accuracy", 2].metric_value == pytest.approx((logits.argmax(-1) == text[:, 1:]).float().mean().item())
    assert row.flops_mean == matmul_flops(model.config, 16, 2).total / 16
    assert not row.extrapolated and rows["accuracy", 4].extrapolated
    assert (row.batch_size, rows["accuracy", 4].batch_size) == (4, 4)
    assert len(row.hidden_norms) == 3 and len(row.hidden_deltas) == 2 and row.hidden_deltas[0] is None


def test_only_the_depth_differs_between_rows(place, tmp_path, no_pictures):
    run_loop_scaling(order(place, tmp_path, depths=(1, 2)), print)
    one, two = (row for row in read_rows(tmp_path / "rows.jsonl") if row.metric_name == "accuracy")
    changed = {key for key, value in measured(one).items() if measured(two)[key] != value}
    results = {"metric_value", "standard_error", "hidden_norms", "hidden_deltas"}
    assert "loop_count" in changed
    assert changed <= {"loop_count", "flops_mean", "stage_flops", "elementwise_flops_mean", *results}


def test_same_seed_gives_the_same_rows(place, tmp_path, no_pictures):
    for name in ("a", "b"):
        run_loop_scaling(order(place, tmp_path / name), print)
    first, second = (read_rows(tmp_path / name / "rows.jsonl") for name in ("a", "b"))
    assert [*map(measured, first)] == [*map(measured, second)]
    assert (tmp_path / "a" / "samples.jsonl").read_bytes() == (tmp_path / "b" / "samples.jsonl").read_bytes()


def test_study_goes_on_where_it_was_killed(place, tmp_path, no_pictures, monkeypatch):
    depths = []

    def counted(model, rows, num_loops, **options):
        depths.append(num_loops)
        if len(depths) == 2:
            raise KeyboardInterrupt
        return measure_depth(model, rows, num_loops, **options)

    monkeypatch.setattr(loop_scaling, "measure_depth", counted)
    with pytest.raises(KeyboardInterrupt):
        run_loop_scaling(order(place, tmp_path), print)
    for name in ("rows.jsonl", "samples.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"cut off')
    run_loop_scaling(order(place, tmp_path), print)
    assert depths == [1, 2, 2, 4]
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row.loop_count for row in rows] == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert len(loop_scaling.read_samples(tmp_path / "samples.jsonl", rows)) == 6


def test_failed_depth_is_a_row_and_the_study_goes_on(place, tmp_path, no_pictures, monkeypatch):
    def broken(model, rows, num_loops, **options):
        if num_loops == 2:
            raise NonFiniteError("a state is not finite")
        return measure_depth(model, rows, num_loops, **options)

    monkeypatch.setattr(loop_scaling, "measure_depth", broken)
    run_loop_scaling(order(place, tmp_path), print)
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row.metric_name == "accuracy"]
    assert [(row.loop_count, row.status) for row in rows] == [(1, "completed"), (2, "failed"), (4, "completed")]
    assert rows[1].detail == "NonFiniteError: a state is not finite"


def test_too_little_memory_halves_the_batch(place, tmp_path, no_pictures, monkeypatch):
    def hungry(model, rows, num_loops, *, batch_size, **options):
        if num_loops * batch_size > 4:
            raise torch.OutOfMemoryError("too large")
        return measure_depth(model, rows, num_loops, batch_size=batch_size, **options)

    monkeypatch.setattr(loop_scaling, "measure_depth", hungry)
    run_loop_scaling(order(place, tmp_path, depths=(1, 2, 4, 8)), print)
    rows = [row for row in read_rows(tmp_path / "rows.jsonl") if row.metric_name == "accuracy"]
    assert [(row.batch_size, row.status) for row in rows] == [
        (4, "completed"),
        (2, "completed"),
        (1, "completed"),
        (1, "failed"),
    ]


def test_weights_that_are_not_finite_are_noticed(place):
    model = CognexisForCausalLM.from_pretrained(place / "model").eval()
    with torch.no_grad():
        model.model.final_norm.weight.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="not finite"):
        measure_depth(model, torch.randint(3, 90, (2, 9)), 1, batch_size=2)
    assert not model.model.recurrent.loop_state._forward_hooks


def test_time_is_bounded(place):
    model = CognexisForCausalLM.from_pretrained(place / "model").eval()
    with pytest.raises(TimeoutError, match="at 2 of 6 rows"):
        measure_depth(model, torch.randint(3, 90, (6, 9)), 1, batch_size=2, timeout_s=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"checkpoint": "nowhere"}, CheckpointError, "nowhere: no such folder"),
        ({"overrides": ("evaluation.datasets=[]",)}, InvalidConfigError, "none has type language_modeling"),
        ({"row_length": 100_000}, InvalidConfigError, "a row needs 100001"),
    ],
)
def test_wrong_orders_measure_nothing(place, tmp_path, changes, error, message):
    given = vars(order(place, tmp_path / "out")) | changes
    given["checkpoint"] = place / given["checkpoint"]
    with pytest.raises(error, match=message):
        run_loop_scaling(LoopScalingOrder(**given), print)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 2: not valid JSON"),
        (b'{"words": 1}', "line 2: must be"),
        (b'{"input_ids": [1, true]}', "line 2: must be"),
        (b'{"input_ids": [1, 999999]}', "line 2: id 999999 must be 0 to 371"),
    ],
)
def test_damaged_line_of_text_is_fatal(place, tmp_path, line, message):
    from cognexis import CognexisTokenizer

    tokenizer = CognexisTokenizer.from_pretrained(place / "model")
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n' + line + b"\n")
    with pytest.raises(InvalidConfigError, match=message):
        read_text_rows(tmp_path / "x.jsonl", tokenizer, 2, 372)
    with pytest.raises(InvalidConfigError, match="must be a file .jsonl or .txt"):
        read_text_rows(tmp_path / "x.parquet", tokenizer, 2, 372)


def test_folder_without_rows_has_no_report(tmp_path):
    result = CliRunner().invoke(app, ["eval", "report", str(tmp_path)])
    assert isinstance(result.exception, InvalidConfigError) and "holds no rows.jsonl" in str(result.exception)
