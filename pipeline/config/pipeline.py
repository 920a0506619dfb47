"""All settings together."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from pipeline.config.compare import CompareConfig
from pipeline.config.data import DataConfig
from pipeline.config.doctor import DoctorConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.export import ExportConfig
from pipeline.config.format import FormatConfig
from pipeline.config.model import ModelConfig
from pipeline.config.quantize import QuantizeConfig
from pipeline.config.serve import ServeConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.config.training import QatConfig, TrainConfig
from pipeline.config.upcast import UpcastConfig
from pipeline.config.verify import VerifyConfig


class Stage(Enum):
    """The stages, with their meanings. `all` runs those above it, in this order."""

    doctor = "check the data, and whether the run fits on this machine"
    upcast = "MXFP4 checkpoint -> BF16, bit-exact"
    sft = "supervised fine-tuning"
    quantize = "insert fake quantization: the PTQ baseline"
    qat = "quantization-aware training of the quantized model, at a low learning rate"
    export = "write the checkpoint for serving, by default MXFP4 in the original's layout"
    verify = "prove that the export is correct"
    evaluate = "measure a stage's model: loss, perplexity, size and weight error"
    compare = "report the gains and losses of each step, of one run or several"
    all = "all stages above in order; skips stages that are up to date, resumes interrupted ones"
    publish = (
        "add a model card to the verified export; with export.push_to_hub, upload it (stage=all then includes publish)"
    )
    serve = "start vLLM, SGLang, TensorRT-LLM or llama.cpp on the verified export, and ask it a question"


class Device(Enum):
    """Where tensors are converted."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Sharding(Enum):
    """How the processes of a training stage share one model: the rows of sharding.STRATEGIES."""

    none = "none"
    fsdp2 = "fsdp2"
    zero2 = "zero2"
    zero3 = "zero3"


@dataclass
class PipelineConfig:
    """The whole pipeline. Only `stage` says which part runs now."""

    stage: Stage = MISSING
    """The part of the pipeline to run."""
    recipe: str = "default"
    """Name of the recipe. Choose it on the command line with recipe=<name>."""
    run_dir: str = "runs/${recipe}"
    """Directory of the run's artifacts."""
    base_run: Optional[str] = None
    """Another run whose models, up to qat, are reused where they have the same settings. Sweeps (-m) set it."""
    device: Device = Device.auto
    """Device of upcast and export; auto: the GPU if there is one. Results are bit-identical on every device."""
    overwrite: bool = False
    """Rebuild a complete stage, and discard unfinished work of the stage if its settings have changed."""
    sharding: Sharding = Sharding.none
    """State split over training processes. fsdp2, zero3: parameters, gradients, optimizer; zero2: the last two."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)
    upcast: UpcastConfig = field(default_factory=UpcastConfig)
    sft: TrainConfig = field(default_factory=TrainConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    qat: QatConfig = field(default_factory=QatConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
