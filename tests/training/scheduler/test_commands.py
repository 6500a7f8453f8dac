"""The commands on a small checkpoint, from rows to a report."""

import json
import shutil
import sys
import time

import pytest
import torch

from cognexis import CognexisForCausalLM, cli
from cognexis.checkpoints.metadata import read_scheduler
from cognexis.errors import CheckpointError, InvalidConfigError
from cognexis.looping.value_head import ValueHead
from cognexis.training.scheduler.commands import CalibrationOptions, DataOptions, calibrate, collect, fit, report
from tests.batteries.saved_checkpoint import save_checkpoint
from tests.batteries.tiny import tiny_config, tiny_model

L = 4
FIT = {"head": {"kind": "token", "bottleneck_size": 8, "features": ["relative_delta"]}, "steps": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, rows that it answers at full depth, and the checkpoint with a head fitted on them."""
    place = tmp_path_factory.mktemp("scheduler")
    model = tiny_model(tiny_config(vocab_size=12, num_prelude_blocks=1))
    model.save_pretrained(place / "plain")
    for name, seed, count in (("rows", 0, 120), ("others", 1, 16)):
        ids = torch.randint(0, 12, (count, 10), generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            labels = model(ids, num_loops=L).logits.argmax(-1)
        pairs = zip(ids.tolist(), labels.tolist(), strict=True)
        lines = [{"input_ids": a, "labels": b, "task": f"t{a[0] % 2}"} for a, b in pairs]
        (place / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fit(options(place), place / "fitted", **FIT)
    return place


def options(place):
    return DataOptions(place / "plain", place / "rows.jsonl", device="cpu")


@pytest.fixture
def fitted(folder, tmp_path):
    shutil.copytree(folder / "fitted", tmp_path / "fitted")
    return DataOptions(tmp_path / "fitted", folder / "rows.jsonl", device="cpu")


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cognexis", "scheduler", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        shown = capsys.readouterr()
        return int(stop.value.code or 0), shown.out, shown.err

    return call


def test_fitted_checkpoint_loads_with_its_head_and_the_same_trunk(folder):
    plain, model = (
        CognexisForCausalLM.from_pretrained(folder / name, verify="strict") for name in ("plain", "fitted")
    )
    own = plain.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items() if name in own)
    facts = read_scheduler(folder / "fitted")["value_head"]["fit"]
    assert facts["settings"]["num_loops"] == L and facts["settings"]["head"] == model.config.value_head
    assert facts["train_rows"] > 60 and facts["steps"] == 6 and "/" not in facts["data"]
    assert read_scheduler(folder / "fitted")["scheduler"] == {"type": "fixed"}


def test_predictions_are_equal_after_saving_and_loading(fitted, tmp_path):
    calibrate(fitted, CalibrationOptions(method="temperature"))
    state = torch.randn(2, 3, 32)
    features = {"relative_delta": torch.rand(2, 3)}
    model = CognexisForCausalLM.from_pretrained(fitted.checkpoint)
    model.save_pretrained(tmp_path / "again")
    again = CognexisForCausalLM.from_pretrained(tmp_path / "again")
    heads = model.model.value_head, again.model.value_head
    first, second = (head.predict(state, 2, features=features) for head in heads)
    assert torch.equal(first, second) and heads[0].calibration is not None
    assert not torch.equal(first, heads[0](state, 2, features=features).detach())


def test_collected_traces_name_checkpoint_data_and_seed(folder, tmp_path):
    manifest = collect(
        DataOptions(folder / "plain", folder / "rows.jsonl", num_rows=3, seed=5, max_length=6), tmp_path
    )
    assert manifest["checkpoint"] == "plain" and manifest["data"] == "rows.jsonl" and manifest["seed"] == 5
    assert manifest["weights"][0].startswith("sha256:") and manifest["data_checksum"].startswith("sha256:")
    assert manifest["num_loops"] == L and manifest["num_lines"] == 3 * 6 * L
    lines = [json.loads(line) for line in (tmp_path / "traces.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["loop"] == L]
    assert all(line["score"] == 1.0 for line in last)  # the labels are the answers at full depth


@pytest.mark.slow
def test_calibration_and_report_follow_from_the_fit(fitted, folder, tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr("cognexis.training.scheduler.runs.NUM_THRESHOLDS", 3)
    content = calibrate(fitted, CalibrationOptions(tolerance=0.2, halt_dependency="token"))
    assert content == read_scheduler(fitted.checkpoint) and content["calibration"]["method"] == "isotonic"
    facts = content["value_head"]["calibrated"]
    assert facts["rows"] == "validation split of the file of the fit" and 2 < facts["num_rows"] < 40
    assert facts["calibration_error"][1] < facts["calibration_error"][0]
    assert set(facts["task_thresholds"]) == {"t0", "t1"} and len(facts["loop_thresholds"]) == L - 1
    kind = content["scheduler"]["type"]
    assert kind == ("rule_based" if facts["falls_back"] else "value_head")
    chosen = facts["chosen"]["relative_delta" if facts["falls_back"] else "value_head"]
    assert chosen["threshold"] in content["scheduler"].values() and chosen["mean_loops"] < L
    found = report(fitted, tmp_path / "report")
    assert found["facts"]["rows"] == "test split of the file of the fit"
    assert found == json.loads((tmp_path / "report" / "report.json").read_text())
    text = (tmp_path / "report" / "report.md").read_text()
    assert all(word in text for word in ("| value_head |", "| constant |", "| relative_delta |", "loops regret"))
    assert set(found["frontiers"]) == {"token", "row"} and set(found["operating_points"]) == {"token", "prefix", "row"}
    assert set(found["frontiers"]["row"]) == {
        *("constant", "relative_delta", "confidence", "prediction_change", "value_head", "oracle"),
    }
    for row in found["operating_points"]["token"]:
        assert row["loops_regret"] is None or row["loops_regret"] > -1e-6
    other = report(DataOptions(fitted.checkpoint, folder / "others.jsonl", device="cpu"), tmp_path / "b")
    assert other["facts"]["num_rows"] == 16 and other["facts"]["rows"].startswith("all rows of another file")


@pytest.mark.slow
def test_report_draws_a_picture(fitted, tmp_path):
    pytest.importorskip("matplotlib")
    calibrate(fitted, CalibrationOptions(method="none"))
    report(fitted, tmp_path / "report")
    assert (tmp_path / "report" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_head_that_costs_more_than_it_saves_is_not_the_scheduler(fitted, monkeypatch):
    predict = ValueHead.predict

    def predict_slowly(self, *args, **kwargs):
        time.sleep(0.2)  # far more than a loop of this model takes
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(ValueHead, "predict", predict_slowly)
    content = calibrate(fitted, CalibrationOptions(method="none", tolerance=0.3))
    facts = content["value_head"]["calibrated"]
    assert facts["falls_back"] and "falls back to rule_based" in facts["decision"]
    assert content["scheduler"]["type"] == "rule_based"
    assert content["scheduler"]["min_delta"] == facts["chosen"]["relative_delta"]["threshold"]


def test_what_cannot_work_is_refused_with_the_way_out(folder, fitted, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        collect(DataOptions(tmp_path / "nowhere", folder / "rows.jsonl"), tmp_path / "x")
    with pytest.raises(InvalidConfigError, match="has no value head; make one with `cognexis scheduler fit`"):
        calibrate(options(folder), CalibrationOptions())
    with pytest.raises(InvalidConfigError, match="is not calibrated; run `cognexis scheduler calibrate` first"):
        report(fitted, tmp_path / "x")
    with pytest.raises(InvalidConfigError, match="must be another folder than the checkpoint"):
        fit(options(folder), folder / "plain", **FIT)
    with pytest.raises(InvalidConfigError, match="max_loops=9: must lie between 2 and .*max_loops=4"):
        collect(DataOptions(folder / "plain", folder / "rows.jsonl", max_loops=9), tmp_path / "x")
    with pytest.raises(InvalidConfigError, match="num_rows=0: must be at least 1"):
        DataOptions(folder / "plain", folder / "rows.jsonl", num_rows=0)
    with pytest.raises(InvalidConfigError, match="halt_dependency='rows'"):
        CalibrationOptions(halt_dependency="rows")
    with pytest.raises(InvalidConfigError, match="tolerance=-1: must be finite and 0 or more"):
        CalibrationOptions(tolerance=-1)
    other = DataOptions(fitted.checkpoint, folder / "others.jsonl", device="cpu")
    calibrate(other, CalibrationOptions(method="none"))
    with pytest.raises(InvalidConfigError, match="thresholds were chosen on this very file; report on another one"):
        report(other, tmp_path / "x")


@pytest.mark.parametrize("command", [[], ["collect"], ["fit"], ["calibrate"], ["report"]], ids=" ".join)
def test_commands_explain_themselves(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0 and "Usage:" in out


def test_command_line_goes_from_text_to_a_report(run, tmp_path):
    save_checkpoint(tmp_path / "model")
    lines = [json.dumps({"text": f"line {i} of {i * i}"}) for i in range(60)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    common = ["--data", tmp_path / "text.jsonl", "--max-loops", 3, "--device", "cpu"]
    out = tmp_path / "fitted"
    code, shown, _ = run(
        "collect", "--checkpoint", tmp_path / "model", *common, "--out", tmp_path / "t", "--num-rows", 4
    )
    assert code == 0 and "num_rows: 4" in shown and "prediction_change" not in shown
    fitting = ["--kind", "sequence", "--features", "entropy, margin", "--bottleneck-size", 8, "--steps", 2]
    code, shown, err = run("fit", "--checkpoint", tmp_path / "model", *common, "--out", out, *fitting)
    assert code == 0 and "best_step: " in shown and "step 2: loss " in err
    assert json.loads((out / "config.json").read_text())["value_head"]["features"] == ["entropy", "margin"]
    assert (out / "tokenizer.json").is_file()
    code, shown, _ = run("calibrate", "--checkpoint", out, *common, "--method", "none", "--json")
    assert code == 0 and json.loads(shown)["value_head"]["calibrated"]["method"] == "none"
    code, shown, _ = run("report", "--checkpoint", out, *common, "--out", tmp_path / "report")
    assert code == 0 and shown == (tmp_path / "report" / "report.md").read_text()


def test_fault_of_the_user_is_one_line_and_code_2(run, folder, tmp_path):
    arguments = ["fit", "--checkpoint", folder / "plain", "--data", folder / "rows.jsonl", "--out", tmp_path / "x"]
    code, out, err = run(*arguments, "--kind", "tokens")
    assert (code, out) == (2, "") and err.startswith("error: invalid configuration: value_head.kind='tokens'")
    assert err.count("\n") == 1 and not (tmp_path / "x").exists()
