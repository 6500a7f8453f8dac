"""Cognexis: recurrent-depth language models for transformers.

Importing the package registers the model with the Auto classes and makes every ``save_pretrained`` write the code
that lets the saved folder load where the package is not installed.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from cognexis.configuration_cognexis import CognexisConfig
from cognexis.decoder.cache import CognexisCache
from cognexis.decoder.generation import CognexisGenerateBeamOutput, CognexisGenerateOutput
from cognexis.decoder.streaming import StepEvent, StepEventStreamer
from cognexis.hub.bundle import write_bundle
from cognexis.modeling_cognexis import (
    CognexisForCausalLM,
    CognexisForQuestionAnswering,
    CognexisForSequenceClassification,
    CognexisForTokenClassification,
    CognexisModel,
    CognexisPreTrainedModel,
)

__version__ = "0.1.0"

AutoConfig.register("cognexis", CognexisConfig, exist_ok=True)
for _auto_class, _model_class in (
    (AutoModel, CognexisModel),
    (AutoModelForCausalLM, CognexisForCausalLM),
    (AutoModelForSequenceClassification, CognexisForSequenceClassification),
    (AutoModelForTokenClassification, CognexisForTokenClassification),
    (AutoModelForQuestionAnswering, CognexisForQuestionAnswering),
):
    _auto_class.register(CognexisConfig, _model_class, exist_ok=True)
CognexisConfig._code_writer = write_bundle

__all__ = [
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
    "StepEvent",
    "StepEventStreamer",
]
