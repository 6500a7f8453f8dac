"""Leaving stopped tokens out: the result is that of the dense form, and a batch costs what its rows cost."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cognexis import CognexisCache
from cognexis.decoder.adaptive_run import _groups
from cognexis.decoder.recurrent_core import RecurrentCore
from tests.batteries.invariance import left_padding, token_ids
from tests.batteries.scripted_schedulers import ByTable
from tests.batteries.tiny import tiny_config, tiny_model

LOOPS = 6
LENGTHS = (5, 21, 9, 33, 13, 29, 7, 17)
SLIDING = {"sliding_window": 4, "core_layer_types": ["sliding_attention"]}
MODES: dict[str, dict[str, Any]] = {
    "token": {"loop_mode": "adaptive_token", "halt_dependency": "token"},
    "prefix": {"loop_mode": "adaptive_token", "halt_dependency": "prefix"},
    "row": {"loop_mode": "adaptive_token", "halt_dependency": "row"},
    "sequence": {"loop_mode": "adaptive_sequence"},
}


class Meter:
    """Operations of the core, its projections of frozen states included."""

    flops = 0

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        for name in ("loop", "frozen_keys"):
            patch.setattr(RecurrentCore, name, self._counted(getattr(RecurrentCore, name)))

    def _counted(self, method: Any) -> Any:
        def counted(core: Any, *args: Any, **kwargs: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = method(core, *args, **kwargs)
            self.flops += counter.get_total_flops()
            return result

        return counted

    def of(self, model: Any, *args: Any, **kwargs: Any) -> int:
        self.flops = 0
        run(model, *args, **kwargs)
        return self.flops


@pytest.fixture
def meter() -> Iterator[Meter]:
    with pytest.MonkeyPatch.context() as patch:
        yield Meter(patch)


@pytest.fixture(scope="module")
def model() -> Any:
    built = tiny_model(tiny_config(trained_max_loops=LOOPS, max_loops=LOOPS, max_position_embeddings=64))
    built.set_attn_implementation("eager")
    return built.double()


@torch.no_grad()
def run(model: Any, ids: Tensor, mask: Tensor, depths: Tensor, form: str, mode: str, **kwargs: Any) -> Any:
    model.model.compaction = form
    depths = depths.amax(dim=1, keepdim=True) if mode == "sequence" else depths
    try:
        return model(ids, attention_mask=mask, scheduler=ByTable(depths), min_loops=1, **MODES[mode], **kwargs)
    finally:
        model.model.compaction = "auto"


def text(model: Any, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    mask = left_padding(lengths)
    torch.manual_seed(5)
    return token_ids(model, *mask.shape), mask, torch.randint(1, LOOPS + 1, mask.shape)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_mixed_lengths_costs_what_its_rows_cost(model: Any, meter: Meter, mode: str) -> None:
    ids, mask, depths = text(model)
    together = meter.of(model, ids, mask, depths, "exact", mode, use_cache=False)
    rows = [slice(i, i + 1) for i in range(len(LENGTHS))]  # padded as in the batch, so with as many keys in sight
    alone = sum(meter.of(model, ids[i], mask[i], depths[i], "exact", mode, use_cache=False) for i in rows)
    dense = meter.of(model, ids, mask, depths, "off", mode, use_cache=False)
    assert together <= 1.05 * alone and 1.5 * together < dense, (together / alone, dense / together)


@pytest.mark.parametrize("form", ["exact", "auto"])
@pytest.mark.parametrize("mode", MODES)
def test_groups_of_rows_give_what_the_dense_form_gives(model: Any, mode: str, form: str) -> None:
    ids, mask, depths = text(model)
    real = mask.bool()
    caches = [CognexisCache(model.config), CognexisCache(model.config)]
    found, dense = (
        run(model, ids, mask, depths, each, mode, past_key_values=cache)
        for each, cache in zip((form, "off"), caches, strict=True)
    )
    assert torch.equal(found.loop_counts, dense.loop_counts)
    torch.testing.assert_close(found.logits[real], dense.logits[real], rtol=0, atol=1e-10)
    for mine, other in zip(caches[0].layers, caches[1].layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=0, atol=1e-10)


@pytest.mark.parametrize("policy", ["first_loop", "last_exited"])
def test_groups_of_rows_keep_the_keys_of_other_policies(model: Any, policy: str) -> None:
    ids, mask, depths = text(model)
    found = [run(model, ids, mask, depths, form, "token", cache_policy=policy).logits for form in ("exact", "off")]
    torch.testing.assert_close(found[0][mask.bool()], found[1][mask.bool()], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("sizes", "allowance", "expected"),
    [
        ([7], 0, [(0, 1)]),
        ([9, 9, 9], 0, [(0, 3)]),
        ([100, 99, 50, 50, 1], 0, [(0, 2), (2, 4), (4, 5)]),
        ([100, 99, 50, 50, 1], 49, [(0, 2), (2, 5)]),
        ([100, 99, 50, 50, 1], 200, [(0, 5)]),
    ],
)
def test_rows_are_cut_where_filling_them_up_adds_much(sizes: Any, allowance: int, expected: Any) -> None:
    assert _groups(sizes, allowance) == expected
