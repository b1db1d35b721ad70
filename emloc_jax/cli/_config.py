"""From a YAML file and `key=value` overrides to a checked configuration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from emloc_jax.errors import ConfigError

__all__ = ["differences", "load_config", "to_yaml"]

T = TypeVar("T")


def load_config(kind: type[T], file: str | None, overrides: Sequence[str]) -> T:
    """A `kind` from its defaults, a YAML file and overrides, the later ones first.

    Args:
      kind: configuration class, a dataclass of `_options`.
      file: YAML file or None.
      overrides: `group.key=value` each, the value in YAML.

    Raises:
      ConfigError: no such file, an unknown key, a value of the wrong type, or a required key
        that nobody gave.
    """
    config = OmegaConf.structured(kind)
    try:
        if file is not None:
            config = OmegaConf.merge(config, _read(file))
        for text in overrides:
            if "=" not in text:
                raise ConfigError(f"'{text}' is no override; write key=value, e.g. train.steps=50.")
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([text]))
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise ConfigError(
                f"{', '.join(missing)} must be given: as key=value, or in the file of --config."
            )
        result: Any = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error)) from error
    except (yaml.YAMLError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"The options cannot be read as YAML: {reason}.") from error
    return result


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def differences(old: str, config: Any) -> list[str]:
    """`key: old -> new` for every option in which the YAML text `old` and `config` differ."""
    before = _flat(OmegaConf.to_container(OmegaConf.create(old)))
    after = _flat(OmegaConf.to_container(OmegaConf.structured(config)))
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _read(file: str) -> Any:
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"There is no configuration file {path}.")
    try:
        return OmegaConf.load(path)
    except Exception as error:  # whatever the YAML parser raises
        raise ConfigError(f"{path} is not readable as YAML: {error}") from error


def _explain(error: OmegaConfBaseException) -> str:
    reason = str(error).splitlines()[0]
    if "ListConfig" in reason:
        reason += " A list is wanted; write key=['value']"
    key = getattr(error, "full_key", None) or ""
    return f"Configuration key '{key}': {reason}. `emloc VERB --help` lists all keys."


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat
