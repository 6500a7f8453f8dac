"""The training loop on a plain GRU, whose state and gradients torch itself vouches for."""

import math

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from cognexis.errors import InvalidConfigError, NonFiniteError
from cognexis.eval_harness.cortex_training import (
    SequenceClassifier,
    TrainingSettings,
    accuracy_of,
    chunked_logits,
    lr_factor,
    make_optimizer,
    probe_parity,
    train_classifier,
    without_traces,
)
from cognexis.tasks.delayed_recall import DelayedRecall

WIDTH = 8


class GRUStack(nn.Module):
    """torch's GRU with the interface of a stack; ``nu_log`` stands for a parameter of an Axon recurrence."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.nu_log = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x, state=None, *, resets=None):
        h = None if state is None else state["h"][None]
        y, h = self.gru(x * self.nu_log, h)
        return y, TensorDict({"h": h[0]}, batch_size=[len(x)])


def small_splits(num_samples=200):
    return DelayedRecall.splits(num_samples, delay=4, delay_spread=2, p_distractor=0.1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SequenceClassifier(GRUStack(), WIDTH, 7, 2)


@pytest.fixture
def ids():
    return DelayedRecall(6, delay=8, delay_spread=2).ids


def test_a_stack_learns_and_the_global_random_state_stays():
    before = torch.get_rng_state()
    settings = TrainingSettings(epochs=20, batch_size=16, lr=0.03)
    result = train_classifier(GRUStack, WIDTH, small_splits(400), settings)
    assert torch.equal(torch.get_rng_state(), before)
    assert result.test_accuracy > 0.9 and result.num_updates == 20 * len(result.history)
    assert result.val_accuracy == max(entry["val_accuracy"] for entry in result.history)
    assert result.history[result.best_epoch - 1]["val_accuracy"] == result.val_accuracy


def test_easier_data_comes_first_and_only_the_task_itself_is_validated():
    splits, settings = small_splits(), TrainingSettings(epochs=2, easier_epochs=3, batch_size=16, stop_at=2)
    easier = [DelayedRecall(20, delay=1, delay_spread=1), DelayedRecall(40, delay=2, delay_spread=1)]
    seen, totals = [], set()

    class Recorder(GRUStack):
        def forward(self, x, state=None, *, resets=None):
            if self.training:
                seen.append(tuple(x.shape[:2]))
            return super().forward(x, state, resets=resets)

    result = train_classifier(
        Recorder, WIDTH, splits, settings, easier=easier, on_update=lambda done, total, _: totals.add(total)
    )
    first = [[(16, part.length)] * (len(part) // 16) + [(len(part) % 16, part.length)] for part in easier]
    assert seen[:15] == first[0] * 3 + first[1] * 3
    assert {length for _, length in seen[15:]} == {splits.train.length}
    assert totals == {15 + 2 * 10} and result.num_updates == 35
    assert len(result.history) == 2 and result.best_epoch in (1, 2)
    plain = train_classifier(GRUStack, WIDTH, splits, TrainingSettings(epochs=1, batch_size=16), easier=easier)
    assert plain.num_updates == 10


def test_equal_seeds_give_equal_results():
    def run(seed):
        settings = TrainingSettings(epochs=2, seed=seed)
        return [entry["loss"] for entry in train_classifier(GRUStack, WIDTH, small_splits(), settings).history]

    assert run(1) == run(1) != run(2)


def test_reported_accuracies_are_those_of_a_plain_count():
    splits = small_splits()
    settings = TrainingSettings(batch_size=7)
    model = SequenceClassifier(GRUStack(), WIDTH, splits.test.vocab_size, 2)
    answers = [model(ids[None])[0].argmax().item() for ids in splits.test.ids]
    right = sum(answer == label for answer, label in zip(answers, splits.test.labels.tolist(), strict=True))
    assert accuracy_of(model, splits.test, settings) == right / len(splits.test)


def test_training_ends_at_the_wanted_accuracy_and_time():
    assert len(train_classifier(GRUStack, WIDTH, small_splits(), TrainingSettings(stop_at=0.01)).history) == 1
    late = TrainingSettings(max_seconds=1e-6, stop_at=2)
    assert len(train_classifier(GRUStack, WIDTH, small_splits(), late).history) == 1


def test_callbacks_see_every_update_and_epoch():
    updates, epochs = [], []
    train_classifier(
        GRUStack,
        WIDTH,
        small_splits(),
        TrainingSettings(epochs=2, stop_at=2),
        on_update=lambda update, total, loss: updates.append((update, total)),
        on_epoch=lambda epoch, entry: epochs.append(epoch),
    )
    assert updates == [(update, 6) for update in range(1, 7)] and epochs == [1, 2]


def test_loss_that_is_not_finite_stops_the_training():
    class Broken(GRUStack):
        def forward(self, x, state=None, *, resets=None):
            return super().forward(x * math.inf, state)

    with pytest.raises(NonFiniteError, match="loss became nan in epoch 1; try a smaller lr"):
        train_classifier(Broken, WIDTH, small_splits(), TrainingSettings())


@pytest.mark.parametrize("size", [1, 4, 10, 11, 50])
def test_chunks_do_not_change_the_logits(model, ids, size):
    chunked = chunked_logits(model, ids, TrainingSettings(chunk_size=size))
    torch.testing.assert_close(chunked, model(ids)[0])


def test_gradient_stops_in_front_of_the_last_chunk(model, ids):
    first_only = ids.clone()
    first_only[:, 1:] = 2
    first_only[:, 0] = 5
    chunked_logits(model, first_only, TrainingSettings(chunk_size=3)).sum().backward()
    gradient = model.embedding.weight.grad
    assert not gradient[5].any() and gradient[2].any()


def test_fresh_state_before_the_last_chunk_forgets_the_rest(model, ids):
    settings = TrainingSettings(chunk_size=3, reset_state_before_last_chunk=True)
    torch.testing.assert_close(chunked_logits(model, ids, settings), model(ids[:, -3:])[0])


def test_traces_are_zeroed_at_every_depth_and_nothing_else():
    inner = TensorDict({"hc1": torch.ones(2, 3), "E_nu_c1": torch.ones(2, 3)}, batch_size=[2])
    state = TensorDict({"block": TensorDict({"AxonCell": inner}, batch_size=[2])}, batch_size=[2])
    cleared = without_traces(state)["block", "AxonCell"]
    assert not cleared["E_nu_c1"].any() and cleared["hc1"].all() and inner["E_nu_c1"].all()


def test_traces_are_zeroed_on_request(model, ids):
    settings = TrainingSettings(chunk_size=3, rtu_disable_traces_last_chunk=True)
    torch.testing.assert_close(chunked_logits(model, ids, settings), model(ids)[0])


def test_probe_measures_the_part_of_the_gradient_that_is_lost(model, ids):
    labels = torch.zeros(len(ids), dtype=torch.int64)
    nothing = probe_parity(model, ids, labels, TrainingSettings(chunk_size=ids.shape[1]))
    assert nothing == {"max_relative_difference": 0.0, "num_parameters": 1}
    lost = probe_parity(model, ids, labels, TrainingSettings(chunk_size=2))
    assert lost["max_relative_difference"] > 0.01
    result = train_classifier(
        GRUStack, WIDTH, small_splits(), TrainingSettings(chunk_size=2, axons_parity_probe=2, epochs=1)
    )
    assert [probe["update"] for probe in result.parity] == [0, 2]


def test_axon_parameters_have_their_own_group(model):
    rest, axon = make_optimizer(model, TrainingSettings(lr=0.1, axon_lr_mult=0.5, axon_weight_decay=0.2)).param_groups
    assert axon["params"] == [model.stack.nu_log] and (axon["lr"], axon["weight_decay"]) == (0.05, 0.2)
    assert rest["lr"] == 0.1 and len(rest["params"]) + 1 == len(list(model.parameters()))


def test_learning_rate_rises_and_falls_to_zero():
    factors = [lr_factor(update, 100) for update in range(101)]
    assert factors[:5] == [0.2, 0.4, 0.6, 0.8, 1.0] and factors[100] == 0
    assert sorted(factors[5:], reverse=True) == factors[5:]
    assert lr_factor(0, 1) == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"lr": 0.0}, "lr=0.0: must be above 0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"grad_clip": 0.0}, "grad_clip=0.0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop_at": 0.0}, "stop_at=0.0"),
        ({"max_seconds": 0.0}, "max_seconds=0.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"axon_lr_mult": -1.0}, "axon_lr_mult=-1.0"),
        ({"axon_weight_decay": -1.0}, "axon_weight_decay=-1.0"),
        ({"axons_parity_probe": -1, "chunk_size": 3}, "axons_parity_probe=-1"),
        ({"axons_parity_probe": 5}, "axons_parity_probe=5: needs chunk_size"),
        ({"rtu_disable_traces_last_chunk": True}, "rtu_disable_traces_last_chunk=True: needs chunk_size"),
        ({"reset_state_before_last_chunk": True}, "reset_state_before_last_chunk=True: needs chunk_size"),
    ],
)
def test_wrong_setting_is_named(setting, message):
    with pytest.raises(InvalidConfigError, match=message):
        TrainingSettings(**setting)
