"""Every text can be printed, whatever the encoding of the stream is."""

import io
import sys

import pytest

from pipeline.runs import console


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("ascii", "a -> b... \\xe9 \\u4e2d \\udcff"),
        ("latin-1", "a -> b... \xe9 \\u4e2d \\udcff"),
        ("utf-8", "a → b… é 中 \\udcff"),
    ],
)
def test_characters_that_a_stream_lacks_are_spelt(
    encoding: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    console.let_streams_print()
    console.say("export", "a → b… é 中 \udcff")
    console.warn("export", "a → b… é 中 \udcff")
    for name, stream in streams.items():
        stream.flush()
        text = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        assert text == f"[export] {'warning: ' if name == 'stderr' else ''}{expected}\n"


def test_a_replaced_stream_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    console.let_streams_print()
    console.say("export", "a → b")
