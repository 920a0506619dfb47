"""Make the command that starts an engine on an export, and check that the engine can start on this machine."""

import errno
import os
import shlex
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.checkpoints.config_json import CONFIG, read_config
from pipeline.checkpoints.gpt_oss import Shape
from pipeline.config import ServeConfig
from pipeline.config.engines import ENGINES, SERVERS, Server
from pipeline.errors import user_errors
from pipeline.runs import parts
from pipeline.runs.artifacts import Artifact
from pipeline.runs.paths import absolute
from pipeline.runs.records import ExportRecord

_SETTABLE = ("tensor_parallel_size", "context_length", "gpu_memory_fraction")
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Launch:
    """An engine to start, and the addresses at which it will answer.

    Attributes:
        command: the command, one word per item.
        environment: environment variables of the engine, beside those of this program.
        address: address of the server, without a path.
        health: address that answers with status 200 once the engine is up.
    """

    command: list[str]
    address: str
    health: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def shell_line(self) -> str:
        """The command as one line of shell, with its environment variables."""
        variables = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*(["env", *variables] if variables else []), *self.command])

    @property
    def api(self) -> str:
        """Address of the engine's API, for evaluate.endpoint.url. The API has OpenAI's form."""
        return f"{self.address}/v1"


def plan(serve: ServeConfig, export: Artifact, *, name: str, date: str, gpus: int, found: list[str]) -> Launch:
    """Make the command that starts the engine, and check that the engine can start.

    Args:
        serve: settings of the engine.
        export: the export to serve.
        name: name under which the engine offers the model.
        date: date of the trained prompts. The engine's chat prompts get it, if the engine allows that, and if the
            user's environment does not set another.
        gpus: number of visible GPUs.
        found: problems that the caller has found. They are reported together with the problems found here.

    Raises:
        UserError: the engine cannot read the export, does not support a setting, or cannot divide the model by the
            tensor-parallel size. If serve.dry_run=false, two more causes are possible: the engine is not installed, or
            the port is taken.
    """
    server = SERVERS[serve.engine.name]
    values = {key: getattr(serve, key) for key in ("host", "port", *_SETTABLE)} | {"name": name}
    found = [*found, *_target_problems(serve, export), *_setting_problems(serve, server)]
    if not found and "tensor_parallel_size" in server.flags:
        shape = Shape.of(read_config(export.directory), export.directory / CONFIG)
        found += _parallel_problems(serve, shape, gpus)
        values["tensor_parallel_size"] = serve.tensor_parallel_size or largest_parallel(shape, gpus)
    if not serve.dry_run:
        found += _program_problems(serve, server) + _port_problems(serve)
    if found:
        raise user_errors(found)
    values["model"] = server.model_in(export.directory, export.files)
    host = _EVERY_ADDRESS.get(serve.host, serve.host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{serve.port}"
    command = server.arguments(_program(serve), values, serve.extra_arguments)
    return Launch(command, address, address + server.health, _environment(server, date, os.environ))


def _environment(server: Server, date: str, ours: Mapping[str, str]) -> dict[str, str]:
    return {server.date_variable: ours.get(server.date_variable, date)} if server.date_variable else {}


def largest_parallel(shape: Shape, gpus: int) -> int:
    """Return the largest tensor-parallel size, up to `gpus`, that divides each layer evenly.

    The size is 1 without GPUs.
    """
    return max((size for size in range(2, gpus + 1) if not _undivided(shape, size)), default=1)


def _undivided(shape: Shape, size: int) -> list[str]:
    counts = {
        "attention heads": shape.num_attention_heads,
        "key-value heads": shape.num_key_value_heads,
        "experts": shape.num_local_experts,
    }
    return [f"{count} {name}" for name, count in counts.items() if count % size]


def _target_problems(serve: ServeConfig, export: Artifact) -> list[str]:
    target, targets = export.read(ExportRecord).target, ENGINES[serve.engine.name].targets
    if target in targets:
        return []
    there = [name for name in parts.complete(export.directory.parent) if name in targets]
    advice = (
        f"The run also has {' and '.join(f'export/{name}' for name in there)}: add export.target={there[0]}. "
        if there
        else "Export to another target. "
    )
    able = [name for name in SERVERS if target in ENGINES[name].targets]
    others = f"serve.engine={' or '.join(able)} reads that one" if able else "no engine here reads that one"
    return [
        f"serve.engine={serve.engine.name}: reads export.target={', '.join(targets)}, but {export.directory} was"
        f" exported with export.target={target}. {advice}Or change the engine:"
        f" {others}."
    ]


def _setting_problems(serve: ServeConfig, server: Server) -> list[str]:
    return [
        f"serve.{name}={getattr(serve, name)}: serve.engine={serve.engine.name} has no such setting. Set it to null."
        for name in _SETTABLE
        if name not in server.flags and getattr(serve, name) is not None
    ]


def _parallel_problems(serve: ServeConfig, shape: Shape, gpus: int) -> list[str]:
    size = serve.tensor_parallel_size
    if size is None:
        return []
    if undivided := _undivided(shape, size):
        return [
            f"serve.tensor_parallel_size={size}: does not divide the model's {', '.join(undivided)}."
            f" Here {largest_parallel(shape, gpus)} fits best."
        ]
    if size > max(gpus, 1) and not serve.dry_run:
        return [f"serve.tensor_parallel_size={size}: {gpus} GPUs are visible here. Lower it, or set it to null."]
    return []


def _program(serve: ServeConfig) -> str | None:
    """Return `serve.program`, made absolute if it is a path."""
    is_path = serve.program is not None and "/" in serve.program
    return str(absolute(str(serve.program))) if is_path else serve.program


def _program_problems(serve: ServeConfig, server: Server) -> list[str]:
    program = _program(serve) or server.command[0]
    if shutil.which(program):
        return []
    where = f"serve.program={program}" if serve.program else f"serve.engine={serve.engine.name}"
    return [
        f"{where}: the program {program!r} was not found. Install the engine in an environment of its own"
        f" ({server.install}), and say where: serve.program=<path of its {server.command[0]}>."
    ]


def _port_problems(serve: ServeConfig) -> list[str]:
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just released counts as free
        try:
            probe.bind((serve.host, serve.port))
        except OSError as error:
            return [_not_bound(serve, error)]
    return []


def _not_bound(serve: ServeConfig, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"serve.port={serve.port}: another program listens on this port. Stop it, or choose another port."
    return f"serve.host={serve.host}, serve.port={serve.port}: cannot listen there ({error.strerror})."
