"""What ``CognexisTrainer`` does beyond ``transformers.TrainingArguments``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cognexis.configuration_rules import config_error
from cognexis.errors import ConfigFault

_WEIGHTS = ("lambda_value", "lambda_continue", "consistency_weight", "router_balance_weight")


@dataclass(frozen=True)
class TrainerOptions:
    """Losses, gradients, monitors and evaluation of a training run.

    Raises:
        InvalidConfigError: lists every value out of range.
    """

    multi_depth: Mapping[int, float] = field(default_factory=dict)
    """Loop count -> weight of its loss; empty: the last loop only. A drawn count becomes the largest listed one that
    does not exceed it, or the smallest."""
    lambda_value: float = 0.0
    """Weight of the value head's regression on measured gains."""
    lambda_continue: float = 0.0
    """Weight of the value head's decision whether the gain exceeds ``gain_threshold``."""
    gain_horizon: str = "best"
    """"best": gain of the best later loop; "next": that of the next."""
    gain_threshold: float = 1e-3
    """Nats that make another loop worth it."""
    consistency_weight: float = 0.0
    """Weight of the distance between an earlier state, drawn by (seed, step), and the last one."""
    router_balance_weight: float = 0.0
    """Weight of the uneven use of experts in Cortex columns."""
    fused_loss: bool = False
    """Compute the next-token loss in chunks, without the logits of all positions."""
    loop_grad_normalization: str = "none"
    """"by_loops": the core's gradient is divided by the executed loops."""
    clip_each_norm: float | None = None
    """Largest gradient norm of a single parameter, before the global norm is cut; None: no limit."""
    max_skipped_steps: int = 10
    """So many steps in a row with NaN or infinity end the training."""
    task_column: str = "task"
    """Key of a batch that holds its tags, for ``CurriculumSettings.task_profiles``."""
    observe_every: int | None = None
    """Steps between summaries of the loops; None: those that are logged, 0: never."""
    spectral_every: int = 0
    """Steps between measurements of the core's largest singular values; 0: never."""
    spectral_target: float | None = None
    """Largest singular value that the core's output matrices may keep; None: only watched."""
    residual_scale_limit: float = 2.0
    """Magnitude of a learned residual scale that raises an alert."""
    eval_loops: int | None = None
    """Loops of evaluation; None: ``config.default_loops``."""
    eval_depths: tuple[int, ...] = ()
    """Loop counts whose losses evaluation reports besides."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "multi_depth", {int(n): float(w) for n, w in dict(self.multi_depth).items()})
        object.__setattr__(self, "eval_depths", tuple(self.eval_depths))
        if faults := self._faults():
            raise config_error(faults)

    def _faults(self) -> list[ConfigFault]:
        rules: dict[str, tuple[bool, str]] = {
            name: (0 <= getattr(self, name) < float("inf"), "must be finite and 0 or more") for name in _WEIGHTS
        }
        depths = self.multi_depth
        rules |= {
            "multi_depth": (
                all(n >= 1 and 0 <= w < float("inf") for n, w in depths.items())
                and (not depths or any(depths.values())),
                "must map loop counts of 1 or more to weights of 0 or more, not all 0",
            ),
            "gain_horizon": (self.gain_horizon in ("best", "next"), "must be best or next"),
            "loop_grad_normalization": (
                self.loop_grad_normalization in ("none", "by_loops"),
                "must be none or by_loops",
            ),
            "clip_each_norm": (_is_optional_positive(self.clip_each_norm), "must be positive or None"),
            "spectral_target": (_is_optional_positive(self.spectral_target), "must be positive or None"),
            "spectral_every": (self.spectral_every >= 0, "must be 0 or more"),
            "observe_every": (self.observe_every is None or self.observe_every >= 0, "must be 0 or more, or None"),
            "max_skipped_steps": (self.max_skipped_steps >= 1, "must be at least 1"),
            "eval_loops": (self.eval_loops is None or self.eval_loops >= 1, "must be at least 1, or None"),
            "eval_depths": (all(depth >= 1 for depth in self.eval_depths), "must be loop counts of 1 or more"),
        }
        return [ConfigFault(name, getattr(self, name), why) for name, (is_valid, why) in rules.items() if not is_valid]

    def document(self) -> dict[str, Any]:
        """The options as JSON data."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["multi_depth"] = {str(n): w for n, w in self.multi_depth.items()}
        return values | {"eval_depths": list(self.eval_depths)}


def _is_optional_positive(value: float | None) -> bool:
    return value is None or 0 < value < float("inf")
