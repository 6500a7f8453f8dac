"""How many loops a training step runs: bounds that grow, distributions, and what is remembered of the draws."""

from cognexis.training.curriculum.curriculum import LoopCurriculum, LoopSample
from cognexis.training.curriculum.phases import PHASES, SchedulerPhases
from cognexis.training.curriculum.settings import CurriculumSettings

__all__ = ["PHASES", "CurriculumSettings", "LoopCurriculum", "LoopSample", "SchedulerPhases"]
