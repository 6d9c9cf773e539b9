"""`python benchmarks/kills.py`: runs that are killed at random moments and go on, against runs that never stopped.

Every run of `digests.py` is killed by SIGKILL four times, at moments drawn evenly from its whole length; it has four
steps and two checkpoints, so that many kills fall into a save. After each kill the run goes on as its user would let
it: from its last whole checkpoint, or anew where there is none. At its end all that it wrote must be the same, bit for
bit. Prints a line for each run and writes `benchmarks/results/kills.json`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from digests import RUNS, differences, run, torch, write_inputs
from zofo import ZofoError
from zofo.training.checkpoint import SEAL, checkpoints, last_sealed
from zofo.training.folder import MARKER

KILLS = 4  # of each run
RESULT = Path(__file__).parent / "results" / "kills.json"


def in_process(task: Callable[[], dict[str, str]], file: Path) -> int:
    """Starts a function in a process of its own, which writes what it returns to a file; returns the process id.

    This process itself never runs torch, whose threads do not survive a fork.
    """
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    found = task()
    file.write_text(json.dumps(found))
    os._exit(int(found.get("status", 0)))


def start(name: str, paths: dict[str, str], folder: Path, **keys: Any) -> int:
    """Starts a run, which writes its digests beside its folder; returns the process id."""
    return in_process(lambda: run(name, paths, folder, **keys), folder.with_suffix(".json"))


def status(child: int) -> int:
    """How a process ended: its exit status, or the signal as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole(name: str, paths: dict[str, str], folder: Path) -> tuple[dict[str, str], float]:
    """What a run that never stops writes, and its seconds."""
    started = time.perf_counter()
    assert status(start(name, paths, folder)) == 0, name
    return json.loads(folder.with_suffix(".json").read_text()), time.perf_counter() - started


def killed(name: str, paths: dict[str, str], folder: Path, seconds: float, rng: random.Random) -> Counter[str]:
    """Kills a run `KILLS` times, lets it end, and says when the kills came; the digests lie beside the folder."""
    moments: Counter[str] = Counter()
    while moments.total() < KILLS:
        child = start(name, paths, folder, **going_on(folder))
        time.sleep(rng.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        ended = status(child)
        if ended == -signal.SIGKILL:
            moments[moment(folder)] += 1
        else:  # it was faster, and is done: from the start again
            assert ended == 0, name
            shutil.rmtree(folder)
    assert status(start(name, paths, folder, **going_on(folder))) == 0, name
    return moments


def going_on(folder: Path) -> dict[str, Any]:
    """The key by which its user goes on with a run."""
    try:
        last_sealed(folder)
    except ZofoError:
        return {"overwrite_output_dir": True}
    return {"resume_from_checkpoint": True}


def moment(folder: Path) -> str:
    """Where a kill has hit, by what it left in the folder."""
    if (folder / ".zofo.new").exists():
        return "inside the final save"
    if any(not (checkpoint / SEAL).is_file() for checkpoint in checkpoints(folder)):
        return "inside a checkpoint's save"
    if not (folder / MARKER).exists():
        return "before it began"
    return "between saves" if checkpoints(folder) else "before the first checkpoint"


def main() -> None:
    """Kills, compares, prints and writes."""
    rng = random.Random(0)
    moments: Counter[str] = Counter()
    odd: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        inputs = Path(place) / "inputs.json"
        assert status(in_process(lambda: write_inputs(Path(place)), inputs)) == 0
        paths: dict[str, str] = json.loads(inputs.read_text())
        (Path(place) / "runs").mkdir()
        for name in RUNS:
            folder = Path(place) / "runs" / name.replace(" ", "-")
            expected, seconds = whole(name, paths, folder)
            shutil.rmtree(folder)
            hit = killed(name, paths, folder, seconds, rng)
            different = differences({name: expected}, {name: json.loads(folder.with_suffix(".json").read_text())})
            odd += different
            moments += hit
            print(f"{name}: {dict(hit)}: {', '.join(different) or 'the same'}", flush=True)
            shutil.rmtree(folder)
    report = {"runs": len(RUNS), "kills": moments.total(), "moments": dict(moments), "different": odd}
    RESULT.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    sys.exit(bool(odd))


if __name__ == "__main__":
    main()
