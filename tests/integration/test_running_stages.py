"""`pipeline.run` verifies exports and trains, raises what the command prints, and leaves the process as it was."""

import logging
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import linked

from pipeline import CheckFailed, run


def test_a_wrong_export_is_a_failed_check(smoke_run: Path, tmp_path: Path) -> None:
    own = linked(tmp_path / "run", smoke_run, "source", "upcast", "sft", "quantize", "qat", "data")
    overrides = ["data.max_samples=80", "verify.samples=2"]
    export = run("export", recipe="smoke", run_dir=own, overrides=overrides)
    (export.directory / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckFailed, match="is not right"):
        run("verify", recipe="smoke", run_dir=own, overrides=overrides)


def process_state() -> dict[str, Any]:
    """Return settings of the process that a program may rely on."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)]
    libraries = (
        torch.initial_seed(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
    )
    return {
        "environment": dict(os.environ),
        "signals": handlers,
        "logging": (logging.root.level, list(logging.root.handlers), logging.root.manager.disable),
        "random": libraries,
        "torch": (
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
        ),
        "python": (list(sys.argv), os.getcwd(), sys.stdout, sys.stderr, sys.excepthook),
    }


def test_training_leaves_the_process_as_it_was(smoke_run: Path, tmp_path: Path) -> None:
    """Libraries set variables when they are imported. `smoke_run` has imported them."""
    own = linked(tmp_path / "run", smoke_run, "source", "upcast", "data")
    overrides = ["data.max_samples=80", "sft.max_steps=1", "sft.eval_steps=1", "sft.save_steps=1"]
    before = process_state()
    run("sft", recipe="smoke", run_dir=own, overrides=overrides)
    after = process_state()
    assert {name: after[name] for name in after if after[name] != before[name]} == {}
