"""Hostile input ends in one message within seconds, and nothing of others runs or is copied."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import run_program

INDEX = "model.safetensors.index.json"
DEEP = "[" * 100_000 + "]" * 100_000
ROWS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "ho"}]}) + "\n"
    for i in range(30)
)


def error_of(capsys: pytest.CaptureFixture[str], tmp_path: Path, *arguments: str) -> str:
    capsys.readouterr()
    assert run_program("recipe=smoke", f"run_dir={tmp_path / 'run'}", *arguments) == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text[text.index("error: ") :]


def upcast_error(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> str:
    return error_of(capsys, tmp_path, "stage=upcast", f"model.path={model}")


def doctor_error(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, *arguments: str) -> str:
    rows = tmp_path / "rows.jsonl"
    if not os.path.lexists(rows):
        rows.write_text(ROWS)
    return error_of(
        capsys, tmp_path, "stage=doctor", f"model.path={model}", "data=chat", f"data.path={rows}", *arguments
    )


FILES = ("config.json", INDEX, "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("text", [DEEP, "[1]", "null", "", "9" * 5000], ids=["deep", "list", "null", "empty", "digits"])
def test_json_file_of_a_model_is_damaged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, name: str, text: str
) -> None:
    (model / name).write_text(text)
    assert str(model / name) in upcast_error(capsys, tmp_path, model)


@pytest.mark.parametrize("name", [*FILES, "chat_template.jinja", "model-00001-of-00002.safetensors", "README.md"])
def test_named_pipe_in_a_model_is_not_opened(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, name: str
) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    assert f"{model / name}: is a named pipe, not a regular file." in upcast_error(capsys, tmp_path, model)


def test_side_file_that_leads_out_of_the_model_is_not_copied(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / "NOTES.md").symlink_to(tmp_path / "secret")
    message = upcast_error(capsys, tmp_path, model)
    assert f"{model / 'NOTES.md'}: is a symbolic link to {tmp_path / 'secret'}, outside the model" in message
    assert not (tmp_path / "run" / "upcast" / "NOTES.md").exists()


def test_links_of_the_hubs_cache_and_links_to_shards_are_followed(tmp_path: Path, model: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in model.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs", path.name))
        path.rename(blobs / path.name)
    shard = blobs / "model-00001-of-00002.safetensors"
    shutil.move(shard, tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert run_program("stage=upcast", "recipe=smoke", f"run_dir={tmp_path / 'run'}", f"model.path={snapshot}") == 0
    assert not (tmp_path / "run" / "upcast" / "tokenizer.json").is_symlink()


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("name", "message"),
    [("pytorch_model.bin", "Its weights are in PyTorch's format"), ("calibration.pt", "not a readable calibration")],
)
def test_pickles_are_not_executed_where_the_environment_weakens_torch(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    message: str,
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(tmp_path)
    if name.endswith(".bin"):
        for path in model.glob("*.safetensors*"):
            path.unlink()
    (model / name).write_bytes(pickle.dumps(Evil()))
    assert message in upcast_error(capsys, tmp_path, model)
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["modelopt_state.pth", "training_args.bin", "x.ckpt", "x.pkl"])
def test_pickles_beside_the_weights_are_neither_read_nor_copied(tmp_path: Path, model: Path, name: str) -> None:
    (model / name).write_bytes(pickle.dumps(Evil()))
    assert run_program("stage=upcast", "recipe=smoke", f"run_dir={tmp_path / 'run'}", f"model.path={model}") == 0
    assert not (tmp_path / "run" / "upcast" / name).exists()
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes longer than 0.5"),
        ("{{ 'x' * 10**11 }}", "needs more than 2 GiB of memory"),
        ("{{ 10**(10**9) }}", "takes longer than 0.5"),
        ("{{ 1 / 0 }}", "refuses it: division by zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses it: maximum recursion depth exceeded"),
    ],
)
def test_chat_template_is_a_hostile_program(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    message: str,
) -> None:
    monkeypatch.setattr("pipeline.data.template_text.MOST_SECONDS", 0.5)
    (model / "chat_template.jinja").write_text(template)
    assert message in doctor_error(capsys, tmp_path, model, "data.rendering=template")


def test_row_of_100_megabytes_is_refused_with_its_size(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path
) -> None:
    with (tmp_path / "rows.jsonl").open("w") as file:
        file.write(ROWS + '{"messages": [')
        file.write("1," * 50_000_000)
    message = doctor_error(capsys, tmp_path, model)
    assert "row 31: has 100,000,014 bytes. A row has at most 16,777,216." in message


@pytest.mark.parametrize("row", [DEEP, '{"messages": ' + DEEP + "}", json.dumps({"messages": [], "tools": DEEP})])
def test_deep_rows_are_reported_with_their_number(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, row: str
) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{ROWS}{row}\n")
    assert "row 31: " in doctor_error(capsys, tmp_path, model)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["fifo", "device"])
def test_data_path_is_no_regular_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path, make: Any
) -> None:
    make(tmp_path / "rows.jsonl")
    assert "not a regular file. Give a .jsonl" in doctor_error(capsys, tmp_path, model)


def test_path_that_is_too_long(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    message = error_of(capsys, tmp_path, "stage=doctor", f"model.path={model}", "data=chat", f"data.path={'x' * 9000}")
    assert "the path of 9000 characters is too long" in message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "\n".join(
                f"{n}: &{n} [{', '.join([f'*{chr(ord(n) - 1)}'] * 9)}]" if n > "a" else "a: &a [1]" for n in "abcdefgh"
            ),
            "its aliases repeat values",
        ),
        ("a: " + "[" * 3000 + "]" * 3000, "is nested too deeply"),
        ("a: [", "is not valid YAML"),
    ],
    ids=["bomb", "deep", "broken"],
)
def test_recipe_is_a_hostile_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    capsys.readouterr()
    assert run_program("--config-dir", str(tmp_path), "stage=doctor", "recipe=mine", f"run_dir={tmp_path / 'run'}") == 2
    assert f"{tmp_path / 'recipe' / 'mine.yaml'}: {message}" in capsys.readouterr().err


def test_setting_with_brackets_inside_each_other(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "too many brackets inside each other" in error_of(
        capsys, tmp_path, "stage=doctor", "+a=" + "[" * 3000 + "]" * 3000
    )
