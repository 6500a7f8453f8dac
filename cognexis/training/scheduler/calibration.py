"""How far predicted gains are from measured ones, and maps that bring them closer.

    reliability     predictions in ascending order, in bins of equal mass; mean prediction and mean gain of each
    ECE             sum over bins of share * |mean prediction - mean gain|
    false halt      prediction < threshold <= gain           share of all slots
    false continue  gain < threshold <= prediction           share of all slots
    AUROC           probability that a slot worth continuing ranks above one that is not, ties counted half

For ``continue_logit`` the predictions are probabilities here and the gains are 0 or 1.

Maps (see ``cognexis.looping.value_calibration``): ``temperature`` and ``linear`` by least squares, for logits by the
likelihood (Platt scaling); ``isotonic`` by pool-adjacent-violators, each pooled block as one point at its mean, so
that the map rises between the blocks and keeps apart predictions that pooling would make equal. A least-squares map
moves predictions towards the mean gain, so where most gains are 0 and few are large it can raise the absolute error
while it lowers the ECE.
Source: Guo et al. 2017, "On Calibration of Modern Neural Networks" (temperature); Platt 1999; Zadrozny and Elkan 2002,
"Transforming Classifier Scores into Accurate Multiclass Probability Estimates" (isotonic); Oron and Flournoy 2017,
"Centered Isotonic Regression" (blocks as points).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cognexis.configuration_rules import nearest_name
from cognexis.errors import BackendError, InvalidConfigError
from cognexis.looping.value_calibration import build_calibration

MAX_KNOTS = 200
_EDGE = 1e-4


def reliability_curve(predictions: Tensor, gains: Tensor, num_bins: int = 10) -> list[dict[str, float]]:
    """Bins of equal mass in ascending order of ``predictions`` ``[N]``; ``gains`` ``[N]`` is what was measured."""
    order = predictions.argsort(stable=True)
    bins = []
    for part in order.tensor_split(min(num_bins, len(order))):
        predicted, measured = predictions[part].double().mean().item(), gains[part].double().mean().item()
        bins.append({"count": len(part), "predicted": predicted, "measured": measured})
    return bins


def expected_calibration_error(curve: list[dict[str, float]]) -> float:
    """Mean distance between prediction and measurement over the bins of a reliability curve, by their mass."""
    mass = sum(entry["count"] for entry in curve)
    return sum(entry["count"] * abs(entry["predicted"] - entry["measured"]) for entry in curve) / mass


def mean_absolute_error(predictions: Tensor, gains: Tensor) -> float:
    """Mean of ``|predictions - gains|``."""
    return (predictions - gains).abs().double().mean().item()


def halt_error_rates(predictions: Tensor, gains: Tensor, threshold: float) -> tuple[float, float]:
    """Shares of all slots that halt wrongly and that continue wrongly at ``threshold``."""
    halts, should_halt = predictions < threshold, gains < threshold
    false_halt, false_continue = halts & ~should_halt, ~halts & should_halt
    return false_halt.double().mean().item(), false_continue.double().mean().item()


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation of ``[N]`` and ``[N]``, ties at their mean rank; None if one side is flat."""
    ranks = torch.stack((mean_ranks(a), mean_ranks(b)))
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    size = ranks.norm(dim=1).prod()
    return (ranks[0] @ ranks[1] / size).item() if size > 0 else None


def auroc(scores: Tensor, is_positive: Tensor) -> float | None:
    """Area under the ROC curve of ``scores`` ``[N]``; None if all slots are of one kind."""
    positives = int(is_positive.sum())
    negatives = len(scores) - positives
    if not positives or not negatives:
        return None
    rank_sum = mean_ranks(scores)[is_positive].sum().item()
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks ``[N]`` from 1 in float64; equal values get the mean of their ranks."""
    _, place, counts = values.double().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2).double()[place]


def fit_calibration(
    method: str, values: Tensor, gains: Tensor, *, is_logit: bool = False, is_by_loop: bool = False
) -> dict[str, Any]:
    """Fit a map from uncalibrated ``values`` to measured ``gains``.

    Args:
        method: "temperature", "linear" or "isotonic".
        values: ``[N]``, or ``[N, L]`` with ``is_by_loop``, column i after loop i + 1.
        gains: of the same shape; 0 or 1 with ``is_logit``.
        is_logit: the values are logits.
        is_by_loop: one map for each loop.

    Returns:
        Settings for :func:`build_calibration`.

    Raises:
        InvalidConfigError: an unknown method, or values that fall where gains rise, which no rising map can mend.
        BackendError: scikit-learn is missing.
    """
    if method not in METHODS:
        raise InvalidConfigError(
            f"method={method!r}: must be one of {', '.join(METHODS)}{nearest_name(method, METHODS)}",
            path="method",
            value=method,
        )
    if is_by_loop:
        maps = [METHODS[method](values[:, i].double(), gains[:, i].double(), is_logit) for i in range(values.shape[1])]
        return {"method": "by_loop", "maps": maps}
    return METHODS[method](values.flatten().double(), gains.flatten().double(), is_logit)


def _temperature(values: Tensor, gains: Tensor, is_logit: bool) -> dict[str, Any]:
    if not is_logit:
        covered = (values @ values).item()
        temperature = covered / (values @ gains).item() if (values @ gains).item() else math.inf
        return _checked({"method": "temperature", "temperature": temperature})
    low, high = -5.0, 5.0  # of ln temperature; the loss has a single minimum
    for _ in range(60):
        third = (high - low) / 3
        losses = [_cross_entropy(values / math.exp(point), gains) for point in (low + third, high - third)]
        low, high = (low, high - third) if losses[0] < losses[1] else (low + third, high)
    return _checked({"method": "temperature", "temperature": math.exp((low + high) / 2)})


def _linear(values: Tensor, gains: Tensor, is_logit: bool) -> dict[str, Any]:
    models = _sklearn("linear_model")
    x, y = values[:, None].numpy(), gains.numpy()
    if is_logit:
        if not 0 < y.mean() < 1:
            raise InvalidConfigError("method='linear': every slot has the same answer; take more rows", path="method")
        fitted = models.LogisticRegression(C=math.inf).fit(x, y)
        scale, offset = fitted.coef_[0, 0], fitted.intercept_[0]
    else:
        fitted = models.LinearRegression().fit(x, y)
        scale, offset = fitted.coef_[0], fitted.intercept_
    return _checked({"method": "linear", "scale": float(scale), "offset": float(offset)})


def _isotonic(values: Tensor, gains: Tensor, is_logit: bool) -> dict[str, Any]:
    fitted = _sklearn("isotonic").IsotonicRegression(out_of_bounds="clip").fit(values.numpy(), gains.numpy())
    level, block = torch.as_tensor(fitted.predict(values.numpy())).unique(return_inverse=True)
    mass = torch.zeros_like(level).index_add_(0, block, torch.ones_like(values))
    x, y = torch.zeros_like(level).index_add_(0, block, values) / mass, level
    if is_logit:
        y = y.clamp(_EDGE, 1 - _EDGE).logit()
    if len(x) > MAX_KNOTS:
        chosen = torch.linspace(0, len(x) - 1, MAX_KNOTS).round().long()
        x, y = x[chosen], y[chosen]
    rises = torch.cat((torch.ones(1, dtype=torch.bool), x.float().diff() > 0))  # in the dtype in which it is applied
    return _checked({"method": "isotonic", "x": x[rises].tolist(), "y": y[rises].tolist()})


METHODS: dict[str, Callable[[Tensor, Tensor, bool], dict[str, Any]]] = {
    "temperature": _temperature,
    "linear": _linear,
    "isotonic": _isotonic,
}


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    try:
        build_calibration(settings)
    except InvalidConfigError as error:
        raise InvalidConfigError(
            f"method={settings['method']!r}: no rising map fits, predictions do not rise with gains ({error})",
            path="method",
            value=settings["method"],
        ) from error
    return settings


def _cross_entropy(logits: Tensor, answers: Tensor) -> float:
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, answers).item()


def _sklearn(module: str) -> Any:
    try:
        from sklearn import isotonic, linear_model
    except ImportError as error:
        raise BackendError("this method needs scikit-learn: pip install 'cognexis[eval]'") from error
    return {"isotonic": isotonic, "linear_model": linear_model}[module]
