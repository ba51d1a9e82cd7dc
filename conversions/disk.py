"""What a refused write means: a disk that ran full, or a folder that may not be written.

Owns the two errors and their words. Leaves the check before the first byte to `hub_source.py`.
"""

import errno
import shutil
from pathlib import Path

from mlx_gemma4.conversions.hub_progress import size
from mlx_gemma4.errors import DoesNotFitError, Gemma4Error


def refused(folder: Path, error: OSError) -> Gemma4Error:
    """The error to raise instead of the one the system gave while writing into `folder`, which may not exist yet."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Gemma4Error(f"cannot write {folder} ({error.strerror}); choose a folder you may write to")
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    return DoesNotFitError(
        f"the disk filled up while writing {folder} ({size(shutil.disk_usage(existing).free)} free); make room and run "
        "the same command again: it goes on where it stopped"
    )
