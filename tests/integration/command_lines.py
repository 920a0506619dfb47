"""Command lines of the program, one after the other, in processes that a launcher has started: imports cost the most.

Takes a JSON file of them (see `Line`) and leaves <file>.outcomes, with one line of JSON for each.
"""

import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from pipeline import __main__ as program
from pipeline import callbacks, losses, models, sharding, training
from pipeline.tracking import is_main_process, process_count


@dataclass(frozen=True)
class Line:
    """What is to be run.

    Attributes:
        arguments: of the program.
        interrupted_at: the step after whose checkpoint the run is interrupted, or None.
        is_compared: whether what is saved is held against what one process would save of the same weights.
    """

    arguments: list[str]
    interrupted_at: int | None = None
    is_compared: bool = False


def use_gloo_alone() -> None:
    """Keep DeepSpeed from building an extension, which takes a minute, for what gloo does as well.

    DeepSpeed 0.19 has collectives of its own for CPUs, and no setting without them. On GPUs it has no such extension.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def share_held(model: Any) -> float:
    """Which part of a model is this process's own, by its number of values."""
    parameters = list(model.parameters())
    # ds_tensor: DeepSpeed's part of a parameter, which is whole in some moments and empty in others.
    own = (p.to_local() if isinstance(p, DTensor) else getattr(p, "ds_tensor", p.data) for p in parameters)
    return sum(part.numel() for part in own) / sum(getattr(p, "ds_numel", p.numel()) for p in parameters)


def loss_of(inputs: Any) -> float:
    """The validation loss of the model as it is now."""
    batches = losses.batches(inputs.splits.validation, 12, inputs.tokenizer.pad_token_id)
    loss = losses.measure(inputs.model, batches).supervised
    sharding.let_go(inputs.model)
    return loss


def run(line: Line) -> dict[str, Any]:
    outcome: dict[str, Any] = {}
    on_save, train, save = callbacks.Checkpoints.on_save, training.train, models.save

    def interrupting(self: Any, args: Any, state: Any, control: Any, **event: Any) -> None:
        on_save(self, args, state, control, **event)
        if state.global_step == line.interrupted_at:
            raise KeyboardInterrupt

    def looking(inputs: Any, setup: Any) -> dict[str, Any]:
        details = train(inputs, setup)
        outcome["share"] = share_held(inputs.model)
        outcome["loss_left"] = loss_of(inputs)
        outcome["teacher_share"] = None if inputs.teacher is None else share_held(inputs.teacher.model)
        return details

    def comparing(model: Any, ref: Any, directory: Path, settings: Any, config: Any) -> Any:
        result = save(model, ref, directory, settings, config)
        state = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
        if is_main_process():
            whole = models.load_plain(ref.base, models.TRAIN_DTYPES[settings.precision])
            whole.load_state_dict(state)
            other = Path(config.run_dir) / "other"
            other.mkdir()
            assert save(whole, ref, other, settings, config) == result
            names = [path.name for path in other.glob("*.safetensors")]
            outcome["same"] = [(other / name).read_bytes() == (directory / name).read_bytes() for name in names]
        return result

    callbacks.Checkpoints.on_save, training.train = interrupting, looking  # type: ignore[method-assign]
    models.save = comparing if line.is_compared else save
    sys.argv = ["pipeline", *line.arguments]
    try:
        return {"status": program.status(line.arguments), **outcome}
    finally:
        callbacks.Checkpoints.on_save, training.train, models.save = on_save, train, save  # type: ignore[method-assign]


def main(file: Path) -> None:
    # Here no launcher ends a process that has reported its error: none has to wait until the main one has spoken.
    program._SECONDS_FOR_THE_MAIN_PROCESS = 0
    lines = [Line(**line) for line in json.loads(file.read_text(encoding="utf-8"))]
    if any(argument.startswith("sharding=zero") for line in lines for argument in line.arguments):
        use_gloo_alone()
    for line in lines:
        outcome = run(line)
        if is_main_process():
            with Path(f"{file}.outcomes").open("a", encoding="utf-8") as outcomes:
                outcomes.write(json.dumps({**outcome, "processes": process_count()}) + "\n")
        gc.freeze()  # what libraries have made by now stays: collections need not look at it again


if __name__ == "__main__":
    main(Path(sys.argv[1]))
