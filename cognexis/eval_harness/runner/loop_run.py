"""One way to run the loops: a fixed depth, or an adaptive mode with its scheduler and bounds."""

import time
from dataclasses import dataclass, field
from typing import Any

from cognexis.looping.schedulers.base import LoopScheduler

_BOUNDS = ("min_loops", "max_loops", "quality_tier", "halt_dependency")


@dataclass
class LoopRun:
    """What a call is told about its loops.

    Attributes:
        mode: "fixed", "adaptive_sequence" or "adaptive_token".
        loop_count: the depth of a fixed run, the bound of an adaptive one.
        keywords: for ``forward``; ``generate`` takes those of ``limits`` too.
        limits: budgets of a request.
        decoding: what identifies the run besides mode and count.
        overhead_s: seconds that the scheduler has spent on decisions.
    """

    mode: str
    loop_count: int
    keywords: dict[str, Any]
    limits: dict[str, Any] = field(default_factory=dict)
    decoding: dict[str, Any] = field(default_factory=dict)
    overhead_s: float = 0.0

    @property
    def is_adaptive(self) -> bool:
        """Whether a scheduler decides."""
        return self.mode != "fixed"


def fixed_run(depth: int, inference: Any) -> LoopRun:
    """``depth`` loops for every token; more than the model was trained with are allowed."""
    limits = _limits(inference)
    keywords = {"loop_mode": "fixed", "num_loops": depth, "allow_extrapolation": True}
    return LoopRun("fixed", depth, keywords, limits, {"budget": limits} if limits else {})


def adaptive_run(mode: str, model: Any, inference: Any, *, teacher_forced: bool) -> LoopRun:
    """A scheduler between the bounds of the ``inference`` section.

    The scheduler is that of the section, or where it says "fixed" (the default) the checkpoint's own. For likelihoods,
    tokens wait for all earlier ones (``halt_dependency="prefix"``) unless the section says otherwise: a decision may
    not look at later tokens.

    Raises:
        InvalidConfigError: what the section says does not go together with the mode or the model.
    """
    given = {name: getattr(inference, name) for name in _BOUNDS if name in inference.model_fields_set}
    given = {name: value for name, value in given.items() if value is not None}
    given["min_loops"] = max(inference.min_loops, model.config.min_loops)
    if teacher_forced:
        given.setdefault("halt_dependency", "prefix")
    elif mode == "adaptive_sequence":
        given.pop("halt_dependency", None)
    if inference.scheduler.type != "fixed":
        given["scheduler"] = inference.scheduler.spec()
    if inference.research_override:
        given["allow_extrapolation"] = True
    options = model.model.loop_options({**given, "loop_mode": mode})
    limits = _limits(inference)
    run = LoopRun(mode, options.num_loops, {**given, "loop_mode": mode, "scheduler": options.scheduler}, limits)
    facts = {"scheduler": options.scheduler.to_dict(), "min_loops": options.min_loops}
    facts["halt_dependency"] = options.halt_dependency
    run.decoding = {"loops": facts} | ({"budget": limits} if limits else {})
    _time(options.scheduler, run)
    return run


def _limits(inference: Any) -> dict[str, Any]:
    return {name: value for name, value in inference.compute_budget.model_dump().items() if value is not None}


def _time(scheduler: LoopScheduler, run: LoopRun) -> None:
    """Let ``run`` know what the decisions of ``scheduler`` cost; its signals are part of the forward pass."""
    observe = scheduler.observe

    def timed(observation: Any) -> Any:
        started = time.perf_counter()
        decision = observe(observation)
        run.overhead_s += time.perf_counter() - started
        return decision

    scheduler.observe = timed  # type: ignore[method-assign]
