"""Compose a configuration from conf/, the recipes and overrides, as the command line does.

Hydra keeps global state. `compose` restores this state, so programs that use Hydra themselves can call `compose`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from pipeline.config import config_files, rates, rules
from pipeline.config.groups import RECIPE, Folders
from pipeline.config.overrides import quote
from pipeline.config.pipeline import PipelineConfig
from pipeline.errors import UserError, user_errors

_PACKAGE = Path(__file__).resolve().parents[1]
HYDRA_VERSION = "1.3"
"""The version of Hydra whose defaults apply."""


def _beside_or_inside(name: str) -> Path:
    """Find conf/ or recipes/. An installed wheel has them inside the package, and a checkout has them beside it."""
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


CONF_DIR = _beside_or_inside("conf")
RECIPES_DIR = _beside_or_inside("recipes")
FOLDERS = Folders(CONF_DIR, RECIPES_DIR)


@cache
def register() -> None:
    """Register the schema, the recipes and the resolver `rate_of_sft` with Hydra, once per process."""
    from hydra.core.config_store import ConfigStore

    rates.register()
    store = ConfigStore.instance()
    store.store("schema", PipelineConfig)
    for path in sorted(RECIPES_DIR.glob("*.yaml")):
        node = OmegaConf.merge(OmegaConf.load(path), {"recipe": path.stem})
        store.store(path.stem, node, group=RECIPE, package="_global_", provider=str(path))


def compose(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> PipelineConfig:
    """Compose the configuration of one job, and check it.

    Args:
        overrides: settings as on the command line, such as `stage=sft` and `recipe=smoke`.
        config_dirs: absolute directories with further configuration files, as --config-dir names them.

    Raises:
        UserError: as `rules.resolve`. Or Hydra cannot compose these overrides. For example, one has several values,
            which only a sweep takes.
    """
    with _composed(overrides, config_dirs) as composed:
        return rules.resolve(composed)


def values(overrides: Sequence[str], config_dirs: Sequence[Path] = ()) -> dict[str, object]:
    """Return the values of all settings by their full keys, unchecked, for messages.

    A value that is not set is `???`. Interpolations such as `${oc.env:TOKEN}` stay as they are written.

    Raises:
        UserError: Hydra cannot compose these overrides.
    """
    with _composed(overrides, config_dirs) as composed:
        plain: Any = OmegaConf.to_container(composed, resolve=False, throw_on_missing=False, enum_to_str=True)
    return _flat(plain)


def _flat(node: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in node.items():
        found.update(_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return found


@contextmanager
def _composed(overrides: Sequence[str], config_dirs: Sequence[Path]) -> Iterator[DictConfig]:
    """Compose a configuration. Inside the block, interpolations of Hydra's own settings can be resolved.

    Raises:
        UserError: Hydra or OmegaConf raised an error, also inside the block.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException

    if found := config_files.problems(config_dirs):
        raise user_errors(found)
    register()
    searched = (
        [f"hydra.searchpath=[{','.join(quote(f'file://{path}') for path in config_dirs)}]"] if config_dirs else []
    )
    try:
        with _restored_state(), hydra.initialize_config_dir(str(CONF_DIR), version_base=HYDRA_VERSION):
            composed = hydra.compose("config", [*overrides, *searched], return_hydra_config=True)
            HydraConfig.instance().set_config(composed)  # for the resolver `hydra`
            with open_dict(composed):
                hydra_config = composed.pop("hydra")
            keep_choice(composed, hydra_config.runtime.choices.get(RECIPE))
            yield composed
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(short_message(error)) from error


def keep_choice(composed: DictConfig, recipe: str | None) -> None:
    """Set `recipe` to the name of the chosen recipe. `register` sets this only in our own recipes."""
    if recipe is not None:
        composed.recipe = recipe


def short_message(error: Exception) -> str:
    """Return the first three lines of a message of Hydra or OmegaConf. They name the error and its place."""
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:3])


@contextmanager
def _restored_state() -> Iterator[None]:
    """Let Hydra be initialized inside the block, even if the caller uses it. Then restore the caller's state."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.version import VersionBase

    state, settings, version = GlobalHydra.instance(), HydraConfig.instance(), VersionBase.instance()
    before = (state.hydra, settings.cfg, version.version_base)
    state.clear()
    try:
        yield
    finally:
        GlobalHydra.set_instance(state)
        state.hydra, settings.cfg, version.version_base = before
