"""How far the expert weights are from the fine-tuned ones."""

import math

from pipeline.evals.subject import Subject
from pipeline.gpt_oss import expert_projections
from pipeline.tracking import progress


def score(subject: Subject) -> dict[str, float]:
    """Relative error of the weights that the forward pass uses: ||W - R|| / ||R|| over all experts, R the reference."""
    if subject.ref is None or subject.weights is None or subject.reference is None:
        return {}
    difference = norm = 0.0
    projections = expert_projections(subject.weights.shape)
    for projection in progress(projections, what=f"weights of {subject.ref.name}", unit="tensor"):
        experts = subject.weights.effective(projection.name)
        references = subject.reference.effective(projection.name)
        for expert, reference in zip(experts, references, strict=True):  # float64 copies of one expert at a time
            difference += float((expert.double() - reference.double()).square().sum())
            norm += float(reference.double().square().sum())
    return {"relative_weight_error": math.sqrt(difference / norm) if norm else 0.0}
