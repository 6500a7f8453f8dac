"""Cognexis as a model of lm-eval, with the settings of its loops and what they cost.

Importing this module registers the model ``cognexis``, so that lm-eval's command knows it too. It is lm-eval's own
``hf`` model with the loop keywords of ``generate()`` passed on in every call, and it counts loops, halt reasons and
operations. Likelihoods need decisions that look at no later token: ``adaptive_token`` then waits for all earlier
tokens (``halt_dependency="prefix"``), and ``adaptive_sequence`` is refused. Letters: B rows, T tokens.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.compute import generation_flops, matmul_flops
from cognexis.looping.schedulers.base import reason_name

_PADDING = 0  # what lm-eval fills rows of likelihood requests up with, at their ends
_LOOP_KEYWORDS = (
    *("loop_mode", "num_loops", "min_loops", "max_loops", "scheduler", "quality_tier", "halt_dependency"),
    *("cache_policy", "allow_extrapolation"),
)


@dataclass
class LoopRecord:
    """What the requests since the last setting of the loops took.

    Attributes:
        loops: tokens by their number of loops.
        halts: tokens by halt reason.
        flops: matrix operations.
        tokens: tokens that were run, padding not counted; of a generation its prompt and its new tokens.
    """

    loops: Counter[int] = field(default_factory=Counter)
    halts: Counter[str] = field(default_factory=Counter)
    flops: float = 0.0
    tokens: int = 0

    @property
    def mean_loops(self) -> float:
        """Mean loops of a token; 0 before any ran."""
        total = sum(self.loops.values())
        return sum(count * number for count, number in self.loops.items()) / total if total else 0.0

    @property
    def histogram(self) -> list[int]:
        """Tokens by loop count, from 0 loops."""
        return [self.loops[number] for number in range(max(self.loops, default=0) + 1)]


@register_model("cognexis")
class CognexisLM(HFLM):
    """A checkpoint of this package under lm-eval.

    Args:
        pretrained: folder or identifier of the checkpoint, or a model.
        loop_mode, num_loops, min_loops, max_loops, scheduler, quality_tier, halt_dependency, cache_policy,
            allow_extrapolation: as in ``generate()``.
        kwargs: of lm-eval's ``hf`` model.

    Attributes:
        record: loops and operations since :meth:`set_loops`.
    """

    def __init__(self, pretrained: Any, **kwargs: Any) -> None:
        loops = {name: kwargs.pop(name) for name in _LOOP_KEYWORDS if name in kwargs}
        super().__init__(pretrained=pretrained, **{"backend": "causal", **kwargs})
        self.loop_keywords: dict[str, Any] = {}
        self.record = LoopRecord()
        self.set_loops(**loops)

    def set_loops(self, **keywords: Any) -> None:
        """Choose the loops of all further requests, and count anew.

        Raises:
            InvalidConfigError: the model cannot run so.
        """
        keywords = {name: value for name, value in keywords.items() if value is not None}
        self.model.model.loop_options(keywords)
        self.loop_keywords, self.record = keywords, LoopRecord()

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        keywords = dict(self.loop_keywords)
        mode = keywords.get("loop_mode", "fixed")
        if mode == "adaptive_token":
            keywords.setdefault("halt_dependency", "prefix")
        if mode not in ("fixed", "adaptive_token") or keywords.get("halt_dependency") == "row":
            raise InvalidConfigError(
                f"loop_mode={mode!r}: where a row stops as a whole, later tokens decide about earlier ones, so this "
                "task has no likelihood; use a fixed number of loops or loop_mode='adaptive_token'",
                path="loop_mode",
                value=mode,
            )
        with (
            torch.no_grad(),
            torch.autocast(
                device_type=self.device.type,
                dtype=self.mixed_precision_dtype,
                enabled=self.mixed_precision_dtype is not None,
            ),
        ):
            output = self.model(inps, use_cache=False, **keywords)
        self._count_scored(inps, output)
        logits: Tensor = output.logits
        return logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        keywords = {**self.loop_keywords, **generation_kwargs, "return_loop_stats": True}
        output = super()._model_generate(context, max_length, stop, **keywords)
        mask = generation_kwargs.get("attention_mask")
        self._count_generated(context if mask is None else mask, output, has_mask=mask is not None)
        sequences: Tensor = output.sequences
        return sequences

    def _count_scored(self, ids: Tensor, output: Any) -> None:
        """Add the real tokens of ``ids`` ``[B, T]``."""
        counts, codes = output.loop_counts.cpu(), output.halt_codes
        places = torch.arange(1, ids.shape[1] + 1)
        for row, length in enumerate(((ids.cpu() != _PADDING) * places).amax(1).clamp_min(1).tolist()):
            own = counts[row, :length] if counts.ndim == 2 else counts[row].expand(length)
            why = ["max_loops"] * length if codes is None else map(reason_name, codes[row, :length].tolist())
            self.record.loops.update(own.tolist())
            self.record.halts.update(map(str, why))
            self.record.tokens += length
            one, two = (matmul_flops(self.model.config, length, loops).total for loops in (1, 2))
            self.record.flops += one + (own.double().mean().item() - 1) * (two - one)

    def _count_generated(self, prompt: Tensor, output: Any, *, has_mask: bool) -> None:
        """Add new tokens, and the operations of prompt ``[B, T]`` and new tokens."""
        lengths = prompt.sum(1).tolist() if has_mask else [prompt.shape[1]] * len(prompt)
        for length, counts, reasons in zip(lengths, output.loop_counts.tolist(), output.halt_reasons, strict=True):
            own = [count for count in counts if count > 0]
            self.record.loops.update(own)
            self.record.halts.update(str(reason) for reason in reasons if reason is not None)
            self.record.tokens += length + len(own) - 1
            if own:
                self.record.flops += generation_flops(self.model.config, length, own).total
