"""Recomputation by stages: exact gradients, and memory that hardly grows with the loops."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cognexis.errors import InvalidConfigError
from cognexis.training.activation_checkpointing import set_activation_checkpointing
from tests.batteries.tiny import tiny_config, tiny_model

IDS = torch.randint(4, 60, (2, 24), generator=torch.Generator().manual_seed(0))


def gradients(num_loops=4, **stages):
    model = tiny_model(tiny_config(trained_max_loops=16)).train()
    if stages:
        set_activation_checkpointing(model, **stages)
    model(input_ids=IDS, labels=IDS, num_loops=num_loops, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "stages",
    [
        {"prelude": "every_block"},
        {"recurrent": "every_block"},
        {"recurrent": "every_3_loops", "coda": "every_block"},
        {"prelude": "every_block", "recurrent": "every_2_loops", "coda": "every_block"},
    ],
)
def test_gradients_are_exact_whatever_is_computed_again(stages):
    plain, saved = gradients(7), gradients(7, **stages)
    for name, gradient in plain.items():
        assert torch.equal(saved[name], gradient), name


def test_only_the_named_stages_compute_again():
    model = tiny_model().train()
    assert set_activation_checkpointing(model, prelude="every_block") == {"prelude": 2, "recurrent": 0, "coda": 0}
    assert set_activation_checkpointing(model, recurrent="every_4_loops") == {"prelude": 0, "recurrent": 4, "coda": 0}
    assert model.model.recurrent.checkpoint_every_loops == 4


@pytest.mark.parametrize(
    "stages, message",
    [
        ({"prelude": "every_2_loops"}, "prelude='every_2_loops': must be none, every_block; it has no loops"),
        ({"recurrent": "every_0_loops"}, "recurrent='every_0_loops': must be none, every_block or every_<k>_loops"),
    ],
)
def test_setting_that_a_stage_cannot_honour_is_refused(stages, message):
    with pytest.raises(InvalidConfigError, match=message):
        set_activation_checkpointing(tiny_model(), **stages)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations made and that are still there."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self.known:
                    self.known.add(key)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.release, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def release(self, key, size):
        self.known.discard(key)
        self.now -= size


def activation_peak(num_loops, **stages):
    """Largest number of live bytes in a training step, the gradients of the parameters left out."""
    model = tiny_model(tiny_config(trained_max_loops=16, hidden_size=64, intermediate_size=256)).train()
    if stages:
        set_activation_checkpointing(model, **stages)
    ids = torch.randint(4, 60, (4, 96))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        model(input_ids=ids, labels=ids, num_loops=num_loops, use_cache=False).loss.backward()
    return live.peak


def test_sixteen_loops_in_segments_of_two_need_little_more_than_two_loops():
    two, sixteen = activation_peak(2), activation_peak(16, recurrent="every_2_loops")
    without, segment = activation_peak(16), activation_peak(2, recurrent="every_2_loops")
    print(f"bytes at 2 loops {two:,}, as one segment {segment:,}; at 16 loops {without:,}, in 8 segments {sixteen:,}")
    assert sixteen <= 1.3 * min(two, segment)
    assert without > 3 * two  # the measurement sees what is kept
