"""The value head: says after each loop how much a position's loss would still fall if the core ran on.

    x     = rms_norm(h) * w_norm                                  token form, each position by itself
    x     = sum_t m_t rms_norm(h_t) * w_norm / sum_t m_t          sequence form, the mean over real positions
    z     = W_in x + b_in [+ e_loop] [+ W_f f]                    [.., K]
    value = w_out . silu(z) + b_out                               one number per position, or per row

h ``[B, T, H]`` is the state after ``loop`` loops, m ``[B, T]`` marks real tokens, K is the bottleneck. A feature
is a signal d that falls to 0 where the state settles (for confidence and margin, 1 minus the signal), on a
logarithmic scale with 0 at 1e-6 and 1 at 1:

    f = 1 + log10(clip(d, 1e-6, 1e6)) / 6

Adding e_loop behind W_in equals adding it to x or joining it to x, with K instead of H numbers per loop. Padding, and
a row without real tokens, get exactly 0 whatever the features and the calibration are. The head computes in at least
float32 and returns float32. Letters: B batch, T tokens, H hidden width, K bottleneck.

Source: the state of the core predicts measured future improvement of the loss, as in Ouro's second stage (Zhu et al.
2025, "Scaling Latent Reasoning via Looped Language Models"). Different: the prediction is a gain in nats and not a
probability to halt, and no loss ever rewards halting by itself.
"""

from typing import Any

import torch
from torch import Tensor, nn

from cognexis.configuration_rules import value_head_settings
from cognexis.errors import InvalidConfigError, ShapeMismatchError
from cognexis.looping.value_calibration import ValueCalibration, build_calibration

_FALLS_WITH_DISTANCE = ("confidence", "margin")
_DECADES = 6.0


def scaled_feature(name: str, signal: Tensor) -> Tensor:
    """The feature that the head reads in place of ``signal``; see the module docstring."""
    distance = 1.0 - signal if name in _FALLS_WITH_DISTANCE else signal
    return 1.0 + distance.clamp(10.0**-_DECADES, 10.0**_DECADES).log10() / _DECADES


class ValueHead(nn.Module):
    """The head of one model.

    Args:
        hidden_size: H.
        settings: the configuration's ``value_head``:

            * ``kind``: "token" or "sequence".
            * ``bottleneck_size``: K, 4 to 512 (default 64).
            * ``max_loops_embedded``: loops with an embedding of their own; 0 (default): the head does not see the
              loop number.
            * ``loop_index_policy``: what a larger loop number does: "clamp" (default) or "error".
            * ``output_kind``: what the number means (default "predicted_gain"); its consumer declares the same kind.
            * ``features``: names of signals that the head reads besides the state (default none).
        eps: added to the mean square in the norm.

    Raises:
        InvalidConfigError: lists every broken rule of ``settings``.
    """

    def __init__(self, hidden_size: int, settings: dict[str, Any], eps: float = 1e-6) -> None:
        super().__init__()
        complete = value_head_settings(settings)
        self.kind: str = complete["kind"]
        self.output_kind: str = complete["output_kind"]
        self.feature_names: tuple[str, ...] = tuple(complete["features"])
        self.max_loops_embedded: int = complete["max_loops_embedded"]
        self.loop_index_policy: str = complete["loop_index_policy"]
        self.calibration: ValueCalibration | None = None
        bottleneck = complete["bottleneck_size"]
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.input_proj = nn.Linear(hidden_size, bottleneck)
        self.loop_embedding = nn.Embedding(self.max_loops_embedded, bottleneck) if self.max_loops_embedded else None
        self.feature_proj = nn.Linear(len(self.feature_names), bottleneck, bias=False) if self.feature_names else None
        self.output_proj = nn.Linear(bottleneck, 1)

    def forward(
        self,
        hidden_states: Tensor,
        loop_index: int,
        mask: Tensor | None = None,
        features: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The uncalibrated values: ``[B, T]`` in the token form, ``[B]`` in the sequence form.

        Args:
            hidden_states: ``[B, T, H]``, the state after ``loop_index`` loops.
            loop_index: loops executed so far, from 1.
            mask: ``[B, T]`` bool, True at real tokens; None when all are.
            features: ``[B, T]`` signals by name; at least those of ``feature_names``, others are not read.

        Raises:
            InvalidConfigError: ``loop_index`` is below 1, or above the table under the policy "error"; a feature is
                missing.
            ShapeMismatchError: a shape does not fit ``hidden_states``.
        """
        self._check_shapes(hidden_states, mask)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        is_real = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        is_real = is_real if mask is None else mask
        with torch.autocast(hidden_states.device.type, enabled=False):
            x = torch.where(is_real[..., None], hidden_states.to(dtype), 0)
            x = nn.functional.rms_norm(x, x.shape[-1:], self.norm.weight.to(dtype), self.norm.eps)
            z = self._linear(self.input_proj, self._pooled(x, is_real))
            if self.loop_embedding is not None:
                z = z + self.loop_embedding.weight[self._embedding_row(loop_index)].to(dtype)
            if self.feature_proj is not None:
                f = self._features(features or {}, is_real).to(dtype)
                z = z + self._linear(self.feature_proj, self._pooled(f, is_real))
            values = self._linear(self.output_proj, nn.functional.silu(z)).squeeze(-1).float()
        if self.output_kind == "uncertainty":
            values = nn.functional.softplus(values)
        return torch.where(is_real if self.kind == "token" else is_real.any(dim=-1), values, 0)

    @torch.no_grad()
    def predict(
        self,
        hidden_states: Tensor,
        loop_index: int,
        mask: Tensor | None = None,
        features: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The calibrated values ``[B, T]`` for a scheduler; the sequence form repeats a row's value at its tokens."""
        values = self(hidden_states, loop_index, mask, features)
        if self.calibration is not None:
            values = self.calibration(values, loop_index)
        values = values if self.kind == "token" else values[:, None].expand(hidden_states.shape[:2])
        return values if mask is None else torch.where(mask, values, 0)

    def set_calibration(self, settings: dict[str, Any] | None) -> None:
        """Use this map in ``predict``; None takes the values as they are.

        Raises:
            InvalidConfigError: see :func:`build_calibration`.
        """
        self.calibration = None if settings is None else build_calibration(settings)

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, layer.weight.to(x.dtype), bias)

    def _pooled(self, x: Tensor, is_real: Tensor) -> Tensor:
        """``x`` ``[B, T, ..]`` is 0 at padding; the sequence form averages it over the real tokens."""
        if self.kind == "token":
            return x
        return x.sum(dim=1) / is_real.sum(dim=1, keepdim=True).clamp(min=1)

    def _features(self, signals: dict[str, Tensor], is_real: Tensor) -> Tensor:
        """``[B, T, F]``, 0 at padding."""
        if missing := [name for name in self.feature_names if signals.get(name) is None]:
            raise InvalidConfigError(
                f"features: the value head reads {', '.join(self.feature_names)}, and {', '.join(missing)} is missing",
                path="features",
                value=sorted(signals),
            )
        for name in self.feature_names:
            if signals[name].shape != is_real.shape:
                raise _shape_error(f"features[{name!r}]", is_real.shape, signals[name].shape)
        scaled = [scaled_feature(name, signals[name].float()) for name in self.feature_names]
        return torch.where(is_real[..., None], torch.stack(scaled, dim=-1), 0)

    def _embedding_row(self, loop_index: int) -> int:
        size = self.max_loops_embedded
        if loop_index < 1 or (loop_index > size and self.loop_index_policy == "error"):
            high = f"1 to max_loops_embedded={size}" if self.loop_index_policy == "error" else "1 or more"
            raise InvalidConfigError(f"loop_index={loop_index}: must be {high}", path="loop_index", value=loop_index)
        return min(loop_index, size) - 1

    def _check_shapes(self, hidden_states: Tensor, mask: Tensor | None) -> None:
        hidden_size = self.input_proj.in_features
        if hidden_states.ndim != 3 or hidden_states.shape[-1] != hidden_size:
            raise _shape_error("hidden_states", ("B", "T", hidden_size), hidden_states.shape)
        if mask is not None and (mask.shape != hidden_states.shape[:2] or mask.dtype != torch.bool):
            raise _shape_error(f"mask ({mask.dtype}, wanted torch.bool)", hidden_states.shape[:2], mask.shape)


def attach_value_head(model: Any, settings: dict[str, Any]) -> ValueHead:
    """Give ``model`` a new value head in its dtype and on its device, and note it in the configuration.

    Args:
        model: a causal language model or its body; a head that it has is replaced.
        settings: as for :class:`ValueHead`.
    """
    body = getattr(model, "model", model)
    head = ValueHead(body.config.hidden_size, settings)
    body.value_head = head.to(device=body.device, dtype=body.dtype).train(body.training)
    body.config.value_head = value_head_settings(settings)
    return body.value_head


def _shape_error(name: str, expected: Any, actual: Any) -> ShapeMismatchError:
    expected, actual = tuple(expected), tuple(actual)
    return ShapeMismatchError(f"{name}: shape must be {expected}, got {actual}", expected=expected, actual=actual)
