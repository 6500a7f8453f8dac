"""The whole command: modes, pairs, resuming, failures, sameness, and what is refused before anything is measured."""

import json
import math

import pytest
import torch
from typer.testing import CliRunner

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.cli import app
from cognexis.errors import ArtifactMismatchError, CheckpointError, InvalidConfigError, NonFiniteError
from cognexis.eval_harness.compute import matmul_flops
from cognexis.eval_harness.result_files import read_rows
from cognexis.eval_harness.runner import evaluation
from cognexis.eval_harness.runner.evaluation import EvaluationOrder, run_evaluation
from cognexis.eval_harness.runner.likelihood import run_likelihoods
from cognexis.eval_harness.tasks import registry
from cognexis.eval_harness.tasks.protocol import Example, Generation, Task
from cognexis.tasks.windowed_parity import WindowedParity
from tests.eval_harness.runner.tiny_place import SHAPE, TEXT, make_place, write_config

MEASURED = ("latency_ms_mean", "latency_ms_p50", "latency_ms_p90", "latency_ms_p99", "tokens_per_second")
MEASURED += ("prefill_latency_ms_mean", "decode_latency_ms_per_token_mean", "peak_memory_bytes")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.fixture
def evaluate(place, tmp_path):
    def run(*names, out="out", overrides=(), **section):
        config = write_config(place, tmp_path / "eval.json", *([names] if names else []), **section)
        order = EvaluationOrder(config, place / "model", tmp_path / out, overrides, device="cpu")
        return run_evaluation(order, lambda line: None)

    return run


def steady(row):
    content = {key: value for key, value in row.model_dump().items() if key not in MEASURED}
    if content["scheduler_diagnostics"]:
        content["scheduler_diagnostics"].pop("scheduler_overhead_ms_mean")
    return content


def test_every_data_set_runs_at_every_depth_and_in_every_mode(evaluate, tmp_path):
    rows = evaluate(adaptive_modes=["fixed", "adaptive_sequence", "adaptive_token"])
    assert all(row.status == "completed" for row in rows)
    modes = {(row.dataset, row.loop_mode) for row in rows}
    assert {name for name, mode in modes if mode == "fixed"} == {"prose", "quiz", "words"}
    assert {name for name, mode in modes if mode == "adaptive_token"} == {"prose", "quiz", "words"}
    assert {name for name, mode in modes if mode == "adaptive_sequence"} == {"words"}
    assert {row.metric_name for row in rows if row.dataset == "quiz"} == {
        "accuracy",
        "accuracy_normalized",
        "flops",
        "loops_mean",
    }
    for row in rows:
        assert row.hardware and row.versions["torch"] and row.batch_size == 2 and row.cache_memory_bytes is not None
        assert row.latency_ms_mean > 0 and row.flops_mean > 0 and row.scheduler_diagnostics is not None
        deepest = len(row.scheduler_diagnostics.loop_count_histogram) - 1
        assert row.extrapolated == (deepest > 2) and row.trained_max_loops == 2
        if row.loop_mode != "fixed":
            assert row.loop_count == 4 and row.scheduler_diagnostics.scheduler_overhead_ms_mean > 0
            assert row.decoding["loops"]["scheduler"]["type"] == "rule_based"
        if row.dataset == "words":
            assert row.prefill_latency_ms_mean > 0 and row.decode_latency_ms_per_token_mean > 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files >= {"rows.jsonl", "samples.jsonl", "summary.json", "rows.csv", "matched_compute.json", "study.json"}
    assert "NaN" not in (tmp_path / "out" / "rows.jsonl").read_text()


def test_every_adaptive_row_has_a_fixed_partner_of_its_mean_depth(evaluate, tmp_path):
    scheduler = "inference.scheduler={type: rule_based, min_delta: 1.5, patience: 2}"
    rows = evaluate("prose", adaptive_modes=["adaptive_token"], loop_counts=[1, 4], overrides=(scheduler,))
    pairs = json.loads((tmp_path / "out" / "matched_compute.json").read_text())
    adaptive = [row for row in rows if row.loop_mode == "adaptive_token"]
    assert len(pairs) == len(adaptive) == 5
    fixed = {(row.metric_name, row.loop_count): row for row in rows if row.loop_mode == "fixed"}
    for pair, row in zip(pairs, adaptive, strict=True):
        depth = int(pair["mean_loops"] + 0.5)
        assert pair["fixed_loop_count"] == depth
        assert pair["fixed_value"] == fixed[row.metric_name, depth].metric_value
        assert pair["fixed_value_at_mean_loops"] is not None and pair["adaptive_value"] == row.metric_value
    assert 1 < pairs[0]["mean_loops"] < 4


def test_adaptive_run_that_never_halts_costs_and_gives_what_the_fixed_one_does(evaluate, tmp_path):
    never = "inference.scheduler={type: rule_based, min_delta: 0.0}"
    evaluate("prose", "quiz", adaptive_modes=["adaptive_token"], loop_counts=[4], overrides=(never,))
    for pair in json.loads((tmp_path / "out" / "matched_compute.json").read_text()):
        assert (pair["mean_loops"], pair["fixed_loop_count"]) == (4.0, 4)
        assert pair["adaptive_flops"] == pytest.approx(pair["fixed_flops"], rel=1e-9)
        assert pair["advantage"] == pytest.approx(0.0, abs=1e-4)


def test_looking_at_predictions_between_loops_is_counted(evaluate, place):
    never = "inference.scheduler={type: rule_based, min_delta: 0.0, entropy_threshold: 0.0}"
    rows = evaluate("prose", adaptive_modes=["adaptive_token"], loop_counts=[4], overrides=(never,))
    fixed, adaptive = (next(row for row in rows if row.loop_mode == mode) for mode in ("fixed", "adaptive_token"))
    assert adaptive.stage_flops.recurrent == pytest.approx(fixed.stage_flops.recurrent)
    assert adaptive.stage_flops.head > 3 * fixed.stage_flops.head
    assert adaptive.stage_flops.coda / fixed.stage_flops.coda == adaptive.stage_flops.head / fixed.stage_flops.head


def test_values_are_those_of_the_model(evaluate, place):
    rows = {(row.metric_name, row.loop_count): row for row in evaluate("prose")}
    from cognexis import CognexisTokenizer

    tokenizer = CognexisTokenizer.from_pretrained(place / "model")
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    stream = [tokenizer.bos_token_id, *ids, tokenizer.convert_tokens_to_ids("<eod>")]
    whole = torch.tensor(stream[: len(stream) // 13 * 13]).view(-1, 13)
    text = whole[[n * len(whole) // 5 for n in range(5)]]
    model = CognexisForCausalLM.from_pretrained(place / "model").eval()
    with torch.no_grad():
        logits = model(input_ids=text[:, :-1], num_loops=2, use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item()
    row = rows["negative_log_likelihood", 2]
    assert row.metric_value == pytest.approx(nats, rel=1e-5) and row.num_examples == 5 and row.standard_error > 0
    assert rows["perplexity", 2].metric_value == pytest.approx(math.exp(nats), rel=1e-5)
    assert rows["accuracy", 2].metric_value == pytest.approx((logits.argmax(-1) == text[:, 1:]).float().mean().item())
    assert row.flops_mean == pytest.approx(matmul_flops(model.config, 12, 2).total / 12)
    assert rows["flops", 2].metric_value == matmul_flops(model.config, 12, 2).total
    assert len(row.hidden_norms) == 3 and row.compute_unit == "flops_per_token"


def test_same_seed_gives_the_same_rows(evaluate, tmp_path):
    for out in ("a", "b"):
        evaluate(out=out, adaptive_modes=["adaptive_token"], loop_counts=[2])
    first, second = (read_rows(tmp_path / out / "rows.jsonl") for out in ("a", "b"))
    assert [*map(steady, first)] == [*map(steady, second)]
    for name in ("samples.jsonl", "predictions.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_evaluation_goes_on_where_it_was_killed(evaluate, tmp_path, monkeypatch):
    calls = []

    def counted(model, examples, run, *rest):
        calls.append((run.mode, run.loop_count))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run_likelihoods(model, examples, run, *rest)

    monkeypatch.setattr(evaluation, "run_likelihoods", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate("prose", loop_counts=[1, 2, 4])
    rows = (tmp_path / "out" / "rows.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out" / "rows.jsonl").write_bytes(b"".join(rows[:-2]) + rows[-1][:40])  # killed within the last row
    evaluate("prose", loop_counts=[1, 2, 4])
    assert calls == [("fixed", depth) for depth in (1, 2, 4, 2, 4)]
    found = read_rows(tmp_path / "out" / "rows.jsonl")
    assert [(row.loop_count, row.metric_name) for row in found] == [
        (depth, name)
        for depth in (1, 2, 4)
        for name in ("negative_log_likelihood", "perplexity", "accuracy", "flops", "loops_mean")
    ]
    evaluate("prose", loop_counts=[1, 2, 4])
    assert len(calls) == 5
    lines = (tmp_path / "out" / "samples.jsonl").read_bytes().splitlines()
    assert len(lines) == len(set(lines)) == 6  # two means at three depths


def test_other_data_are_measured_anew(evaluate, tmp_path):
    once = evaluate("quiz")
    others = [{"question": word, "choices": ["a", "b"], "answer": 0} for word in ("Who?", "What?")]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(other) + "\n" for other in others))
    again = evaluate(datasets=[{"name": "quiz", "type": "multiple_choice", "path": str(tmp_path / "two.jsonl")}])
    assert len(again) == 2 * len(once) and len({row.identity for row in again}) == len(again)


def test_failed_run_is_rows_and_the_others_go_on(evaluate, monkeypatch):
    def broken(model, examples, run, *rest):
        if run.loop_count == 2:
            raise NonFiniteError("a state is not finite")
        return run_likelihoods(model, examples, run, *rest)

    monkeypatch.setattr(evaluation, "run_likelihoods", broken)
    rows = evaluate("prose", "words", loop_counts=[1, 2, 4])
    states = {(row.dataset, row.loop_count): row.status for row in rows}
    assert states.pop(("prose", 2)) == "failed" and set(states.values()) == {"completed"}
    assert {row.detail for row in rows if row.status == "failed"} == {"NonFiniteError: a state is not finite"}


def test_too_little_memory_halves_the_batch(evaluate, monkeypatch):
    def hungry(model, examples, run, batch_size, deadline):
        if batch_size * run.loop_count > 2:
            raise torch.OutOfMemoryError("too large")
        return run_likelihoods(model, examples, run, batch_size, deadline)

    monkeypatch.setattr(evaluation, "run_likelihoods", hungry)
    rows = evaluate("prose", loop_counts=[1, 2, 4])
    assert {(row.loop_count, row.batch_size, row.status) for row in rows} == {
        (1, 2, "completed"),
        (2, 1, "completed"),
        (4, None, "failed"),
    }


class Chatty(Task):
    """A task of a user, whose metric can be spoilt."""

    name = "chatty"
    metrics = {"characters": "lower_is_better"}
    spoilt = ("characters", 1.0)

    def examples(self):
        return [Example(str(n), Generation("a" * n, max_new_tokens=2, temperature=1.0)) for n in (1, 2)]

    def score(self, prediction, example):
        return dict([self.spoilt]) if self.spoilt else {"characters": float(len(prediction[0]))}


@pytest.mark.parametrize(
    ("spoilt", "detail"),
    [
        (None, ""),
        (("characters", math.nan), "example '1': the task scored characters=nan: must be a finite number"),
        (("words", 1.0), "the task scored words=1.0"),
        (("characters", True), "the task scored characters=True"),
    ],
)
def test_own_task_runs_and_its_faults_are_failed_rows(evaluate, monkeypatch, spoilt, detail):
    monkeypatch.setattr(registry, "CUSTOM_TASKS", {"chatty": type("Own", (Chatty,), {"spoilt": spoilt})})
    rows = evaluate(datasets=[{"name": "own", "type": "custom", "task": "chatty"}], loop_counts=[1])
    assert {row.status for row in rows} == {"failed" if detail else "completed"} and detail in rows[0].detail


def test_budgets_are_counted(evaluate, place):
    limits = ("inference.compute_budget.max_total_loops=3",)
    rows = evaluate("words", overrides=limits, metrics=["budget_exhaustion_rate", "loops_p90"], loop_counts=[1, 2, 4])
    found = {(row.metric_name, row.loop_count): row.metric_value for row in rows}
    assert [found["budget_exhaustion_rate", depth] for depth in (1, 2, 4)] == [1.0, 1.0, 1.0]
    assert (found["loops_p90", 1], found["loops_p90", 2]) == (1.0, 2.0)
    assert rows[0].decoding["budget"] == {"max_total_loops": 3}


# ---- refused before anything is measured ----


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datasets": []}, "evaluation.datasets: none given"),
        ({"metrics": ["latency"]}, "'latency' is no metric of these data sets .did you mean 'latency_ms'"),
        ({"datasets": [{"name": "q", "type": "code", "path": "nowhere"}]}, r"datasets\[0\] \(q\).*no such file"),
        ({"datasets": [{"name": "q", "type": "recall", "options": {"shots": 1}}]}, "options.shots=1: unknown option"),
    ],
)
def test_wrong_orders_measure_nothing(evaluate, tmp_path, settings, message):
    with pytest.raises(InvalidConfigError, match=message):
        evaluate("quiz", **settings)
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_aborts(evaluate, place, tmp_path):
    file = place / "model" / "config.json"
    content = file.read_text()
    wrong = json.loads(content) | {"tokenizer_checksum": "sha256:" + "0" * 64}
    try:
        file.write_text(json.dumps(wrong))
        (place / "model" / "manifest.json").rename(place / "manifest.json")
        with pytest.raises(ArtifactMismatchError, match="0000"):
            evaluate("quiz")
    finally:
        file.write_text(content)
        (place / "manifest.json").rename(place / "model" / "manifest.json")
    assert not (tmp_path / "out").exists()


def test_example_that_does_not_fit_is_named(evaluate, place, tmp_path):
    (tmp_path / "long.jsonl").write_text(json.dumps({"id": "long", "question": "a b " * 200, "answer": "c"}))
    with pytest.raises(InvalidConfigError, match="example 'long': .* tokens with its answer; the model takes 128"):
        evaluate(datasets=[{"name": "x", "type": "exact_match", "path": str(tmp_path / "long.jsonl")}])


def test_command_line(place, tmp_path):
    config = write_config(place, tmp_path / "eval.json", ("quiz",))
    words = ["eval", "--config", str(config), "--checkpoint", str(place / "model"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--device", "cpu", "--set", "evaluation.loop_counts=[2]"])
    assert result.exit_code == 0, result.output
    assert "4 rows, 0 of them failed" in result.output and (tmp_path / "out" / "config.resolved.yaml").is_file()
    assert {row.loop_count for row in read_rows(tmp_path / "out" / "rows.jsonl")} == {2}
    for wrong, message in (
        (["eval", "--config", str(config)], "needs --config and --checkpoint"),
        (["eval", "--config", str(config), "report", str(tmp_path)], "--config must stand behind report"),
    ):
        result = CliRunner().invoke(app, wrong)
        assert result.exit_code == 2 and message in " ".join(result.output.split()).replace("│ ", "")
    missing = CliRunner().invoke(app, ["eval", "--config", str(config), "--checkpoint", str(tmp_path / "none")])
    assert isinstance(missing.exception, CheckpointError)


def test_checkpoint_of_a_family_is_asked_in_its_own_ids(tmp_path):
    torch.manual_seed(0)
    model = CognexisForCausalLM(CognexisConfig(vocab_size=4, bos_token_id=2, pad_token_id=3, **SHAPE)).eval()
    model.save_pretrained(tmp_path / "model")
    options = {"form": "ids", "difficulty": 6, "num_examples": 6}
    dataset = {"name": "parity", "type": "synthetic", "task": "windowed_parity", "options": options}
    section = {"datasets": [dataset], "loop_counts": [2], "metrics": []}
    (tmp_path / "eval.json").write_text(json.dumps({"schema_version": 1, "evaluation": section}))
    order = EvaluationOrder(tmp_path / "eval.json", tmp_path / "model", tmp_path / "out", device="cpu")
    (row,) = run_evaluation(order, lambda line: None)
    test = WindowedParity.splits(60, seed=1234, num_bits=6).test
    with torch.no_grad():
        logits = model(input_ids=test.ids, num_loops=2, use_cache=False).logits[:, -1]
    right = (logits[:, :2].argmax(-1) == test.labels[:, -1]).double().mean().item()
    assert row.metric_value == pytest.approx(right) and row.tokenizer_checksum == "none"
    for kind in ({"type": "recall"}, {**dataset, "options": {}}):
        (tmp_path / "eval.json").write_text(json.dumps({"evaluation": {"datasets": [{"name": "x", **kind}]}}))
        with pytest.raises(InvalidConfigError, match="the checkpoint has no(ne| tokenizer)"):
            run_evaluation(order, lambda line: None)
