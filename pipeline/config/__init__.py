"""Define the settings and check them: types, defaults, bounds, descriptions, rules and the command line.

This package may import the tables of formats, export targets and engines. It must not import the code of models, data
sets or stages.
"""

from pipeline.config.compare import CompareConfig
from pipeline.config.data import (
    BlendPartConfig,
    ColumnsConfig,
    DataConfig,
    DataPartConfig,
    ReasoningEffort,
    RenderingForm,
    Supervise,
    ValidationConfig,
)
from pipeline.config.doctor import DoctorConfig
from pipeline.config.evaluate import (
    DuringTrainingConfig,
    EndpointApi,
    EndpointConfig,
    EvaluateConfig,
    GenerationConfig,
    JudgeConfig,
    LmEvalConfig,
    PromptsConfig,
    ServerConfig,
)
from pipeline.config.export import DEFAULT_TARGET, CardConfig, ExportConfig, ExportTarget
from pipeline.config.format import FormatConfig, FormatName, ScaleRule
from pipeline.config.keys import is_known, schema, setting_keys, unknown_key, value_problem
from pipeline.config.model import SYNTHETIC, Dtype, ModelConfig, TinyConfig
from pipeline.config.pipeline import Device, PipelineConfig, Sharding, Stage, can_train_parts
from pipeline.config.quantize import (
    Fallback,
    QuantizeConfig,
    QuantizeSource,
    RoundingMethod,
    RoundingScales,
    calibration_tokens,
    first_training,
    leaves_nothing_to_round,
    packs_rounded,
    raise_if_nothing_to_round,
    rounds_base,
    writes_rounded,
)
from pipeline.config.serve import ServeConfig, ServingEngine
from pipeline.config.tracking import TrackingBackend, TrackingConfig, Upload
from pipeline.config.training import (
    AUTO_ATTENTION,
    DistillationConfig,
    ExpertsImplementation,
    LoraConfig,
    LoraTarget,
    Method,
    Oscillation,
    Precision,
    QatConfig,
    SftConfig,
    TrainConfig,
    adapted_layers,
)
from pipeline.config.upcast import Experts, UpcastConfig, keeps_packed
from pipeline.config.verify import LoadingEngine, PythonConfig, VerifyConfig

__all__ = [
    "AUTO_ATTENTION",
    "DEFAULT_TARGET",
    "SYNTHETIC",
    "BlendPartConfig",
    "CardConfig",
    "ColumnsConfig",
    "CompareConfig",
    "DataConfig",
    "DataPartConfig",
    "Device",
    "DistillationConfig",
    "DoctorConfig",
    "Dtype",
    "DuringTrainingConfig",
    "EndpointApi",
    "EndpointConfig",
    "EvaluateConfig",
    "Experts",
    "ExpertsImplementation",
    "ExportConfig",
    "ExportTarget",
    "Fallback",
    "FormatConfig",
    "FormatName",
    "GenerationConfig",
    "JudgeConfig",
    "LmEvalConfig",
    "LoadingEngine",
    "LoraConfig",
    "LoraTarget",
    "Method",
    "ModelConfig",
    "Oscillation",
    "PipelineConfig",
    "Precision",
    "PromptsConfig",
    "PythonConfig",
    "QatConfig",
    "QuantizeConfig",
    "QuantizeSource",
    "ReasoningEffort",
    "RenderingForm",
    "RoundingMethod",
    "RoundingScales",
    "ScaleRule",
    "ServeConfig",
    "ServerConfig",
    "ServingEngine",
    "SftConfig",
    "Sharding",
    "Stage",
    "Supervise",
    "TinyConfig",
    "TrackingBackend",
    "TrackingConfig",
    "TrainConfig",
    "UpcastConfig",
    "Upload",
    "ValidationConfig",
    "VerifyConfig",
    "adapted_layers",
    "calibration_tokens",
    "can_train_parts",
    "first_training",
    "is_known",
    "keeps_packed",
    "leaves_nothing_to_round",
    "packs_rounded",
    "raise_if_nothing_to_round",
    "rounds_base",
    "schema",
    "setting_keys",
    "unknown_key",
    "value_problem",
    "writes_rounded",
]
