"""The loss of held-out batches at several depths, from one run of the deepest.

The state after loop i of a deeper run is the state of a run of i loops, so the losses are those of separate runs. Each
is the mean over all targets of all batches and processes.
"""

from collections.abc import Iterable
from typing import Any

import torch

from cognexis.training.losses.linear_cross_entropy import shifted_targets
from cognexis.training.losses.watched_run import watched


@torch.no_grad()
def losses_by_depth(trainer: Any, batches: Iterable[Any], depths: Iterable[int]) -> dict[int, float]:
    """Loop count -> loss.

    Args:
        trainer: a ``CognexisTrainer``; its model is left in the mode that it was in.
        batches: with labels.
    """
    wanted = sorted(set(depths))
    model = trainer.language_model
    was_training = model.training
    model.eval()
    sums = torch.zeros(len(wanted) + 1, dtype=torch.float64, device=trainer.args.device)
    try:
        for batch in batches:
            inputs = trainer._prepare_inputs(batch)
            for name in trainer._columns_of_trainer:
                inputs.pop(name, None)
            labels, mask = inputs.pop("labels", None), inputs.pop("loss_mask", None)
            with watched(model) as run, trainer.accelerator.autocast():
                model(**inputs, num_loops=wanted[-1], use_cache=False, logits_to_keep=1)
                targets, weights = shifted_targets(run.final.shape[:2], model.config.vocab_size, labels, None, mask)
                for place, depth in enumerate(wanted):
                    log_probs = model.lm_head(run.normed(depth)).float().log_softmax(dim=-1)
                    losses = -log_probs.gather(-1, targets[..., None]).squeeze(-1)
                    sums[place] += (losses * weights).double().sum()
            sums[-1] += weights.double().sum()
    finally:
        model.train(was_training)
    total = trainer.accelerator.reduce(sums, reduction="sum")
    return {depth: (total[place] / total[-1]).item() for place, depth in enumerate(wanted)}
