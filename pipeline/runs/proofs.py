"""Find the proof of an export. The proof is the artifact of `verify`, if it passed on the present files."""

from pipeline.config import Stage
from pipeline.runs.artifacts import Artifact, load
from pipeline.runs.run import Run


def find_proof(run: Run, export: Artifact) -> Artifact | None:
    """Return the artifact of the `verify` that passed on this export, or None. A failed `verify` leaves no artifact."""
    if not run.is_complete(Stage.verify):
        return None
    proof = load(run.stage_dir(Stage.verify))
    return proof if proof.parents["checkpoint"] == export.fingerprint else None


def missing_proof(run: Run, export: Artifact) -> str:
    """Return the message for an export that `verify` has not passed."""
    return f"{export.directory}: has not passed stage=verify. Run first: {run.command(Stage.verify)}"
