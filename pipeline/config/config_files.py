"""Checks configuration files of the user before Hydra reads them.

A YAML file of a few lines can stand for billions of values, because an alias repeats its anchor. OmegaConf copies each
repetition.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import yaml

_MOST_BYTES = 1 << 18
_MOST_VALUES = 100_000
_FLAGS = ("--config-dir", "-cd")


def config_dirs_of(arguments: Sequence[str]) -> list[Path]:
    """Return the directories that --config-dir names."""
    found = [value for flag, value in pairwise(arguments) if flag in _FLAGS]
    found += [argument.partition("=")[2] for argument in arguments if argument.startswith(("--config-dir=", "-cd="))]
    return [Path(each) for each in found]


def problems(directories: Sequence[Path]) -> list[str]:
    """Return a message for each YAML file in these directories that cannot or must not be read."""
    files = [path for directory in directories for path in sorted(directory.rglob("*.yaml"))]
    return [f"{path}: {found}" for path in files for found in _describe(path)]


def _describe(path: Path) -> Iterator[str]:
    import yaml

    if not path.is_file():
        yield "is not a regular file. Remove it."
    elif (size := path.stat().st_size) > _MOST_BYTES:
        yield f"has {size:,} bytes. A configuration file has at most {_MOST_BYTES:,}."
    else:
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
            count = 0 if node is None else _count(node, {})
        except RecursionError:
            yield "is nested too deeply, or an anchor contains itself."
        except OSError as error:
            yield f"cannot be read ({error.strerror})."
        except (yaml.YAMLError, ValueError) as error:
            yield f"is not valid YAML ({' '.join(str(error).split()):.300})."
        else:
            if count > _MOST_VALUES:
                yield f"its aliases repeat values, {count:,} in all. A configuration file has at most {_MOST_VALUES:,}."


def _count(node: "yaml.Node", counted: dict[int, int]) -> int:
    """Count the values that a node stands for. `counted` has the nodes that were counted."""
    if id(node) not in counted:
        inner = node.value if isinstance(node.value, list) else []
        children = [child for each in inner for child in (each if isinstance(each, tuple) else (each,))]
        counted[id(node)] = 1 + sum(_count(child, counted) for child in children)
    return counted[id(node)]
