"""Find mistakes before the first stage of a command. A later stage would refuse them after hours of training.

Every check calls the function that the later stage calls. Training stages that are complete are not checked.
"""

from collections.abc import Sequence
from pathlib import Path

from pipeline.checkpoints.config_json import read_model
from pipeline.checkpoints.gpt_oss import GptOssJson, Shape, expert_projections
from pipeline.checkpoints.recognition import describe_missing
from pipeline.config import (
    FormatConfig,
    LoraConfig,
    Method,
    PipelineConfig,
    QuantizeSource,
    Stage,
    TrainConfig,
    VerifyConfig,
    leaves_nothing_to_round,
    rebuilds,
)
from pipeline.config.controls import controls_of, reason_for_none
from pipeline.config.engines import loading_problems
from pipeline.config.hub_ids import is_hub_id
from pipeline.config.training import layers_problem
from pipeline.data.rows import load_rows
from pipeline.doctor import device_memory, fit, machine, needs
from pipeline.doctor.facts import Facts
from pipeline.doctor.plan import Plan
from pipeline.errors import Attempts, UserError
from pipeline.models import continuing, foreign_sft, references, sharding, source
from pipeline.runs import compared, controls, hub_login, tracking
from pipeline.runs.artifacts import EVALUATED_STAGES, MODEL_STAGES, load
from pipeline.runs.console import note
from pipeline.runs.processes import is_main_process, process_count
from pipeline.runs.records import DoctorRecord
from pipeline.runs.run import Run

_TRAINING = {
    Stage.sft: (Stage.sft,),
    Stage.qat: (Stage.qat,),
    Stage.controls: (Stage.sft, Stage.qat),
    Stage.all: (Stage.sft, Stage.qat),
}
"""Stage of the command -> the training stages that it may run."""
_BEFORE = {Stage.sft: Stage.upcast, Stage.qat: Stage.quantize, Stage.controls: Stage.sft}
"""Stage of the command -> the stage that it needs."""
_ALL = "all"  # value of evaluate.source
_TASKS = "evaluate.lm_eval"


def problems(config: PipelineConfig, is_launched_well: bool = True) -> list[str]:
    """Return a message for each mistake in the settings of a stage that this command will run. Empty if there is none.

    A stage that trains nothing is not checked, because it checks its settings at once. stage=all is always checked: its
    last stages follow after long ones. If the machine or the launcher does not fit, nothing is written to the run's
    directory, so the model and the data are not checked.
    """
    trained = _trained(config)
    if not trained and config.stage is not Stage.all:
        return []
    here, found = Run(config), Attempts()
    found.attempt(lambda: sharding.raise_if_impossible(config.sharding))
    is_launched_well = is_launched_well and not found.problems
    if trained:
        found.attempt(lambda: tracking.raise_if_impossible(config.tracking.backend))
        _check_training(found, here, trained)
    if trained and is_launched_well:
        _check_model(found, here, trained)
    if is_launched_well:
        _check_data(found, here, is_trained=bool(trained))
    return [*found.problems, *(_later_problems(here) if config.stage is Stage.all else [])]


def _later_problems(here: Run) -> list[str]:
    """Return the mistakes in the settings of the stages after training, as far as they need neither model nor data."""
    config = here.config
    login = hub_login.problems(config.export) if is_main_process() else []  # only the main process uploads
    _, runs = compared.find_directories(config.compare.runs, here.directory)
    return [*_source_problems(here), *_verify_problems(config.verify, config.export.layout.name), *runs, *login]


def _trained(config: PipelineConfig) -> dict[str, TrainConfig]:
    """Return the settings of the training stages that the command will run, by the stage's name."""
    here, before = Run(config), _BEFORE.get(config.stage)
    if before is not None and not here.is_complete(before):
        return {}  # the stage says at once that its input is missing
    skipped = set()
    if config.stage is Stage.all and config.quantize.source != QuantizeSource.sft:
        skipped.add(Stage.sft)
    if leaves_nothing_to_round(config.quantize.source, config.sft, config.format.name):
        skipped.add(Stage.qat)
    todo = [
        stage
        for stage in _TRAINING.get(config.stage, ())
        if stage not in skipped
        and (rebuilds(config.overwrite, stage) or config.stage is Stage.controls or not here.is_complete(stage))
    ]
    if config.stage is Stage.all and config.controls and _makes_controls(here):
        todo = [stage for stage in _TRAINING[Stage.controls] if stage not in skipped]
    return {stage.name: getattr(config, stage.name) for stage in todo}


def _makes_controls(here: Run) -> bool:
    """Return whether a control is missing. The controls train with the settings of `sft` and of `qat`."""
    if reason_for_none(here.config) is not None:
        return False
    listed = controls_of(here.config, str(here.stage_dir(Stage.sft)), has_mxfp4=False)
    made = {Path(each.model).parent.name for each in controls.find_made(here) if each.staleness is None}
    return rebuilds(here.config.overwrite, Stage.controls) or not {each.name for each in listed} <= made


def _check_training(found: Attempts, here: Run, trained: dict[str, TrainConfig]) -> None:
    # These modules import transformers, which takes seconds. The training stages need it too.
    from pipeline.training import attention_check, optimizers

    for name, train in trained.items():
        found.attempt(lambda train=train, name=name: optimizers.raise_if_impossible(train, name))  # type: ignore[misc]
        found.attempt(lambda train=train, name=name: attention_check.raise_if_wrong(train, name))  # type: ignore[misc]
    start = here.config.sft.start
    if start is not None and Stage.sft.name in trained:
        found.attempt(lambda: continuing.check_start(here, start))


def _check_model(found: Attempts, here: Run, trained: dict[str, TrainConfig]) -> None:
    """Check the settings that depend on config.json: layers of adapters, memory, block size, layout of the export."""
    config = here.config
    directory = found.attempt(lambda: source.locate_without_weights(here, config.model))
    if directory is None:
        return
    model = read_model(directory)
    shape = Shape.of(model, directory)
    for name, train in trained.items():
        if train.method is Method.lora:
            found.attempt(lambda train=train, name=name: _raise_if_no_layer(train.lora, shape, name))  # type: ignore[misc]
        if config.stage is Stage[name]:
            found.attempt(lambda name=name: _raise_if_too_small(here, model, name))  # type: ignore[misc]
    if config.stage is Stage.all:
        found.attempt(lambda: foreign_sft.check(here, directory))
        _check_export(found, config.format, config.export.layout.name, model, directory)


def _raise_if_no_layer(lora: LoraConfig, shape: Shape, section: str) -> None:
    if (problem := layers_problem(lora, shape.num_hidden_layers, section)) is not None:
        raise UserError(problem)


def _check_export(
    found: Attempts, format_config: FormatConfig, layout: str, model: GptOssJson, directory: Path
) -> None:
    from pipeline.export import EXPORTERS
    from pipeline.export.weights import raise_if_not_divisible

    block_format = references.configured_format(format_config)
    for projection in expert_projections(Shape.of(model, directory))[:2]:  # all layers have the same sizes
        found.attempt(lambda projection=projection: raise_if_not_divisible(projection, block_format))  # type: ignore[misc]
    found.attempt(lambda: EXPORTERS[layout].check_source(model, directory))


def _raise_if_too_small(here: Run, model: GptOssJson, stage: str) -> None:
    """Compare a training stage with the machine, by the report of `doctor`, or else without activations."""
    free = machine.figures(here.directory)
    known = _report(here)
    if known is not None:
        facts = Facts.of(known, free, Plan.of(here.config), model, here)
        fit.report(fit.shortages_of_stage(facts, stage), here, "stage=doctor says what to set.")
        return
    plan, shape = Plan.of(here.config), Shape.of(model, here.config.model.path)
    least = device_memory.least(plan, stage, model, free["processes"])
    copies, kind, room = (
        (1, fit.GPU, free["gpu_free_bytes"])
        if free["gpus"]
        else (free["local_processes"], fit.HOST, free["host_free_bytes"])
    )
    lacking = fit.Shortage(f"{stage}, even without activations,", kind, copies * least, room)
    train = plan.trainings[stage]
    files = needs.saved_bytes(shape, train) + needs.checkpoint(shape, train)
    on_disk = fit.Shortage(f"{stage}, with one checkpoint,", fit.DISK, files, free["disk_free_bytes"])
    found = [each for each in (lacking, on_disk) if each.needed > each.free]
    fit.report(found, here, "stage=doctor says what to set.")


def _report(here: Run) -> DoctorRecord | None:
    """Return the report of `doctor` if it was made with the settings of this command and for as many processes."""
    if not here.is_complete(Stage.doctor):
        return None
    artifact = load(here.stage_dir(Stage.doctor), check_files=False)
    is_same = artifact.settings == here.settings(artifact.settings)
    return artifact.read(DoctorRecord) if is_same and artifact.parents["processes"] == str(process_count()) else None


def _check_data(found: Attempts, here: Run, *, is_trained: bool) -> None:
    """Check the rows, the prompts of `evaluate` and of the answers during training, and the data of task suites."""
    from pipeline.evaluate import measure
    from pipeline.evaluate.generation import prompts

    config, evaluate = here.config, here.config.evaluate
    if config.stage is Stage.all:
        inputs = found.attempt(lambda: measure.check_inputs(here, config.data, evaluate))
        suites = None if inputs is None else inputs[-1]
        if suites is not None and is_main_process() and (is_trained or not _has_run_the_tasks(here)):
            note("evaluate", f"loading the data of {', '.join(evaluate.lm_eval.tasks)}")
            found.attempt(suites.check_data)
    if not is_trained or not evaluate.during_training.prompts or (config.stage is Stage.all and evaluate.generate):
        return

    def load_prompts() -> None:
        rows = load_rows(here, config.data)
        prompts.load(here, config.data, evaluate.prompts, rows, evaluate.during_training.prompts)

    found.attempt(load_prompts)


def _has_run_the_tasks(here: Run) -> bool:
    """Return whether the report of `evaluate` has the results of the same tasks."""
    if not here.is_complete(Stage.evaluate):
        return False
    recorded = load(here.stage_dir(Stage.evaluate), check_files=False).settings
    tasks = {key: value for key, value in recorded.items() if key.startswith(f"{_TASKS}.")}
    return bool(tasks) and tasks == here.settings(tasks)


def _source_problems(here: Run) -> list[str]:
    export, evaluate = here.config.export.source, here.config.evaluate.source
    asked = (
        ("export.source", export, MODEL_STAGES),
        ("evaluate.source", None if evaluate == _ALL else evaluate, EVALUATED_STAGES),
    )
    found = [references.source_problem(here, given, among, key) for key, given, among in asked if given is not None]
    return [problem for problem in found if problem is not None]


def _verify_problems(verify: VerifyConfig, layout: str) -> list[str]:
    engines = [engine.name for engine in verify.engines]
    found = loading_problems(engines, layout, vars(verify.python))
    places: Sequence[tuple[str, str | None]] = (
        ("verify.reference", verify.reference),
        ("verify.checkpoint", verify.checkpoint),
    )
    for key, path in places:
        if path is not None and not Path(path).expanduser().is_dir() and not is_hub_id(path):
            found.append(f"{key}={path}: {describe_missing(path)}")
    return found
