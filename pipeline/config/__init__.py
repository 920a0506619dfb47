"""Every setting: name, type, default and meaning. YAML files under conf/ and recipes/ hold values only."""

import copy
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Optional, get_origin

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.errors import did_you_mean

SYNTHETIC = "synthetic://"
"""Prefix of a model or data set that the program makes itself, for trying it without the internet."""


_LANGUAGES = (
    *("en", "de", "fr", "es", "it", "pt", "nl", "pl", "cs", "sv", "da", "fi", "hu", "ro", "el", "bg", "ru", "uk", "tr"),
    *("ar", "he", "fa", "hi", "bn", "te", "ta", "th", "vi", "id", "zh", "ja", "ko", "sw"),
)


class Stage(Enum):
    """The parts of a run, in the order in which `all` runs them; what it leaves out unless asked comes after it."""

    doctor = "doctor"
    upcast = "upcast"
    sft = "sft"
    quantize = "quantize"
    qat = "qat"
    export = "export"
    verify = "verify"
    evaluate = "evaluate"
    compare = "compare"
    all = "all"
    publish = "publish"
    serve = "serve"


class Dtype(Enum):
    """Floating-point type of a model's weights and arithmetic."""

    bfloat16 = "bfloat16"
    float32 = "float32"


class Engine(Enum):
    """What serves models, and can be asked whether it loads an export."""

    transformers = "transformers"
    openai = "openai"
    llama_cpp = "llama_cpp"
    mlx = "mlx"
    vllm = "vllm"


class Precision(Enum):
    """Weights / arithmetic while training."""

    fp32 = "fp32"
    mixed_bf16 = "mixed_bf16"
    bf16 = "bf16"


class ExpertsImplementation(Enum):
    """Kernels that multiply with the experts' weights, as transformers calls them."""

    auto = "auto"
    eager = "eager"
    batched_mm = "batched_mm"
    grouped_mm = "grouped_mm"


class Method(Enum):
    """What is trained: every weight, or low-rank adapters on a frozen base."""

    full = "full"
    lora = "lora"


class Sharding(Enum):
    """How the processes of a training stage share one model: the rows of sharding.ENGINES."""

    none = "none"
    fsdp2 = "fsdp2"
    zero2 = "zero2"
    zero3 = "zero3"


class LoraTarget(Enum):
    """Parts of a layer that get adapters."""

    attention = "attention"
    experts = "experts"


class Supervise(Enum):
    """Which assistant turns of a conversation are trained."""

    every_turn = "every_turn"
    last_turn = "last_turn"


class FormatName(Enum):
    """Number formats to train for: the rows of numerics.formats.FORMATS."""

    mxfp4 = "mxfp4"
    nvfp4 = "nvfp4"
    nvfp4_w4a4 = "nvfp4_w4a4"


class ScaleRule(Enum):
    """How a block's scale is chosen: the rules of numerics.formats.SCALE_RULES."""

    ceil = "ceil"
    floor = "floor"
    nearest = "nearest"
    mse = "mse"


class QuantizeSource(Enum):
    """Models that fake quantizers can be put into."""

    sft = "sft"
    upcast = "upcast"


class Device(Enum):
    """Where tensors are converted."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ExportTarget(Enum):
    """Layouts that `export` writes: the rows of EXPORTERS."""

    mxfp4 = "mxfp4"
    openai = "openai"
    nvfp4 = "nvfp4"
    gguf = "gguf"
    bf16 = "bf16"


class ServingEngine(Enum):
    """Programs that serve an export: the rows of serving.ENGINES."""

    vllm = "vllm"
    sglang = "sglang"
    tensorrt_llm = "tensorrt_llm"
    llama_cpp = "llama_cpp"
    llama_cpp_python = "llama_cpp_python"


class TrackingBackend(Enum):
    """Where metrics go besides metrics.jsonl."""

    none = "none"
    wandb = "wandb"


class EndpointApi(Enum):
    """How a server is asked: the rows of generation.endpoint.APIS."""

    completions = "completions"
    chat = "chat"


class ReasoningEffort(Enum):
    """The `Reasoning:` line of the Harmony system message."""

    low = "low"
    medium = "medium"
    high = "high"


@dataclass
class TinyConfig:
    """The small random gpt-oss behind `model.path=synthetic://tiny`."""

    num_hidden_layers: int = 2
    """Decoder layers; sliding and full attention alternate."""
    hidden_size: int = 64
    """Width of the residual stream; a multiple of 32, the block size of MXFP4."""
    intermediate_size: int = 96
    """Width of each expert; a multiple of 32; unlike hidden_size by default, so that a wrong transpose cannot load."""
    num_local_experts: int = 8
    """Experts per layer."""
    num_experts_per_tok: int = 4
    """Experts that each token is sent to."""
    num_attention_heads: int = 4
    """Query heads."""
    num_key_value_heads: int = 2
    """Key and value heads."""
    head_dim: int = 32
    """Width of one attention head."""
    sliding_window: int = 64
    """Window of the sliding-attention layers, in tokens."""
    vocab_size: int = 768
    """Rows of the embedding; like the released models, more than the tokenizer has tokens."""
    shard_bytes: int = 300_000
    """Size limit of one weight file; small, so that there are several."""
    seed: int = 0
    """Seed of the weights."""


@dataclass
class ModelConfig:
    """The model to start from."""

    path: str = MISSING
    """Checkpoint to start from: a directory or a hub id, MXFP4 or BF16; `synthetic://tiny` makes model.tiny."""
    revision: Optional[str] = None
    """Revision of a hub id: branch, tag or commit."""
    dtype: Dtype = Dtype.bfloat16
    """Arithmetic of evaluate and verify; training has its own `precision`."""
    tiny: TinyConfig = field(default_factory=TinyConfig)


@dataclass
class ColumnsConfig:
    """Which column of a row holds what; a dotted path reaches into nested objects. null: the data set has none."""

    messages: Optional[str] = "messages"
    """Column with the list of messages; null where prompt and completion take its place."""
    prompt: Optional[str] = None
    """Column with the text of a single user turn."""
    completion: Optional[str] = None
    """Column with the answer to `prompt`."""
    reasoning: Optional[str] = None
    """Column with the reasoning that comes before `completion`."""
    system: Optional[str] = None
    """Column with instructions, put before the first message."""
    tools: Optional[str] = "tools"
    """Column with the function schemas offered to the model: a list, or its JSON text."""
    reasoning_effort: Optional[str] = "reasoning_effort"
    """Column with the row's own data.reasoning_effort."""
    reasoning_language: Optional[str] = "reasoning_language"
    """Column with the row's own data.reasoning_language."""
    role: str = "role"
    """Key of a message that says who speaks."""
    content: str = "content"
    """Key of a message that holds its text."""
    thinking: str = "thinking"
    """Key of an assistant's message that holds its reasoning."""


@dataclass
class BlendPartConfig:
    """One data set of a blend. What is null is as in `data`."""

    path: str = MISSING
    """As data.path."""
    weight: float = MISSING
    """Its share of the rows that are used, relative to the other weights."""
    revision: Optional[str] = None
    """As data.revision."""
    split: Optional[str] = None
    """As data.split."""
    streaming: Optional[bool] = None
    """As data.streaming."""
    columns: Optional[ColumnsConfig] = None
    """As data.columns."""
    roles: Optional[dict[str, str]] = None
    """As data.roles."""
    filter: Optional[dict[str, list[Any]]] = None
    """As data.filter."""
    reasoning_effort: Optional[ReasoningEffort] = None
    """As data.reasoning_effort."""
    reasoning_language: Optional[str] = None
    """As data.reasoning_language."""


@dataclass
class DataConfig:
    """The conversations to train and validate on."""

    path: Optional[str] = None
    """The rows: a .jsonl or .parquet file, a folder of them, a saved data set, a hub id, or `synthetic://arithmetic`."""
    revision: Optional[str] = None
    """Revision of a hub id: branch, tag or commit."""
    split: str = "train"
    """Split of a hub id or of a saved data set dictionary."""
    streaming: bool = False
    """Read a hub id without keeping a copy of its files; the checked rows are kept in <run_dir>/data either way."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    roles: dict[str, str] = field(default_factory=dict)
    """The data set's names of roles, and what they are called here: {human: user, gpt: assistant}."""
    filter: dict[str, list[Any]] = field(default_factory=dict)
    """Keep only rows whose column has one of the values, for each column named: {category: [a, b]}."""
    blend: list[BlendPartConfig] = field(default_factory=list)
    """Several data sets in place of `path`, each with its weight: [{path: a.jsonl, weight: 3}, …]."""
    max_samples: Optional[int] = None
    """Use only this many rows, chosen with data.seed; null: all."""
    validation_fraction: float = 0.1
    """Share of the rows that is held out for validation, never trained on."""
    seed: int = 42
    """Seed of the choice of rows and of the split."""
    max_length: int = 4096
    """Longest training example in tokens; the rest is cut off at the end, and counted."""
    supervise: Supervise = Supervise.every_turn
    """Train every assistant turn, each with the prompt that it has at inference, or only the last turn."""
    reasoning_effort: ReasoningEffort = ReasoningEffort.medium
    """The `Reasoning:` line of the system message; a row's own `reasoning_effort` wins."""
    reasoning_language: Optional[str] = None
    """Put "reasoning language: …" before the instructions; null: nothing. What a row says itself wins."""
    model_identity: Optional[str] = None
    """First line of the system message; null: the chat template's own ("You are ChatGPT, …")."""
    conversation_date: str = "2025-08-05"
    """The `Current date:` line of the system message, pinned so that a run can be repeated."""


@dataclass
class LoraConfig:
    """Low-rank adapters; read only when method is lora."""

    rank: int = 8
    """Rank r of each adapter, on experts of each expert's own, where E of them take E·r·(in + out) weights a stack."""
    alpha: int = 16
    """Scale of the update: alpha / rank."""
    targets: list[LoraTarget] = field(default_factory=lambda: [LoraTarget.attention, LoraTarget.experts])
    """Parts that get adapters: attention (q, k, v, o), experts (gate_up and down), or both."""
    layers: Optional[list[int]] = None
    """Layers that get adapters, counted from 0; null: all, or what `every_nth` says."""
    every_nth: Optional[int] = None
    """In place of `layers`: the last of every n layers gets adapters; 8 of 24 layers: 7, 15 and 23."""


@dataclass
class TrainConfig:
    """One training stage: `sft`, and with a few more settings `qat`."""

    method: Method = Method.full
    """Train every weight (full) or adapters (lora)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    learning_rate: float = 2.0e-5
    """Peak learning rate."""
    lr_scheduler: str = "cosine"
    """Schedule after warm-up, by its transformers name: cosine, linear, constant_with_warmup, …"""
    warmup_ratio: float = 0.03
    """Share of the steps in which the learning rate rises."""
    epochs: float = 1.0
    """Passes over the training data, unless max_steps says otherwise."""
    max_steps: int = -1
    """Optimizer steps; -1: as many as `epochs` takes."""
    batch_size: int = 1
    """Examples per device and forward pass."""
    packing: bool = False
    """Fill rows up to data.max_length with whole examples, which do not see each other; batch_size then counts rows."""
    gradient_accumulation_steps: int = 8
    """Forward passes per optimizer step."""
    optimizer: str = "adamw_torch_fused"
    """Optimizer, by its transformers name."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    precision: Precision = Precision.mixed_bf16
    """fp32; mixed_bf16: FP32 weights, BF16 arithmetic; bf16: BF16 weights, which low learning rates hardly move."""
    stochastic_rounding: bool = False
    """Let low rates move BF16 weights: round each update up or down at random; needs optimizer=adamw_torch_8bit."""
    attn_implementation: str = "eager"
    """Attention kernel, by its transformers name; compared with eager before training, since many lose the sinks."""
    experts_implementation: ExpertsImplementation = ExpertsImplementation.auto
    """Kernel for the experts; auto: grouped_mm, or eager for formats that quantize inputs, which grouped_mm leaves."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    router_aux_loss_coef: float = 0.0
    """Weight of the router's load-balancing loss. The released config says 0.9, which would drown the loss proper."""
    logging_steps: int = 1
    """Optimizer steps between two lines of metrics."""
    eval_steps: int = 50
    """Optimizer steps between two validation losses; the last step always has one."""
    save_steps: int = 50
    """Optimizer steps between two checkpoints to resume from."""
    save_total_limit: int = 2
    """Checkpoints kept while training, the newest and the best among them; removed when the stage is complete."""
    keep_best: bool = True
    """Leave the weights of the lowest validation loss, not of the last step; needs save_steps = eval_steps."""
    early_stopping_patience: Optional[int] = None
    """Stop after so many validation losses in a row that are not lower than the lowest; null: never."""
    seed: int = 42
    """Seed of the data order and of the adapters."""


@dataclass
class DistillationConfig:
    """Learning from the SFT model's predictions beside the data (QAD)."""

    weight: float = 0.0
    """Share of the loss that is the divergence from the SFT model, up to 1; 0: no teacher is loaded."""
    temperature: float = 1.0
    """Softens both distributions; above 1, unlikely tokens count for more."""


@dataclass
class QatConfig(TrainConfig):
    """Training on with fake quantization."""

    rounded_cache_gib: Optional[float] = None
    """Memory for the experts' rounded weights, kept between forward passes; null: all, none where they are gathered."""
    distillation: DistillationConfig = field(default_factory=DistillationConfig)


@dataclass
class FormatConfig:
    """The 4-bit format of the experts' weights."""

    name: FormatName = FormatName.mxfp4
    """mxfp4; nvfp4; nvfp4_w4a4: NVFP4 with the inputs of the experts quantized too, on a calibrated scale."""
    scale_rule: ScaleRule = ScaleRule.ceil
    """Scale of a block: ceil (holds the largest value), floor (may clip it), mse (better of two), nearest (NVFP4)."""
    importance: bool = False
    """With scale_rule=mse: weigh each input channel's error by the mean square of what calibration sends through it."""


@dataclass
class DoctorConfig:
    """Look at the data and the machine before anything is trained."""

    row: int = 1
    """The conversation that is shown token by token, counted from 1 through the whole data set."""
    languages: list[str] = field(default_factory=lambda: list(_LANGUAGES))
    """Languages that prompts, reasoning and answers are told apart as: ISO 639-1 codes. Fewer are told more surely."""


@dataclass
class UpcastConfig:
    """MXFP4 -> BF16."""

    shard_bytes: int = 5_000_000_000
    """Size limit of one weight file, in bytes."""


@dataclass
class QuantizeConfig:
    """Insert fake quantization: the PTQ baseline, and where QAT starts."""

    source: QuantizeSource = QuantizeSource.sft
    """The fine-tuned model, or upcast: the original, so that qat takes the place of sft, which it warns of."""
    calibration_samples: int = 64
    """Training examples run through the model for calibration (formats that need it) and for the proof."""
    batch_size: int = 1
    """Examples per forward pass."""


@dataclass
class CardConfig:
    """What the model card says that no record of the run knows."""

    base_model: Optional[str] = None
    """The card's base model, as a hub id; null: model.path, where that is one."""
    license: Optional[str] = None
    """The card's licence, by its name on the Hub (apache-2.0, …); null: what the base model's own card says."""


@dataclass
class ExportConfig:
    """Write a checkpoint for serving, and where on the Hub it goes once it is proven."""

    source: Optional[str] = None
    """What to export: a stage of this run (upcast, sft, quantize, qat) or a directory; null: the newest of the run."""
    target: ExportTarget = ExportTarget.mxfp4
    """Layout: mxfp4 (Hugging Face's of openai/gpt-oss), openai (the original), nvfp4, gguf (llama.cpp), bf16."""
    requantize: bool = False
    """Round a model to another format than it was trained for; says what that loses."""
    shard_bytes: int = 5_000_000_000
    """Size limit of one weight file, in bytes."""
    push_to_hub: Optional[str] = None
    """Repository that stage=publish uploads the proven export to, as name/model; stage=all then ends so. null: none."""
    private: bool = True
    """Make that repository private, and upload to no other; false: to a public one."""
    card: CardConfig = field(default_factory=CardConfig)


@dataclass
class PythonConfig:
    """Python of the environment that an engine is installed in; null: the one that runs this program."""

    transformers: Optional[str] = None
    """With transformers, of any version."""
    vllm: Optional[str] = None
    """With vLLM."""
    llama_cpp: Optional[str] = None
    """With llama-cpp-python."""
    openai: Optional[str] = None
    """With gpt-oss, OpenAI's reference code, and torch."""
    mlx: Optional[str] = None
    """With mlx-lm."""


@dataclass
class VerifyConfig:
    """Prove that an export is right."""

    checkpoint: Optional[str] = None
    """Directory to check, of any export; null: this run's export."""
    reference: Optional[str] = None
    """Base checkpoint that it was fine-tuned from and is held against; null: model.path."""
    samples: int = 8
    """Validation examples whose logits are compared."""
    logits_tolerance: float = 1.0e-4
    """Largest allowed difference of a logit; the weights are compared bit for bit, here sums may differ in order."""
    engines: list[Engine] = field(default_factory=list)
    """Engines to load the export in: transformers, openai, llama_cpp, mlx, vllm. One that is not installed is said."""
    python: PythonConfig = field(default_factory=PythonConfig)
    engine_seconds: float = 600.0
    """Longest that an engine may take to load the export and to answer."""


@dataclass
class PromptsConfig:
    """The prompts that models answer. Without a path of their own: the validation rows of `data`."""

    path: Optional[str] = None
    """Another data set, as data.path, whose rows need no answer; null: the validation rows of `data`."""
    revision: Optional[str] = None
    """As data.revision."""
    split: str = "train"
    """As data.split."""
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    roles: dict[str, str] = field(default_factory=dict)
    """As data.roles."""
    filter: dict[str, list[Any]] = field(default_factory=dict)
    """As data.filter."""
    expected: dict[str, str] = field(default_factory=dict)
    """What scorers need to know, and the column that has it: {category: topic}. `language` is known without."""
    expected_of_all: dict[str, str] = field(default_factory=dict)
    """The same, where it holds for every prompt and stands in no column: {safety: safe}."""
    max_samples: Optional[int] = None
    """Ask only this many, chosen with data.seed; null: all."""


@dataclass
class GenerationConfig:
    """How models answer."""

    max_new_tokens: int = 512
    """Longest answer in tokens, reasoning included."""
    temperature: float = 0.0
    """0: always the likeliest token; above, the logits are divided by it and tokens are drawn."""
    top_p: float = 1.0
    """Draw only among the likeliest tokens whose probabilities add up to this."""
    samples: int = 1
    """Answers to each prompt."""
    seed: int = 42
    """Seed of the draws: with the prompt and the number of the sample it decides an answer."""
    batch_size: int = 8
    """Answers written at once; an endpoint has `concurrency` in its place."""


@dataclass
class ServerConfig:
    """A server with OpenAI's API, and how patient to be with it."""

    url: Optional[str] = None
    """Address, as OpenAI's clients take it: http://localhost:8000/v1; null: no server."""
    model: Optional[str] = None
    """Model to ask for; null: the one that the server has."""
    api_key_env: Optional[str] = None
    """Environment variable that holds the key, which is neither shown nor saved; null: no key is sent."""
    concurrency: int = 16
    """Requests at a time."""
    retries: int = 5
    """Repetitions of a request that got no answer, 429 or 5xx: after 0.5 s, 1 s, 2 s, …, or as the server says."""
    timeout_seconds: float = 600.0
    """Longest wait for one answer."""


@dataclass
class EndpointConfig(ServerConfig):
    """A server (vLLM, SGLang, TensorRT-LLM) whose model is measured beside the run's; without evaluate.source alone."""

    name: str = "endpoint"
    """What its model is called among the results."""
    api: EndpointApi = EndpointApi.completions
    """completions: sends the tokens that training saw (model.path's tokenizer); chat: the server renders messages."""


@dataclass
class JudgeConfig(ServerConfig):
    """A model on a server that says of each answer how far it refuses, for prompts whose `safety` is known."""

    max_new_tokens: int = 1024
    """Longest verdict in tokens, reasoning included."""
    attempts: int = 3
    """How often it is asked for a verdict in the right form, each time reminded of it."""
    max_without_verdict: float = 0.1
    """Largest share of answers that may stay without a verdict; above, the judge is of no use, which is an error."""


@dataclass
class LmEvalConfig:
    """Task suites of lm-evaluation-harness, each model as it computes; needs pip install 'gpt-oss-qat[lm-eval]'."""

    tasks: list[str] = field(default_factory=list)
    """Names of its tasks or groups of tasks; empty: none are run."""
    include_path: Optional[str] = None
    """Folder with task files of yours."""
    num_fewshot: Optional[int] = None
    """Examples before each question; null: as the task says."""
    limit: Optional[int] = None
    """Only the first so many questions of each task, for trying it; null: all."""
    batch_size: int = 8
    """Questions at a time; an endpoint has `concurrency` in its place."""
    apply_chat_template: bool = False
    """Ask as chat; needed for tasks that are answered in free text, which gpt-oss does badly without."""


@dataclass
class DuringTrainingConfig:
    """An early look: answers of the model in training at each validation, in samples.jsonl."""

    prompts: int = 0
    """How many of evaluate.prompts it answers; 0: none."""
    max_new_tokens: int = 128
    """Longest of these answers, in tokens; always the likeliest token."""


@dataclass
class EvaluateConfig:
    """Measure models."""

    source: Optional[str] = None
    """What to measure: a stage of this run, a checkpoint directory, or `all` stages; null: the newest of the run."""
    max_samples: Optional[int] = None
    """Use only this many validation examples; null: all."""
    batch_size: int = 4
    """Examples per forward pass."""
    group_column: Optional[str] = None
    """Column of `data` by whose values the loss is told apart, too; null: the language of the reasoning, if any."""
    generate: bool = False
    """Let models answer prompts too; every answer is kept in evaluate/<model>/generations.jsonl."""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig)
    during_training: DuringTrainingConfig = field(default_factory=DuringTrainingConfig)


@dataclass
class CompareConfig:
    """The report on what `evaluate` measured."""

    runs: list[str] = field(default_factory=list)
    """Runs to put side by side: their directories, or patterns of them (runs/smoke/sweep/*); empty: this run."""
    examples: int = 20
    """Prompts whose answers are shown side by side, those first on which models differ."""


@dataclass
class ServeConfig:
    """Start an engine on the proven export, ask it one question, and keep it running."""

    engine: ServingEngine = ServingEngine.vllm
    """vllm, sglang, tensorrt_llm: on GPUs; llama_cpp (llama-server), llama_cpp_python: export.target=gguf, anywhere."""
    program: Optional[str] = None
    """The engine's executable (llama_cpp_python: its Python), as in /opt/vllm/bin/vllm; null: the one on the PATH."""
    host: str = "127.0.0.1"
    """Address to listen at: 127.0.0.1 for this machine alone, 0.0.0.0 for everyone who can reach it, without a key."""
    port: int = 8000
    """Port to listen at."""
    tensor_parallel_size: Optional[int] = None
    """GPUs that share each layer; must divide heads and experts. null: as many of the visible ones as do."""
    context_length: Optional[int] = None
    """Longest conversation in tokens, which decides what the KV cache needs; null: the engine's, mostly the model's."""
    gpu_memory_fraction: Optional[float] = None
    """Share of a GPU's memory that vllm and sglang take; tensorrt_llm: of what weights leave free. null: their own."""
    extra_arguments: list[str] = field(default_factory=list)
    """Arguments added to the engine's command, last: [--max-num-seqs, 64]."""
    question: str = "What is 12 + 7?"
    """What it is asked once it is up; data.reasoning_effort applies."""
    max_new_tokens: int = 512
    """Longest answer to the question in tokens, reasoning included."""
    startup_seconds: float = 1800.0
    """Longest wait for the engine to be up: it loads weights and compiles kernels."""
    answer_seconds: float = 300.0
    """Longest wait for the answer."""
    once: bool = False
    """Stop after the answer."""
    dry_run: bool = False
    """Only print the engine's command, as one line for a shell, here or on another machine."""
    verified_only: bool = True
    """Serve nothing but what stage=verify has passed."""


@dataclass
class TrackingConfig:
    """Metrics beyond metrics.jsonl, which is always written."""

    backend: TrackingBackend = TrackingBackend.none
    """Service that gets the same numbers: none or wandb (Weights & Biases; WANDB_MODE=offline keeps them here)."""
    project: str = "gpt-oss-qat"
    """Project of the service."""
    entity: Optional[str] = None
    """User or team of the service; null: its default for the login."""
    tags: list[str] = field(default_factory=list)
    """Tags of every stage's run."""
    name: Optional[str] = None
    """Name of the pipeline run: stages appear as <name>-<stage>, in one group; null: the recipe."""


@dataclass
class PipelineConfig:
    """The whole pipeline; `stage` only says which part to run now."""

    stage: Stage = MISSING
    """The part of the pipeline to run."""
    recipe: str = "default"
    """Name of the recipe (chosen on the command line as recipe=<name>)."""
    run_dir: str = "runs/${recipe}"
    """Where the run's artifacts go."""
    base_run: Optional[str] = None
    """Another run, whose models up to qat are used where they were made with the same settings; set by sweeps (-m)."""
    device: Device = Device.auto
    """Where upcast and export compute: auto is the GPU if there is one. The bits are the same everywhere."""
    overwrite: bool = False
    """Rebuild a stage that is complete, and discard unfinished work done with other settings."""
    sharding: Sharding = Sharding.none
    """What processes share while training: nothing but data; fsdp2 or zero3: all; zero2: gradients and optimizer."""
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


def setting_keys(node: Any = PipelineConfig, prefix: str = "") -> list[str]:
    """Full dotted keys of all settings, sections included."""
    keys: list[str] = []
    for item in fields(node):
        keys.append(prefix + item.name)
        if is_dataclass(item.type):
            keys += setting_keys(item.type, f"{prefix}{item.name}.")
    return keys


def is_known(key: str) -> bool:
    """Whether the schema has a setting or section of this full key."""
    # Below a setting that maps names to values, the names are the user's own.
    return key in _known_keys() or any(key.startswith(f"{mapping}.") for mapping in _mappings())


def unknown_key(key: str, where: str) -> str:
    """The message for a key that the schema does not have."""
    return f"{where}: unknown key {key!r}.{did_you_mean(key, setting_keys())} `--help` lists all keys."


def schema() -> DictConfig:
    """The settings' names, types and defaults, to be filled in."""
    return copy.deepcopy(_schema())


def value_problem(known: DictConfig, key: str, value: Any) -> str | None:
    """Why `value` does not fit the setting `key` of a schema; or None, and the schema has it."""
    try:
        OmegaConf.update(known, key, value, merge=True)
    except (OmegaConfBaseException, ValueError) as error:
        return f"{key}={value!r}: {str(error).splitlines()[0]}"
    return None


@cache
def _schema() -> DictConfig:
    """Made once: it takes longer than all else that is done with a command line."""
    return OmegaConf.structured(PipelineConfig)


@cache
def _mappings() -> tuple[str, ...]:
    sections = {"data": DataConfig, "evaluate.prompts": PromptsConfig}
    return tuple(
        f"{key}.{item.name}" for key, node in sections.items() for item in fields(node) if get_origin(item.type) is dict
    )


@cache
def _known_keys() -> frozenset[str]:
    return frozenset(setting_keys())
