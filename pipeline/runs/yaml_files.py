"""YAML files of a run: config.yaml and command.yaml.

libyaml reads and writes them, if PyYAML was built with it. It takes an eighth of the time of PyYAML's own code.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", re.ASCII)
"""A number such as 1e-5. YAML 1.2 and OmegaConf read a number, but PyYAML, which reads YAML 1.1, reads a text."""


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not valid YAML in UTF-8.
    """
    import yaml

    text = path.read_text(encoding="utf-8")
    try:
        return yaml.load(text, yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader)
    except RecursionError as error:
        raise ValueError("is nested too deeply") from error
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def value_at(content: object, key: str) -> Any:
    """Return the value under a dotted key, or None if the content has no such value."""
    for name in key.split("."):
        content = content.get(name) if isinstance(content, dict) else None
    return content


def as_yaml(content: object, width: int | None = None) -> str:
    """Return the YAML of plain values. A text that a reader could take for another type is quoted.

    Args:
        content: dictionaries, lists, texts, numbers, booleans and null.
        width: the number of characters after which a long text is folded. None stands for PyYAML's width.
    """
    import yaml

    return yaml.dump(
        content, Dumper=_dumper(), default_flow_style=False, allow_unicode=True, sort_keys=False, width=width
    )


@cache
def _dumper() -> Any:
    import yaml

    base = yaml.CSafeDumper if yaml.__with_libyaml__ else yaml.SafeDumper
    dumper: Any = type("_Dumper", (base,), {})
    dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
    return dumper
