"""Check the name and the package of an optimizer before a model is loaded."""

from torch import nn
from transformers import Trainer
from transformers.training_args import OptimizerNames, TrainingArguments

from pipeline.config import TrainConfig
from pipeline.errors import UserError, did_you_mean


def raise_if_impossible(train: TrainConfig, section: str) -> None:
    """Check that transformers knows the optimizer and that its package is installed.

    Args:
        train: settings of the stage.
        section: name of `train` in the configuration, for messages.

    Raises:
        UserError: the optimizer is unknown, its package is missing, or it needs settings that this program lacks.
    """
    key, names = f"{section}.optimizer={train.optimizer}", [name.value for name in OptimizerNames]
    if train.optimizer not in names:
        guess = did_you_mean(train.optimizer, names) or f" Use one of {', '.join(names)}."
        raise UserError(f"{key}: transformers has no such optimizer.{guess}")
    # Making TrainingArguments in the usual way would set up the devices. The class has the defaults of all fields.
    arguments = TrainingArguments.__new__(TrainingArguments)
    arguments.optim, arguments.optim_args = OptimizerNames(train.optimizer), None
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, nn.Linear(1, 1))  # type: ignore[arg-type]
    except (ImportError, ValueError) as error:
        raise UserError(f"{key}: {error}") from error
