"""How fast the place of the runs is written and read."""

import contextlib
import os
import secrets
import time
from pathlib import Path

__all__ = ["disk_rates"]

_CHUNK = 1 << 22


def disk_rates(folder: Path, nbytes: int = 1 << 26) -> tuple[float, float] | None:
    """Bytes per second to a new file, flushed to the disk, and back.

    The system is asked to forget the file before it is read (not on every system can it be); a
    cache below, of a virtual disk say, may still answer.

    Args:
      folder: where the file is made; it is removed again.
      nbytes: its size.

    Returns:
      Write and read rates; None: nothing could be written there.
    """
    path = folder / f".emloc-doctor-{secrets.token_hex(4)}"
    chunk = secrets.token_bytes(min(_CHUNK, nbytes))  # a disk may compress zeros
    count = max(1, nbytes // len(chunk))
    try:
        with path.open("wb", buffering=0) as file:
            begin = time.perf_counter()
            for _ in range(count):
                file.write(chunk)
            os.fsync(file.fileno())
            written = time.perf_counter() - begin
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            while file.read(_CHUNK):
                pass
            read = time.perf_counter() - begin
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    total = count * len(chunk)
    return total / max(written, 1e-9), total / max(read, 1e-9)
