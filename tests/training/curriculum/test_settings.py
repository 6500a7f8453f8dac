"""Every rule of the curriculum's settings."""

import pytest

from cognexis.artifacts.run_config import load_run_config, resolve
from cognexis.errors import InvalidConfigError
from cognexis.training.curriculum.settings import CurriculumSettings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"min_loops": 0}, "min_loops=0: must be a whole number of 1 or more"),
        ({"min_loops": 3}, "min_loops=3: must not exceed initial_max_loops=2"),
        ({"initial_max_loops": 9}, "initial_max_loops=9: must not exceed target_max_loops=8"),
        ({"architecture_max_loops": 7}, "target_max_loops=8: the model allows at most 7"),
        ({"target_max_loops": 8.0}, "target_max_loops=8.0: must be a whole number"),
        ({"warmup_steps": -1}, "warmup_steps=-1: must be a whole number of 0 or more"),
        ({"ramp_steps": True}, "ramp_steps=True: must be a whole number of 0 or more"),
        ({"window": 0}, "window=0: must be a whole number of 1 or more"),
        ({"mode": "ramp"}, "mode='ramp': must be one of fixed, ramp_then_sample"),
        ({"sampling_distribution": "uniforn"}, "did you mean 'uniform'"),
        ({"ramp": "cubic"}, "ramp='cubic': must be one of linear"),
        ({"exponential_base": 1.0}, "exponential_base=1.0: must be finite and above 1"),
        ({"continue_probability": 1.0}, "continue_probability=1.0: must lie between 0 and 1"),
        ({"std": 0.0}, "std=0.0: must be finite and positive"),
        ({"sigma": float("nan")}, "sigma=nan: must be finite and positive"),
        ({"mean": -1.0}, "mean=-1.0: must be finite and positive"),
        ({"high_depth_fraction": 1.5}, r"high_depth_fraction=1.5: must lie in \[0, 1\]"),
        ({"cap": 0}, "cap=0: must be at least min_loops=1"),
        ({"ramp": "milestone"}, "milestones={}: goes with ramp='milestone'"),
        ({"milestones": {1: 2}}, "goes with ramp='milestone' and only with it"),
        ({"ramp": "milestone", "milestones": {5: 4, 9: 3}}, "steps and loop counts must ascend"),
        ({"ramp": "milestone", "milestones": {5: 9}}, "loop counts must lie between min_loops=1 and"),
        ({"task_profiles": {"math": "deepest"}}, "must be one of shallow, medium, deep"),
    ],
)
def test_setting_that_breaks_a_rule_is_refused(changes, message):
    with pytest.raises(InvalidConfigError, match=message):
        CurriculumSettings(**changes)


def test_every_fault_is_listed():
    with pytest.raises(InvalidConfigError) as caught:
        CurriculumSettings(min_loops=5, std=-1.0, ramp="none")
    assert {fault.path for fault in caught.value.faults} == {"min_loops", "std", "ramp"}


def test_settings_of_a_run_configuration_are_taken_over():
    text = """
    model: {variant: cognexis-tiny}
    training:
      data: {sequence_length: 64}
      loop_curriculum:
        {warmup_steps: 7, ramp: milestone, milestones: {"9": 3, "12": 8}, sampling_distribution: truncated_geometric}
    """
    config = resolve(load_run_config(text))
    rule = CurriculumSettings.from_section(config.training.loop_curriculum, config.model.trained_max_loops)
    assert (rule.min_loops, rule.initial_max_loops, rule.target_max_loops) == (1, 2, 8)
    assert (rule.warmup_steps, rule.milestones) == (7, {9: 3, 12: 8})
    assert (rule.sampling_distribution, rule.high_depth_fraction) == ("geometric", 0.05)


def test_every_field_of_the_section_is_one_of_the_settings():
    section = resolve(
        load_run_config("model: {variant: cognexis-tiny}\ntraining: {data: {sequence_length: 64}}\n")
    ).training.loop_curriculum
    names = set(type(section).model_fields) - {"loop_grad_normalization"}  # a matter of gradients, not of draws
    assert names <= set(CurriculumSettings.__dataclass_fields__)
