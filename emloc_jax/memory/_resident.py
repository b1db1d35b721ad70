"""The resident set of this process, as the operating system counts it."""

import contextlib
import sys
from pathlib import Path

from emloc_jax.memory._ledger_peak import Reading

__all__ = ["reset_resident_peak", "resident_reading"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the peak resident set to what is resident now


def resident_reading() -> Reading:
    """Resident bytes now, and their peak since the start or the last reset.

    On Linux VmRSS and VmHWM; elsewhere only the peak since the start, from `getrusage`.

    Example:
      >>> resident_reading().peak > 2**20
      True
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        lines = _STATUS.read_text(encoding="utf-8", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if line.startswith("Vm"))
        now, peak = (1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM"))
        return Reading(now, peak)
    with contextlib.suppress(ImportError, OSError):
        import resource  # not on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return Reading(None, unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return Reading()


def reset_resident_peak() -> bool:
    """Lets the peak start anew from what is resident; whether that was permitted.

    It walks no pages and takes microseconds. The peak is the process's own, so `getrusage` and a
    tool such as `/usr/bin/time`, which read the same counter, also see it only since the reset.
    """
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True
