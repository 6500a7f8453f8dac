"""The command: trains and switches, goes on after a kill, marks what is unstable, and refuses mixed settings."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from typer.testing import CliRunner

from cognexis import CognexisForCausalLM
from cognexis.artifacts.run_config import load_run_config, resolve
from cognexis.artifacts.tokenizer_training import train_tokenizer
from cognexis.cli import app, main
from cognexis.errors import BackendError, InvalidConfigError, NonFiniteError
from cognexis.eval_harness.ablations import report, running
from cognexis.eval_harness.ablations.measuring import Measurement, flops_per_token
from cognexis.eval_harness.ablations.records import UsePoint
from cognexis.eval_harness.ablations.running import AblationOrder, Interrupted, run_ablations
from cognexis.eval_harness.compute import matmul_flops
from cognexis.tokenization_cognexis import CognexisTokenizer
from cognexis.training.data.build import BuildOrder, build_data
from cognexis.training.data.inputs import DataInput

TEXT = "The shared block runs as often as it is asked to, and each loop sees what the loop before it left. " * 8
MODEL = {
    "variant": "cognexis-tiny",
    "dtype": "fp32",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "trained_max_loops": 4,
    "default_loops": 2,
    "recurrent_gating": True,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a plan, a tokenizer, token shards and a text to measure on."""
    folder = tmp_path_factory.mktemp("ablations")
    tokenizer = train_tokenizer([TEXT], vocab_size=372)
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "text.txt").write_text(TEXT)
    build_data(BuildOrder([DataInput(str(folder / "text.txt"))], folder / "shards", tokenizer))
    base = {
        "run": {"name": "small"},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "model": MODEL | {"vocab_size": len(tokenizer)},
        "training": {
            "data": {"train_manifest": str(folder / "shards"), "sequence_length": 16, "num_workers": 0},
            "optimization": {"total_steps": 2, "warmup_steps": 1, "learning_rate": 1e-2},
            "batch": {"micro_batch_size": 2, "gradient_accumulation_steps": 1},
            "precision": {"compute_dtype": "fp32"},
            "loop_curriculum": {"warmup_steps": 0, "ramp_steps": 0},
            "checkpoint": {"save_every_steps": 2, "keep_last": 1},
        },
        "inference": {"loop_mode": "adaptive_token", "halt_dependency": "prefix", "scheduler": {"type": "rule_based"}},
        "evaluation": {
            "loop_counts": [1, 4],
            "batch_size": 4,
            "datasets": [
                {"name": "prose", "type": "language_modeling", "path": str(folder / "text.txt"), "split": "validation"}
            ],
        },
    }
    plan = {"name": "small", "base": base, "seeds": [0, 1], "row_length": 12, "max_rows": 6}
    plan |= {"components": ["no_injection", "no_gating"], "sweeps": {"scheduler_min_delta": [0.01, 0.03, 0.5]}}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return folder


class FakeWorkshop:
    """Saves untrained models with weights from the seed; faults by the number of the training run."""

    saves = True

    def __init__(self, faults=None):
        self.faults, self.trained = faults or {}, []

    def prepare_text(self, folder, characters, held_out_share):
        raise AssertionError("the plan names its own data")

    def train(self, config, *, use_cpu):
        self.trained.append((config.run.seed, config.model.recurrent_gating, config.model.input_injection))
        fault = self.faults.get(len(self.trained))
        if isinstance(fault, Exception):
            raise fault
        folder = Path(config.training.checkpoint.output_dir, "model")
        self.save(config, folder, fault == "huge") if self.saves else folder.mkdir(parents=True)
        facts = {"model_dir": str(folder), "steps": 2, "loss": 5.0, "skipped_steps": 0, "stop_signal": None}
        return SimpleNamespace(**(facts | (fault if isinstance(fault, dict) else {})))

    def save(self, config, folder, is_huge):
        torch.manual_seed(config.run.seed)
        model = CognexisForCausalLM(config.model.config())
        if is_huge:
            model.model.embed_tokens.weight.data *= 1e4
        tokenizer = CognexisTokenizer.from_pretrained(config.tokenizer.path)
        model.config.tokenizer_checksum = tokenizer.checksum
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def ordered(place, out, **changes):
    settings = {"config": place / "plan.yaml", "out": out, "device": "cpu", "seeds": (0,)} | changes
    return AblationOrder(**settings)


def silent(line):
    pass


@pytest.fixture
def quick(monkeypatch):
    """No pictures, and a measurement that is known without a model; what is tested is what happens around it."""
    use = UsePoint(
        loop_mode="fixed",
        negative_log_likelihood=3.0,
        last_negative_log_likelihood=3.0,
        mean_loops=2.0,
        flops_per_token=1.0,
    )
    monkeypatch.setattr(report, "_write_pictures", lambda *arguments: [])
    monkeypatch.setattr(running, "_measured", lambda *arguments: Measurement(use, use, [], []))
    monkeypatch.setattr(FakeWorkshop, "saves", False)


def lines_of(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_command_trains_two_components_and_writes_a_report(place, tmp_path):
    words = ["ablate", "--config", str(place / "plan.yaml"), "--only", "no_injection,no_gating"]
    result = CliRunner().invoke(app, [*words, "--out", str(tmp_path), "--seeds", "0", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    rows = lines_of(tmp_path)
    assert [row["experiment"] for row in rows] == ["baseline", "no_injection", "no_gating"]
    assert {row["status"] for row in rows} == {"completed"} and {row["training_steps"] for row in rows} == {2}
    assert [[point["loops"] for point in row["depths"]] for row in rows] == [[1, 2, 4]] * 3
    assert rows[0]["compared"]["negative_log_likelihood"] == rows[0]["depths"][1]["negative_log_likelihood"]
    assert rows[0]["in_use"]["loop_mode"] == "adaptive_token" and rows[1]["in_use"] is None
    resolved = load_run_config(tmp_path / "runs/no_gating/seed-0/config.resolved.yaml")
    assert resolved == resolve(resolved) and resolved.model.recurrent_gating is False
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["runs"] == summary["completed"] == 2
    delta = summary["results"][1]["metric_delta"]
    values = [row["compared"]["negative_log_likelihood"] for row in rows]
    assert delta == pytest.approx(values[0] - values[2])
    text = (tmp_path / "report.md").read_text()
    assert "| no_gating | the gate of the core | retrained | completed |" in text
    for picture in ("differences", "depths", "pareto"):
        assert (tmp_path / f"plots/{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert json.loads((tmp_path / f"plots/{picture}.json").read_text())


def test_settings_that_act_in_use_need_no_training(place, tmp_path):
    workshop = FakeWorkshop()
    run_ablations(
        ordered(place, tmp_path, only=("scheduler_min_delta", "fixed_only", "no_tokenwise")), workshop, silent
    )
    assert len(workshop.trained) == 1
    rows = {row["experiment"]: row for row in lines_of(tmp_path)}
    loops = [rows[f"scheduler_min_delta={value}"]["compared"]["mean_loops"] for value in (0.01, 0.5)]
    assert loops[0] >= rows["baseline"]["in_use"]["mean_loops"] > loops[1] >= 1
    assert rows["fixed_only"]["compared"]["mean_loops"] == 4
    points = {point["loops"]: point for point in rows["baseline"]["depths"]}
    fixed = rows["fixed_only"]["compared"]
    assert fixed["negative_log_likelihood"] == pytest.approx(points[4]["negative_log_likelihood"], rel=1e-6)
    assert fixed["flops_per_token"] == pytest.approx(points[4]["flops_per_token"])
    by_row = rows["no_tokenwise"]["compared"]
    assert by_row["negative_log_likelihood"] is None and by_row["last_negative_log_likelihood"] > 0
    data = json.loads((tmp_path / "plots/sweep-scheduler_min_delta.json").read_text())
    assert data["values"] == [0.01, 0.03, 0.5] and data["statuses"] == ["completed"] * 3
    assert (tmp_path / "plots/sweep-scheduler_min_delta.png").is_file()


def test_a_killed_ablation_goes_on_without_repeating_a_run(place, tmp_path, quick):
    class Killed(BaseException):
        pass

    class Dying(FakeWorkshop):
        def train(self, config, *, use_cpu):
            if len(self.trained) == 3:
                raise Killed
            return super().train(config, use_cpu=use_cpu)

    order = ordered(place, tmp_path, seeds=(0, 1), only=("no_injection", "no_gating"))
    first, second = Dying(), FakeWorkshop()
    with pytest.raises(Killed):
        run_ablations(order, first, silent)
    kept = (tmp_path / "runs/no_gating/seed-0/run.json").stat().st_mtime_ns
    run_ablations(order, second, silent)
    assert len(first.trained) == len(second.trained) == 3
    assert [seed for seed, *_ in second.trained] == [1, 1, 1]
    rows = lines_of(tmp_path)
    assert len({(row["experiment"], row["seed"]) for row in rows}) == len(rows) == 6
    assert (tmp_path / "runs/no_gating/seed-0/run.json").stat().st_mtime_ns == kept
    before = (tmp_path / "summary.json").read_bytes(), (tmp_path / "report.md").read_bytes()
    run_ablations(order, FakeWorkshop({1: Killed()}), silent)
    assert before == ((tmp_path / "summary.json").read_bytes(), (tmp_path / "report.md").read_bytes())


def test_unstable_and_failed_runs_are_results_and_the_rest_runs(place, tmp_path, quick):
    faults = {
        2: NonFiniteError("10 steps in a row were not finite"),
        3: {"skipped_steps": 1},
        4: RuntimeError("no room"),
    }
    order = ordered(place, tmp_path, only=("no_injection", "no_gating", "no_coda", "no_prelude"))
    run_ablations(order, FakeWorkshop(faults), silent)
    rows = {row["experiment"]: row for row in lines_of(tmp_path)}
    assert {name: (row["status"], row["detail"]) for name, row in rows.items()} == {
        "baseline": ("completed", ""),
        "no_injection": ("unstable", "10 steps in a row were not finite"),
        "no_gating": ("unstable", "1 optimizer steps with NaN or infinity"),
        "no_coda": ("failed", "RuntimeError: no room"),
        "no_prelude": ("completed", ""),
    }
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["runs"], summary["completed"], summary["unstable"], summary["failed"]) == (4, 1, 2, 1)
    assert "unstable" in (tmp_path / "report.md").read_text()


def test_without_a_baseline_nothing_can_be_switched(place, tmp_path, quick):
    order = ordered(place, tmp_path, only=("fixed_only",))
    run_ablations(order, FakeWorkshop({1: NonFiniteError("broken")}), silent)
    states = {row["experiment"]: (row["status"], row["detail"]) for row in lines_of(tmp_path)}
    assert states["baseline"][0] == "unstable"
    assert states["fixed_only"][0] == "failed" and "baseline of this seed" in states["fixed_only"][1]


def test_results_of_other_settings_are_refused(place, tmp_path, quick):
    run_ablations(ordered(place, tmp_path, only=("no_gating",)), FakeWorkshop(), silent)
    with pytest.raises(InvalidConfigError, match="holds a result of other settings"):
        run_ablations(ordered(place, tmp_path, only=("no_gating",), steps=3), FakeWorkshop(), silent)


def test_one_folder_has_one_writer(place, tmp_path, quick):
    order = ordered(place, tmp_path, only=("no_gating",))

    class Second(FakeWorkshop):
        def train(self, config, *, use_cpu):
            with pytest.raises(BackendError, match="another ablation"):
                run_ablations(order, FakeWorkshop(), silent)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_ablations(order, Second(), silent)


def test_a_signal_ends_the_command_with_its_code(place, tmp_path, quick):
    with pytest.raises(Interrupted):
        run_ablations(ordered(place, tmp_path, only=("no_gating",)), FakeWorkshop({1: {"stop_signal": 15}}), silent)
    assert not list(tmp_path.glob("runs/*/*/run.json"))


def test_a_diverged_run_is_unstable_and_a_trained_model_is_switched(place, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "_write_pictures", lambda *arguments: [])
    run_ablations(ordered(place, tmp_path / "a", only=("no_gating",)), FakeWorkshop({2: "huge"}), silent)
    baseline, diverged = lines_of(tmp_path / "a")
    assert diverged["status"] == "unstable" and "diverged" in diverged["detail"]
    model = tmp_path / "a/runs/baseline/seed-0/training/model"
    order = ordered(place, tmp_path / "b", only=("no_recurrent", "fixed_only"), checkpoint=model)
    run_ablations(order, FakeWorkshop({1: RuntimeError("trained")}), silent)
    rows = {row["experiment"]: row for row in lines_of(tmp_path / "b")}
    assert {row["method"] for row in rows.values()} == {"switched"}
    assert rows["no_recurrent"]["compared"]["mean_loops"] == 1
    first = baseline["depths"][0]["negative_log_likelihood"]
    assert rows["no_recurrent"]["compared"]["negative_log_likelihood"] == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "no_gate"], "did you mean 'no_gating'"),
        (["--only", ","], "--only"),
        (["--seeds", "a"], "--seeds"),
        (["--set", "model.hidden=3"], "model.hidden"),
        (["--only", "no_value_head"], "the base has no value head"),
    ],
)
def test_faulty_orders_exit_with_code_2(place, tmp_path, capsys, monkeypatch, words, message):
    arguments = ["cognexis", "ablate", "--config", str(place / "plan.yaml"), "--out", str(tmp_path), *words]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_counted_operations_agree_with_the_formula(place):
    config = resolve(load_run_config(yaml.safe_load((place / "plan.yaml").read_text())["base"]))
    model = CognexisForCausalLM(config.model.config()).eval()
    row = torch.randint(5, 300, (1, 12))
    for loops in (1, 3):
        expected = matmul_flops(model.config, 12, loops).total / 12
        assert flops_per_token(model, row, loops) == pytest.approx(expected, rel=0.02)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_text_of_this_machine_is_prepared_once(tmp_path):
    from cognexis.errors import ArtifactMismatchError
    from cognexis.training.ablation_workshop import AblationWorkshop

    files = AblationWorkshop().prepare_text(tmp_path / "data", 60_000, 0.2)
    made = Path(files.train_manifest, "data_manifest.json").stat().st_mtime_ns
    assert AblationWorkshop().prepare_text(tmp_path / "data", 60_000, 0.2) == files
    assert Path(files.train_manifest, "data_manifest.json").stat().st_mtime_ns == made
    training = {json.loads(line)["text"] for line in (tmp_path / "data/training.jsonl").read_text().splitlines()}
    held_out = {json.loads(line)["text"] for line in Path(files.held_out).read_text().splitlines()}
    assert held_out and not training & held_out
    with pytest.raises(ArtifactMismatchError, match="other text"):
        AblationWorkshop().prepare_text(tmp_path / "data", 50_000, 0.2)
