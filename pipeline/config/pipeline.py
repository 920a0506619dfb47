"""Define PipelineConfig, which holds all settings, and the list of stages."""

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Annotated, Optional, Union

from omegaconf import MISSING

from pipeline.config.artifacts import ArtifactsConfig
from pipeline.config.bounds import Bound
from pipeline.config.compare import CompareConfig
from pipeline.config.data import DataConfig
from pipeline.config.doctor import DoctorConfig
from pipeline.config.evaluate import EvaluateConfig
from pipeline.config.export import ExportConfig
from pipeline.config.format import FormatConfig
from pipeline.config.model import ModelConfig
from pipeline.config.quantize import QuantizeConfig, QuantizeSource, RoundingMethod
from pipeline.config.serve import ServeConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.config.training import QatConfig, SftConfig
from pipeline.config.upcast import Experts, UpcastConfig
from pipeline.config.verify import VerifyConfig


class Stage(Enum):
    """The stages. Each value describes its stage for the help. `all` runs the stages above it in this order."""

    doctor = "check the data, and whether the run fits on this machine"
    upcast = "make the model that training starts from; experts in MXFP4 are decoded to BF16, or stay frozen"
    sft = "supervised fine-tuning (SFT): teach the model with the conversations, without rounding"
    quantize = "post-training quantization (PTQ): round the trained experts to 4 bits, without more training"
    qat = "quantization-aware training (QAT): train on while each forward pass rounds the experts"
    export = "write the checkpoint for serving, by default MXFP4 in the original's layout"
    verify = "prove that the export holds the trained weights, bit for bit"
    controls = "train and round the models that QAT must beat (stage=all includes it with controls=true)"
    evaluate = "measure models on held-out data: loss, size and weight error, and on request answers"
    compare = "report what each step gained or lost, for one run or several"
    all = "run all stages above in order; skip stages that are up to date, and resume interrupted ones"
    publish = (
        "add a model card to the verified export; with export.push_to_hub, upload it (stage=all then includes publish)"
    )
    serve = "start vLLM, SGLang, TensorRT-LLM or llama.cpp on the verified export, and ask it a question"


class Device(Enum):
    """Device on which upcast and export convert tensors."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Sharding(Enum):
    """Strategies by which training processes share one model: the rows of sharding.STRATEGIES."""

    none = "none"
    fsdp2 = "fsdp2"
    zero2 = "zero2"
    zero3 = "zero3"


def can_train_parts(stage: str, source: str, experts: Experts | None) -> bool:
    """Return whether `method=bf16_parts` is possible in a training stage, with these other settings of the run."""
    is_first_in_bf16 = stage == Stage.sft.name and experts is Experts.bf16
    return source != QuantizeSource.upcast and not is_first_in_bf16


MORE_SFT, BF16_PARTS = "more_sft", "bf16_parts"
"""Names of the controls that train. Each other control has the name of its rounding method."""

CONTROLS = (*(method.name for method in RoundingMethod if method is not RoundingMethod.auto), MORE_SFT, BF16_PARTS)
"""Names of all controls that a run may have."""

_REBUILDABLE = (*(stage.name for stage in Stage if stage not in (Stage.all, Stage.serve)), *CONTROLS)
_OF_CONTROLS = {
    f"{control}/{stage.name}" for control in CONTROLS for stage in (Stage.upcast, Stage.sft, Stage.quantize)
}
"""The names that `overwrite` may list, and names of one stage of a control, which the help does not list."""


def list_names(overwrite: bool | str) -> tuple[str, ...]:
    """Return the names that `overwrite` lists, as in `overwrite=sft,quantize`. true and false list none.

    A name is a stage, a control (`more_sft`), or a stage of a control (`more_sft/quantize`).
    """
    names = () if isinstance(overwrite, bool) else overwrite.split(",")
    return tuple(name.strip().removeprefix(f"{Stage.controls.name}/") for name in names)


def list_controls(overwrite: bool | str) -> tuple[str, ...]:
    """Return the names in `overwrite` that belong to one control: the control, or a stage of it."""
    return tuple(name for name in list_names(overwrite) if name.partition("/")[0] in CONTROLS)


def rebuilds(overwrite: bool | str, stage: Stage) -> bool:
    """Return whether `overwrite` asks to rebuild a stage."""
    return overwrite if isinstance(overwrite, bool) else stage.name in list_names(overwrite)


_LIST_OF_STAGES = Bound(
    f"true, false, or stages and controls with commas between them: {', '.join(_REBUILDABLE)}",
    lambda value: isinstance(value, bool) or {*list_names(value)} <= {*_REBUILDABLE, *_OF_CONTROLS},
    ("true", "false", *_REBUILDABLE),
)


@dataclass
class PipelineConfig:
    """Settings of the whole pipeline. `stage` names the part to run."""

    stage: Stage = MISSING
    """Stage to run: one part of the pipeline, or all."""
    recipe: str = "default"
    """Name of the recipe. Choose it on the command line with recipe=<name>."""
    run_dir: str = "runs/${recipe}"
    """Directory of the run's artifacts. Without recipe=, an existing run supplies the settings that it recorded."""
    base_run: Optional[str] = None
    """Directory of another run. Its models (upcast to qat) are reused if settings match. Sweeps (-m) set base_run."""
    device: Device = Device.auto
    """Device of upcast and export; auto: the GPU if there is one. All devices give bit-identical results."""
    overwrite: Annotated[Union[bool, str], _LIST_OF_STAGES] = False
    """Rebuild a complete stage or control. Unfinished work of other settings is discarded. all needs names: sft,qat."""
    sharding: Sharding = Sharding.none
    """Split over processes: parameters, gradients and optimizer (fsdp2, zero3), or gradients and optimizer (zero2)."""
    controls: bool = False
    """Let stage=all also make the controls of QAT: more SFT and the best PTQ, PTQ by each rounding, BF16 parts."""
    artifacts: ArtifactsConfig = field(default_factory=ArtifactsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    doctor: DoctorConfig = field(default_factory=DoctorConfig)
    upcast: UpcastConfig = field(default_factory=UpcastConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    format: FormatConfig = field(default_factory=FormatConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    qat: QatConfig = field(default_factory=QatConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def with_target(self) -> "PipelineConfig":
        """Return these settings with the export target that `export` uses, if it is null."""
        return replace(self, export=replace(self.export, target=self.export.layout))
