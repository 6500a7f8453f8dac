"""Cognexis: recurrent-depth language models for transformers.

Once the package is imported, the Auto classes know the model, and every ``save_pretrained`` writes the code that lets
the saved folder load where the package is not installed. What that takes is imported when transformers' Auto classes
or one of the names below are first used, so that ``cognexis.cortex_layers`` needs no transformers. The command line
puts it off further, until a command needs it: its help must not wait for torch.
"""

import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from cognexis.registration_hook import register_when_needed

if TYPE_CHECKING:
    from cognexis.registration import (
        CardFacts,
        CognexisCache,
        CognexisConfig,
        CognexisForCausalLM,
        CognexisForQuestionAnswering,
        CognexisForSequenceClassification,
        CognexisForTokenClassification,
        CognexisGenerateBeamOutput,
        CognexisGenerateOutput,
        CognexisModel,
        CognexisPreTrainedModel,
        CognexisTokenizer,
        DepthScore,
        LoopScheduler,
        StepEvent,
        StepEventStreamer,
        TrainingRecord,
        register_layer_type,
        register_scheduler,
    )

__version__ = "0.1.0"

__all__ = [
    "CardFacts",
    "CognexisCache",
    "CognexisConfig",
    "CognexisForCausalLM",
    "CognexisForQuestionAnswering",
    "CognexisForSequenceClassification",
    "CognexisForTokenClassification",
    "CognexisGenerateBeamOutput",
    "CognexisGenerateOutput",
    "CognexisModel",
    "CognexisPreTrainedModel",
    "CognexisTokenizer",
    "DepthScore",
    "LoopScheduler",
    "StepEvent",
    "StepEventStreamer",
    "TrainingRecord",
    "register_layer_type",
    "register_scheduler",
]

# While `python -m cognexis` looks for the module to run, sys.argv[0] is "-m"; the installed script has our name.
if not sys.argv or PurePath(sys.argv[0]).stem not in ("-m", "cognexis"):
    register_when_needed()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from cognexis.registration import __name__ as registration

    return getattr(sys.modules[registration], name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
