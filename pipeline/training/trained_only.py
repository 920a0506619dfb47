"""Keep frozen weights out of the checkpoints that training resumes from."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, Trainer


class TrainedOnly(Trainer):
    """A trainer whose checkpoints hold only the trained parameters. Frozen parameters are read from the base model.

    PEFT leaves out frozen weights itself. Without adapters, transformers 5.14 has no setting for this, so two of its
    methods are overridden. Checkpoints of FSDP2 and DeepSpeed also hold frozen weights, because these libraries write
    them.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Overridden to save only the trained parameters."""
        if state_dict is None:
            state_dict = self._trained_parameters()
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Overridden to expect that checkpoints lack the frozen parameters."""
        trained = self._trained_parameters()
        if trained is not None:
            load_result.missing_keys[:] = [name for name in load_result.missing_keys if name in trained]
        super()._issue_warnings_after_load(load_result)

    def _trained_parameters(self) -> dict[str, Tensor] | None:
        """Return the trained parameters of a model without adapters. If no parameter is frozen, return None."""
        parameters = dict(self.model.named_parameters()) if isinstance(self.model, PreTrainedModel) else {}
        trained: dict[str, Tensor] = {name: each for name, each in parameters.items() if each.requires_grad}
        return trained if len(trained) < len(parameters) else None
