"""The trainer: loop counts, losses, skipped steps, metrics; and that a stock trainer works too."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from cognexis.errors import BackendError, InvalidConfigError, NonFiniteError
from cognexis.looping.value_head import attach_value_head
from cognexis.training.curriculum import CurriculumSettings, LoopCurriculum
from cognexis.training.flops import forward_flops, step_flops
from cognexis.training.options import TrainerOptions
from cognexis.training.trainer import CognexisTrainer
from tests.batteries.tiny import tiny_model


class Rows(Dataset):
    """Random rows, the same each time; ``tag`` adds a column."""

    def __init__(self, count=32, length=12, tag=None):
        self.ids = torch.randint(4, 60, (count, length), generator=torch.Generator().manual_seed(1))
        self.tag = tag

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        row = {"input_ids": self.ids[index], "labels": self.ids[index]}
        return row if self.tag is None else row | {"task": self.tag(index)}


def collate(rows):
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return batch if "task" not in rows[0] else batch | {"task": [row["task"] for row in rows]}


def arguments(folder, **changes):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    settings |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), **settings | {"remove_unused_columns": False} | changes)


class Collect(TrainerCallback):
    """A tracker: keeps every line that reaches the callbacks."""

    def __init__(self):
        self.lines = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.lines.append(dict(logs))


def trainer_of(folder, model=None, data=None, curriculum=None, options=None, **changes):
    return CognexisTrainer(
        model=tiny_model() if model is None else model,
        args=arguments(folder, **changes),
        train_dataset=Rows() if data is None else data,
        data_collator=collate,
        curriculum=curriculum,
        options=options,
    )


class Spy:
    """Notes the loop counts that a model is called with."""

    def __init__(self, model):
        self.loops = []
        self.handle = model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        self.loops.append(kwargs.get("num_loops"))


def test_each_step_runs_the_count_drawn_for_it_in_every_micro_batch(tmp_path):
    rule = CurriculumSettings(target_max_loops=4, initial_max_loops=1, warmup_steps=2, ramp_steps=4, min_loops=1)
    trainer = trainer_of(tmp_path, curriculum=rule, max_steps=8, gradient_accumulation_steps=2, seed=5)
    spy = Spy(trainer.model)
    trainer.train()
    expected = [LoopCurriculum(rule, seed=5).sample(step).sampled_loops for step in range(8)]
    assert spy.loops == [n for n in expected for _ in range(2)]
    assert len(set(expected)) > 1 and expected[:2] == [1, 1]
    assert sum(trainer.curriculum.histogram.values()) == 8


def test_loss_is_that_of_the_model_at_the_drawn_count(tmp_path):
    rule = CurriculumSettings(target_max_loops=3, mode="fixed")
    trainer = trainer_of(tmp_path, curriculum=rule, max_steps=1, learning_rate=0.0)
    seen = []
    trainer.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"]), with_kwargs=True)
    trainer.train()
    expected = tiny_model()(input_ids=seen[0], labels=seen[0], num_loops=3).loss.item()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_stock_trainer_trains_the_model_at_its_default_depth(tmp_path):
    model = tiny_model()
    spy = Spy(model.model)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=Rows(), data_collator=collate)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert spy.loops == [None] * 4  # config.default_loops
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def step_parameters(folder, **keywords):
    """Weights after two steps of plain gradient descent."""
    changes = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1}
    trainer = trainer_of(folder, **changes | keywords)
    trainer.train()
    return {name: p.detach() for name, p in trainer.model.named_parameters()}, trainer


def test_fused_loss_trains_like_the_plain_one(tmp_path):
    plain, one = step_parameters(tmp_path)
    fused, other = step_parameters(tmp_path, options=TrainerOptions(fused_loss=True))
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-6, msg=name)
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_accumulated_micro_batches_are_one_large_batch_for_every_term(tmp_path):
    model = tiny_model()
    attach_value_head(model, {"kind": "token"})
    options = TrainerOptions(
        multi_depth={2: 0.5, 4: 1.0}, lambda_value=0.5, consistency_weight=0.1, loop_grad_normalization="by_loops"
    )
    state = model.state_dict()
    found = []
    for rows, steps in ((8, 1), (2, 4)):
        fresh = tiny_model()
        attach_value_head(fresh, {"kind": "token"})
        fresh.load_state_dict(state)
        changes = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps}
        found.append(step_parameters(tmp_path, model=fresh, options=options, **changes)[0])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=2e-6, msg=name)


def test_core_gradient_is_divided_by_the_loops_before_the_norm_is_cut(tmp_path):
    rule = CurriculumSettings(target_max_loops=4, mode="fixed")
    changes = {"curriculum": rule, "max_steps": 1}
    start = {name: p.detach() for name, p in tiny_model().named_parameters()}
    plain, _ = step_parameters(tmp_path, **changes)
    divided, _ = step_parameters(tmp_path, options=TrainerOptions(loop_grad_normalization="by_loops"), **changes)
    for name, value in start.items():
        share = 4 if ".recurrent." in name else 1
        torch.testing.assert_close((divided[name] - value) * share, plain[name] - value, rtol=1e-3, atol=2e-6)


class Poison(TrainerCallback):
    """Makes the gradients of one step infinite, in a parameter of the prelude."""

    def __init__(self, model, step):
        self.step, self.now = step, 0
        next(model.model.prelude.parameters()).register_hook(self.spoil)

    def on_step_begin(self, args, state, control, **kwargs):
        self.now = state.global_step

    def spoil(self, gradient):
        return gradient * float("inf") if self.now == self.step else gradient


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_step_with_a_bad_gradient_changes_nothing_and_is_counted(tmp_path, optim, caplog):
    trainer = trainer_of(tmp_path, max_steps=3, optim=optim)
    trainer.add_callback(Poison(trainer.model, 1))
    snapshots = []

    class Snapshot(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
            moments = [v.clone() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
            snapshots.append([p.detach().clone() for p in model.parameters()] + moments)

    trainer.add_callback(Snapshot())
    trainer.train()
    same = [all(map(torch.equal, one, other)) for one, other in itertools.pairwise(snapshots)]
    assert same == [True, False]
    assert trainer.skipped_steps == 1
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert [line.get("skipped_steps", 0) for line in lines] == [0, 1, 0]
    assert lines[1]["alerts/nonfinite"] == 1 and "gradient norm" in caplog.text


def test_state_that_is_not_finite_skips_the_step_and_may_lower_the_depth(tmp_path):
    rule = CurriculumSettings(
        target_max_loops=4, mode="ramp_then_sample", sampling_distribution="fixed", initial_max_loops=4
    )
    rule = replace(rule, lower_on_nonfinite=True)
    trainer = trainer_of(tmp_path, curriculum=rule, max_steps=3)
    calls = 0

    def spoil(module, args, state):
        nonlocal calls
        calls += 1
        return state * float("nan") if calls == 4 else state

    trainer.model.model.recurrent.loop_state.register_forward_hook(spoil)
    spy = Spy(trainer.model)
    trainer.train()
    assert trainer.skipped_steps == 1 and spy.loops == [4, 3, 3]
    assert trainer.state.log_history[0]["alerts/loops_lowered"] == 1


def test_too_many_bad_steps_in_a_row_end_the_training(tmp_path):
    model = tiny_model()
    next(model.model.coda.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    trainer = trainer_of(tmp_path, model=model, max_steps=9, options=TrainerOptions(max_skipped_steps=3))
    with pytest.raises(NonFiniteError, match="3 steps in a row gave NaN or infinity .last at step 2"):
        trainer.train()
    assert trainer.skipped_steps == 3


def test_loops_that_run_without_gradient_are_an_error_instead_of_nothing(tmp_path):
    trainer = trainer_of(tmp_path)
    core = trainer.model.model.recurrent
    core.forward = torch.no_grad()(core.forward)
    with pytest.raises(BackendError, match="no gradient reached the"):
        trainer.train()


def test_metrics_reach_callbacks_that_were_added_before_or_after(tmp_path):
    tracker = Collect()
    options = TrainerOptions(spectral_every=2, eval_depths=(1, 4), eval_loops=2)
    trainer = trainer_of(tmp_path, options=options, max_steps=2)
    trainer.add_callback(tracker)
    trainer.eval_dataset = Rows(6)
    trainer.train()
    measured = trainer.evaluate()
    first, second = (line for line in tracker.lines if "loss" in line)
    expected = {"loops/mean", "loops/current_max", "loops/state_norm_1", "gate/mean_1", "grad_norm/core", "grad_norm"}
    assert expected <= set(first) and "spectral/gate.proj" in second
    by_depth = {name: measured[f"eval_loss_loops_{name}"] for name in (1, 4)}
    assert any(
        line.items() >= {f"eval_loss_loops_{n}": loss for n, loss in by_depth.items()}.items()
        for line in tracker.lines
    )
    model, batch = trainer.model.eval(), collate([Rows(6)[i] for i in range(6)])
    for depth, loss in (*by_depth.items(), (2, measured["eval_loss"])):
        assert loss == pytest.approx(model(**batch, num_loops=depth).loss.item(), rel=1e-5)


def test_operations_count_the_loops_of_each_step(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=5)
    trainer.train()
    config = trainer.model.config
    expected = sum(count * step_flops(config, 48, 12, n) for n, count in trainer.curriculum.histogram.items())
    assert trainer.state.total_flos == pytest.approx(expected)
    trainer.model.eval()
    assert trainer.floating_point_ops(collate([Rows()[0]])) == int(forward_flops(config, 12, 12, config.default_loops))


def test_tag_of_a_step_chooses_its_distribution_and_never_reaches_the_model(tmp_path):
    rule = CurriculumSettings(
        target_max_loops=4, initial_max_loops=4, task_profiles={"math": "deep"}, continue_probability=0.01
    )
    mean = {}
    for tag in ("math", "other"):
        trainer = trainer_of(tmp_path, curriculum=rule, data=Rows(tag=lambda index, tag=tag: tag), max_steps=12)
        trainer.train()
        mean[tag] = sum(n * count for n, count in trainer.curriculum.histogram.items()) / 12
    assert mean["math"] > 2.8 and mean["other"] < 1.5
    mixed = trainer_of(
        tmp_path, curriculum=rule, data=Rows(tag=lambda index: ("math", "code")[index % 2]), max_steps=1
    )
    assert mixed._common_tag([{"task": ["math", "code"]}]) is None
    mixed.train()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lambda_value": -1.0}, "lambda_value=-1.0: must be finite and 0 or more"),
        ({"multi_depth": {4: 0.0}}, "multi_depth={4: 0.0}: must map"),
        ({"gain_horizon": "last"}, "gain_horizon='last': must be best or next"),
        ({"loop_grad_normalization": "by_steps"}, "must be none or by_loops"),
        ({"clip_each_norm": 0.0}, "clip_each_norm=0.0: must be positive"),
        ({"max_skipped_steps": 0}, "max_skipped_steps=0: must be at least 1"),
        ({"eval_depths": (0,)}, "must be loop counts of 1 or more"),
    ],
)
def test_option_out_of_range_is_refused(changes, message):
    with pytest.raises(InvalidConfigError, match=message):
        TrainerOptions(**changes)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"options": TrainerOptions(eval_depths=(5,))}, "eval_depths=5: the model allows at most 4"),
        ({"options": TrainerOptions(multi_depth={9: 1.0})}, "multi_depth=9: the model allows at most 4"),
        ({"curriculum": CurriculumSettings(target_max_loops=8)}, "target_max_loops=8: the model allows at most 4"),
    ],
)
def test_depth_that_the_model_does_not_allow_is_refused_before_training(tmp_path, keywords, message):
    with pytest.raises(InvalidConfigError, match=message):
        trainer_of(tmp_path, **keywords)


def test_model_states_what_it_was_trained_with(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=4, include_num_input_tokens_seen="all")
    trainer.data_checksum = "sha256:" + "0" * 64
    trainer.train()
    reloaded = type(trainer.model).from_pretrained(tmp_path / "checkpoint-4", verify="strict").training_record
    assert reloaded.checkpoint_step == 4 and reloaded.training_tokens_seen == 4 * 4 * 12
    assert reloaded.sampled_loops == dict(trainer.curriculum.histogram)
    assert reloaded.data_manifest_checksum == trainer.data_checksum


def test_adapters_train_save_and_continue(tmp_path):
    peft = pytest.importorskip("peft")

    def trainer_with_adapter(steps):
        torch.manual_seed(0)
        wrapped = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        changes = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2}
        return trainer_of(tmp_path / "run", model=wrapped, **changes)

    def adapter(trainer):
        return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}

    trainer = trainer_with_adapter(4)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(adapter(trainer))
    assert isinstance(trainer.language_model.model.recurrent, nn.Module)
    weights = tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    resumed = trainer_with_adapter(4)
    resumed.train("auto")
    assert str(resumed._resumed_from).endswith("checkpoint-2")
    for name, value in adapter(trainer).items():
        assert torch.equal(adapter(resumed)[name], value), name
