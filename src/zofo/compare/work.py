"""The runs of a comparison, one after the other or side by side, shared by all processes that work on its folder.

Each run is a `zofo train` of its own, so that its peak memory is its own. A run that has results is never done again;
one that was killed goes on from its last checkpoint.
"""

import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from zofo.compare.plan import Cell, Plan, failure, failure_file
from zofo.console import Say
from zofo.errors import ZofoError
from zofo.report.words import duration
from zofo.training.checkpoint import half_of, last_sealed
from zofo.training.folder import is_written

MARK = "comparison.yaml"
_INTERRUPTED = 130  # the exit status after Ctrl-C
_WAIT = 1.0  # seconds between two looks at what other processes have left


def claim(plan: Plan) -> list[str]:
    """Makes the folder of a comparison, or finds what of it can be reused; what to say of that."""
    folder = plan.output_dir
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ZofoError(f"{folder} holds something else than a comparison: choose another output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    before = (folder / MARK).read_text(encoding="utf-8") if (folder / MARK).is_file() else plan.text
    cells = plan.cells()
    done = [cell for cell in cells if cell.is_done]
    ended = [*folder.glob("runs/*/*/*/results.json")]
    if before != plan.text and ended and not any(cell.has_ended for cell in cells):
        raise ZofoError(
            f"{folder} holds another comparison: none of its {len(ended)} runs is one of this plan; choose another "
            "output_dir"
        )
    (folder / MARK).write_text(plan.text, encoding="utf-8")
    notes = [f"{len(done)} of {len(cells)} runs were done before, and are reused"] if done else []
    if others := {file.parent for file in ended} - {cell.folder for cell in cells}:
        notes.append(f"{len(others)} runs of an earlier plan stay in {folder}/runs, and do not count")
    return notes


def work(plan: Plan, say: Say) -> None:
    """Does all runs that are not done, as far as no other process does them; returns when none is left.

    Raises:
        KeyboardInterrupt: after Ctrl-C, which reaches the runs under way as well, once these have ended; no other one
            begins.
    """
    progress = _Progress(plan, say)
    with ThreadPoolExecutor(plan.jobs) as workers:
        try:
            for worker in [workers.submit(_work, plan, progress) for _ in range(plan.jobs)]:
                worker.result()
        except BaseException:
            progress.stopped = True
            raise


def command(cell: Cell) -> list[str]:
    """The command of a run."""
    return ["zofo", "train", "--config", str(cell.folder.with_suffix(".yaml"))]


def _work(plan: Plan, progress: "_Progress") -> None:
    while left := progress.left():
        if not any(_took(plan, cell, progress) for cell in left):
            time.sleep(_WAIT)  # others do what is left, or what must come before


def _took(plan: Plan, cell: Cell, progress: "_Progress") -> bool:
    """Does a run, unless it is somebody else's or done."""
    folder = cell.folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"), timeout=0)
    try:
        with lock:
            if cell.is_done or is_written(folder) or not progress.begins(cell):
                return False  # a run may outlive the process that has begun it
            _run(plan, cell)
            progress.ended(cell)
            return True
    except Timeout:
        return False


def _run(plan: Plan, cell: Cell) -> None:
    """Trains, unless that has ended before, and evaluates what is asked for after it; keeps why it has failed."""
    message = failure_file(plan, cell)
    failed = (None if cell.has_ended else _trained(cell)) or _evaluated(cell)
    if failed:
        message.parent.mkdir(exist_ok=True)
        message.write_text(failed + "\n", encoding="utf-8")
    else:
        message.unlink(missing_ok=True)


def _trained(cell: Cell) -> str | None:
    """Does a run; why it has failed, if it has."""
    file = cell.folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(cell.keys, sort_keys=False), encoding="utf-8")
    words = [*command(cell)[1:], "--disable_tqdm", "true"]
    try:
        last_sealed(cell.folder)
        words += ["--resume_from_checkpoint", "true"]
    except ZofoError:
        shutil.rmtree(cell.folder, ignore_errors=True)  # what a killed run has left before its first checkpoint
    return _failure_of(words, cell.folder.with_suffix(".log"))


def _evaluated(cell: Cell) -> str | None:
    """Evaluates what is asked for after a run; why that has failed, if it has."""
    for file, words in cell.evaluations.items():
        output = file.parent if words[0] == "adapt" else file  # a folder of its own
        output.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(output.with_suffix(".lock")):  # what comes before all training is of all runs
            if file.is_file():
                continue
            for left in (half_of(output), output) if words[0] == "adapt" else ():  # what a stopped one has left
                shutil.rmtree(left, ignore_errors=True)
            if failed := _failure_of([*words, "--output", str(output)], output.with_suffix(".log")):
                return failed
    return None


def _failure_of(words: list[str], log: Path) -> str | None:
    """Runs a command of zofo; the last line of its message, if it has failed."""
    found = ended([sys.executable, "-m", "zofo.cli", *words])
    log.write_text(found.stdout + found.stderr, encoding="utf-8")
    return failure_of_process(found) if found.returncode else None


def failure_of_process(found: subprocess.CompletedProcess[str]) -> str:
    """Why a command has failed: what it says last, or the signal that has ended it."""
    if found.returncode in (_INTERRUPTED, -signal.SIGINT):
        raise KeyboardInterrupt
    if found.returncode < 0:
        return f"killed by signal {-found.returncode}, perhaps for lack of memory"
    lines = [line for line in found.stderr.splitlines() if line.strip()] or [f"exit status {found.returncode}"]
    return lines[-1].removeprefix("zofo: ")


def ended(words: list[str]) -> subprocess.CompletedProcess[str]:
    """A command that has been run, with what it has said."""
    return subprocess.run(words, capture_output=True, text=True, check=False)


class _Progress:
    """What is left, what was tried, and how long it will take."""

    def __init__(self, plan: Plan, say: Say) -> None:
        self._plan = plan
        self._say = say
        self._lock = threading.Lock()
        self._tried: set[str] = set()
        self._seconds: list[float] = []
        self._started: dict[str, float] = {}
        self.stopped = False

    def left(self) -> list[Cell]:
        """Runs that are neither done nor tried; not those whose settings are still being searched for."""
        if self.stopped:
            return []
        with self._lock:
            return [cell for cell in self._plan.cells() if not cell.is_done and str(cell.folder) not in self._tried]

    def begins(self, cell: Cell) -> bool:
        """Notes that a run begins; False if another thread has tried it, or none is to begin."""
        with self._lock:
            if self.stopped or str(cell.folder) in self._tried:
                return False
            self._tried.add(str(cell.folder))
            self._started[str(cell.folder)] = time.monotonic()
        self._say(f"begins: {cell.name}")
        return True

    def ended(self, cell: Cell) -> None:
        """Says how a run has ended, and when the others will have."""
        with self._lock:
            taken = time.monotonic() - self._started[str(cell.folder)]
            self._seconds.append(taken)
            mean = sum(self._seconds) / len(self._seconds)
        left = len(self.left())
        how = f"failed: {failure(self._plan, cell)}" if not cell.is_done else f"done in {duration(taken)}"
        rest = f"; {left} left, about {duration(left * mean / self._plan.jobs)}" if left else ""
        self._say(f"{cell.name}: {how}{rest}")
