"""The `emulator_config.json` beside the factors of an emulator."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emloc_jax.errors import CheckpointError
from emloc_jax.kernels import Layout

__all__ = ["EmulatorConfig"]

_FORMAT = "emloc_jax.emulator/1"


@dataclasses.dataclass(frozen=True)
class EmulatorConfig:
    """What an emulator was made from and how.

    Attributes:
      base: name or place of the base, for people.
      base_fingerprint: identity of the base (`base_fingerprint`).
      ranks: rank of every compressed kernel, by path.
      layouts: axes of every compressed kernel, by path.
      rules: what decided the ranks: a ratio, rules, an energy or a budget, as JSON.
      weighting: 'two_sided', 'one_sided' or 'plain'.
      calibration_fingerprint: identity of the second moments (`calibration_fingerprint`).
      seed: of the calibration data.
    """

    base: str
    base_fingerprint: str
    ranks: Mapping[str, int]
    layouts: Mapping[str, Layout]
    rules: Any = None
    weighting: str | None = None
    calibration_fingerprint: str | None = None
    seed: int | None = None

    def write(self, file: Path) -> None:
        """Write the config as JSON."""
        values = {"format": _FORMAT} | dataclasses.asdict(self)
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> "EmulatorConfig":
        """Read a config back.

        Raises:
          CheckpointError: the file is missing, or no emulator config of this version.
        """
        if not file.is_file():
            raise CheckpointError(f"There is no {file}, so {file.parent} is no emulator folder.")
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if values.pop("format") != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT!r}")
            values["ranks"] = {path: int(rank) for path, rank in values["ranks"].items()}
            values["layouts"] = {
                path: Layout(v["num_in"], v["num_out"], v["perm"] and tuple(v["perm"]))
                for path, v in values["layouts"].items()
            }
            return cls(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} is no emulator config: {error!r}. Make the emulator again."
            ) from error
