"""A round: one run that is killed and started again until it is done, checked after each kill and at its end."""

from __future__ import annotations

import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional

from primus_bridge.callbacks.metrics import METRICS_FILE, read_history
from primus_bridge.checkpoint.integrity import damage, refusal
from primus_bridge.checkpoint.manifest import MANIFEST, Checkpoint, committed, read_manifest
from primus_bridge.errors import ConfigError
from tests.cli.example import alpaca_rows, save_model, train_words, write_rows
from tests.reliability.lives import END_SECONDS, ENDED_BY_LAUNCHER, Life, describe, survivors
from tests.reliability.outcome import PARTS, Outcome, differences, read_outcome

AIM_SECONDS = 0.05
"""A kill aimed at a save comes within this time after its mark."""
COMMAND_SECONDS = 6.0
"""What the real command needs to import before its ranks are where forked ones begin."""
LIFE_SECONDS = 300.0

WHOM = ("rank", "all", "launcher")
MARKS: dict[str, Callable[[Path], bool]] = {
    "folder": lambda folder: True,
    "shard": lambda folder: any(folder.glob("*.distcp")),
    "manifest": lambda folder: (folder / MANIFEST).exists(),
}
"""When a checkpoint's folder has come as far as a kill waits for."""


@dataclass(frozen=True)
class Configuration:
    name: str
    nproc: int
    options: dict[str, Any]


@dataclass
class Unbroken:
    """The run that nobody killed, on forked ranks: what it came to, and how long it took to start and in all."""

    outcome: Outcome
    start_seconds: float
    seconds: float


@dataclass
class Row:
    """What happened to a configuration, all its rounds together."""

    configuration: str
    ranks: int
    rounds: int = 0
    asynchronous: int = 0
    """Rounds whose saves were asynchronous."""
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(WHOM, 0))
    """By whom SIGKILL went to."""
    during_save: int = 0
    """Kills after which the save under way was not committed, or that came within AIM_SECONDS of the commit."""
    commands: int = 0
    """Kills of lives that the real command started."""
    resumes: int = 0
    """Lives that continued a checkpoint."""
    steps_lost: int = 0
    """Steps that were logged before a kill and had to be done again."""
    half_written: int = 0
    """Folders without a manifest that kills left."""
    ended_by_launcher: int = 0
    """Kills of one rank after which others had to be ended."""
    slowest_end: float = 0.0
    """Seconds from a kill until nobody was left."""
    equal: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(PARTS, True))
    seconds: float = 0.0


@dataclass
class Place:
    """What a save folder holds at a moment when nobody writes in it."""

    newest: Optional[Path]
    step: int
    half: set[tuple[str, int]]
    """(name, inode) of folders without a manifest."""
    logged: int
    """The last step of metrics.jsonl."""


def look(save: Path) -> Place:
    """Raises ConfigError when a checkpoint with a manifest is not whole."""
    folders = committed(save)
    for folder in folders:
        verify(folder)
    half = {(path.name, path.stat().st_ino) for path in save.glob("iter_*") if not (path / MANIFEST).exists()}
    history = read_history(save / METRICS_FILE)
    newest = folders[-1] if folders else None
    step = int(newest.name.removeprefix("iter_")) if newest else 0
    return Place(newest, step, half, max((entry["step"] for entry in history), default=0))


def verify(folder: Path) -> None:
    """Raises ConfigError when a file is missing or has not the checksum that the manifest says."""
    if findings := damage(Checkpoint(folder, read_manifest(folder))):
        raise refusal(folder, findings)


class Bench:
    """The model, the data and the folders of all runs."""

    def __init__(self, work: Path, steps: int, save_interval: int):
        self.work, self.steps, self.save_interval = work, steps, save_interval
        self.model = save_model(work / "model")
        self.rows = write_rows(work / "rows.json", alpaca_rows(96))

    def words(self, configuration: Configuration, save: Path, asynchronous: bool) -> list[str]:
        options = {
            "train_iters": self.steps,
            "save_interval": self.save_interval,
            "save_total_limit": 2,
            "async_save": asynchronous,
            "device": "cpu",
            "report": False,
            "tensorboard": False,
            **configuration.options,
        }
        return train_words(self.model, self.rows, save, **options)

    def life(
        self, configuration: Configuration, folder: Path, number: int, asynchronous: bool = False, forked: bool = True
    ) -> Life:
        log, cache = folder / f"life_{number:02d}.log", folder / "cache"
        words = self.words(configuration, folder / "save", asynchronous)
        return Life(words, configuration.nproc, log, cache, forked)

    def unbroken(self, configuration: Configuration) -> Unbroken:
        """Raises RuntimeError when it fails."""
        folder = self.work / ("unbroken " + configuration.name)
        folder.mkdir()
        life = self.life(configuration, folder, 0)
        life.wait(LIFE_SECONDS)
        seconds = time.time() - life.started
        if life.code:
            raise RuntimeError(f"the unbroken run of {configuration.name} failed:\n{life.says}")
        # written when everything is ready for the first step
        start = (folder / "save" / "run.yaml").stat().st_mtime - life.started
        return Unbroken(read_outcome(folder / "save"), start, seconds)


class Round:
    """One run of a configuration with some kills. ``fault`` is told what is wrong, in words."""

    def __init__(
        self,
        bench: Bench,
        configuration: Configuration,
        unbroken: Unbroken,
        row: Row,
        folder: Path,
        asynchronous: bool,
        dice: random.Random,
        fault: Callable[[str], None],
    ):
        self.bench, self.configuration, self.unbroken, self.row = bench, configuration, unbroken, row
        self.folder, self.save, self.asynchronous = folder, folder / "save", asynchronous
        self.dice, self.fault = dice, fault
        folder.mkdir()

    def run(self, kills: int, command: Callable[[], bool], killed: Callable[[], None]) -> None:
        """Until the run is done; at most ``kills`` kills. command: whether the next life is the real command."""
        began = time.time()
        number = 0
        while True:
            number += 1
            before = look(self.save)
            life = self.bench.life(self.configuration, self.folder, number, self.asynchronous, not command())
            alive = True
            if kills and self._moment(life, before):
                kills -= 1
                self._kill(life)
                killed()
            else:
                alive = False
                if not self._ended(life):
                    break
            try:
                after = look(self.save)
            except ConfigError as error:
                self.fault(f"life {number}: {error}")
                break
            self._check_life(life, number, before, after)
            if alive:
                self._count(life, before, after)
            else:
                self._compare()
                break
        self.row.rounds += 1
        self.row.asynchronous += self.asynchronous
        self.row.seconds += time.time() - began

    def _moment(self, life: Life, before: Place) -> bool:
        """Wait for the moment of a kill; False when the run has ended before."""
        if self.dice.random() < 0.5:
            return self._save_begins(life)
        left = (self.bench.steps - before.step) / self.bench.steps
        seconds = self.unbroken.start_seconds + left * (self.unbroken.seconds - self.unbroken.start_seconds)
        moment = life.started + self.dice.uniform(0, seconds + (0 if life.forked else COMMAND_SECONDS))
        while time.time() < moment:
            if life.code is not None:
                return False
            time.sleep(0.002)
        return life.code is None

    def _save_begins(self, life: Life) -> bool:
        """Wait until the first, second or third save of this life has come to a mark, then up to AIM_SECONDS."""
        mark = MARKS[self.dice.choice(list(MARKS))]
        left = self.dice.randint(1, 3)
        seen = {(path.name, path.stat().st_ino) for path in self.save.glob("iter_*")}
        while life.code is None:
            try:
                for path in self.save.glob("iter_*"):
                    entry = (path.name, path.stat().st_ino)
                    if entry not in seen and mark(path):
                        seen.add(entry)
                        left -= 1
            except FileNotFoundError:  # an old one was just removed
                continue
            if left <= 0:
                time.sleep(self.dice.uniform(0, AIM_SECONDS))
                return life.code is None
            time.sleep(0.001)
        return False

    def _kill(self, life: Life) -> None:
        whom, everybody = life.kill(self.dice.choice(WHOM), self.dice.choice)
        self.at = time.time()
        self.row.kills[whom] += 1
        self.row.commands += not life.forked
        try:
            life.wait(END_SECONDS)
        except TimeoutError as error:
            self.fault(f"{life.log}: {whom} killed, but the launcher: {error}")
            life.end()
        if left := survivors(everybody, END_SECONDS):
            self.fault(f"{life.log}: {whom} killed, but these live on: {[describe(process) for process in left]}")
            for process in left:
                process.kill()
        self.row.ended_by_launcher += life.code == ENDED_BY_LAUNCHER
        self.row.slowest_end = max(self.row.slowest_end, time.time() - self.at)

    def _ended(self, life: Life) -> bool:
        """Wait for a life that nobody kills; whether it ended well."""
        try:
            life.wait(LIFE_SECONDS)
        except TimeoutError as error:
            self.fault(f"{life.log}: {error}")
            life.end()
            return False
        if life.code:
            self.fault(f"{life.log}: exit code {life.code}:\n{life.says[-3000:]}")
        return not life.code

    def _check_life(self, life: Life, number: int, before: Place, after: Place) -> None:
        if after.step < before.step:
            self.fault(f"life {number}: the newest checkpoint is of step {after.step}; it was of {before.step}")
        start = re.search(r"^model  .*", life.says, re.MULTILINE)
        if start is None:  # it did not come so far
            return
        said = re.search(r"continuing (\S+) at step (\d+)$", start[0])
        found = (said[1], int(said[2])) if said else (None, 0)
        wanted = (str(before.newest) if before.newest else None, before.step)
        if found != wanted:
            self.fault(f"life {number}: it starts from {found}, the newest committed checkpoint is {wanted}")
        self.row.resumes += before.newest is not None

    def _count(self, life: Life, before: Place, after: Place) -> None:
        half = after.half - before.half
        self.row.half_written += len(half)
        just = after.newest is not None and after.newest != before.newest
        written = (after.newest / MANIFEST).stat().st_mtime if just and after.newest else 0.0
        self.row.during_save += bool(half) or self.at - written < AIM_SECONDS
        history = self.save / METRICS_FILE
        if history.exists() and history.stat().st_mtime > life.started:  # else they were lost, and counted, before
            self.row.steps_lost += max(0, after.logged - after.step)

    def _compare(self) -> None:
        for part, names in differences(self.unbroken.outcome, read_outcome(self.save)).items():
            if names:
                self.row.equal[part] = False
                self.fault(f"{part} differ from the unbroken run's: {', '.join(names[:5])} ({len(names)} in all)")
