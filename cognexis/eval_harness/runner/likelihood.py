"""Likelihoods of given tokens, by forward passes over whole sequences.

Sequences of a batch are padded at the right. Operations are counted without padding. In an adaptive mode the core of a
sequence of T tokens costs its tokens' loops times the operations of a token that sees T keys, and as much more as the
model really computed more positions than the loops of its tokens, where stopped tokens are not left out. Every time
that predictions are looked at between the loops, coda and head are counted once more.
"""

import time
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cognexis.errors import NonFiniteError
from cognexis.eval_harness.compute import StageFlops, elementwise_flops, matmul_flops
from cognexis.eval_harness.runner.encoding import EncodedExample, ScoredIds
from cognexis.eval_harness.runner.execution import Deadline, Execution, batches
from cognexis.eval_harness.runner.loop_run import LoopRun
from cognexis.eval_harness.tasks.protocol import Choice, ChoiceScores, TokenScores
from cognexis.looping.cost import core_flops_per_token
from cognexis.looping.schedulers.base import reason_code, reason_name


@torch.no_grad()
def run_likelihoods(
    model: Any, examples: list[EncodedExample], run: LoopRun, batch_size: int, deadline: Deadline
) -> Execution:
    """Score every sequence; the first batch runs once before the clock does.

    Raises:
        NonFiniteError: a likelihood is NaN or infinite.
        TimeoutError: time is over.
    """
    sequences = [sequence for example in examples for sequence in example.scored]
    found = Execution(batch_size=batch_size, num_requests=len(examples))
    keywords = {**run.keywords, "use_cache": False, "return_loop_stats": True}
    scores: list[TokenScores | ChoiceScores] = []
    weighted_norms: list[Tensor] = []
    _forward(model, sequences[:batch_size], keywords)
    run.overhead_s = 0.0
    for batch in batches(sequences, batch_size):
        started = time.perf_counter()
        output, mask = _forward(model, batch, keywords)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        found.batch_ms.append(1e3 * (time.perf_counter() - started))
        scores += [_scores(output.logits[row], sequence) for row, sequence in enumerate(batch)]
        _count(found, model.config, batch, output, mask, run)
        if not run.is_adaptive and output.loop_diagnostics.norms is not None:
            weighted_norms.append(len(batch) / len(sequences) * output.loop_diagnostics.norms.double().cpu())
        deadline.require(len(scores), len(sequences))
    if weighted_norms:
        found.norms = torch.stack(weighted_norms).sum(0).tolist()
    found.num_tokens = sum(len(sequence.ids) - 1 for sequence in sequences)
    found.overhead_ms = 1e3 * run.overhead_s
    remaining = iter(scores)
    for example in examples:
        own = list(islice(remaining, len(example.scored)))
        is_joined = isinstance(example.example.request, Choice) and not isinstance(own[0], ChoiceScores)
        found.predictions.append(_choice_scores(own) if is_joined else own[0])
    return found


def _forward(model: Any, batch: list[ScoredIds], keywords: dict[str, Any]) -> tuple[Any, Tensor]:
    """Output over all tokens but the last of every sequence, and the mask ``[B, T]`` of real ones."""
    length = max(len(sequence.ids) for sequence in batch) - 1
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(batch):
        ids[row, : len(sequence.ids) - 1] = torch.tensor(sequence.ids[:-1])
        mask[row, : len(sequence.ids) - 1] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    given = None if bool(mask.all()) else mask
    return model(input_ids=ids, attention_mask=given, **keywords), mask


def _scores(logits: Tensor, sequence: ScoredIds) -> TokenScores | ChoiceScores:
    """Scores of the tokens from ``start`` on, or of the candidates for the last; ``logits`` are ``[T, V]``."""
    if sequence.candidates:
        each = logits[sequence.start - 1].double().log_softmax(-1)[list(sequence.candidates)]
        if not torch.isfinite(each).all():
            raise NonFiniteError(f"{int((~torch.isfinite(each)).sum())} of {each.numel()} losses are not finite")
        return ChoiceScores(tuple(each.tolist()), (1,) * len(each))
    targets = torch.tensor(sequence.ids[sequence.start :], device=logits.device)
    wanted = logits[sequence.start - 1 : len(sequence.ids) - 1].float()
    nats = torch.nn.functional.cross_entropy(wanted, targets, reduction="none").double()
    if not torch.isfinite(nats).all():
        raise NonFiniteError(f"{int((~torch.isfinite(nats)).sum())} of {nats.numel()} losses are not finite")
    return TokenScores(tuple(nats.tolist()), tuple((wanted.argmax(-1) == targets).tolist()))


def _choice_scores(scores: list[Any]) -> ChoiceScores:
    sums = tuple(-float(torch.tensor(score.nats, dtype=torch.float64).sum()) for score in scores)
    return ChoiceScores(sums, tuple(len(score.nats) for score in scores))


def _count(found: Execution, config: Any, batch: list[ScoredIds], output: Any, mask: Tensor, run: LoopRun) -> None:
    """Add loops, halts and operations of a batch."""
    lengths = [len(sequence.ids) - 1 for sequence in batch]
    if not run.is_adaptive:
        found.loops += [run.loop_count] * len(batch)
        found.halts["max_loops"] += len(batch)
        for length in lengths:
            found.flops += matmul_flops(config, length, run.loop_count)
            found.elementwise = (found.elementwise or 0.0) + elementwise_flops(config, length, run.loop_count).total
        return
    counts = output.loop_counts if output.loop_counts.ndim == 2 else output.loop_counts[:, None] * mask
    codes = output.halt_codes if output.halt_codes.ndim == 2 else output.halt_codes[:, None].expand_as(mask)
    is_real = mask.bool() & (codes != reason_code("forced"))
    found.loops += counts[is_real].tolist()
    found.halts.update(str(reason_name(code)) for code in codes[is_real].tolist())
    updates = (counts * mask).sum(1).tolist()
    diagnostics = output.loop_diagnostics
    real_share = sum(lengths) / mask.numel()  # what is computed at padding does not count in fixed runs either
    computed = max(1.0, (diagnostics.computed_tokens or 0) * real_share / max(1, sum(updates)))
    for length, loops in zip(lengths, updates, strict=True):
        one = matmul_flops(config, length, 1)
        per_token = core_flops_per_token(config, length)
        core = one.recurrent + round(per_token * (computed * loops - length))
        probes = 1 + diagnostics.num_probes
        found.flops += StageFlops(one.prelude, core, probes * one.coda, probes * one.head)
        light = elementwise_flops(config, length, 1)
        light = replace(light, recurrent=round(light.recurrent * loops / length))
        found.elementwise = (found.elementwise or 0.0) + light.total
