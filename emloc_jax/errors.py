"""Every error the library raises on purpose: what was asked, what was found, what to do."""

__all__ = [
    "AdapterMismatchError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "EmlocError",
    "MaskShapeError",
    "MomentShapeError",
    "NoTokensError",
    "NonFiniteError",
    "OutputExistsError",
    "PlanError",
    "ProjectorError",
    "RatioError",
    "ResumeError",
    "UnmatchedRuleError",
    "UnsupportedArchitectureError",
    "UnsupportedKernelError",
]


class EmlocError(Exception):
    """Base of every error that the library raises on purpose; the command line exits with 2."""


class UnmatchedRuleError(EmlocError):
    """A rule matches no kernel."""


class UnsupportedKernelError(EmlocError):
    """A kernel has no handler, so a box on it would be materialized at every call."""


class MomentShapeError(EmlocError):
    """A second moment and a kernel disagree in shape, or a kernel has no second moment."""


class MaskShapeError(EmlocError):
    """A token mask does not fit the input of a kernel."""


class NoTokensError(EmlocError):
    """A kernel saw no token in calibration: empty or all-masked data, or it never ran."""


class AdapterMismatchError(EmlocError):
    """Adapters and parameters differ in paths or shapes, or an adapter was corrected already."""


class NonFiniteError(EmlocError):
    """A NaN or an infinity where only finite numbers make sense."""


class PlanError(EmlocError):
    """No setting keeps the memory and time limits that were given."""


class ProjectorError(EmlocError):
    """A projector, or a subspace size, that cannot exist for its kernel."""


class RatioError(EmlocError):
    """A ratio, rank, energy or budget outside its range."""


class CheckpointError(EmlocError):
    """A checkpoint that is truncated, corrupt, incomplete, or that disagrees with its model."""


class UnsupportedArchitectureError(EmlocError):
    """A model family, or an option of one, that the library does not implement."""


class OutputExistsError(EmlocError):
    """An output path exists already; nothing existing is ever overwritten unasked."""


class DataError(EmlocError):
    """A data set or a row of it that cannot be used; the message names file and line."""


class ConfigError(EmlocError):
    """A configuration with an unknown key or an impossible value."""


class ResumeError(EmlocError):
    """A run that cannot be resumed as asked."""
