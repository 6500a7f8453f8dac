"""What importing the package does: the Auto classes learn the model, saving writes everything a folder needs.

The command line leaves this to the commands that need a model, because it takes seconds to import torch and
transformers.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from cognexis.checkpoints.card_facts import CardFacts, DepthScore
from cognexis.checkpoints.metadata import TrainingRecord
from cognexis.configuration_cognexis import CognexisConfig
from cognexis.decoder.cache import CognexisCache
from cognexis.decoder.generation_stats import CognexisGenerateBeamOutput, CognexisGenerateOutput
from cognexis.decoder.state_layer import register_layer_type
from cognexis.decoder.streaming import StepEvent, StepEventStreamer
from cognexis.hub.build import build_id
from cognexis.hub.bundle import write_bundle, write_tokenizer_code
from cognexis.hub.saved_records import write_saved_records
from cognexis.looping.schedulers.base import LoopScheduler
from cognexis.looping.schedulers.registry import register_scheduler
from cognexis.modeling_cognexis import (
    CognexisForCausalLM,
    CognexisForQuestionAnswering,
    CognexisForSequenceClassification,
    CognexisForTokenClassification,
    CognexisModel,
    CognexisPreTrainedModel,
)
from cognexis.tokenization_cognexis import CognexisTokenizer

AutoConfig.register("cognexis", CognexisConfig, exist_ok=True)
AutoTokenizer.register(CognexisConfig, fast_tokenizer_class=CognexisTokenizer, exist_ok=True)
for _auto_class, _model_class in (
    (AutoModel, CognexisModel),
    (AutoModelForCausalLM, CognexisForCausalLM),
    (AutoModelForSequenceClassification, CognexisForSequenceClassification),
    (AutoModelForTokenClassification, CognexisForTokenClassification),
    (AutoModelForQuestionAnswering, CognexisForQuestionAnswering),
):
    _auto_class.register(CognexisConfig, _model_class, exist_ok=True)
CognexisConfig._code_writer = write_bundle
CognexisTokenizer._code_writer = write_tokenizer_code
CognexisPreTrainedModel._folder_writers = [write_saved_records]
CognexisPreTrainedModel._build_id = staticmethod(build_id)

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
