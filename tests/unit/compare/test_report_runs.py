"""A report finds its runs. If runs are not comparable, a single message lists all problems."""

import json
from pathlib import Path

import evaluated
import pytest

from pipeline.compare import runs
from pipeline.errors import UserError

LOSS = {"sft": {"validation_loss": 2.0}}


def refused(*patterns: object) -> UserError:
    with pytest.raises(UserError) as raised:
        runs.find([str(pattern) for pattern in patterns])
    return raised.value


def test_patterns_and_evaluate_directories_name_runs(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        evaluated.run(tmp_path / "sweep" / name, figures=LOSS)
    found = runs.find([str(tmp_path / "sweep" / "[ab]"), str(tmp_path / "sweep" / "c" / "evaluate")])
    assert [run.label for run in found] == ["a", "b", "c"]


def test_a_directory_whose_name_looks_like_a_pattern_is_found_by_its_name(tmp_path: Path) -> None:
    evaluated.run(tmp_path / "layers=[1]", figures=LOSS)
    assert [run.label for run in runs.find([str(tmp_path / "layers=[1]")])] == ["layers=[1]"]


def test_runs_with_equal_names_are_labelled_by_their_paths(tmp_path: Path) -> None:
    directories = [evaluated.run(tmp_path / name / "run", figures=LOSS) for name in ("a", "b")]
    assert [run.label for run in runs.find([str(each) for each in directories])] == ["a/run", "b/run"]


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    run = evaluated.run(tmp_path / "run", figures=LOSS)
    evaluated.record(tmp_path / "unmeasured" / "sft")
    (tmp_path / "half" / "evaluate").mkdir(parents=True)
    (tmp_path / "half" / "evaluate" / "unfinished.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    names = ("run", "unmeasured", "half", "notes", "nothing/*")
    problems = refused(*(tmp_path / name for name in names), run / "evaluate").problems
    assert [problem.removeprefix("compare.runs: ") for problem in problems] == [
        f"{tmp_path}/unmeasured: the run was not evaluated. Run first: python -m pipeline stage=evaluate"
        f" run_dir={tmp_path}/unmeasured, with the run's recipe",
        f"{tmp_path}/half/evaluate: the evaluation is unfinished. Run it again: python -m pipeline stage=evaluate"
        f" run_dir={tmp_path}/half, with the run's recipe",
        f"{tmp_path}/notes: not the directory of a run, because no stage in it is complete. Give a run_dir.",
        f"'{tmp_path}/nothing/*': no directory matches. Give run directories, or patterns like runs/*.",
        f"{run} is named twice: by '{run}' and by '{run}/evaluate'. Leave one out.",
    ]


def test_a_stage_that_was_rebuilt_after_its_evaluation_is_named(tmp_path: Path) -> None:
    run = evaluated.run(tmp_path / "run", figures=LOSS)
    evaluated.record(run / "sft", fingerprint="rebuilt")
    assert f"{run}/sft: was rebuilt after it was evaluated" in str(refused(run))


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        (
            {"data": "others"},
            "the evaluation data: chats.jsonl, fingerprint rows and chats.jsonl, fingerprint others.",
        ),
        ({"settings": {"data.seed": 7}}, "data.seed: data.seed=42 and data.seed=7."),
        (
            {"settings": {"data.max_samples": 80}},
            "data.max_samples: data.max_samples=None and data.max_samples=80.",
        ),
    ],
)
def test_figures_on_different_data_are_not_mixed(tmp_path: Path, facts: dict, part: str) -> None:
    usual = {"data.seed": 42, "data.max_samples": None}
    first = evaluated.run(tmp_path / "a", figures=LOSS, settings=usual)
    other = {**facts, "settings": {**usual, **facts.get("settings", {})}}
    second = evaluated.run(tmp_path / "b", figures=LOSS, **other)
    message = str(refused(first, second))
    assert message.startswith(f"compare.runs: {first} and {second} cannot be compared. They differ in {part}")
    assert "Evaluate both under the same conditions" in message


def test_answers_to_different_prompts_are_not_mixed(tmp_path: Path) -> None:
    first, second = (evaluated.run(tmp_path / name, {"sft": [True]}) for name in ("a", "b"))
    path = second / "evaluate" / "artifact.json"
    path.write_text(path.read_text().replace('"evaluate.prompts": "prompts"', '"evaluate.prompts": "others"'))
    assert "They differ in the prompts: fingerprint prompts and fingerprint others." in str(refused(first, second))


def test_revisions_of_the_base_model_are_not_mixed(tmp_path: Path) -> None:
    first, second = (
        evaluated.run(tmp_path / name, figures=LOSS, base_model={"path": "openai/gpt-oss-20b", "revision": name})
        for name in ("a", "b")
    )
    names = [f"openai/gpt-oss-20b at revision {name}" for name in ("a", "b")]
    assert f"They differ in the base model: {' and '.join(names)}." in str(refused(first, second))


def test_the_same_base_model_may_have_several_paths(tmp_path: Path) -> None:
    both = {**LOSS, "upcast": {"validation_loss": 7.0}}
    first, second = (
        evaluated.run(tmp_path / name, figures=both, base_model={"path": f"/{name}", "revision": None})
        for name in ("a", "b")
    )
    assert len(runs.find([str(first), str(second)])) == 2
    evaluated.record(second / "upcast", parents={"source": "another"})
    assert "They differ in the base model: /a (base) and /b (another)." in str(refused(first, second))


def test_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    first, second = (evaluated.run(tmp_path / name, figures=LOSS) for name in ("a", "b"))
    for run in (first, second):
        (run / "sft" / "tokenizer.json").write_text(json.dumps({"of": run.name}))
    assert "They differ in the tokenizer: fingerprint " in str(refused(first, second))


def test_a_setting_that_only_one_run_has_is_no_difference(tmp_path: Path) -> None:
    first = evaluated.run(tmp_path / "a", {"sft": [True]}, settings={"evaluate.generation.max_new_tokens": 5})
    second = evaluated.run(tmp_path / "b", figures=LOSS, settings={"evaluate.generation.max_new_tokens": 9})
    assert len(runs.find([str(first), str(second)])) == 2
