"""Spares most of the work by which Hydra composes a configuration. The tests run a thousand command lines."""

import copy
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import CachingConfigRepository, ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from pipeline.config.composition import CONF_DIR

_Sources = tuple[tuple[str, str], ...]
_load, _merge = ConfigRepository.load_config, ConfigLoaderImpl._compose_config_from_defaults_list
_parse = OverridesParser.parse_rule
_deepcopy = DictConfig.__deepcopy__
_map_interpolations = defaults_list._create_interpolation_map
_loaded: dict[tuple[_Sources, str], Any] = {}
_merged: dict[tuple[_Sources, str], bytes] = {}
_parsed: dict[tuple[str, str], Any] = {}


@contextmanager
def composed_once(arguments: Sequence[str]) -> Iterator[None]:
    """Let the program that runs with these arguments compose its configuration once, and quickly.

    Hydra 1.3 first composes a configuration only to read hydra.mode, which is null by default, and ignores all errors.
    That takes a tenth of a second. It is skipped if no argument sets a key of Hydra.
    """
    if any("hydra." in argument for argument in arguments):
        yield
        return
    with patch.object(Hydra, "get_mode", lambda *_, **__: None), composed_quickly():
        yield


@contextmanager
def composed_quickly() -> Iterator[None]:
    """Let Hydra read each file of conf/ once in this process, and merge the same choice of files once.

    Hydra then applies the settings of a command line to a copy. It always reads files in other directories.
    Copying a configuration takes a quarter of the time.
    """
    with (
        patch.object(DictConfig, "__deepcopy__", _copy_by_pickle),
        patch.object(OverridesParser, "parse_rule", _parse_once),
        patch.object(ConfigRepository, "load_config", _load_once),
        patch.object(ConfigLoaderImpl, "_compose_config_from_defaults_list", _merge_once),
        patch.object(CachingConfigRepository, "__init__", _share_sources),
        patch.object(defaults_list, "_create_interpolation_map", _map_if_needed),
    ):
        yield


def _load_once(repository: ConfigRepository, config_path: str) -> Any:
    sources = _constant(repository)
    if sources is None:
        return _load(repository, config_path)
    if (sources, config_path) not in _loaded:
        _loaded[sources, config_path] = _load(repository, config_path)
    return _loaded[sources, config_path]


def _merge_once(loader: ConfigLoaderImpl, defaults: Any, repo: CachingConfigRepository) -> Any:
    sources = _constant(repo)
    if sources is None:
        return _merge(loader, defaults, repo)
    key = (sources, repr(defaults))
    if key not in _merged:
        _merged[key] = pickle.dumps(_merge(loader, defaults, _Copies(repo)))  # type: ignore[arg-type]
    return pickle.loads(_merged[key])


class _Copies:
    """A repository that returns copies, because Hydra changes what it merges."""

    def __init__(self, repository: CachingConfigRepository) -> None:
        self._repository = repository

    def load_config(self, config_path: str) -> Any:
        return copy.deepcopy(self._repository.load_config(config_path))

    def get_schema_source(self) -> Any:
        return self._repository.get_schema_source()


def _copy_by_pickle(config: DictConfig, memo: dict[int, Any]) -> DictConfig:
    """Copy a configuration by way of its pickle. As in OmegaConf, the copy has the same parent, which is not copied."""
    if memo:  # part of a larger copy
        return _deepcopy(config, memo)
    parent = config.__dict__["_parent"]
    config.__dict__["_parent"] = None
    try:
        copied: DictConfig = pickle.loads(pickle.dumps(config, pickle.HIGHEST_PROTOCOL))
    finally:
        config.__dict__["_parent"] = parent
    copied.__dict__["_parent"] = parent
    return copied


def _parse_once(parser: OverridesParser, text: str, rule: str) -> Any:
    """Parse each text once, and return a copy. The program and Hydra parse each setting of a command line."""
    if (text, rule) not in _parsed:
        _parsed[text, rule] = _parse(parser, text, rule)
    return copy.deepcopy(_parsed[text, rule])


def _share_sources(self: CachingConfigRepository, delegate: Any) -> None:
    """Copy the repository, but not its sources. Hydra copies the schema and all recipes in each composition."""
    self.delegate = copy.copy(delegate)
    self.cache = {}


def _map_if_needed(overrides: Any, defaults: Any, self_added: bool) -> Any:
    """Make the map only for defaults that refer to other choices. Hydra reads the map for these alone."""
    return _map_interpolations(overrides, defaults, self_added) if any(d.is_interpolation() for d in defaults) else None


def _constant(repository: Any) -> _Sources | None:
    """Return the places that a repository reads from. Return None if one is a directory other than conf/."""
    sources = [(each.scheme(), each.path) for each in repository.get_sources()]
    return None if any(scheme == "file" and path != str(CONF_DIR) for scheme, path in sources) else tuple(sources)
