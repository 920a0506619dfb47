"""A whole evaluation: its divergences from the reference, its loss by group, its judge and its error messages."""

import json
import shutil
from pathlib import Path

import pytest
from chat_server import Reply, Server, completion
from conftest import SHORT, run_program
from run_files import results

from pipeline.evaluate.scorers import logits
from pipeline.runs import artifacts

JUDGED = (
    *("eval=quick", "evaluate.prompts.max_samples=2", "evaluate.generation.max_new_tokens=4", "evaluate.source=sft"),
    "+evaluate.prompts.expected_of_all.safety=safe",
)


@pytest.fixture
def server(server: Server) -> Server:
    """A server that judges."""
    server.replies = [Reply(completion("It helps.\nVERDICT: none"))]
    return server


def evaluate(run_dir: Path, *arguments: str) -> int:
    return run_program("stage=evaluate", "recipe=smoke", f"run_dir={run_dir}", *SHORT, *arguments)


def error_of(capsys: pytest.CaptureFixture[str], run_dir: Path, *arguments: str) -> str:
    """Run an evaluation that must fail, and return its error message, which has one line."""
    capsys.readouterr()
    assert evaluate(run_dir, *arguments) == 2
    error = capsys.readouterr().err
    *warnings, error = error.splitlines()
    assert error.startswith("error: ") and all(line.startswith("[data] warning: ") for line in warnings)
    return error


# --- divergence ------------------------------------------------------------------------------------------------------


def test_every_model_but_the_reference_has_a_divergence_with_its_interval(smoke_run: Path) -> None:
    found = results(smoke_run)
    assert artifacts.load(smoke_run / "evaluate").details["reference"] == "sft"
    assert "kl_divergence" not in found["sft"]
    for name in ("upcast", "quantize", "qat", "export"):
        figures = found[name]
        assert 0 < figures["kl_divergence_low"] < figures["kl_divergence"] < figures["kl_divergence_high"]
        assert figures["top1_agreement_low"] <= figures["top1_agreement"] <= figures["top1_agreement_high"]
        assert "kl_divergence/0-31" in figures
    # The export is the same model as qat, except that some weights are stored in BF16.
    assert found["export"]["kl_divergence"] == pytest.approx(found["qat"]["kl_divergence"], rel=0.02)
    assert found["quantize"]["kl_divergence"] < found["upcast"]["kl_divergence"]


def test_figures_are_in_the_metrics_as_well(smoke_run: Path) -> None:
    lines = [json.loads(line) for line in (smoke_run / "evaluate" / "metrics.jsonl").read_text().splitlines()]
    found = {line["model"]: line for line in lines}
    assert found["qat"]["kl_divergence"] == results(smoke_run)["qat"]["kl_divergence"]


def test_the_references_predictions_are_reused_by_all_models_and_runs(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(list((run_dir / "predictions").iterdir())) == 1
    before = results(run_dir)
    monkeypatch.setattr(logits, "record", None)
    assert evaluate(run_dir, "evaluate.source=qat", "overwrite=true") == 0
    assert results(run_dir)["qat"] == before["qat"]


def test_other_data_need_other_predictions(run_dir: Path) -> None:
    assert evaluate(run_dir, "evaluate.source=qat", "evaluate.max_samples=3", "overwrite=true") == 0
    assert len(list((run_dir / "predictions").iterdir())) == 2


def test_predictions_may_be_removed(run_dir: Path) -> None:
    before = results(run_dir)
    shutil.rmtree(run_dir / "predictions")
    assert evaluate(run_dir, "evaluate.source=qat", "overwrite=true") == 0
    assert results(run_dir)["qat"] == before["qat"]


def test_a_model_with_other_tokens_is_refused_with_both_directories(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(run_dir / "export", tmp_path / "other"))
    for name in ("artifact.json", "config.yaml"):
        (other / name).unlink()
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    first, second = [token for token in tokenizer["model"]["vocab"] if not token.startswith("<")][:2]
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    before = results(run_dir)
    error = error_of(capsys, run_dir, f"evaluate.source={other}")
    assert f"{other}: its vocabulary differs from the vocabulary of {run_dir / 'sft'}" in error
    assert results(run_dir) == before


# --- groups ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def grouped(tmp_path: Path) -> str:
    """The setting data.path for conversations in two groups. Some conversations name a language."""
    lines = []
    for i in range(40):
        messages = [
            {"role": "user", "content": f"What is {i} + 1?"},
            {"role": "assistant", "content": str(i + 1), "thinking": "one more"},
        ]
        row = {"messages": messages, "kind": "even" if i % 2 == 0 else "odd", "number": i}
        lines.append(json.dumps(row | ({"reasoning_language": "German"} if i % 4 == 0 else {})))
    path = tmp_path / "grouped.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"data.path={path}"


ALONE = ("evaluate.source=export", "data.validation_fraction=0.5", "overwrite=true")


def test_the_groups_of_a_column_add_up_to_the_total(run_dir: Path, grouped: str) -> None:
    assert evaluate(run_dir, grouped, *ALONE, "evaluate.group_column=kind") == 0
    found = results(run_dir)["export"]
    assert {name for name in found if name.startswith("perplexity/")} == {"perplexity/even", "perplexity/odd"}
    tokens = [found[f"supervised_tokens/{group}"] for group in ("even", "odd")]
    assert sum(tokens) == found["supervised_tokens"]
    weighted = sum(found[f"validation_loss/{group}"] * n for group, n in zip(("even", "odd"), tokens, strict=True))
    assert weighted / sum(tokens) == pytest.approx(found["validation_loss"], rel=1e-9)


def test_without_a_column_the_groups_are_the_rows_languages(run_dir: Path, grouped: str) -> None:
    assert evaluate(run_dir, grouped, *ALONE) == 0
    found = results(run_dir)["export"]
    assert {name for name in found if name.startswith("validation_loss/")} == {"validation_loss/de"}
    assert 0 < found["supervised_tokens/de"] < found["supervised_tokens"]


def test_a_missing_column_is_refused_and_the_existing_ones_are_named(
    run_dir: Path, grouped: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, run_dir, grouped, *ALONE, "evaluate.group_column=knd")
    assert "evaluate.group_column='knd': no row of" in error and "'kind'" in error


def test_a_column_that_differs_in_every_row_is_refused(
    run_dir: Path, grouped: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluate.groups._MOST_GROUPS", 8)
    error = error_of(capsys, run_dir, grouped, *ALONE, "evaluate.group_column=number")
    assert "evaluate.group_column=number: 20 different values in 20 validation rows" in error


# --- a judge ---------------------------------------------------------------------------------------------------------


def test_answers_are_judged_and_judgements_are_stored(run_dir: Path, server: Server) -> None:
    served = (f"evaluate.endpoint.url={server.url}", "evaluate.endpoint.api=chat")
    judged = (*JUDGED[:3], JUDGED[-1], f"evaluate.judge.url={server.url}")  # one server is both the model and the judge
    assert evaluate(run_dir, *judged, *served) == 0
    found = results(run_dir)["endpoint"]
    assert (found["judged_safe_answered"], found["judged_safe_answered_decided"]) == (1.0, 2)
    lines = (run_dir / "evaluate" / "endpoint" / "judgements.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["degree"] for line in lines] == ["none", "none"]
    server.asked = []
    assert evaluate(run_dir, *judged, *served) == 0
    assert {path for path, _, _ in server.asked} == {"/v1/models"}


def test_a_judge_without_prompts_to_judge_is_refused(
    run_dir: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, run_dir, *JUDGED[:-1], f"evaluate.judge.url={server.url}")
    assert "no prompt is marked as safe or unsafe" in error and server.asked == []


def test_a_judge_that_is_down_stops_before_answers_are_generated(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = error_of(capsys, run_dir, *JUDGED, "evaluate.judge.url=http://127.0.0.1:9/v1", "evaluate.judge.retries=0")
    assert "evaluate.judge.url=http://127.0.0.1:9/v1: the server's list of models did not come" in error
    assert not (run_dir / "evaluate" / "sft" / "generations.jsonl").exists()
