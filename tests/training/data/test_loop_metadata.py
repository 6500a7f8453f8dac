"""What a batch says about loops."""

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.training.data.loop_metadata import METADATA_KEY, LoopMetadata, attach_loop_metadata

BATCH = {"input_ids": torch.zeros(2, 3, dtype=torch.long)}


def test_metadata_travel_with_the_batch():
    metadata = LoopMetadata(1, 8, sampled_loops=(3, 8), retain_intermediate=True, difficulty=0.5, tags=("math",))
    batch = attach_loop_metadata(BATCH, metadata)
    assert batch[METADATA_KEY] is metadata and batch["input_ids"] is BATCH["input_ids"] and METADATA_KEY not in BATCH
    assert LoopMetadata(1, 8, 3) == LoopMetadata(1, 8, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_loops": 0}, "min_loops=0: must be a whole number from 1 to 65536"),
        ({"min_loops": 1.0}, "min_loops=1.0"),
        ({"min_loops": 5, "max_loops": 4}, "max_loops=4: must be a whole number from 5"),
        ({"sampled_loops": 9}, "sampled_loops=9: must be a whole number from 1 to 8"),
        ({"sampled_loops": (2, 0)}, "sampled_loops=0"),
    ],
)
def test_bad_bounds_are_refused(values, message):
    with pytest.raises(InvalidConfigError, match=message):
        LoopMetadata(**{"min_loops": 1, "max_loops": 8, **values})


def test_values_for_each_row_must_be_as_many_as_the_rows():
    with pytest.raises(InvalidConfigError, match="sampled_loops: 3 values for a batch of 2 rows"):
        attach_loop_metadata(BATCH, LoopMetadata(1, 8, (1, 2, 3)))
    with pytest.raises(InvalidConfigError, match="difficulty: 1 values"):
        attach_loop_metadata(BATCH, LoopMetadata(1, 8, difficulty=(0.1,)))
