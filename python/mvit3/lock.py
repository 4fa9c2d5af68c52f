"""One run in a folder at a time."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .distributed import World
from .options import UsageError

NAME = ".lock"


@contextmanager
def alone(folder: Path, world: World) -> Iterator[None]:
    """Keeps other runs out of a folder, which it makes; a run that was killed keeps nobody out.

    Raises:
        UsageError: another run is in it; on every process of this one.
    """
    made, file, error = not folder.exists(), None, None
    if world.first:
        try:
            file = _lock(folder)
        except UsageError as found:
            error = found
    if error := world.from_first(error):
        raise error
    try:
        yield
    finally:
        if file is not None:
            (folder / NAME).unlink(missing_ok=True)
            file.close()
            if made:
                with suppress(OSError):  # it is not empty, as a rule
                    folder.rmdir()


def _lock(folder: Path) -> IO[str]:
    # Locks of this kind belong to the process, not to the loading processes that it forks, and are known to network
    # file systems.
    from fcntl import LOCK_EX, LOCK_NB, lockf

    folder.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(folder / NAME, "a+")  # noqa: SIM115 -- open as long as the run
        try:
            lockf(file, LOCK_EX | LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().strip() or "another run"
            file.close()
            raise UsageError(
                f"run.output {folder} is in use by {holder}; take another run.output, or wait until it has ended"
            ) from None
        # where its holder has just left, the file that was locked has no name any more
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / NAME)):
                break
        file.close()
    with suppress(OSError):  # a full disk is the checkpoint's matter
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
    return file
