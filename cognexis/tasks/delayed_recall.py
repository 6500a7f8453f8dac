"""Delayed recall (a T-maze in symbols): report at the end which of two cues was seen long before.

    distractor* cue distractor ... distractor        label = cue

The cue (token 0 or 1) stands ``delay`` to ``delay + delay_spread`` steps before the last token. All other positions
hold filler (token 2), or with chance ``p_distractor`` one of ``num_distractors`` meaningless tokens (3, 4, ...).
Position and distractors vary, so there are far more sequences than samples; with a fixed delay and plain filler there
would be exactly two.
"""

import torch
from torch import Tensor

from cognexis.tasks.sequence_task import SequenceTask, require, require_chance

FILLER = 2
FIRST_DISTRACTOR = 3


class DelayedRecall(SequenceTask):
    """Cue, then at least ``delay`` steps of noise; sequences of ``delay + delay_spread + 1`` tokens."""

    name = "delayed_recall"
    title = "remember one bit over a delay"

    def __init__(
        self,
        num_samples: int = 2000,
        *,
        delay: int = 50,
        delay_spread: int = 14,
        num_distractors: int = 4,
        p_distractor: float = 0.2,
        seed: int = 42,
        start_idx: int = 0,
        end_idx: int | None = None,
    ) -> None:
        require(delay >= 1, "delay", delay, "must be at least 1")
        require(delay_spread >= 0, "delay_spread", delay_spread, "must not be negative")
        require(num_distractors >= 1, "num_distractors", num_distractors, "must be at least 1")
        require_chance("p_distractor", p_distractor)
        self.delay, self.delay_spread = delay, delay_spread
        self.num_distractors, self.p_distractor = num_distractors, p_distractor
        self.length = delay + delay_spread + 1
        self.vocab_size, self.num_classes = FIRST_DISTRACTOR + num_distractors, 2
        super().__init__(num_samples, seed=seed, start_idx=start_idx, end_idx=end_idx)

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = (count, self.length)
        distractors = torch.randint(FIRST_DISTRACTOR, self.vocab_size, shape, generator=generator)
        is_distractor = torch.rand(shape, generator=generator) < self.p_distractor
        ids = torch.where(is_distractor, distractors, FILLER)
        cue = torch.randint(2, (count,), generator=generator)
        position = torch.randint(self.delay_spread + 1, (count, 1), generator=generator)
        return ids.scatter_(1, position, cue[:, None]), cue
