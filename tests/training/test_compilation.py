"""A model compiled by parts trains as it does uncompiled, with one set of graphs for all loop counts."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from cognexis.training.activation_checkpointing import set_activation_checkpointing
from cognexis.training.callbacks.loop_statistics import loops_observed
from cognexis.training.compilation import compile_for_training
from tests.batteries.invariance import CONFIGURATIONS
from tests.batteries.state_layers import overrides
from tests.batteries.tiny import tiny_config, tiny_model

QUICK = ("linear_injection", "core_of_two_blocks")


@pytest.fixture
def counter():
    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


def ids_of(rows=2, length=12, seed=0):
    return torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(model, loops, ids=None):
    model.zero_grad()
    torch.manual_seed(0)  # some start from noise
    ids = ids_of() if ids is None else ids
    loss = model(ids, labels=ids, num_loops=loops, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in sorted(CONFIGURATIONS)]
)
def test_all_loop_counts_share_graphs_and_gradients_stay(name, recomputed, counter):
    model = tiny_model(tiny_config(**{**CONFIGURATIONS[name], "max_loops": 8})).train()
    if recomputed:
        set_activation_checkpointing(model, recurrent="every_2_loops")
    expected = {loops: gradients(model, loops) for loops in (1, 2, 3, 8)}
    assert (
        compile_for_training(model, backend=counter)
        == 1 + model.config.num_prelude_blocks + model.config.num_coda_blocks
    )
    gradients(model, 3)
    graphs = counter.frame_count
    for loops, plain in expected.items():
        torch.testing.assert_close(gradients(model, loops), plain, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == graphs > 0


def test_hooks_that_observe_loops_and_gate_compile_nothing(counter):
    model = tiny_model().train()
    compile_for_training(model, backend=counter)
    gradients(model, 3)
    graphs = counter.frame_count
    for _ in range(3):
        found = []
        with loops_observed(model, lambda name, value, found=found: found.append(name)):
            gradients(model, 3)
        assert {"gate/mean_3", "loops/delta_norm_3"} <= set(found)
    assert counter.frame_count == graphs


def test_copies_are_not_bound_to_the_compiled_original(counter):
    model = tiny_model().train()
    compile_for_training(model, backend=counter)
    expected = gradients(model, 2)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            for parameter in other.model.recurrent.parameters():
                parameter.mul_(1.5)
        assert gradients(other, 2)["loss"] != expected["loss"]
        assert gradients(model, 2)["loss"] == expected["loss"]


def test_outside_training_nothing_is_compiled_in_the_core(counter):
    model = tiny_model()
    ids = ids_of()
    expected = [model(ids, num_loops=n).logits for n in (1, 2, 3)]
    compile_for_training(model, backend=counter)
    for loops, logits in enumerate(expected, start=1):
        torch.testing.assert_close(model(ids, num_loops=loops).logits, logits)


def test_memory_cells_of_the_core_stay_as_they_are(counter):
    model = tiny_model(tiny_config(**overrides("axon", "core"))).train()
    expected = gradients(model, 2)
    assert compile_for_training(model, backend=counter) == 3
    torch.testing.assert_close(gradients(model, 2), expected, rtol=1e-4, atol=1e-6)
