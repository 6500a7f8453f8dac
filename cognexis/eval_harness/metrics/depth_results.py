"""The depth metrics as result files and the library ``evaluate`` show them: flat dictionaries, strict JSON.

Every key begins with the long name of its metric, except ``first_harmful_depth``, so that the four dictionaries can
be merged. A value that does not exist is None, and ``<name>_undefined`` says why. With ``confidence_level`` set,
``<name>_confidence_interval`` is ``[low, high]``, one such pair per entry where the metric is a list, and None where
there is one example only; ``<name>_defined_share`` is the share of draws in which the value existed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cognexis.eval_harness.metrics.bootstrap import bootstrap_depths
from cognexis.eval_harness.metrics.depth import (
    DEFINITIONS,
    depth_efficiency_index,
    depth_gain_ratio,
    loop_saturation_point,
    overthinking_threshold,
)


@dataclass(frozen=True)
class DepthOptions:
    """What the four metrics are told alike; each reads what it needs.

    Attributes:
        direction: "higher_is_better" or "lower_is_better".
        definition: headline of the saturation point; None: "max_dei".
        form: of the efficiency, "pairwise" or "baseline".
        threshold: efficiency below which another loop does not pay; None: 0.
        tolerance: loss of quality that does not count as overthinking.
        compute_unit: the unit of ``compute``, repeated in the result.
        confidence_level: of the intervals, between 0 and 1; None: no intervals.
        num_resamples: draws of the bootstrap.
        seed: of the draws.
    """

    direction: str = "higher_is_better"
    definition: str | None = None
    form: str = "pairwise"
    threshold: float | None = None
    tolerance: float = 0.0
    compute_unit: str = "flops_per_token"
    confidence_level: float | None = None
    num_resamples: int = 1000
    seed: int = 0


Depths = Sequence[int]
Numbers = Sequence[float]


def dei_results(depths: Depths, scores: Numbers, compute: Numbers, options: DepthOptions) -> dict[str, Any]:
    """Depth efficiency index: one value per pair of depths."""

    def statistic(depths: Depths, scores: Numbers, compute: Numbers) -> list[float | None]:
        pairs = depth_efficiency_index(depths, scores, compute, direction=options.direction, form=options.form)
        return [pair.value for pair in pairs]

    pairs = depth_efficiency_index(depths, scores, compute, direction=options.direction, form=options.form)
    return {
        "depth_efficiency_index": [pair.value for pair in pairs],
        "depth_efficiency_index_depths": [[pair.shallow, pair.deep] for pair in pairs],
        "depth_efficiency_index_form": options.form,
        "depth_efficiency_index_compute_unit": options.compute_unit,
        "depth_efficiency_index_undefined": [pair.undefined and pair.undefined.value for pair in pairs],
        **interval_results("depth_efficiency_index", depths, scores, compute, statistic, options, as_list=True),
    }


def lsp_results(depths: Depths, scores: Numbers, compute: Numbers, options: DepthOptions) -> dict[str, Any]:
    """Loop saturation point in all definitions, one of them the headline."""
    headline = options.definition or "max_dei"
    threshold = 0.0 if options.threshold is None else options.threshold

    def statistic(depths: Depths, scores: Numbers, compute: Numbers) -> list[float | None]:
        found = loop_saturation_point(
            depths, scores, compute, direction=options.direction, definition=headline, threshold=threshold
        )
        return [found.depth]

    every = {
        name: loop_saturation_point(
            depths, scores, compute, direction=options.direction, definition=name, threshold=threshold
        )
        for name in dict.fromkeys((headline, *DEFINITIONS))
    }
    undefined = every[headline].undefined
    return {
        "loop_saturation_point": every[headline].depth,
        "loop_saturation_point_definition": headline,
        "loop_saturation_point_threshold": threshold,
        "loop_saturation_point_by_definition": {name: every[name].depth for name in DEFINITIONS},
        "loop_saturation_point_undefined": undefined and undefined.value,
        **interval_results("loop_saturation_point", depths, scores, compute, statistic, options),
    }


def ot_results(depths: Depths, scores: Numbers, compute: Numbers, options: DepthOptions) -> dict[str, Any]:
    """Overthinking threshold, and the depth that is the first to harm."""

    def statistic(depths: Depths, scores: Numbers, compute: Numbers) -> list[float | None]:
        found = overthinking_threshold(depths, scores, direction=options.direction, tolerance=options.tolerance)
        return [found.depth]

    found = overthinking_threshold(depths, scores, direction=options.direction, tolerance=options.tolerance)
    return {
        "overthinking_threshold": found.depth,
        "overthinking_threshold_tolerance": options.tolerance,
        "first_harmful_depth": found.first_harmful_depth,
        "overthinking_threshold_undefined": found.undefined and found.undefined.value,
        **interval_results("overthinking_threshold", depths, scores, compute, statistic, options),
    }


def dgr_results(depths: Depths, scores: Numbers, compute: Numbers, options: DepthOptions) -> dict[str, Any]:
    """Depth gain ratio of the deepest against the shallowest depth."""

    def statistic(depths: Depths, scores: Numbers, compute: Numbers) -> list[float | None]:
        return [depth_gain_ratio(depths, scores, direction=options.direction).value]

    found = depth_gain_ratio(depths, scores, direction=options.direction)
    return {
        "depth_gain_ratio": found.value,
        "depth_gain_ratio_depths": None if found.shallow is None else [found.shallow, found.deep],
        "depth_gain_ratio_undefined": found.undefined and found.undefined.value,
        **interval_results("depth_gain_ratio", depths, scores, compute, statistic, options),
    }


def interval_results(
    name: str,
    depths: Depths,
    scores: Numbers,
    compute: Numbers,
    statistic: Callable[[list[int], list[float], list[float]], Sequence[float | None]],
    options: DepthOptions,
    as_list: bool = False,
) -> dict[str, Any]:
    """The interval keys of one metric; none unless intervals are asked for."""
    if options.confidence_level is None:
        return {}
    intervals = bootstrap_depths(
        depths,
        scores,
        compute,
        statistic,
        confidence_level=options.confidence_level,
        num_resamples=options.num_resamples,
        seed=options.seed,
    )
    keys = (f"{name}_confidence_interval", f"{name}_defined_share")
    if intervals is None:
        return dict.fromkeys(keys)
    ends = [None if interval.low is None else [interval.low, interval.high] for interval in intervals]
    shares = [interval.defined_share for interval in intervals]
    return dict(zip(keys, (ends, shares) if as_list else (ends[0], shares[0]), strict=True))


DEPTH_METRICS: dict[str, Callable[[Depths, Numbers, Numbers, DepthOptions], dict[str, Any]]] = {
    "depth_efficiency_index": dei_results,
    "loop_saturation_point": lsp_results,
    "overthinking_threshold": ot_results,
    "depth_gain_ratio": dgr_results,
}
# These read no compute, which may then be left out.
WITHOUT_COMPUTE = ("overthinking_threshold", "depth_gain_ratio")
