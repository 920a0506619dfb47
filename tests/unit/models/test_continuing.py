"""The recorded path of the model that SFT continues."""

from pathlib import Path

from pipeline.models import continuing


def test_the_path_of_the_start_leads_there_also_through_links(tmp_path: Path) -> None:
    start, run_dir = tmp_path / "first" / "sft", tmp_path / "disk" / "deep" / "run"
    for directory in (start, run_dir):
        directory.mkdir(parents=True)
    (tmp_path / "runs").symlink_to(run_dir.parent)
    linked = tmp_path / "runs" / "run"
    assert (linked / continuing.relative_path(start, linked)).resolve() == start.resolve()
