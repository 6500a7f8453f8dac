"""Overrides and their policy, the resolved form and its file, the description of a checkpoint, the mappings."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, TrainingArguments

from cognexis import CognexisConfig
from cognexis.artifacts.config_commands import (
    check_command,
    list_variants_command,
    migrate_command,
    resolve_command,
    show_defaults_command,
)
from cognexis.artifacts.run_config import (
    apply_overrides,
    default_run_config,
    load_run_config,
    loop_keywords_of,
    resolve,
    run_config_of_checkpoint,
    training_arguments_of,
    write_resolved,
)
from cognexis.artifacts.run_config.inference_section import SCHEDULER_FIELDS, SchedulerSettings
from cognexis.errors import InvalidConfigError, UnsafeOverrideError
from cognexis.looping.options import LOOP_KEYWORDS
from cognexis.looping.schedulers.registry import build_scheduler
from tests.batteries.tiny import tiny_config

CONFIGS = Path(__file__).parents[3] / "configs"
RUN_CONFIGS = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem != "ablations"]  # a plan over a run
TINY = {"model": {"variant": "tiny"}, "training": {"data": {"sequence_length": 64}}, "evaluation": {}, "tokenizer": {}}


# -- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolved", [False, True])
def test_run_time_setting_changes_beside_a_checkpoint(resolved: bool) -> None:
    config = load_run_config(TINY)
    config = resolve(config) if resolved else config
    changed = apply_overrides(
        config, ["inference.max_loops=4", "run.name=x", "inference.sampling.top_p=5e-1"], context="checkpoint"
    )
    assert (changed.inference.max_loops, changed.run.name, changed.inference.sampling.top_p) == (4, "x", 0.5)
    again = resolve(changed)
    assert (again.inference.num_loops, again.safety.max_user_loops) == (4, 4), "derived values follow"
    assert again.evaluation.output_path == "runs/x/evaluation"


@pytest.mark.parametrize(
    "override",
    [
        *(
            f"model.{name}=64"
            for name in ("hidden_size", "hidden_dim", "vocab_size", "num_prelude_blocks", "max_loops")
        ),
        *(
            "model.recurrent.gating=false",
            "model.ffn.activation=gelu",
            "model.variant=mini",
            "model={hidden_size: 64}",
        ),
        *("tokenizer.vocab_size=3", "tokenizer.bos_token=x", "training.optimization.learning_rate=1"),
        *("safety.input_filter=disabled", "safety.output_filter=false", "safety.block_special_token_injection=false"),
        *("safety={input_filter: disabled}", "safety.policy_mode=audit_only", "safety.pii_logging=verbatim"),
        "schema_version=1",
    ],
)
def test_fixed_or_protecting_setting_does_not_change_beside_a_checkpoint(override: str) -> None:
    config = load_run_config(TINY)
    with pytest.raises(UnsafeOverrideError) as caught:
        apply_overrides(config, ["inference.max_loops=4", override], context="checkpoint")
    assert caught.value.code == "unsafe_override" and isinstance(caught.value, InvalidConfigError)
    assert caught.value.path.startswith(override.partition(".")[0].partition("=")[0])
    assert config == load_run_config(TINY), "nothing changes when one of several is refused"


def test_research_mode_permits_to_weaken_protections() -> None:
    overrides = ["run.research_mode=true", "safety.input_filter=disabled"]
    assert apply_overrides(load_run_config(TINY), overrides, context="checkpoint").safety.input_filter == "disabled"
    apply_overrides(load_run_config(TINY), ["safety.input_filter=enabled"], context="checkpoint")


def test_architecture_changes_freely_without_a_checkpoint() -> None:
    config = load_run_config(CONFIGS / "train.yaml", overrides=["model.recurrent.max_loops=16"])
    assert (config.model.max_loops, config.model.trained_max_loops) == (16, 16)
    resolved = resolve(default_run_config())
    wider = apply_overrides(resolved, ["model.hidden_size=8192", "training.batch.micro_batch_size=4"])
    assert (wider.model.head_dim, wider.model.intermediate_size) == (256, 22_016), "derived sizes follow"
    assert resolve(wider).training.batch.global_batch_tokens == 4 * 16 * 2048


@pytest.mark.parametrize(
    "override, words",
    [
        ("inference.max_lops=4", "inference.max_lops: unknown setting (did you mean 'max_loops'?)"),
        ("infrence.max_loops=4", "infrence: unknown setting (did you mean 'inference'?)"),
        ("model.hiden_size=4", "model.hiden_size: unknown setting (did you mean 'hidden_size'?)"),
        ("inference.top_p=1", "did you mean 'inference.sampling.top_p'?"),
        ("run.seed.x=1", "unknown setting; run.seed has no parts"),
        ("inference.max_loops", "must have the form path=value"),
        ("=3", "must have the form path=value"),
        ("a..b=3", "must have the form path=value"),
        ("inference.max_loops=[", "not valid YAML"),
        ("inference.max_loops=.nan", "not finite"),
        ("inference.max_loops=four", "must be a whole number"),
        ("run.name=\ud800", "not UTF-8"),
    ],
)
def test_override_that_cannot_be_meant_names_the_nearest(override: str, words: str) -> None:
    with pytest.raises(InvalidConfigError) as caught:
        apply_overrides(load_run_config(TINY), [override])
    assert words in str(caught.value)


def test_later_override_wins_and_lists_and_mappings_are_values() -> None:
    overrides = ["run.seed=1", "run.seed=2", "evaluation.loop_counts=[1, 2]", "inference={sampling: {top_k: 3}}"]
    config = apply_overrides(load_run_config(TINY), overrides)
    assert (config.run.seed, config.evaluation.loop_counts, config.inference.sampling.top_k) == (2, (1, 2), 3)


# -- the resolved form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [TINY, {}, *RUN_CONFIGS], ids=str)
def test_resolving_is_idempotent_and_the_file_reproduces_it(source: Any, tmp_path: Path) -> None:
    config = load_run_config(source)
    resolved = resolve(config)
    assert resolve(resolved) == resolved and resolve(resolved).document() == resolved.document()
    path = write_resolved(config, tmp_path / "deep" / "folder")
    assert path.name == "config.resolved.yaml" and load_run_config(path) == resolved
    assert resolve(load_run_config(path)).document() == resolved.document()
    (tmp_path / "same.json").write_text(json.dumps(resolved.document()))
    assert load_run_config(tmp_path / "same.json") == resolved
    first = path.read_bytes()
    write_resolved(load_run_config(path), tmp_path / "deep" / "folder")
    assert path.read_bytes() == first and os.listdir(path.parent) == [path.name]


def test_resolved_form_holds_derived_values() -> None:
    config = resolve(load_run_config(TINY), world_size=3)
    assert config.document()["schema_version"] == 1
    assert config.tokenizer.vocab_size == 8192 and config.model.kv_slots == 8
    assert config.training.batch.global_batch_tokens == 2 * 16 * 64 * 3
    assert config.training.loop_curriculum.target_max_loops == 8
    assert (config.inference.max_loops, config.inference.num_loops, config.safety.max_user_loops) == (8, 4, 8)
    assert config.evaluation.loop_counts == (1, 2, 4, 8)


def test_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_resolved(load_run_config(TINY), tmp_path)
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_resolved(default_run_config(), tmp_path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


# -- checkpoints ------------------------------------------------------------------------------------------------------


def test_saved_model_is_described_quickly_and_completely() -> None:
    config = tiny_config(dtype="float64", tokenizer_checksum="sha256:" + "a" * 64)
    generation = GenerationConfig(do_sample=True, top_p=0.5, max_new_tokens=7, eos_token_id=1)
    generation.num_loops = 3

    class Tokenizer:
        bos_token, eos_token, pad_token, unk_token = "<s>", "</s>", "</s>", None
        all_special_tokens = ("<s>", "</s>", "<eod>")

    times = []
    for _ in range(5):
        start = time.perf_counter()
        described = run_config_of_checkpoint(config, generation, Tokenizer())
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
    assert resolve(described) == described
    assert described.model.config().to_dict() == config.to_dict()
    assert (described.tokenizer.checksum, described.tokenizer.pad_token) == ("sha256:" + "a" * 64, None)
    assert described.tokenizer.eod_token == "<eod>" and described.tokenizer.vocab_size == 64
    assert (described.inference.sampling.top_p, described.inference.num_loops) == (0.5, 3)
    assert described.training is None and described.evaluation is None
    load_run_config(described.document(), "checkpoint")


@pytest.mark.parametrize("name", ["tiny", "8b"])
def test_every_model_can_be_described(name: str) -> None:
    described = run_config_of_checkpoint(CognexisConfig.from_variant(name), GenerationConfig())
    assert described.inference.sampling.temperature == 0.0 and described.model.dtype is None


def test_depth_beyond_the_bound_is_marked_as_research() -> None:
    generation = GenerationConfig()
    generation.num_loops = 9
    described = run_config_of_checkpoint(tiny_config(), generation)
    assert described.inference.research_override and described.inference.max_loops == 9


# -- mappings ---------------------------------------------------------------------------------------------------------


def test_training_arguments_are_accepted_by_transformers(tmp_path: Path) -> None:
    config = load_run_config(
        TINY, overrides=[f"training.checkpoint.output_dir={tmp_path}", "training.precision.compute_dtype=fp32"]
    )
    arguments = TrainingArguments(**training_arguments_of(config), use_cpu=True)
    assert (arguments.max_steps, arguments.learning_rate, arguments.adam_beta2) == (500_000, 2e-4, 0.95)
    assert arguments.lr_scheduler_kwargs == {"min_lr": 2e-5}
    with pytest.raises(InvalidConfigError, match="training: the section is missing"):
        training_arguments_of(load_run_config({}))


def test_loop_keywords_are_those_of_generate() -> None:
    assert loop_keywords_of(load_run_config(TINY)) == {
        "loop_mode": "fixed",
        "num_loops": 4,
        "min_loops": 1,
        "max_loops": 8,
    }
    beyond = load_run_config(TINY, overrides=["inference.research_override=true", "inference.max_loops=16"])
    assert loop_keywords_of(beyond)["allow_extrapolation"] is True
    waiting = {"inference": {"halt_dependency": "prefix", "quality_tier": "fast"}}
    assert loop_keywords_of(load_run_config(TINY | waiting)) == loop_keywords_of(load_run_config(TINY))


def test_loop_keywords_of_an_adaptive_mode_hold_the_scheduler_and_the_budgets() -> None:
    inference = {
        "loop_mode": "token_wise",
        "halt_dependency": "prefix",
        "cache_policy": "last_exited",
        "compute_budget": {"max_total_loops": 9},
        "scheduler": {"type": "act", "predicted_gain_threshold": 0.1, "patience": 2, "confidence_threshold": 0.9},
    }
    keywords = loop_keywords_of(load_run_config(TINY | {"inference": inference}))
    assert keywords == {
        "loop_mode": "adaptive_token",
        "min_loops": 1,
        "max_loops": 8,
        "halt_dependency": "prefix",
        "cache_policy": "last_exited",
        "max_total_loops": 9,
        "scheduler": {"type": "act", "gain_threshold": 0.1, "patience": 2},
    }
    assert set(keywords) <= set(LOOP_KEYWORDS)
    assert build_scheduler(keywords["scheduler"]).to_dict()["gain_threshold"] == 0.1


@pytest.mark.parametrize("name", ["rule_based", "value_head", "hybrid", "act"])
def test_run_configurations_and_schedulers_have_the_same_fields_and_defaults(name: str) -> None:
    fields = build_scheduler(name).to_dict()
    assert set(SCHEDULER_FIELDS[name]) == set(fields) - {"type"}
    assert build_scheduler(SchedulerSettings(type=name).spec()).to_dict() == fields
    described = run_config_of_checkpoint(tiny_config(value_head={"kind": "token"}), scheduler=fields)
    assert build_scheduler(described.inference.scheduler.spec()).to_dict() == fields


# -- commands ---------------------------------------------------------------------------------------------------------


def test_commands_give_text_and_faults(tmp_path: Path) -> None:
    text, found = check_command(CONFIGS / "cognexis-tiny.yaml", "train")
    assert found == [] and resolve_command(CONFIGS / "cognexis-tiny.yaml", folder=tmp_path) == text
    assert (tmp_path / "config.resolved.yaml").read_text() == text
    text, found = check_command(CONFIGS / "cognexis-tiny.yaml", "train", check_files=True)
    manifests = ["training.data.train_manifest", "training.data.validation_manifest"]
    assert text == "" and [f.path for f in found] == manifests
    assert load_run_config(show_defaults_command()) == default_run_config()
    assert show_defaults_command("run").startswith("run:\n  name: run\n")
    with pytest.raises(InvalidConfigError, match="section='x'"):
        show_defaults_command("x")
    with pytest.warns(FutureWarning):
        assert migrate_command("schema_version: 0\nname: a\n") == "schema_version: 1\nrun:\n  name: a\n"
    assert [row["variant"] for row in list_variants_command()][:2] == ["cognexis-tiny", "cognexis-mini"]
