"""Functions that break a copy of an export, tensor by tensor or file by file.

The files of the copy are links to the good export. So a function must replace a file instead of writing into it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
METADATA = {"format": "pt"}
Tensors = dict[str, Tensor]
Break = Callable[[Path, Path], object]
"""A function (export, base) that breaks an export."""


def replace(path: Path, content: str | bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def write_shard(path: Path, tensors: Tensors, metadata: dict[str, str] | None = METADATA) -> None:
    path.unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def shards_of(export: Path) -> dict[str, Tensors]:
    return {path.name: load_file(path) for path in sorted(export.glob("model-*.safetensors"))}


def write_index(export: Path, shards: dict[str, Tensors]) -> None:
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    replace(export / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def tensors(edit: Callable[[Tensors], object]) -> Break:
    """Change tensors in their shards. New tensors go into the first shard."""

    def break_(export: Path, _: Path) -> None:
        shards = shards_of(export)
        file_of = {name: file for file, of_file in shards.items() for name in of_file}
        edited = {name: tensor for of_file in shards.values() for name, tensor in of_file.items()}
        edit(edited)
        after: dict[str, Tensors] = {file: {} for file in shards}
        for name, tensor in edited.items():
            after[file_of.get(name, min(shards))][name] = tensor
        for file, of_file in after.items():
            write_shard(export / file, of_file) if of_file else (export / file).unlink()
        write_index(export, after)

    return break_


def change(name: str, how: Callable[[Tensor], Tensor]) -> Break:
    """Apply `how` to a tensor."""
    return tensors(lambda all_: all_.update({name: how(all_[name])}))


def packed_as(how: Callable[[Tensor], Tensor], *names: str) -> Break:
    """Apply `how` to each of several tensors."""
    return tensors(lambda all_: all_.update({name: how(all_[name]) for name in names}))


def packed(name: str, how: Callable[[Tensor], Tensor]) -> Break:
    """Apply `how` to the blocks and to the scales of a stack, for example to reorder experts or rows."""
    return packed_as(how, f"{name}_blocks", f"{name}_scales")


def drop(*names: str) -> Break:
    return tensors(lambda all_: [all_.pop(name) for name in names])


def add(name: str, tensor: Tensor) -> Break:
    return tensors(lambda all_: all_.update({name: tensor}))


def rename(old: str, new: str) -> Break:
    return tensors(lambda all_: all_.update({new: all_.pop(old)}))


def set_at(*index: int, to: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def how(tensor: Tensor) -> Tensor:
        tensor[index] = to(tensor[index])
        return tensor

    return how


def json_file(name: str, edit: Callable[[dict[str, Any]], object]) -> Break:
    def break_(export: Path, _: Path) -> None:
        content = json.loads((export / name).read_text())
        edit(content)
        replace(export / name, json.dumps(content))

    return break_


def config(edit: Callable[[dict[str, Any]], object]) -> Break:
    return json_file("config.json", edit)


def settings(**values: object) -> Break:
    return config(lambda content: content.update(values))


def part(key: str, **values: object) -> Break:
    return config(lambda content: content[key].update(values))


def without(key: str) -> Break:
    return config(lambda content: content.pop(key))


def add_file(name: str, content: str = "{}") -> Break:
    return lambda export, _: replace(export / name, content)


def remove_file(name: str) -> Break:
    return lambda export, _: (export / name).unlink()


def add_text(name: str) -> Break:
    return lambda export, _: replace(export / name, (export / name).read_text() + " ")
