"""Sections, the rules between them, the model section, migration, presence by command."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from cognexis import CognexisConfig
from cognexis.artifacts.run_config import (
    NEEDED_SECTIONS,
    RunConfig,
    config_from_document,
    default_run_config,
    extrapolated_depths,
    load_run_config,
    resolve,
)
from cognexis.artifacts.run_config.documents import yaml_text
from cognexis.artifacts.run_config.model_section import ARCHITECTURE_FIELDS
from cognexis.errors import InvalidConfigError

CONFIGS = Path(__file__).parents[3] / "configs"
RUN_CONFIGS = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem != "ablations"]  # a plan over a run
COMMAND_OF = {"train": "train", "cognexis-tiny": "train", "eval": "eval", "serve": "serve"}


def faults(document: Any, **keywords: Any) -> list[str]:
    """The dotted paths of the faults of a document; empty if it is accepted."""
    try:
        load_run_config(document, **keywords)
    except InvalidConfigError as error:
        return [fault.path for fault in error.faults]
    return []


def sentences(document: Any) -> list[str]:
    try:
        load_run_config(document)
    except InvalidConfigError as error:
        return list(error.faults)
    return []


def nested(path: str, value: Any) -> dict[str, Any]:
    for name in reversed(path.split(".")):
        value = {name: value}
    return value


def merged(*documents: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for document in documents:
        for key, value in document.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = merged(result[key], value) if both else value
    return result


TINY = {"model": {"variant": "tiny"}}
ADAPTIVE = {"inference": {"loop_mode": "adaptive", "scheduler": {"type": "rule_based"}}}


# -- defaults and samples ---------------------------------------------------------------------------------------------


def test_default_is_valid_and_conservative() -> None:
    for config in (RunConfig(), default_run_config()):
        assert (config.inference.loop_mode, config.inference.min_loops) == ("fixed", 1)
        assert (
            config.safety.input_filter
            == config.safety.output_filter
            == config.safety.policy_mode.replace("enforce", "enabled")
        )
        assert config.safety.block_special_token_injection and config.safety.pii_logging == "redacted"
        assert not config.run.research_mode and not config.inference.research_override
    model = default_run_config().model
    assert model.attention_dropout == model.ffn_dropout == model.embedding_dropout == 0.0
    assert resolve(default_run_config()).tokenizer.vocab_size == model.vocab_size


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.stem)
def test_sample_is_valid_for_its_command(path: Path) -> None:
    config = load_run_config(path, COMMAND_OF[path.stem])
    assert resolve(resolve(config)) == resolve(config)


def test_full_sample_holds_the_published_values_and_fits_64_processes() -> None:
    config = load_run_config(CONFIGS / "train.yaml", "train", world_size=64)
    model, training, inference = config.model, config.training, config.inference
    assert (model.hidden_size, model.num_key_value_heads, model.head_dim, model.intermediate_size) == (
        4096,
        8,
        128,
        11008,
    )
    assert (model.trained_max_loops, model.max_loops, model.recurrent_residual_mode) == (12, 12, "fixed")
    assert (model.recurrent_residual_scale, model.recurrent_gating, model.input_injection) == (0.5, True, "residual")
    assert training.batch.global_batch_tokens == 4_194_304 == 2 * 16 * 2048 * 64
    assert (training.optimization.learning_rate, training.optimization.epsilon) == (2e-4, 1e-8)
    assert training.loop_curriculum.sampling_distribution == "geometric"
    assert training.activation_checkpointing.recurrent == "every_2_loops"
    assert (inference.loop_mode, inference.max_loops, inference.scheduler.type) == (
        "adaptive_sequence",
        8,
        "value_head",
    )
    assert (inference.scheduler.min_delta, inference.cache.type, config.safety.max_user_loops) == (1e-4, "paged", 12)
    assert faults(CONFIGS / "train.yaml", command="train", world_size=63) == ["training.batch.global_batch_tokens"]


def test_full_sample_cannot_be_served_before_there_is_a_value_head() -> None:
    assert faults(CONFIGS / "train.yaml", command="serve") == ["inference.scheduler.type", "inference.cache.type"]


# -- formats ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RUN_CONFIGS, ids=lambda path: path.stem)
def test_yaml_and_json_give_equal_objects(path: Path, tmp_path: Path) -> None:
    config = load_run_config(path)
    (tmp_path / "a.json").write_text(json.dumps(config.document()))
    (tmp_path / "a.yaml").write_text(yaml_text(config.given()))
    assert load_run_config(tmp_path / "a.json") == load_run_config(tmp_path / "a.yaml") == config
    assert set(config.document().get("model", {})) <= {"variant", "dtype", *ARCHITECTURE_FIELDS}
    assert "truncated_geometric" not in yaml_text(config.document())


# -- faults -----------------------------------------------------------------------------------------------------------


def test_every_fault_is_listed_with_path_value_and_reason() -> None:
    document = {
        "run": {"name": "", "seeed": 3},
        "model": {"variant": "tiny", "hidden_size": -1, "recurrent": {"gatin": True}},
        "inference": {"loop_mode": "adaptiv", "sampling": {"top_p": 2.0, "temperature": True}},
        "bogus_section": {},
    }
    with pytest.raises(InvalidConfigError) as caught:
        load_run_config(document)
    error = caught.value
    found = {fault.path: fault for fault in error.faults}
    assert set(found) == {
        *("run.name", "run.seeed", "model.recurrent.gatin", "inference.loop_mode", "inference.sampling.top_p"),
        *("inference.sampling.temperature", "bogus_section"),
    }
    assert (error.path, error.value) == (error.faults[0].path, error.faults[0].value)
    assert "did you mean 'seed'?" in found["run.seeed"] and "did you mean 'gating'?" in found["model.recurrent.gatin"]
    assert found["inference.sampling.top_p"].value == 2.0 and found["inference.sampling.top_p"].reason
    assert found["inference.loop_mode"].startswith("inference.loop_mode='adaptiv': must be one of fixed, ")


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("model.rope_thetaa", 1e4, "unknown key (did you mean 'rope_theta'?)"),
        ("model.rope.thetaa", 1e4, "unknown key (did you mean 'theta'?)"),
        ("bogus_section", {}, "unknown key"),
        ("trainning", {}, "unknown key (did you mean 'training'?)"),
        ("inference.max_loops", 2.0, "must be a whole number"),
        ("inference.max_loops", True, "must be a whole number"),
        ("inference.max_loops", 0, "must be at least 1"),
        ("inference.sampling.temperature", "hot", "must be a number"),
        ("inference.sampling.stop_strings", "x", "must be a list"),
        ("inference.research_override", "on", "must be true or false"),
        ("inference.compute_budget", 3, "must be a mapping of settings"),
        ("inference", [], "must be a mapping of settings"),
        ("model.attention", 3, "must be a mapping of settings"),
        ("model.attention.variant", "sliding_window", "must be one of mha, gqa, mqa"),
        ("model.rope.scaling", 3, "must be a mapping"),
        ("model.variant", "cognexis-9b", "unknown variant"),
        ("model.dtype", "int8", "must be one of bf16, fp16, fp32, fp64"),
        ("tokenizer.checksum", "sha256:abc", "must match"),
        ("evaluation.datasets", [{"name": "a", "type": "generation"}], "is required"),
        ("evaluation.loop_counts", [1, 0], "must be at least 1"),
        ("training.precision.loss_scale", 0, "must be dynamic, none or a positive number"),
        ("training.activation_checkpointing.recurrent", "every_0_loops", "must be none, every_block or"),
    ],
)
def test_message_says_what_is_allowed(path: str, value: Any, words: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        load_run_config(nested(path, value))
    fault = caught.value.faults[0]
    assert fault.path.startswith(path) and words in fault, fault
    assert "pydantic" not in str(caught.value) and "Input should" not in str(caught.value)


RULES: list[tuple[str, Any, dict[str, Any]]] = [
    *((f"training.optimization.{n}", x, {}) for n in ("learning_rate", "epsilon") for x in (0.0, -1.0)),
    *((f"training.optimization.{n}", x, {}) for n in ("beta1", "beta2") for x in (1.0, -0.1)),
    ("training.optimization.gradient_clip_norm", 0.0, {}),
    ("training.optimization.min_learning_rate", 1.0, {}),
    ("training.optimization.warmup_steps", 600_000, {}),
    *((f"training.checkpoint.{n}", -1, {}) for n in ("keep_last", "keep_best")),
    ("training.data.sequence_length", 1, {}),
    ("training.data.sequence_length", 1024, TINY),  # packing needs 1025 positions
    ("training.data.document_boundary_attention", True, {"model": {"document_boundary_attention": False}}),
    ("training.data.position_reset", "reset", {**TINY, **nested("training.data.document_boundary_attention", False)}),
    ("training.batch.global_batch_tokens", 65_537, {}),
    *((f"training.loop_curriculum.{n}", 0, {}) for n in ("min_loops", "initial_max_loops", "target_max_loops", "cap")),
    *((f"training.loop_curriculum.{n}", -1, {}) for n in ("warmup_steps", "ramp_steps")),
    *(("training.loop_curriculum.high_depth_fraction", x, {}) for x in (-0.1, 1.1)),
    ("training.loop_curriculum.target_max_loops", 9, TINY),
    ("training.loop_curriculum.initial_max_loops", 9, TINY),
    ("training.loop_curriculum.initial_max_loops", 2, merged(TINY, {"model": {"min_loops": 3}})),
    ("training.loop_curriculum.min_loops", 2, merged(TINY, {"model": {"min_loops": 3}})),
    ("training.loop_curriculum.target_max_loops", 2, merged(TINY, {"model": {"min_loops": 3}})),
    ("training.loop_curriculum.milestones", {"100": 4}, {}),
    ("training.loop_curriculum.milestones", {"1": 4, "2": 3}, nested("training.loop_curriculum.ramp", "milestone")),
    (
        "training.loop_curriculum.milestones",
        {"1": 9},
        merged(TINY, nested("training.loop_curriculum.ramp", "milestone")),
    ),
    ("training.loop_curriculum.milestones", {"x": 9}, nested("training.loop_curriculum.ramp", "milestone")),
    ("training.losses.multi_depth.weights", [1.0], {}),
    ("training.losses.multi_depth.weights", [-1.0], nested("training.losses.multi_depth.depths", [1])),
    ("training.losses.multi_depth.weights", [0.0], nested("training.losses.multi_depth.depths", [1])),
    ("training.losses.multi_depth.depths", [9], merged(TINY, nested("training.losses.multi_depth.weights", [1.0]))),
    ("training.losses.lambda_value", 0.1, TINY),
    ("model.pad_token_id", 1, {"training": {}, "model": {"eos_token_id": 1}}),
    *(("inference.max_loops", x, TINY) for x in (9, 0)),
    ("inference.num_loops", 5, nested("inference.max_loops", 4)),
    ("inference.min_loops", 5, nested("inference.max_loops", 4)),
    ("inference.max_sequence_length", 1025, TINY),
    ("inference.sampling.stop_tokens", [8192], TINY),
    ("inference.sampling.top_k", 8193, TINY),
    *(
        (f"inference.compute_budget.{n}", 0, {})
        for n in ("max_recurrent_flops", "max_wall_time_ms", "max_total_loops")
    ),
    *((f"inference.compute_budget.{n}", -1, {}) for n in ("max_cache_memory_bytes", "max_loops_per_token")),
    *(("inference.scheduler.confidence_threshold", x, {}) for x in (-0.1, 1.1, float("nan"))),
    *((f"inference.scheduler.{n}", x, {}) for n in ("min_delta", "entropy_threshold") for x in (-1.0, float("inf"))),
    ("inference.scheduler.predicted_gain_threshold", float("nan"), {}),
    ("inference.scheduler.large_delta", 0.01, {}),
    ("inference.scheduler.high_conf_gain_threshold", 0.1, nested("inference.scheduler.type", "rule_based")),
    *(("inference.scheduler.type", x, TINY) for x in ("hybrid", "value_head")),
    ("inference.scheduler.type", "oracle", {}),
    (
        "inference.scheduler.type",
        "fixed",
        ADAPTIVE,
    ),
    ("inference.cache.type", "paged", ADAPTIVE),
    *(("inference.sampling.temperature", x, {}) for x in (-1.0, float("nan"))),
    *(("inference.sampling.top_p", x, {}) for x in (0.0, 1.1)),
    ("inference.sampling.repetition_penalty", 0.0, {}),
    ("safety.max_user_loops", 9, TINY),
    ("safety.max_user_loops", 0, {}),
    ("safety.input_filter", "disabled", {}),
    ("safety.output_filter", False, {}),
    ("safety.policy_mode", "audit_only", {}),
    ("tokenizer.vocab_size", 100, TINY),
    ("tokenizer.pad_token", "</s>", {}),
    ("tokenizer.checksum", "sha256:" + "0" * 64, {"model": {"tokenizer_checksum": "sha256:" + "1" * 64}}),
    ("evaluation.loop_counts", [], {}),
]


@pytest.mark.parametrize("path, value, rest", RULES, ids=[f"{path}={value!r}"[:70] for path, value, _ in RULES])
def test_broken_rule_names_the_setting(path: str, value: Any, rest: dict[str, Any]) -> None:
    new = set(sentences(merged(rest, nested(path, value)))) - set(sentences(rest))
    assert any(sentence.startswith(path) for sentence in new), new


def test_same_settings_pass_when_research_permits_them() -> None:
    research = {"run": {"research_mode": True}, "inference": {"research_override": True, "max_loops": 32}, **TINY}
    oracle = nested("inference.scheduler.type", "oracle")
    assert faults(merged(research, oracle, {"safety": {"input_filter": "disabled"}})) == []


def test_training_run_may_describe_a_service_that_needs_its_result() -> None:
    document = merged(
        TINY, {"training": {"data": {"sequence_length": 64}}}, nested("inference.scheduler.type", "hybrid")
    )
    assert faults(document) == faults(document, command=None) == []
    assert "inference.scheduler.type" in faults(document, command="generate")


# -- commands, versions, depths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", NEEDED_SECTIONS)
def test_command_needs_its_sections(command: str) -> None:
    assert faults({}, command=command) == list(NEEDED_SECTIONS[command])
    needed = {name: {} for name in NEEDED_SECTIONS[command]}
    assert faults(needed, command=command) == []


def test_unknown_command_is_named() -> None:
    with pytest.raises(InvalidConfigError, match=r"command='trian'.*did you mean 'train'"):
        load_run_config({}, "trian")


@pytest.mark.parametrize("version", [2, -1, "1", 1.0, True, None, 10**400])
def test_unknown_schema_version_is_refused(version: Any) -> None:
    with pytest.raises(InvalidConfigError, match="schema_version") as caught:
        config_from_document({"schema_version": version})
    assert caught.value.path == "schema_version"


def test_older_version_is_migrated_with_a_warning() -> None:
    old = {"schema_version": 0, "name": "old", "seed": 7, "generation": {"max_new_tokens": 9}}
    with pytest.warns(FutureWarning, match="schema_version 0 is deprecated"):
        config = config_from_document(old)
    assert (config.schema_version, config.run.name, config.run.seed, config.inference.max_new_tokens) == (
        1,
        "old",
        7,
        9,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config_from_document({"schema_version": 1}) == config_from_document({}) == RunConfig()


def test_deprecated_setting_warns_and_moves() -> None:
    with pytest.warns(
        FutureWarning, match="inference.total_loop_budget is deprecated; write inference.compute_budget"
    ):
        config = load_run_config({"inference": {"total_loop_budget": 5}})
    assert config.inference.compute_budget.max_total_loops == 5
    both = {"inference": {"max_generated_tokens": 5, "max_new_tokens": 5}}
    with pytest.warns(FutureWarning), pytest.raises(InvalidConfigError, match="given twice"):
        load_run_config(both)


def test_depth_beyond_training_is_warned_about_and_labelled() -> None:
    document = merged(TINY, {"evaluation": {"loop_counts": [1, 8, 32]}})
    with pytest.warns(UserWarning, match=r"loop_counts \[32\] exceed model.trained_max_loops=8"):
        config = load_run_config(document, "eval")
    assert extrapolated_depths(config) == (32,)


# -- the model section ------------------------------------------------------------------------------------------------


def test_model_section_is_the_configuration_under_its_flat_names() -> None:
    config = CognexisConfig.from_variant("tiny", default_loops=2)
    section = load_run_config({"model": {"variant": "tiny", "num_loops": 2, "dtype": "float32"}}).model
    assert section.dtype == "fp32" and section.hidden_size == 128
    assert {n: getattr(section, n) for n in section.model_extra} == {
        n: getattr(config, n) for n in section.model_extra
    }
    built = section.config()
    assert built.dtype is not None and built.default_loops == 2


def test_nested_spelling_gives_the_flat_section() -> None:
    flat = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "attention_dropout": 0.1,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        "intermediate_size": 96,
        "ffn_activation": "gelu",
        "mlp_bias": True,
        "max_loops": 6,
        "trained_max_loops": 6,
        "recurrent_residual_mode": "fixed",
        "recurrent_residual_scale": 0.25,
        "state_retention": "all",
    }
    nested_form = {
        "hidden_dim": 64,
        "attention": {"variant": "mqa", "num_attention_heads": 4, "dropout": 0.1},
        "rope": {"theta": 500.0, "max_position_embeddings": 256, "scaling": {"type": "linear", "factor": 2.0}},
        "ffn": {"activation": "gelu", "intermediate_dim": 96, "bias": True},
        "recurrent": {"max_loops": 6, "residual_scale": 0.25, "return_intermediate_states": True},
    }
    assert load_run_config({"model": nested_form}) == load_run_config({"model": flat})


@pytest.mark.parametrize(
    "model, named",
    [
        ({"hidden_size": 64, "hidden_dim": 64}, "model.hidden_dim"),
        ({"max_loops": 4, "recurrent": {"max_loops": 4}}, "model.recurrent.max_loops"),
        ({"attention": {"variant": "mha", "num_kv_heads": 8}}, "model.attention.variant"),
        (
            {"recurrent": {"return_intermediate_states": True, "state_retention": "final_only"}},
            "model.recurrent.return",
        ),
        ({"rope_theta": 1e4, "rope": {"theta": 1e4}}, "model.rope"),
    ],
)
def test_setting_given_twice_or_against_itself_is_refused(model: dict[str, Any], named: str) -> None:
    found = faults({"model": model})
    assert found and found[0].startswith(named)


def test_configuration_is_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.run = None  # type: ignore[assignment]
