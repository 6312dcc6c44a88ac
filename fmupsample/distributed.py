"""Several processes as one run, as ``torchrun`` starts them: which is which, and word between them.

Nothing heavy is imported before processes join.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from fmupsample.errors import ProcessError, UsageError

if TYPE_CHECKING:
    import torch

_PIECE = 2**20  # bytes of a message in one value of the store, which takes 8 MB at most
# A process that is not the first gives a sign of life so often, and is taken for dead without; in
# seconds. torchrun notices deaths by itself, but not everything that starts processes does.
_BEAT, _SILENCE = 5.0, 120.0
_joined = 0  # teams of this process: the number is the same in all processes


def is_distributed() -> bool:
    """Whether this process was started by ``torchrun``, with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """Whether this is the only process, or the first."""
    return not is_distributed() or int(os.environ.get("RANK", "0")) == 0


def processes_here() -> int:
    """How many processes of the run share this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def own_device(device: str | torch.device) -> torch.device:
    """As :func:`fmupsample.device.resolve_device`; ``auto`` or ``cuda`` is this process's own GPU.

    Raises:
        UsageError: as there, or more processes than GPUs.
    """
    import torch

    from fmupsample.device import resolve_device

    place = resolve_device(device)
    if not is_distributed() or place.type != "cuda":
        return place
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise UsageError(
            f"process {local} has no GPU: there are {torch.cuda.device_count()}; start fewer "
            "with --nproc-per-node, or give --device cpu"
        )
    place = torch.device("cuda", local)
    torch.cuda.set_device(place)
    return place


@contextlib.contextmanager
def joined() -> Iterator[Team | None]:
    """``with joined() as team``, in all processes of ``torchrun`` at once; ``None``: this is alone.

    Where the block ends with an error, but for Ctrl-C, the other processes hear of it.

    Raises:
        ProcessError: the others cannot be reached.
    """
    global _joined
    if not is_distributed():
        yield None
        return
    from torch import distributed

    _joined += 1
    try:
        store, rank, size = next(distributed.rendezvous("env://"))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = distributed.PrefixStore(f"fmupsample/{attempt}/{_joined}", store)
    except (RuntimeError, ValueError, OSError) as error:
        raise ProcessError(f"the other processes cannot be reached: {error}") from error
    team = Team(store, rank, size)
    try:
        with team.beating():
            yield team
    except Exception:
        team.fail()
        raise


class Team:
    """The processes of one run that share a list of work; see :func:`joined`.

    Word passes through the key-value store that ``torchrun`` keeps for its processes, and not by
    collectives: those hold a process where Ctrl-C does not reach it, and give up after minutes,
    while one share may take days longer than another.

    Attributes:
        rank, size: the number of this process, and how many there are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size

    @property
    def leads(self) -> bool:
        """Whether this process plans, speaks to the user and sums up."""
        return self.rank == 0

    def post(self, name: str, message: Any) -> None:
        """Put ``message``, of what JSON can hold, where one other process can fetch it."""
        data = json.dumps(message).encode()
        pieces = [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]
        with _reaching():
            for number, piece in enumerate(pieces):
                self._store.set(f"{name}/{number}", piece)
            self._store.set(name, str(len(pieces)))

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """``with team.beating():`` the first process sees that this one lives."""
        if self.leads:
            yield
            return
        ended = threading.Event()

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # what that means is seen elsewhere
                while not ended.wait(_BEAT):
                    self._store.add(f"beats of {self.rank}", 1)

        thread = threading.Thread(target=beat, name="beat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def wait(
        self,
        name: str,
        meanwhile: Callable[[], object] = lambda: None,
        *,
        by: int | None = None,
    ) -> None:
        """Until ``name`` has been posted.

        Args:
            meanwhile: called some times a second.
            by: the process that will, which must be :meth:`beating`; default: the first, with
                whom the store goes, or its keeper ends all.

        Raises:
            ProcessError: another process has failed, or is gone.
        """
        pause, beats, heard = 0.01, -1, time.monotonic()
        with _reaching():
            while not self._store.check([name]):
                if self._store.check(["failed"]):
                    number = int(self._store.get("failed")) + 1
                    raise ProcessError(
                        f"process {number} of {self.size} has failed; what is finished is kept, "
                        "and the same command goes on from there"
                    )
                if by is not None and (now := self._store.add(f"beats of {by}", 0)) != beats:
                    beats, heard = now, time.monotonic()
                if by is not None and time.monotonic() - heard > _SILENCE:
                    raise ProcessError(
                        f"process {by + 1} of {self.size} gives no sign of life; what is finished "
                        "is kept, and the same command goes on from there"
                    )
                meanwhile()
                time.sleep(pause)
                pause = min(0.3, pause * 1.5)

    def fetch(self, name: str, meanwhile: Callable[[], object] = lambda: None) -> Any:
        """What was posted, once; waits for it, as :meth:`wait` does."""
        self.wait(name, meanwhile)
        data = b""
        with _reaching():
            for number in range(int(self._store.get(name))):
                data += self._store.get(f"{name}/{number}")
                self._store.delete_key(f"{name}/{number}")
        return json.loads(data)

    def fail(self) -> None:
        """Let the others know that this process ends without what they wait for."""
        with contextlib.suppress(RuntimeError):
            self._store.set("failed", str(self.rank))

    def add(self, name: str, count: int) -> int:
        """Add to a number that all share, and begins at 0; what it is then."""
        with _reaching():
            return self._store.add(name, count)


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # DistError and its kin, where the store has gone
        raise ProcessError(
            "the first process has gone; what is finished is kept, and the same command goes on "
            "from there"
        ) from error
