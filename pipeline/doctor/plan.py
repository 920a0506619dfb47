"""The settings that the needs of a run depend on."""

from dataclasses import dataclass, field, replace

from pipeline.checkpoints.config_json import is_quantized
from pipeline.checkpoints.gpt_oss import GptOssJson
from pipeline.config import (
    DataConfig,
    Experts,
    FormatConfig,
    Method,
    PipelineConfig,
    QatConfig,
    QuantizeConfig,
    QuantizeSource,
    SftConfig,
    Sharding,
    Stage,
    TrainConfig,
    first_training,
    keeps_packed,
    leaves_nothing_to_round,
    rounds_base,
    trained_sft,
)
from pipeline.models.references import configured_format
from pipeline.numerics.formats import MXFP4, BlockFormat


@dataclass(frozen=True)
class Plan:
    """The settings that determine how much memory and disk space a run needs.

    Attributes:
        model_path: value of model.path, used in messages.
        data: section `data` of the configuration.
        sft, qat: settings of the training stages. `sft` describes adapters of another program as LoRA.
        sharding: how several processes share a model.
        target: name of the export target in TARGETS.
        format, quantize: sections of the configuration.
        experts: value of upcast.experts.
        on_gpu: whether the processes train on GPUs.
    """

    model_path: str
    data: DataConfig
    sft: SftConfig
    qat: QatConfig
    sharding: Sharding
    target: str
    format: FormatConfig = field(default_factory=FormatConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    experts: Experts | None = None
    on_gpu: bool = True

    @classmethod
    def of(cls, config: PipelineConfig) -> "Plan":
        """Take the settings from a configuration."""
        return cls(
            config.model.path,
            config.data,
            trained_sft(config.quantize.source, config.sft),
            config.qat,
            config.sharding,
            config.export.layout.name,
            config.format,
            config.quantize,
            config.upcast.experts,
        )

    def is_packed(self, stage: str, model: GptOssJson) -> bool:
        """Return whether a stage trains on packed experts. `model` is the content of the source's config.json."""
        method = (self.sft if stage == Stage.sft.name else self.qat).method
        if stage == Stage.qat.name and method is not Method.full:
            if self.rounds_base:
                return self.block_format.stores_like(MXFP4)
            if method is Method.bf16_parts and self.sft.method is Method.lora:
                return False  # `quantize` merges the adapters
        return self.starts_packed(is_mxfp4=is_quantized(model)) and method is not Method.full

    def starts_packed(self, *, is_mxfp4: bool) -> bool:
        """Return whether training starts from packed experts. `is_mxfp4`: whether the source's experts are MXFP4."""
        _, first = first_training(self.quantize.source, self.sft, self.qat)
        return keeps_packed(self.experts, first.method, is_mxfp4=is_mxfp4)

    @property
    def block_format(self) -> BlockFormat:
        """The format that QAT rounds to."""
        return configured_format(self.format)

    @property
    def rounds_base(self) -> bool:
        """Whether QAT starts from experts that `quantize` has rounded. QAT then has a base of its own."""
        return rounds_base(self.quantize, self.qat, self.format)

    @property
    def trainings(self) -> dict[str, TrainConfig]:
        """The settings of each training stage, by the stage's name. Without rounding there is no QAT.

        There is no SFT if `quantize` starts from the original, or from adapters of another program.
        """
        has_sft = self.quantize.source == QuantizeSource.sft
        found: dict[str, TrainConfig] = {Stage.sft.name: self.sft} if has_sft else {}
        if not leaves_nothing_to_round(self.quantize.source, self.sft, self.format.name):
            found[Stage.qat.name] = self.qat
        return found


def as_batched(train: TrainConfig, longest: int, max_length: int) -> tuple[TrainConfig, int]:
    """Return the settings with the actual batch size, and the number of tokens in each row of a batch.

    Rows are padded to the longest example. With packing, TRL lays all rows of a batch end to end in one row.
    """
    if not train.packing:
        return train, min(longest, max_length)
    return replace(train, batch_size=1), train.batch_size * max_length
