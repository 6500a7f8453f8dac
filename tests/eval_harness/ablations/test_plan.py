"""Plans: files, merge order, sweeps, records and parameter counts."""

import pytest
from pydantic import ValidationError

from cognexis.artifacts.run_config import load_run_config, resolve
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.ablations.overriding import merged
from cognexis.eval_harness.ablations.plan import BASELINE, make_plan, parameter_count
from cognexis.eval_harness.ablations.plan_file import AblationFile, read_base, read_plan_file
from cognexis.eval_harness.ablations.records import ExperimentRecord, StopCriteria
from cognexis.eval_harness.ablations.sweeps import SWEEPS, expanded, folder_name
from cognexis.eval_harness.results import checked
from tests.eval_harness.ablations.test_components import BASE

DATA = {"evaluation": {"datasets": [{"name": "text", "type": "language_modeling", "path": "x.txt"}]}}


def plan_of(base, tmp_path, **settings):
    only = settings.pop("only", None)
    checkpoint = settings.pop("checkpoint", None)
    file = checked(AblationFile, {"name": "x", "base": BASE, **settings}, "plan")
    return make_plan(file, base, tmp_path, hardware="a CPU", only=only, checkpoint=checkpoint)


@pytest.fixture(scope="module")
def base():
    file = checked(AblationFile, {"name": "x", "base": BASE}, "plan")
    return merged(read_base(file, None), DATA)


def test_parameters_of_the_sample_are_counted_on_the_meta_device():
    sample = load_run_config("configs/train.yaml")
    without = {"recurrent_gating": False, "input_injection": "none", "value_head": None}
    assert parameter_count(merged(sample, {"model": without})) == 3_217_502_208


def test_parameters_count_the_core_and_a_tied_embedding_once(base):
    one = parameter_count(base)
    assert parameter_count(merged(base, {"model": {"trained_max_loops": 4, "default_loops": 2}})) == one
    untied = parameter_count(merged(base, {"model": {"tie_word_embeddings": False}}))
    assert untied - one == 64 * 32


def test_overrides_merge_in_order(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "model: {variant: cognexis-tiny, recurrent: {gating: true}, vocab_size: 64}\n"
        "training: {data: {sequence_length: 16}, optimization: {total_steps: 10, warmup_steps: 3}}\n"
        "evaluation: {loop_counts: [1, 2], datasets: [{name: t, type: language_modeling, path: x}]}\n"
    )
    (tmp_path / "overrides").mkdir()
    (tmp_path / "overrides" / "x.yaml").write_text(
        "model: {recurrent_gating: false}\n"
        "training: {optimization: {warmup_steps: 1}}\nevaluation: {loop_counts: [4]}\n"
    )
    own = {"name": "own", "changed_factor": "the gate", "hypothesis": "none", "overrides": "overrides/x.yaml"}
    file = checked(AblationFile, {"name": "x", "base": "base.yaml", "components": [], "experiments": [own]}, "plan")
    base = read_base(file, tmp_path, ["training.optimization.total_steps=20", "model.recurrent.gating=true"])
    config = make_plan(file, base, tmp_path, hardware="x").experiments[1].config
    assert config.model.recurrent_gating is False  # the changed factor wins over the command line
    assert config.training.optimization.total_steps == 20  # the command line wins over the base
    assert config.training.optimization.warmup_steps == 1  # mappings merge, so its neighbour stays
    assert config.evaluation.loop_counts == (4,)  # lists are replaced
    assert base.model.recurrent_gating is True
    run = make_plan(file, base, tmp_path, hardware="x").experiments[1].config_of(7, tmp_path / "run")
    assert run.run.seed == 7 and run.training.checkpoint.output_dir == str(tmp_path / "run" / "training")
    assert resolve(run) == run


@pytest.mark.parametrize("name", sorted(SWEEPS))
def test_each_sweep_expands_to_one_experiment_for_each_value(base, tmp_path, name):
    change = {"inference": {"scheduler": {"type": "hybrid"}}} if name.startswith(("scheduler", "value")) else {}
    if name == "scheduler_risk":
        change = {}
    config = merged(base, change)
    assert len(expanded(name, None, config)) == len(SWEEPS[name].values)
    plan = plan_of(config, tmp_path, components=[], sweeps={name: None})
    points = plan.sweeps[name]
    assert [value for value, _ in points] == list(SWEEPS[name].values)
    run = [experiment for _, experiment in points if experiment != BASELINE]
    assert [experiment.name for experiment in plan.experiments] == [BASELINE, *run]
    assert len(set(run)) == len(run) >= len(points) - 1


def test_a_sweep_takes_values_and_paths(base, tmp_path):
    plan = plan_of(base, tmp_path, components=[], sweeps={"gate_init": [1.0], "model.injection_scale": [0.1, 1.0]})
    names = [experiment.name for experiment in plan.experiments]
    assert names == ["baseline", "gate_init=1.0", "model.injection_scale=0.1"]
    assert plan.sweeps["model.injection_scale"] == [(0.1, "model.injection_scale=0.1"), (1.0, "baseline")]
    assert folder_name("a b/c=1.5") == "a_b_c=1.5"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sweeps": {"gate_int": [1]}}, "unknown sweep.*did you mean 'gate_init'"),
        ({"sweeps": {"gate_init": []}}, "needs a list of one value or more"),
        ({"sweeps": {"model.injektion": [1]}}, "unknown setting.*model.injektion|model.injektion"),
        ({"sweeps": {"heads": [3]}}, "heads=3.*hidden_size"),
        ({"sweeps": {"scheduler_confidence": None}}, "scheduler value_head does not read it"),
        ({"components": ["no_gate"]}, "did you mean 'no_gating'"),
        ({"components": ["no_gating", "no_gating"]}, "stands twice"),
        (
            {"experiments": [{"name": "a", "changed_factor": "b", "hypothesis": "c", "overrides": {}}]},
            "changes nothing",
        ),
        (
            {
                "experiments": [
                    {"name": "a", "changed_factor": "b", "hypothesis": "c", "overrides": {"model": {"gating": 1}}}
                ]
            },
            "model.gating",
        ),
        ({"components": ["no_gating"], "checkpoint": "folder"}, "needs training"),
        ({"components": [], "sweeps": {"gate_init": [1.0]}, "checkpoint": "folder"}, "needs training"),
    ],
)
def test_a_faulty_plan_is_refused_before_anything_runs(base, tmp_path, settings, words):
    with pytest.raises(InvalidConfigError, match=words):
        plan_of(base, tmp_path, **({"components": []} | settings))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"name": "", "base": {}}, "name"),
        ({"name": "x", "base": {}, "seeds": []}, "seeds"),
        ({"name": "x", "base": {}, "seeds": [1, 1]}, "an entry stands twice"),
        ({"name": "x", "base": {}, "seeds": [-1]}, "seeds"),
        ({"name": "x", "base": {}, "sweep": {}}, "sweep"),
        ({"name": "x", "base": {}, "schema_version": 2}, "schema_version"),
        ({"name": "x"}, "base"),
    ],
)
def test_a_faulty_plan_file_names_the_field(content, words):
    with pytest.raises(InvalidConfigError, match=words):
        checked(AblationFile, content, "plan")


def test_only_names_components_sweeps_and_experiments(base, tmp_path):
    plan = plan_of(base, tmp_path, sweeps={"gate_init": [1.0]}, only=["gate_init", "no_coda", "residual_scale"])
    names = [experiment.name for experiment in plan.experiments]
    assert names[:3] == ["baseline", "no_coda", "gate_init=1.0"]
    assert all(name.startswith("residual_scale=") for name in names[3:])
    with pytest.raises(InvalidConfigError, match="unknown component"):
        plan_of(base, tmp_path, only=["no_such"])


def test_what_the_base_lacks_is_left_out_with_a_reason(base, tmp_path):
    config = merged(base, {"model": {"recurrent_gating": False, "gate_loop_embedding": False}})
    plan = plan_of(config, tmp_path)
    assert plan.left_out == {"no_gating": "the base has no gate (model.recurrent_gating is false)"}
    trained = plan_of(base, tmp_path, checkpoint="folder")
    names = [experiment.name for experiment in trained.experiments]
    assert names == ["baseline", "no_recurrent", "fixed_only", "no_value_head", "no_tokenwise"]
    assert "needs training" in trained.left_out["no_ffn"]
    assert {experiment.record.method for experiment in trained.experiments} == {"switched"}


RECORD = {
    "name": "a",
    "baseline": "b",
    "changed_factor": "c",
    "hypothesis": "d",
    "overrides": {},
    "method": "retrained",
    "budget": "10 optimizer steps",
    "suite": ["text"],
    "seeds": [0],
    "hardware": "a CPU",
}


@pytest.mark.parametrize("field", ["name", "changed_factor", "hypothesis", "baseline", "hardware", "budget"])
def test_a_record_needs_its_texts(field):
    assert ExperimentRecord.model_validate(RECORD).stop_criteria == StopCriteria()
    for empty in ("", "  "):
        with pytest.raises(InvalidConfigError, match=field):
            checked(ExperimentRecord, RECORD | {field: empty}, "record")


@pytest.mark.parametrize(
    "change", [{"seeds": []}, {"suite": []}, {"method": "guessed"}, {"more": 1}, {"seeds": ["0"]}]
)
def test_a_record_is_strict(change):
    with pytest.raises(ValidationError):
        ExperimentRecord.model_validate(RECORD | change)


def test_the_shipped_plan_is_valid(tmp_path):
    from pathlib import Path

    path = Path("configs/ablations.yaml")
    file = read_plan_file(path)
    base = merged(read_base(file, path.parent), DATA)
    plan = make_plan(file, base, path.parent, hardware="x")
    assert set(plan.left_out) == {"no_value_head"} and len(plan.experiments) == 13
