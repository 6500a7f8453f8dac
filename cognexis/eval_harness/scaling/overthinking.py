"""What loops beyond the best depth do, as sentences and tables, and what follows for a scheduler.

Overthinking is a loss of quality with more loops. It may go with a state that grows or never settles, with
predictions that become certain while they become wrong (entropy falls, loss rises), and with texts that repeat
themselves. By depth the table shows

    norm            of the state after the last loop, over that after the first
    change          mean of |h_t - h_(t-1)| / |h_(t-1)| in the last loop t
    change ratio    the change in the last loop over that in the loop before; below 1 the state settles;
                    left out where the change is below a thousandth
    gain of a loop  largest singular value of the last loop's Jacobian; below 1 every small difference shrinks

The gain bounds what one loop can do to a difference, the change ratio is what happens along the model's own path, so
a state may settle although the gain is above 1.
"""

import re
from collections.abc import Sequence

from cognexis.eval_harness.results import ResultRow
from cognexis.eval_harness.scaling.study import CurveStudy

Table = list[list[str]]
SETTLED = 1e-3
_CLEARLY = 0.05
_PAYING = {
    "max_dei": "the step to this depth pays most for its compute",
    "threshold": "the step after this depth pays less than the threshold",
    "baseline_argmax": "pays most for its compute against the shallowest depth",
}


def number(value: float | None, digits: int = 4) -> str:
    """A value for a table; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def loops(count: int) -> str:
    """A number of loops in words."""
    return f"{count} loop" if count == 1 else f"{count} loops"


def leading_studies(studies: Sequence[CurveStudy]) -> list[CurveStudy]:
    """One curve for each data set and seed: the loss, else the first metric."""
    found: dict[tuple[str, str, int], CurveStudy] = {}
    for study in studies:
        key = (study.first.dataset, study.first.split, study.first.seed)
        if study.rows and (key not in found or study.first.metric_name == "negative_log_likelihood"):
            found[key] = study
    return list(found.values())


def without_doubles(studies: Sequence[CurveStudy]) -> list[CurveStudy]:
    """The curves without those of a perplexity whose logarithm is there too."""
    logs = {study.first.dataset for study in studies if study.first.metric_name == "negative_log_likelihood"}
    return [s for s in studies if s.rows and not (s.first.metric_name == "perplexity" and s.first.dataset in logs)]


def judged_studies(studies: Sequence[CurveStudy]) -> list[CurveStudy]:
    """The curves from which something follows: depths differ by more than noise."""
    return [study for study in without_doubles(studies) if study.recommended_cap is not None]


def scheduler_table(studies: Sequence[CurveStudy]) -> Table:
    """Bounds and thresholds that follow from the curves."""
    table = [["setting", "value", "because"]]
    capped = judged_studies(studies)
    if not capped:
        return []
    lowest = min(capped, key=lambda study: study.recommended_cap or 0)
    cap = lowest.recommended_cap
    table.append(["max_loops", str(cap), _why_cap(lowest)])
    paying = [study for study in capped if study.recommended_default is not None]
    if paying:
        first = min(paying, key=lambda study: study.recommended_default or 0)
        why = f"{first.title}: {_PAYING[(first.depth_metrics['lsp'] or {})['loop_saturation_point_definition']]}"
        table.append(["default_loops", str(first.recommended_default), why])
    change = _change_at(lowest, cap or 1)
    if change is not None:
        why = f"relative change of the state in loop {cap}; a rule with this threshold stops about there"
        table.append(["min_delta", number(change, 2), why])
    return table


def _why_cap(study: CurveStudy) -> str:
    if study.harmful_beyond is None:
        if study.recommended_cap == study.rows[-1].loop_count:
            return f"{study.title}: best at the deepest measured; no harm was seen"
        return f"{study.title}: as good as the best; deeper neither helps nor harms"
    found = study.depth_metrics["ot"]
    why = f"{study.title}: overthinking threshold; {found['first_harmful_depth']} loops are worse"
    share = found.get("overthinking_threshold_defined_share")
    return why + ("" if share is None else f" (some step harms in {share:.0%} of the bootstrap draws)")


def _change_at(study: CurveStudy, depth: int) -> float | None:
    changes = next((row.hidden_deltas for row in reversed(study.rows) if row.hidden_deltas), ())
    return changes[depth - 1] if len(changes) >= depth else None


def signs(study: CurveStudy) -> list[str]:
    """Sentences on what changes between the best depth of a curve and its deepest."""
    if study.best_depth is None:
        return []
    best = next(row for row in study.rows if row.loop_count == study.best_depth)
    deepest, name = study.rows[-1], study.first.dataset
    found = [_sign_of_quality(study, best, deepest)]
    if best is not deepest:
        found += _signs_of_predictions(best, deepest)
    if (ratio := _norm_ratio(deepest)) is not None:
        found.append(f"From the first loop to the last of {deepest.loop_count} the norm changes by x {ratio:.3g}.")
    change = (deepest.hidden_deltas or (None,))[-1]
    if change is not None:
        state = "has settled" if change < SETTLED else "still moves"
        found.append(f"The state {state}: loop {deepest.loop_count} changes it by {100 * change:.2g} %.")
    return [f"{name}: {found[0]}", *found[1:]]


def _sign_of_quality(study: CurveStudy, best: ResultRow, deepest: ResultRow) -> str:
    metric = study.first.metric_name.replace("_", " ")
    if best is deepest:
        return f"{metric} is best at the deepest run, {loops(deepest.loop_count)}."
    if study.harmful_beyond is None:
        return f"{metric} stays as good as its best from {study.recommended_cap} to {loops(deepest.loop_count)}."
    return (
        f"{metric} is best at {loops(best.loop_count)} ({number(best.metric_value)}) and "
        f"{number(deepest.metric_value)} at {deepest.loop_count}; the first harmful step begins at "
        f"{study.harmful_beyond}."
    )


def _signs_of_predictions(best: ResultRow, deepest: ResultRow) -> list[str]:
    found = []
    if best.prediction_entropy is not None and deepest.prediction_entropy is not None:
        before, after = best.prediction_entropy, deepest.prediction_entropy
        values = f"{number(before, 3)} to {number(after, 3)} nats"
        if after < (1 - _CLEARLY) * before:
            found.append(f"Predictions become more certain beyond the best depth (entropy {values}), not better.")
        elif after > (1 + _CLEARLY) * before:
            found.append(f"Predictions become less certain beyond the best depth (entropy {values}).")
    if best.repetition_rate is not None and deepest.repetition_rate is not None:
        before, after = best.repetition_rate, deepest.repetition_rate
        if abs(after - before) > _CLEARLY:
            word = "more" if after > before else "less"
            found.append(f"Greedy texts repeat themselves {word} ({before:.0%} to {after:.0%} of four-token pieces).")
    return found


def _norm_ratio(row: ResultRow) -> float | None:
    norms = row.hidden_norms or ()
    if len(norms) < 2 or not norms[1] or norms[-1] is None:
        return None
    return norms[-1] / norms[1]


def change_ratio(row: ResultRow) -> float | None:
    """The change of the state in the last loop over that in the loop before; None once the state has settled."""
    changes = row.hidden_deltas or ()
    if len(changes) < 3 or not changes[-2] or changes[-1] is None or changes[-1] < SETTLED:
        return None
    return changes[-1] / changes[-2]


def overthinking_table(study: CurveStudy) -> Table:
    """One line per depth of a curve."""
    head = ["loops", study.first.metric_name.replace("_", " "), "norm", "change", "change ratio", "gain of a loop"]
    table = [[*head, "entropy of predictions", "entropy of attention", "repeated", "depth"]]
    for row in study.rows:
        attention = (row.attention_entropies or (None,))[-1]
        ratio = _norm_ratio(row)
        table.append(
            [
                *(str(row.loop_count), number(row.metric_value), "–" if ratio is None else f"x {ratio:.3g}"),
                *(number((row.hidden_deltas or (None,))[-1], 3), number(change_ratio(row), 3)),
                *(number(row.loop_gain, 3), number(row.prediction_entropy, 3), number(attention, 3)),
                "–" if row.repetition_rate is None else f"{row.repetition_rate:.0%}",
                depth_label(row, study),
            ]
        )
    return table


def depth_label(row: ResultRow, study: CurveStudy) -> str:
    """Where a depth lies: beyond training, at the overthinking threshold, or beyond that."""
    labels = ["beyond training" if row.extrapolated else "trained"]
    if study.harmful_beyond is not None and row.loop_count >= study.harmful_beyond:
        labels.append("overthinking threshold" if row.loop_count == study.harmful_beyond else "overthinking")
    return ", ".join(labels)


def continuation_table(study: CurveStudy) -> Table:
    """The same prompts at every depth, depths of one text together; line ends and runs of spaces are marked."""
    if not study.continuations:
        return []
    table = [["prompt", "loops", "greedy continuation"]]
    beyond = {row.loop_count for row in study.rows if row.extrapolated}
    depths = sorted(study.continuations)
    for index, (prompt, _) in enumerate(study.continuations[depths[0]]):
        by_text: dict[str, list[str]] = {}
        for depth in depths:
            label = f"{depth} (beyond training)" if depth in beyond else str(depth)
            by_text.setdefault(study.continuations[depth][index][1], []).append(label)
        for place, (text, labels) in enumerate(by_text.items()):
            table.append(["" if place else _one_line(prompt), ", ".join(labels), _one_line(text)])
    return table


def _one_line(text: str) -> str:
    """A text whose line ends and runs of spaces can be seen in a table."""
    marked = text.replace("\r", "").replace("\n", "↵")
    return re.sub(" {2,}", lambda run: f"⟨{len(run[0])} spaces⟩", marked)
