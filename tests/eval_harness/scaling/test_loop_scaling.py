"""The command: measures a checkpoint at depths, goes on after a kill, marks failures, and makes its report again."""

import json
import math
import sys

import pytest
import torch
from typer.testing import CliRunner

from cognexis import CognexisConfig, CognexisForCausalLM, CognexisTokenizer
from cognexis.artifacts.tokenizer_training import train_tokenizer
from cognexis.cli import app
from cognexis.errors import BackendError, CheckpointError, InvalidConfigError, NonFiniteError
from cognexis.eval_harness.compute import matmul_flops
from cognexis.eval_harness.result_files import read_rows
from cognexis.eval_harness.scaling import depth_rows, loop_scaling, measure, probes
from cognexis.eval_harness.scaling.loop_scaling import LoopScalingOrder, run_loop_scaling
from cognexis.eval_harness.scaling.measure import measure_depth
from cognexis.eval_harness.scaling.study_files import read_samples
from cognexis.eval_harness.scaling.text_rows import read_text_rows
from cognexis.tasks.windowed_parity import WindowedParity

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


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    monkeypatch.setattr(depth_rows, "_NEW_TOKENS", 3)
    monkeypatch.setattr(probes, "_ROUNDS", 1)


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
    results |= {"prediction_entropy", "attention_entropies", "loop_gain", "repetition_rate"}
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

    monkeypatch.setattr(depth_rows, "measure_depth", counted)
    with pytest.raises(KeyboardInterrupt):
        run_loop_scaling(order(place, tmp_path), print)
    for name in ("rows.jsonl", "samples.jsonl"):
        with open(tmp_path / name, "ab") as file:
            file.write(b'{"cut off')
    run_loop_scaling(order(place, tmp_path), print)
    assert depths == [1, 2, 2, 4]
    rows = read_rows(tmp_path / "rows.jsonl")
    assert [row.loop_count for row in rows] == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert len(read_samples(tmp_path / "samples.jsonl", rows)) == 6


def loaded(place):
    return CognexisForCausalLM.from_pretrained(place / "model").eval()


def given_model(monkeypatch, model):
    """Let the study load ``model`` itself."""
    monkeypatch.setattr(loop_scaling.CognexisForCausalLM, "from_pretrained", lambda folder: model)


def statuses(folder):
    rows = [row for row in read_rows(folder / "rows.jsonl") if row.metric_name == "accuracy"]
    return [(row.loop_count, row.status) for row in rows], [row.detail for row in rows]


class LoopOfFailure:
    """Does something in a loop of the core, counted from 1 in every pass."""

    def __init__(self, model, loop, action):
        self.executed = 0
        model.model.recurrent.register_forward_pre_hook(self.begin)
        model.model.recurrent.loop_state.register_forward_hook(self.see)
        self.loop, self.action = loop, action

    def begin(self, *_):
        self.executed = 0

    def see(self, module, inputs, state):
        self.executed += 1
        return self.action(state) if self.executed == self.loop else None


def test_depth_whose_state_becomes_nan_is_a_failed_row(place, tmp_path, monkeypatch):
    model = loaded(place)
    LoopOfFailure(model, 3, lambda state: state * math.nan)
    given_model(monkeypatch, model)
    run_loop_scaling(order(place, tmp_path, depths=(1, 2, 4)), print)
    found, details = statuses(tmp_path)
    assert found == [(1, "completed"), (2, "completed"), (4, "failed")]
    assert details[2] == "NonFiniteError: 64 of 64 losses are not finite"
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "| prose | accuracy | 4 | NonFiniteError: 64 of 64 losses are not finite |" in text


def test_depth_without_an_end_is_a_failed_row_and_the_next_is_measured(place, tmp_path, no_pictures, monkeypatch):
    model, clock = loaded(place), [0.0]

    def tick(state):
        clock[0] += 1000.0

    LoopOfFailure(model, 2, tick)
    given_model(monkeypatch, model)
    monkeypatch.setattr(measure.time, "monotonic", lambda: clock[0])
    run_loop_scaling(order(place, tmp_path, depths=(2, 1, 4)), print)
    found, details = statuses(tmp_path)
    assert found == [(2, "failed"), (1, "completed"), (4, "failed")]
    assert details[0] == "TimeoutError: no end after 600 seconds, at 0 of 12 rows"
    assert not model._forward_hooks


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
    ids=["device", "python", "allocator"],
)
def test_depth_without_memory_is_a_failed_row(place, tmp_path, no_pictures, monkeypatch, error):
    def refuse(state):
        raise error

    model = loaded(place)
    LoopOfFailure(model, 2, refuse)
    given_model(monkeypatch, model)
    run_loop_scaling(order(place, tmp_path, depths=(1, 2)), print)
    found, details = statuses(tmp_path)
    assert found == [(1, "completed"), (2, "failed")]
    assert details[1] == f"{type(error).__name__}: {error}"


def test_error_of_the_program_is_no_result(place, tmp_path, no_pictures, monkeypatch):
    def stumble(state):
        raise RuntimeError("shapes do not fit")

    model = loaded(place)
    LoopOfFailure(model, 1, stumble)
    given_model(monkeypatch, model)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_loop_scaling(order(place, tmp_path, depths=(1,)), print)


def test_every_depth_continues_the_same_prompts(place, tmp_path, no_pictures):
    run_loop_scaling(order(place, tmp_path, depths=(1, 4)), print)
    lines = [json.loads(line) for line in (tmp_path / "continuations.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["prompts"] == lines[1]["prompts"] and len(lines[0]["prompts"]) == 4
    model, tokenizer = loaded(place), CognexisTokenizer.from_pretrained(place / "model")
    rows = read_text_rows(place / "text.txt", tokenizer, 16, model.config.vocab_size)
    first = rows[torch.arange(12) * len(rows) // 12][:1, :16]
    ids = model.generate(first, attention_mask=torch.ones_like(first), num_loops=4, max_new_tokens=3, do_sample=False)
    assert lines[1]["texts"][0] == tokenizer.decode(ids[0, 16:], skip_special_tokens=False).removesuffix("<eos>")


def test_checkpoint_of_a_task_needs_no_tokenizer(tmp_path, no_pictures):
    torch.manual_seed(0)
    config = CognexisConfig(vocab_size=4, max_position_embeddings=64, bos_token_id=2, pad_token_id=3, **SHAPE)
    model = CognexisForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    dataset = {"name": "parity", "type": "synthetic", "task": "windowed_parity", "options": {"num_bits": 9}}
    content = {"schema_version": 1, "run": {"name": "x", "seed": 5}, "evaluation": {"datasets": [dataset]}}
    (tmp_path / "eval.json").write_text(json.dumps(content))
    run_loop_scaling(order(tmp_path, tmp_path / "out", depths=(2,)), print)
    rows = {row.metric_name: row for row in read_rows(tmp_path / "out" / "rows.jsonl")}
    task = WindowedParity(12, num_bits=9, seed=2**32 + 5)
    with torch.no_grad():
        logits = model(input_ids=task.ids, num_loops=2).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), task.labels.flatten())
    row = rows["negative_log_likelihood"]
    assert row.metric_value == pytest.approx(nats.item(), rel=1e-5)
    right = (logits.argmax(-1) == task.labels)[:, 1:].double().mean().item()
    assert rows["accuracy"].metric_value == pytest.approx(right)
    probabilities = logits.softmax(-1)[:, 1:]
    assert row.prediction_entropy == pytest.approx(torch.special.entr(probabilities).sum(-1).mean().item(), rel=1e-5)
    assert (row.repetition_rate, row.trained_max_loops, row.task_version) == (None, 2, "windowed_parity of 9 bits, 1")
    assert not (tmp_path / "out" / "continuations.jsonl").exists()


def test_too_little_memory_halves_the_batch(place, tmp_path, no_pictures, monkeypatch):
    def hungry(model, rows, num_loops, *, batch_size, **options):
        if num_loops * batch_size > 4:
            raise torch.OutOfMemoryError("too large")
        return measure_depth(model, rows, num_loops, batch_size=batch_size, **options)

    monkeypatch.setattr(depth_rows, "measure_depth", hungry)
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
    with pytest.raises(TimeoutError, match="no end after -1 seconds, at 0 of 6 rows"):
        measure_depth(model, torch.randint(3, 90, (6, 9)), 1, batch_size=2, timeout_s=-1)
    assert not model.model.recurrent.loop_state._forward_hooks


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"checkpoint": "nowhere"}, CheckpointError, "nowhere: no such folder"),
        ({"overrides": ("evaluation.datasets=[]",)}, InvalidConfigError, "none has a type that loop scaling measures"),
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
    tokenizer = CognexisTokenizer.from_pretrained(place / "model")
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n' + line + b"\n")
    with pytest.raises(InvalidConfigError, match=message):
        read_text_rows(tmp_path / "x.jsonl", tokenizer, 2, 372)
    with pytest.raises(InvalidConfigError, match="must be a file .jsonl or .txt"):
        read_text_rows(tmp_path / "x.parquet", tokenizer, 2, 372)


def test_folder_without_rows_has_no_report(tmp_path):
    result = CliRunner().invoke(app, ["eval", "report", str(tmp_path)])
    assert isinstance(result.exception, InvalidConfigError) and "holds no rows.jsonl" in str(result.exception)


def test_a_missing_package_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    wanted = LoopScalingOrder(config=tmp_path / "no.yaml", checkpoint=tmp_path / "none", out=tmp_path / "report")
    with pytest.raises(BackendError, match="A loop-scaling report needs the package matplotlib: pip install"):
        run_loop_scaling(wanted, print)
    assert not (tmp_path / "report").exists()
