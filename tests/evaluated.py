"""Handmade runs with an evaluation. The right report of each run is known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from exports import SIZES, record_of

from pipeline.config.controls import is_control
from pipeline.evaluate.transcripts import Transcript
from pipeline.runs.records import QuantizeRecord, StageRecord, TrainingRecord, UpcastRecord

RIGHT, WRONG = "7", "8"
_TRAINED = TrainingRecord(
    dtype="bfloat16",
    steps=1,
    kept_step=1,
    train_loss_first=1.0,
    train_loss_last=1.0,
    validation_loss_before=1.0,
    validation_loss=1.0,
)
PARENTS = {"upcast": {}, "sft": {"upcast": "upcast"}, "quantize": {"sft": "sft"}, "qat": {"quantize": "quantize"}}
"""Model -> its parents. An export is written by `record_export`."""


_USUAL: dict[str, StageRecord] = {
    "upcast": UpcastRecord(
        dtype="bfloat16", decoded_tensors=0, packed_tensors=0, copied_tensors=0, tensor_bytes=0, source="base"
    ),
    "sft": _TRAINED,
    "quantize": QuantizeRecord(dtype="bfloat16", quantizers=1),
    "qat": _TRAINED,
}
"""Stage -> its record. `details` of `record` changes fields of it."""


def record(directory: Path, **facts: Any) -> None:
    """Write a stage's artifact.json."""
    directory.mkdir(parents=True, exist_ok=True)
    known = _USUAL.get(directory.name)
    details = {**({} if known is None else known.details()), **facts.pop("details", {})}
    usual: dict[str, Any] = {
        "stage": directory.name,
        "kind": "checkpoint",
        "format": "bf16",
        "fake_quantized": None,
        "scale_rule": None,
        "fingerprint": directory.name,
        "parents": {},
        "settings": {},
        "files": {},
        "details": details,
        "base_model": {"path": "gpt", "revision": None},
        "data": None,
        "seconds": 10.0,
        "peak_memory_bytes": 2_000_000,
        "peak_device_memory_bytes": 0,
    }
    (directory / "artifact.json").write_text(json.dumps({**usual, **facts}))


def add(directory: Path, **facts: Any) -> None:
    """Add fields to a stage's artifact.json."""
    path = directory / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **facts}))


def record_export(run: Path, target: str = "mxfp4", **facts: Any) -> None:
    """Write the artifact.json of an export of QAT in MXFP4."""
    own = {"kind": "packed", "format": "mxfp4", "scale_rule": "ceil", "parents": {"model": "qat"}}
    details = {**record_of(target).details(), "tensor_bytes": 600_000, **facts.pop("details", {})}
    record(run / "export", **{**own, **facts, "details": details})


def record_verify(run: Path, checkpoint: str = "export", model: str | None = "qat", engine: str = "") -> None:
    """Write the artifact.json of a `verify` that has passed. `model` is the trained model that it compared with."""
    checks = {"files: sound": "ok", "experts: equal": "ok", "engines": "not checked"}
    checks |= {f"{engine}: loads the export": "ok"} if engine else {}
    parents = {"checkpoint": checkpoint, **({} if model is None else {"model": model})}
    record(run / "verify", kind="report", parents=parents, details={"checks": checks, "not_checked": ["engines"]})


def answer(prompt: int, text: str | None, **facts: Any) -> Transcript:
    """Make a model's answer to "3 + 4?". The right answer is 7."""
    completion = f"<|channel|>final<|message|>{text}<|return|>"
    messages = [{"role": "user", "content": f"3 + 4? ({prompt})"}]
    usual = Transcript(f"p{prompt}", 0, messages, {"answer": RIGHT}, None, text, completion, "return", 4, None)
    return replace(usual, **facts)


def run(
    directory: Path,
    passed: dict[str, list[bool]] | None = None,
    figures: dict[str, dict[str, Any]] | None = None,
    answers: dict[str, list[Transcript]] | None = None,
    block_format: str = "mxfp4",
    fingerprints: dict[str, str] | None = None,
    **facts: Any,
) -> Path:
    """Write an evaluated run: its models, their answers and their figures.

    Args:
        directory: directory of the run.
        passed: model -> whether the model passed each prompt. If None, the evaluation had no prompts.
        figures: model -> figures. A model that is neither in `passed` nor in `figures` was not evaluated.
        answers: model -> answers. If given, no answers are made from `passed`.
        block_format: the format that quantize and qat round to.
        fingerprints: stage -> fingerprint. The default fingerprint is the stage's name.
        facts: further fields of the evaluate artifact.
    """
    given = answers or {
        model: [answer(i, RIGHT if each else WRONG) for i, each in enumerate(outcomes)]
        for model, outcomes in (passed or {}).items()
    }
    models = {model: (figures or {}).get(model, {}) for model in {**(figures or {}), **given}}
    named = {model: (fingerprints or {}).get(model, model) for model in {**PARENTS, **models}}
    for model in [model for model in models if model in PARENTS]:
        parents = {name: named[name] for name in PARENTS[model]} or {"source": "base"}
        rounds = block_format if model in ("quantize", "qat") else None
        record(directory / model, fingerprint=named[model], parents=parents, fake_quantized=rounds)
        (directory / model / "config.json").write_text(json.dumps(SIZES))
    for model in [model for model in models if is_control(model)]:
        record(directory / model, fingerprint=model, parents={"sft": named["sft"]}, fake_quantized=block_format)
    evaluate = directory / "evaluate"
    for model, said in given.items():
        answers_of = evaluate / model.replace("/", "_")
        answers_of.mkdir(parents=True)
        lines = [json.dumps(vars(each)) + "\n" for each in said]
        (answers_of / "generations.jsonl").write_text("".join(lines))
    parents = {model: named[model] for model in models} | ({"evaluate.prompts": "prompts"} if given else {})
    settings = {"data.path": "chats.jsonl", "evaluate.generate": bool(given), **facts.pop("settings", {})}
    details = {"reference": "sft", "results": models}
    record(
        evaluate,
        **{"kind": "report", "parents": parents, "settings": settings, "details": details, "data": "rows", **facts},
    )
    (evaluate / "config.yaml").write_text("base_run: null\n")
    return directory
