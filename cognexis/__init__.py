"""Cognexis: recurrent-depth language models for transformers.

Importing the package registers the model with the Auto classes and makes every ``save_pretrained`` write the code
that lets the saved folder load where the package is not installed. Only the command line puts that off, until a
command needs it: its help must not wait for torch.
"""

import sys
from pathlib import PurePath

__version__ = "0.1.0"

# While `python -m cognexis` looks for the module to run, sys.argv[0] is "-m"; the installed script has our name.
if not sys.argv or PurePath(sys.argv[0]).stem not in ("-m", "cognexis"):
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
        register_scheduler,
    )

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
    "register_scheduler",
]
