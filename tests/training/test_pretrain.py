"""Training by a run configuration: what it honours, what it writes, how it ends and goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from cognexis import CognexisForCausalLM
from cognexis.artifacts.run_config import load_run_config
from cognexis.artifacts.shipped_tokenizer import load_default_tokenizer
from cognexis.cli import main
from cognexis.decoder.recurrent_core import RecurrentCore
from cognexis.errors import ArtifactMismatchError, InvalidConfigError
from cognexis.training.checkpointing.retention import Retention, checkpoints_of, newest_verified
from cognexis.training.data.build import BuildOrder, build_data
from cognexis.training.data.inputs import DataInput
from cognexis.training.pretrain import PretrainOrder, build_trainer, pretrain

CONFIG = """
run: {{name: small, seed: 3}}
tokenizer: {{path: {folder}/tokenizer}}
model:
  {{variant: cognexis-tiny, vocab_size: {vocab}, dtype: bf16, hidden_size: 16, num_attention_heads: 2,
    num_key_value_heads: 1, intermediate_size: 16}}
training:
  data:
    {{train_manifest: {folder}/data/train, validation_manifest: {folder}/data/validation, sequence_length: 24,
      num_workers: 0}}
  optimization: {{learning_rate: 1e-2, min_learning_rate: 1e-3, warmup_steps: 1, total_steps: 6}}
  batch: {{micro_batch_size: 2, gradient_accumulation_steps: 2}}
  precision: {{compute_dtype: fp32}}
  loop_curriculum: {{warmup_steps: 1, ramp_steps: 3, target_max_loops: 4}}
  checkpoint: {{save_every_steps: 2, keep_last: 1, keep_best: 1, output_dir: {folder}/out}}
  activation_checkpointing: {{prelude: every_block, recurrent: every_2_loops, coda: none}}
evaluation: {{loop_counts: [1, 4]}}
"""
QUIET = PretrainOrder(show_progress=False, use_cpu=True, log_every=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a tokenizer, and with token shards of a few texts."""
    folder = tmp_path_factory.mktemp("files")
    tokenizer = load_default_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    words = np.random.default_rng(0).integers(0, 20, (30, 60))
    with open(folder / "text.jsonl", "w") as file:
        for row in words:
            file.write(json.dumps({"text": " ".join(f"word{number}" for number in row)}) + "\n")
    inputs = [DataInput(str(folder / "text.jsonl"), "auto", "", 1.0, "raise")]
    build_data(BuildOrder(inputs, folder / "data", tokenizer, validation_share=0.2))
    return folder, len(tokenizer)


@pytest.fixture
def config(files, tmp_path):
    """The text of a configuration whose output lies in ``tmp_path``."""
    for name in ("data", "tokenizer"):
        (tmp_path / name).symlink_to(files[0] / name)
    return CONFIG.format(folder=tmp_path, vocab=files[1])


def changed(config, *overrides, **order):
    return build_trainer(config, PretrainOrder(overrides=overrides, show_progress=False, use_cpu=True, **order))


def test_run_trains_evaluates_saves_and_leaves_a_model(config, tmp_path, files):
    result = pretrain(config, QUIET)
    out = tmp_path / "out"
    assert result.steps == 6 and result.stop_signal is None and sum(result.loop_histogram.values()) == 6
    assert 0 < result.evaluation["eval_loss"] < 12
    assert load_run_config(out / "config.resolved.yaml").training.checkpoint.keep_best == 1
    assert newest_verified(out) == out / "checkpoint-6"
    model = CognexisForCausalLM.from_pretrained(out / "model", verify="strict")
    assert model.dtype == torch.bfloat16 and model.training_record.checkpoint_step == 6
    assert model.training_record.training_tokens_seen == 6 * 4 * 25
    assert model.training_record.data_manifest_checksum.startswith("sha256:")
    assert (out / "model" / "tokenizer.json").is_file()
    again = pretrain(config, QUIET)  # nothing is left to do
    assert again.steps == 6 and len(checkpoints_of(out)) <= 2


def test_every_setting_of_the_section_reaches_the_trainer(config):
    trainer = changed(
        config,
        *("training.optimization.gradient_clip_norm=0.5", "training.loop_curriculum.loop_grad_normalization=by_loops"),
        *("training.losses.multi_depth.depths=[2, 4]", "training.losses.multi_depth.weights=[0.5, 1.0]"),
        *("training.data.shuffle_buffer=16", "training.data.prefetch_batches=3", "run.seed=11"),
        *("training.optimization.beta2=0.9", "training.optimization.epsilon=1e-6"),
        spectral_every=5,
    )
    args, options = trainer.args, trainer.options
    assert (args.max_grad_norm, args.adam_beta2, args.adam_epsilon, args.seed) == (0.5, 0.9, 1e-6, 11)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.max_steps) == (2, 2, 6)
    assert (args.save_steps, args.eval_steps, args.learning_rate, args.warmup_steps) == (2, 2, 1e-2, 1)
    assert trainer.retention == Retention(keep_last=1, keep_best=1)
    assert options.loop_grad_normalization == "by_loops" and options.multi_depth == {2: 0.5, 4: 1.0}
    assert (options.eval_depths, options.spectral_every) == ((1, 4), 5)
    rule = trainer.curriculum.settings
    assert (rule.target_max_loops, rule.warmup_steps, rule.ramp_steps) == (4, 1, 3) and trainer.curriculum.seed == 11
    loader = trainer._loader
    assert (loader.batch_size, loader.prefetch_batches, loader.num_workers) == (2, 3, 0)
    assert loader.order.fingerprint() != changed(config, "run.seed=11")._loader.order.fingerprint()
    core = next(module for module in trainer.model.modules() if isinstance(module, RecurrentCore))
    assert core.gradient_checkpointing and core.checkpoint_every_loops == 2
    assert trainer.data_checksum == loader.data_checksum


@pytest.mark.parametrize("scheduler, last", [("linear", 1e-3 + 9e-3 / 5), ("cosine", None), ("constant", 1e-2)])
def test_learning_rate_ends_where_the_configuration_says(config, scheduler, last):
    trainer = changed(config, f"training.optimization.scheduler={scheduler}")
    trainer.create_optimizer_and_scheduler(6)
    rates = []
    for _ in range(6):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert max(rates) == pytest.approx(1e-2)
    final = trainer.lr_scheduler.get_last_lr()[0]
    assert final == pytest.approx(1e-2 if scheduler == "constant" else 1e-3)
    if last is not None:
        assert rates[-1] == pytest.approx(last)


def test_documents_are_hidden_from_the_model_where_it_shall_see_across_them(config):
    rows = [changed(config)._loader.dataset[0]]
    with_documents = changed(config).data_collator(rows)
    without = changed(config, "training.data.document_boundary_attention=false").data_collator(rows)
    assert "document_ids" in with_documents and "document_ids" not in without
    positions = without["position_ids"][0]
    assert torch.equal(positions, torch.arange(len(positions)))


def test_precision_is_that_of_the_configuration(config):
    assert changed(config).model.dtype == torch.float32
    half = changed(config, "training.precision.compute_dtype=bf16", "training.precision.optimizer_state_dtype=bf16")
    assert half.model.dtype == torch.bfloat16 and not half.args.bf16
    assert changed(config, "training.precision.compute_dtype=bf16").args.bf16
    with pytest.raises(InvalidConfigError, match="optimizer_state_dtype='bf16': needs compute_dtype='bf16'"):
        changed(config, "training.precision.optimizer_state_dtype=bf16")


def test_tokenizer_and_data_that_do_not_belong_to_the_model_are_refused(config, files):
    with pytest.raises(ArtifactMismatchError, match="tokenizer.checksum="):
        changed(config, f'tokenizer.checksum="sha256:{"0" * 64}"')
    with pytest.raises((ArtifactMismatchError, InvalidConfigError), match="vocab"):
        changed(config, "model.vocab_size=100")
    with pytest.raises(InvalidConfigError, match="train_manifest"):
        changed(config, "training.data.train_manifest=nowhere")
    with pytest.raises(InvalidConfigError, match=r"prelude='every_2_loops': must be none, every_block"):
        changed(config, "training.activation_checkpointing.prelude=every_2_loops")


@pytest.mark.slow
def test_signal_ends_the_command_with_its_code_and_the_same_command_goes_on(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(config)
    command = ["cognexis", "train", "--config", str(tmp_path / "config.yaml"), "--cpu", "--quiet", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    started, sent = TrainerCallback.on_step_begin, []

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 2 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainerCallback, "on_step_begin", stop)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            main()
        assert caught.value.code == 143
        assert json.loads(capsys.readouterr().out)["steps"] == 3
        monkeypatch.setattr(TrainerCallback, "on_step_begin", started)
        with pytest.raises(SystemExit) as caught:
            main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 6


def test_faulty_configuration_is_one_line_and_code_two(config, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text(config.replace("keep_last: 1", "keep_last: -1"))
    monkeypatch.setattr(sys, "argv", ["cognexis", "train", "--config", str(tmp_path / "config.yaml")])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        main()
    signal.signal(signal.SIGTERM, before)
    assert caught.value.code == 2
    assert "training.checkpoint.keep_last=-1: must be at least 0" in capsys.readouterr().err


@pytest.mark.slow
def test_tensorboard_gets_what_was_measured(config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    os.environ["TENSORBOARD_LOGGING_DIR"] = str(tmp_path / "logs")
    try:
        order = PretrainOrder(
            overrides=("training.optimization.total_steps=2",),
            report_to=("tensorboard",),
            show_progress=False,
            use_cpu=True,
            log_every=1,
        )
        pretrain(config, order)
    finally:
        del os.environ["TENSORBOARD_LOGGING_DIR"]
    (place,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(place)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/loops/mean", "train/loops/state_norm_1", "eval/loss_loops_4"} <= tags


_RANK = """
import json, sys
from pathlib import Path
from cognexis.training.pretrain import PretrainOrder, build_trainer
trainer = build_trainer(Path(sys.argv[1]), PretrainOrder(show_progress=False, use_cpu=True, log_every=1))
drawn = []
trainer.model.register_forward_pre_hook(lambda m, a, k: drawn.append(k.get("num_loops")), with_kwargs=True)
if len(sys.argv) > 3:
    from tests.training.test_pretrain import bad_gradient_on
    bad_gradient_on(trainer, rank=1, step=1)
trainer.train("auto")
weights = {name: p.detach().double().sum().item() for name, p in trainer.language_model.named_parameters()}
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
report = {"drawn": [n for n in drawn if n is not None], "weights": weights, "losses": losses}
report["skipped"] = trainer.skipped_steps
Path(sys.argv[2] + f".{trainer.args.process_index}").write_text(json.dumps(report))
"""


def bad_gradient_on(trainer, rank, step):
    """The state becomes NaN on one rank in one step."""

    def spoil(module, args, output):
        is_now = trainer.args.process_index == rank and trainer.state.global_step == step
        return output * float("nan") if is_now else output

    trainer.language_model.model.recurrent.loop_state.register_forward_hook(spoil)


def launched(config_file, report, processes, *extra):
    """Reports of the ranks of a run, gloo on the CPU."""
    script = report.with_suffix(".py")
    script.write_text(_RANK)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    start = [sys.executable]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=29533"]
    command = [*start, str(script), str(config_file), str(report), *extra]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{report}.{rank}").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_two_processes_draw_equal_depths_train_like_one_and_skip_together(config, tmp_path):
    plain = config.replace("every_block, recurrent: every_2_loops", "none, recurrent: none")
    single = plain.replace("micro_batch_size: 2", "micro_batch_size: 4")
    for name, text in (("one", single), ("two", plain), ("bad", plain)):
        text = text.replace(f"{tmp_path}/out", f"{tmp_path}/out-{name}")
        (tmp_path / f"{name}.yaml").write_text(text)
    (one,) = launched(tmp_path / "one.yaml", tmp_path / "one", 1)
    first, second = launched(tmp_path / "two.yaml", tmp_path / "two", 2)
    assert first["drawn"] == second["drawn"] == one["drawn"] and len(set(first["drawn"])) > 1
    assert first["weights"] == second["weights"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4)
    for name, value in one["weights"].items():
        assert first["weights"][name] == pytest.approx(value, rel=1e-3, abs=2e-3), name
    newest = newest_verified(tmp_path / "out-two")
    assert newest is not None and newest.name == "checkpoint-6"
    assert {path.name for path in newest.glob("rng_state*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    first, second = launched(tmp_path / "bad.yaml", tmp_path / "bad", 2, "spoil")
    assert first["skipped"] == second["skipped"] == 1
    assert first["weights"] == second["weights"]
