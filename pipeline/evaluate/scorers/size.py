"""Score the size of a model on disk."""

from pipeline.checkpoints.side_files import ADAPTER_WEIGHTS
from pipeline.evaluate.subject import Subject


def score(subject: Subject) -> dict[str, float]:
    """Compute `weight_bytes`: the size of the weight files that the model needs, including an adapter's base model."""
    if subject.ref is None or subject.weights is None:
        return {}
    adapter = (subject.ref.directory / ADAPTER_WEIGHTS).stat().st_size if subject.ref.adapter else 0
    return {"weight_bytes": subject.weights.checkpoint.weight_bytes + adapter}
