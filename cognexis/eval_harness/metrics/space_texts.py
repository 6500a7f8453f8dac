"""The fixed parts of a metric's Space: shell of the module, card, app and requirements."""

REQUIREMENTS = "evaluate\ndatasets\nnumpy\n"

# The loader of `evaluate` reads one module per import line.
SHELL = '''"""$title: $summary

$formula

The functions are copied from the package cognexis, which this file does not need.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
${pairwise}from typing import Any

import datasets
import evaluate
import numpy as np

InvalidConfigError = ValueError

$functions


_DESCRIPTION = """$summary

$formula
"""

_INPUTS = """
Args:
    depths: loop counts in any order; a depth that occurs more than once has one entry per example.
    scores: the quality at that depth, one number per entry.
    compute: the cost at that depth, one number per entry, in one unit.
    direction: "higher_is_better" or "lower_is_better".
    definition: headline of the loop saturation point: "max_dei" (default), "threshold" or "baseline_argmax".
    form: of the depth efficiency index: "pairwise" (default) or "baseline".
    threshold: efficiency below which another loop does not pay; default 0.
    tolerance: loss of quality that does not count as overthinking.
    compute_unit: the unit of compute, repeated in the result.
    confidence_level: adds bootstrap intervals over examples; default none.
    num_resamples: draws of the bootstrap.
    seed: of the draws.
    Other keywords are ignored, so that the metric can be combined with others.

Examples:
    >>> metric = evaluate.load("$name")
    >>> result = metric.compute(depths=[1, 2, 4, 8], scores=[0.50, 0.70, 0.72, 0.69], compute=[10, 20, 40, 80])
    >>> result["$name"]
    $example
"""

_NEEDS_COMPUTE = $needs_compute


class $class_name(evaluate.Metric):
    """$title as a module of ``evaluate``."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "depths": datasets.Value("int64"),
                    "scores": datasets.Value("float64"),
                    "compute": datasets.Value("float64"),
                }
            ),
        )

    def add_batch(self, *, depths=None, scores=None, compute=None, **others):
        """Add entries; compute may be left out where the metric reads none."""
        for name, values in (("depths", depths), ("scores", scores), ("compute", compute)):
            if values is None and (name != "compute" or _NEEDS_COMPUTE):
                raise ValueError(f"{name}: missing; $name needs one number per entry")
        depths, scores = list(depths), list(scores)
        compute = [0.0] * len(depths) if compute is None else list(compute)
        if not len(depths) == len(scores) == len(compute):
            raise ValueError(
                f"depths, scores and compute have {len(depths)}, {len(scores)} and {len(compute)} entries: "
                "must be equal"
            )
        super().add_batch(depths=depths, scores=scores, compute=compute, **others)

    def _compute(
        self,
        depths,
        scores,
        compute,
        direction="higher_is_better",
        definition=None,
        form="pairwise",
        threshold=None,
        tolerance=0.0,
        compute_unit="flops_per_token",
        confidence_level=None,
        num_resamples=1000,
        seed=0,
        **others,
    ):
        options = DepthOptions(
            direction=direction,
            definition=definition,
            form=form,
            threshold=threshold,
            tolerance=tolerance,
            compute_unit=compute_unit,
            confidence_level=confidence_level,
            num_resamples=num_resamples,
            seed=seed,
        )
        for name in others:
            if near := difflib.get_close_matches(name, inspect.signature(DepthOptions).parameters, n=1, cutoff=0.8):
                raise ValueError(f"{name}: unknown keyword; did you mean {near[0]}?")
        return $function(list(depths), list(scores), list(compute), options)
'''

APP = """from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget

launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("$name.py"))))
"""

CARD = """---
title: $title
colorFrom: blue
colorTo: green
sdk: gradio
app_file: app.py
pinned: false
license: apache-2.0
tags:
- evaluate
- metric
description: >-
  $summary
---

# Metric card: $title

$summary

$formula

## How to use

```python
import evaluate

metric = evaluate.load("$name")
result = metric.compute(depths=[1, 2, 4, 8], scores=[0.50, 0.70, 0.72, 0.69], compute=[10, 20, 40, 80])
print(result["$name"])  # $example
```

The four depth metrics take the same inputs and keywords, and `evaluate.combine` runs them together. From a clone,
`evaluate.load` takes this folder's path; with cognexis installed, `cognexis.eval_harness.metrics.metric_spaces`
has `metric_path("$name")`.

## Inputs

- **depths** (int64): loop counts in any order. Several entries of one depth are several examples, and their mean
  counts.
- **scores** (float64): quality at that depth.
- **compute** (float64): cost at that depth, in one unit.
- **direction**: `higher_is_better` (default) or `lower_is_better`, for losses.
- **definition**, **threshold**: of the loop saturation point. **form**: of the depth efficiency index.
  **tolerance**: of the overthinking threshold. **compute_unit**: a name, repeated in the result.
- **confidence_level**, **num_resamples**, **seed**: percentile bootstrap over examples; the i-th entry of each depth
  must be the same example.

## Output

`$name`, and keys that begin with this name. What does not exist is `None`, and `${name}_undefined` says
why: `fewer_than_two_depths`, `compute_does_not_increase`, `zero_baseline`, `no_depth_helps`, `not_reached` or
`out_of_range`.

## Limits

The value belongs to one task, one model and one grid of depths: tasks saturate and overthink at different depths.
Noise of a small test set can look like overthinking; give a tolerance or ask for intervals.
"""

# Name -> one sentence, the formula, and what the four points of the example give.
CARDS: dict[str, tuple[str, str, str]] = {
    "depth_efficiency_index": (
        "Quality that a model of recurrent depth gains per unit of compute when it runs more loops.",
        """DEI = (M(d') - M(d)) / (C(d') - C(d)) for neighbouring depths d < d', with the sign turned for losses; in
the baseline form d is the shallowest depth.""",
        "[0.02, 0.001, -0.00075] up to rounding",
    ),
    "loop_saturation_point": (
        "The depth at which further loops of a model of recurrent depth stop paying.",
        """max_dei: the deeper depth of the neighbours with the largest positive depth efficiency index.
threshold: the first depth whose next step has an efficiency below the threshold. baseline_argmax: the depth with the
largest positive efficiency against the shallowest.""",
        "2",
    ),
    "overthinking_threshold": (
        "The deepest loop before further loops harm the quality of a model of recurrent depth.",
        """OT = min { d : M(d') < M(d) - tolerance } for neighbouring depths d < d', with the sign turned for losses;
d' is the first harmful depth.""",
        "4",
    ),
    "depth_gain_ratio": (
        "The part of its shallow quality that a model of recurrent depth gains at full depth.",
        "DGR = (M(deep) - M(shallow)) / |M(shallow)|, with the sign turned for losses.",
        "0.38 up to rounding",
    ),
}
