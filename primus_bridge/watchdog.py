"""A rank that hangs is named: where it stands and since when, and who waits for it; then every rank ends.

The main thread says what it does (``beat``). On each rank a thread looks whether it has gone on. When it has not for
too long, the ranks' threads tell each other through the job's store where their main threads stand.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Any, Optional

GRACE_SECONDS = 60.0
"""By how much a collective's own time limit is above the watchdog's, which can say more and so speaks first."""

LEAST_SECONDS = 2.0
"""How long ranks at least have to answer."""

LOOK_SECONDS = 0.5
"""Between two looks at what another thread has done."""

MEND = "Raise dist.distributed_timeout_minutes if that may take longer"


@dataclass(frozen=True)
class Word:
    """Where a rank's main thread stands.

    waits_in: the function in which it waits for other ranks; None: it does not. seconds: since its last beat, or since
    it has last been seen to wait. place: its line of code.
    """

    doing: str
    seconds: float
    waits_in: Optional[str]
    place: str


class _Progress:
    """What the watched thread has said last."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.say("the start of training")

    def say(self, doing: str) -> None:
        self.doing, self.part, self.count, self.since = doing, "", 0, time.monotonic()

    def say_part(self, part: str) -> None:
        self.part, self.count, self.since = part, self.count + 1, time.monotonic()

    def __str__(self) -> str:
        return self.doing + (f", {self.part} {self.count}" if self.count else "")


_progress: Optional[_Progress] = None
_watches = itertools.count()


def beat(doing: str) -> None:
    """The watched thread begins something: 'step 7'. Nothing in another thread or without a watch."""
    if _progress is not None and threading.get_ident() == _progress.thread:
        _progress.say(doing)


def beat_part(part: str) -> None:
    """And the next part of it: a 'forward pass'. Nothing in another thread or without a watch."""
    if _progress is not None and threading.get_ident() == _progress.thread:
        _progress.say_part(part)


def wait_for_threads(ended: Callable[[float], bool], done: Callable[[], int], part: str) -> None:
    """Wait for threads that work for this one, which beats for them while they make progress.

    ended: waits for them for some seconds, and says whether they have ended. done: how much they have done so far.
    """
    before = done()
    while not ended(LOOK_SECONDS):
        now = done()
        if now != before:
            before = now
            beat_part(part)


@contextmanager
def watching(bound: float, waits: Sequence[str], own_work: Sequence[str]) -> Iterator[None]:
    """Inside, this thread beats at least every ``bound`` seconds; when a rank hangs, this process ends with code 1.

    On every rank of the job together; one rank alone waits for nobody. waits: packages in whose functions a rank waits
    for others; own_work: packages in those in which it does not.
    """
    global _progress
    import torch.distributed as dist

    number = next(_watches)
    if dist.get_world_size() == 1:
        yield
        return
    _progress = _Progress()
    watch = _Watch(_progress, bound, waits, own_work, f"primus_bridge/watch{number}")
    try:
        yield
    finally:
        _progress = None
        watch.end()


class _Watch:
    """Two threads: one talks with the other ranks, the other ends the process when the store does not answer."""

    def __init__(self, progress: _Progress, bound: float, waits: Sequence[str], own_work: Sequence[str], prefix: str):
        import torch.distributed as dist

        self.progress, self.bound, self.waits, self.own_work = progress, bound, waits, own_work
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.pause = min(10.0, bound / 10)
        self.patience = max(LEAST_SECONDS, 3 * self.pause)
        self.ended = threading.Event()
        self.heard = time.monotonic()
        """When the store has last answered."""
        self.waited = 0.0
        """When this rank has last been seen to wait for others: however long that took, it is not its own fault."""
        store: Any = dist.distributed_c10d._get_default_store()
        # a connection of its own, where torch can: the main thread may wait inside a call of the other one
        self.store = dist.PrefixStore(prefix, store.clone() if hasattr(store, "clone") else store)
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._guard)]
        for thread in self.threads:
            thread.start()

    def end(self) -> None:
        """Both threads, which take no longer than a question to the store."""
        self.ended.set()
        for thread in self.threads:
            thread.join(self.patience)

    @property
    def late(self) -> bool:
        return time.monotonic() - self.progress.since > self.bound

    def _talk(self) -> None:
        """Ask the others when this rank is late, and answer when another one is."""
        with suppress(RuntimeError):  # the store has gone: if that matters, the guard says so
            number = 0
            while not self.ended.wait(self.pause):
                now = time.monotonic()
                if now - self.heard > self.pause + self.patience:
                    self.progress.since = now  # the process was stopped for a while, and goes on
                self.heard = now
                if self._word().waits_in is not None:
                    self.waited = now
                if self.late:
                    self.store.set(f"{number}/asked", "")
                if self.store.check([f"{number}/asked"]):
                    self._confer(number)
                    number += 1
            self.store.set(f"left/{self.rank}", "")

    def _confer(self, number: int) -> None:
        """One round of questions; returns when nobody hangs, as far as can be told."""
        own = self._word()
        self.store.set(f"{number}/{self.rank}", json.dumps(asdict(own)))
        words, silent = self._words(number, own)
        leads = min(words) == self.rank
        if leads:
            text: Optional[str] = verdict(words, silent, self.world, self.bound)
            self.store.set(f"{number}/verdict", text or "")
        else:
            text = self._verdict(number)
        if not text:
            return
        if leads:
            _tell(text)
            _kill(silent)
            time.sleep(self.pause)  # the others read the verdict of a store that may end with this process
        _leave()

    def _words(self, number: int, own: Word) -> tuple[dict[int, Word], list[int]]:
        """(the words of ranks that answer in time, those that are silent though they have not left)."""
        words, deadline = {self.rank: own}, time.monotonic() + self.patience
        while True:
            for rank in range(self.world):
                if rank not in words and self.store.check([f"{number}/{rank}"]):
                    words[rank] = Word(**json.loads(self.store.get(f"{number}/{rank}")))
            silent = [r for r in range(self.world) if r not in words and not self.store.check([f"left/{r}"])]
            self.heard = time.monotonic()
            if not silent or self.heard > deadline:
                return words, silent
            time.sleep(self.pause / 4)

    def _verdict(self, number: int) -> str:
        """What the lowest rank that answered says; that something is wrong, when nothing comes of it."""
        deadline = time.monotonic() + 2 * self.patience
        while not self.store.check([f"{number}/verdict"]):
            self.heard = time.monotonic()
            if self.heard > deadline:
                return "no verdict"
            time.sleep(self.pause / 4)
        return self.store.get(f"{number}/verdict").decode()

    def _word(self) -> Word:
        frame = sys._current_frames().get(self.progress.thread)
        waits_in, place = stands(frame, self.waits, self.own_work)
        sign = self.progress.since if waits_in is not None else max(self.progress.since, self.waited)
        return Word(str(self.progress), time.monotonic() - sign, waits_in, place)

    def _guard(self) -> None:
        while not self.ended.wait(self.pause):
            if self.late and time.monotonic() - self.heard > self.pause + self.patience:
                word = self._word()
                _tell(
                    f"{_store_holder()} hangs or is gone: the job's store, which it holds, does not answer; "
                    f"rank {self.rank} has given no sign for {word.seconds:.0f} s in {word.doing} (at {word.place}). "
                    + MEND
                )
                _leave()


def stands(frame: Optional[FrameType], waits: Sequence[str], own_work: Sequence[str]) -> tuple[Optional[str], str]:
    """(the function in which a thread waits for other ranks, or None; 'file:line in function' where it stands).

    frame: the thread's innermost one. Of the place neither Python's own library nor what it waits in is told.
    """
    if frame is None:
        return None, "an unknown place"
    waiting = _is_in(frame, waits) and not _is_in(frame, own_work)
    waits_in = frame.f_code.co_name if waiting else None
    place = frame
    while place.f_back is not None and (
        _module(place).partition(".")[0] in sys.stdlib_module_names or (waiting and _is_in(place, waits))
    ):
        place = place.f_back
    return waits_in, f"{place.f_code.co_filename}:{place.f_lineno} in {place.f_code.co_name}"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _is_in(frame: FrameType, packages: Sequence[str]) -> bool:
    return any(f"{_module(frame)}.".startswith(f"{package}.") for package in packages)


def verdict(words: Mapping[int, Word], silent: Sequence[int], world_size: int, bound: float) -> Optional[str]:
    """Which ranks hang, one sentence each, and who waits for them; None when none does.

    words: of the ranks that answered. silent: ranks that should have, and did not; those in neither have left. bound:
    seconds after which a rank hangs that waits for nobody.
    """
    stuck = {rank: word for rank, word in sorted(words.items()) if word.waits_in is None and word.seconds > bound}
    waiting = {rank: word for rank, word in sorted(words.items()) if word.waits_in is not None}
    if not silent and not stuck:
        # one that works is waited for; the others of one that has left, or has only just come, are about to go on
        if len(waiting) < world_size or any(word.seconds <= bound for word in words.values()):
            return None
        where = (f"rank {rank} in {word.waits_in} at {word.place} ({word.doing})" for rank, word in waiting.items())
        return (
            f"no rank has given a sign for {min(word.seconds for word in words.values()):.0f} s, and each waits for "
            f"another: {'; '.join(where)}. Either they do not agree on what comes next, or the network between them "
            f"fails. {MEND}"
        )
    told = [
        f"rank {rank} hangs in {word.doing}: it gave no sign for {word.seconds:.0f} s (at {word.place})"
        for rank, word in stuck.items()
    ]
    if silent:
        one = len(silent) == 1
        told.append(
            f"{_ranks(silent)} {'hangs' if one else 'hang'}: nothing is heard of {'it' if one else 'them'} "
            f"({'its process is' if one else 'their processes are'} stopped or gone, or the machine is)"
        )
    alike: dict[tuple[str, Optional[str]], list[int]] = {}
    for rank, word in waiting.items():
        alike.setdefault((word.doing, word.waits_in), []).append(rank)
    told += [
        f"{_ranks(ranks)} {'waits' if len(ranks) == 1 else 'wait'} in {doing} ({waits_in})"
        for (doing, waits_in), ranks in alike.items()
    ]
    return "; ".join(told) + f". {MEND}"


def _ranks(ranks: Sequence[int]) -> str:
    """'rank 3', 'ranks 0, 2', 'ranks 0-6, 8'."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    names = (f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(names)


def _store_holder() -> str:
    return "torch's launcher" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"


def _tell(text: str) -> None:
    """To the local launcher, which shows it once, else on stderr."""
    from primus_bridge.launch.rank import leave_word

    leave_word("hanging", f"primus: {text}")


def _kill(silent: Sequence[int]) -> None:
    """Those of the local launcher, whose SIGTERM a stopped process does not hear."""
    from primus_bridge.launch.rank import kill_rank

    for rank in silent:
        kill_rank(rank)


def _leave() -> None:
    """End this process, whatever its main thread holds: it may be the lock of stdout."""
    flushing = threading.Thread(target=lambda: (sys.stdout.flush(), sys.stderr.flush()), daemon=True)
    flushing.start()
    flushing.join(1.0)
    os._exit(1)
