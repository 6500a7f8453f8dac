"""Prelude and coda: every block once, in order, with its own weights; stochastic depth."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from cognexis.decoder.block_stack import BlockStack, drawn_skip
from cognexis.decoder.rope import CognexisRotaryEmbedding
from tests.batteries.tiny import tiny_config, tiny_model


def stack(stage: str = "prelude", **overrides: Any) -> BlockStack:
    """A stage of a random tiny model with three blocks, in eval mode."""
    counts = {"num_prelude_blocks": 3, "num_coda_blocks": 3}
    return getattr(tiny_model(tiny_config(**counts | overrides)).model, stage)


def run(module: BlockStack, x: Tensor) -> Tensor:
    length = x.shape[1]
    turn = CognexisRotaryEmbedding(tiny_config())(x, torch.arange(length)[None])
    causal = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return module(x, {"full_attention": causal, "sliding_attention": causal}, position_embeddings=turn)


def count_calls(module: BlockStack) -> list[int]:
    """A list that grows by the index of each block that runs."""
    calls: list[int] = []
    for index, block in enumerate(module.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    return calls


@pytest.mark.parametrize("stage", ["prelude", "coda"])
def test_every_block_runs_once_and_in_order(stage: str) -> None:
    module = stack(stage)
    calls = count_calls(module)
    x = torch.randn(1, 4, 32)
    expected = x
    out = run(module, x)
    assert calls == [0, 1, 2]
    for block in module.blocks:
        turn = CognexisRotaryEmbedding(tiny_config())(x, torch.arange(4)[None])
        expected = block(expected, turn, torch.ones(1, 1, 4, 4, dtype=torch.bool).tril())
    assert torch.equal(out, expected)


@pytest.mark.parametrize("loops", [1, 4])
def test_stages_run_once_whatever_the_number_of_loops(loops: int) -> None:
    model = tiny_model()
    calls = count_calls(model.model.prelude), count_calls(model.model.coda)
    model(torch.randint(0, 64, (1, 4)), num_loops=loops)
    assert calls == ([0, 1], [0])


def test_blocks_share_no_storage() -> None:
    pointers = Counter(p.data_ptr() for p in stack().parameters())
    assert set(pointers.values()) == {1} and len(pointers) == 3 * 9


@pytest.mark.parametrize("stage", ["prelude", "coda"])
def test_stage_without_blocks_is_the_identity(stage: str) -> None:
    x = torch.randn(1, 4, 32)
    assert run(stack(stage, **{f"num_{stage}_blocks": 0}), x) is x


def test_stages_own_disjoint_slots() -> None:
    model = tiny_model(tiny_config(num_prelude_blocks=3, num_coda_blocks=2, input_injection="attention_memory"))
    slots = {
        name: [s.layer_idx for b in getattr(model.model, name).blocks for s in b.attention.sites]
        for name in ("prelude", "coda", "recurrent")
    }
    assert slots == {"prelude": [0, 1, 2], "coda": [3, 4], "recurrent": [6, 7, 8, 9]}
    assert model.model.recurrent.blocks[0].attention.memory_slot.slot == 5


# -- stochastic depth -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["prelude", "coda"])
def test_skip_probability_rises_with_depth(stage: str) -> None:
    module = stack(stage, **{f"{stage}_stochastic_depth": 0.6})
    assert module.skip_probabilities == pytest.approx([0.2, 0.4, 0.6], abs=1e-15)


def test_blocks_are_skipped_at_their_rates_in_training() -> None:
    module = stack(prelude_stochastic_depth=0.6).train()
    calls, x, draws = count_calls(module), torch.randn(1, 1, 32), 300
    with torch.no_grad():
        for _ in range(draws):
            run(module, x)
    rates = [1 - calls.count(index) / draws for index in range(3)]
    # Four standard deviations of a share of 300 draws are at most 4 * sqrt(0.25 / 300) = 0.116.
    assert rates == pytest.approx([0.2, 0.4, 0.6], abs=0.116)


def test_evaluation_runs_every_block() -> None:
    module = stack(prelude_stochastic_depth=0.9)
    calls, x = count_calls(module), torch.randn(1, 2, 32)
    outputs = [run(module, x) for _ in range(20)]
    assert calls == [0, 1, 2] * 20 and all(torch.equal(out, outputs[0]) for out in outputs)


def test_certain_skip_is_the_identity_in_training_and_ignored_in_evaluation() -> None:
    module, x = stack(), torch.randn(1, 4, 32)
    plain = run(module, x)
    module.skip_probabilities = [1.0] * 3
    assert run(module.train(), x) is x
    assert torch.equal(run(module.eval(), x), plain)


def test_draw_without_a_probability_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    assert not drawn_skip(0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_skipping_repeats_with_the_seed() -> None:
    module, x = stack(prelude_stochastic_depth=0.6).train(), torch.randn(1, 2, 32)
    calls = count_calls(module)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        calls.clear()
        for _ in range(10):
            run(module, x)
        runs.append(list(calls))
    assert runs[0] == runs[1] and 0 < len(runs[0]) < 30
