"""Runs `zofo train` in processes forked from one that has imported everything, two at a time; some kill themselves.

Reads a JSON list of jobs from standard input: {"config", "output", "kill": null or one of the names in `_MOMENTS`,
"step": of the kill}. A killed run is resumed. Writes what happened to OUTPUT.json: the exit statuses (negative for
killed processes), and of a killed run the last whole checkpoint and all checkpoint folders before it was resumed.
"""

import functools
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.models.llama import modeling_llama  # noqa: F401  before the forks, once for all

import quick  # noqa: F401
from zofo import cli
from zofo.commands import train as commands
from zofo.models.adapters import AdaptedModel
from zofo.training import storing, trainer
from zofo.training.checkpoint import last_sealed


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _in_step(step):
    """Between backpropagation and the optimizer's step."""

    class Kill(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == step:
                _die()

    commands.ZOFOTrainer = functools.partial(commands.ZOFOTrainer, callbacks=[Kill()])


def _writing_weights(step):
    """With half of the backbone's file written."""
    whole = AdaptedModel.save_adapters

    def save(self, folder, home=None):
        whole(self, folder, home)
        if folder.name == f"checkpoint-{step}":
            file = next((folder / "backbone").glob("*.safetensors"))
            half = file.read_bytes()[: file.stat().st_size // 2]
            file.unlink()  # it may be shared with an earlier checkpoint
            file.write_bytes(half)
            _die()

    AdaptedModel.save_adapters = save


def _writing_optimizer(step):
    """With half of optimizer.pt written."""
    whole = torch.save

    def save(content, file, *args, **kwargs):
        whole(content, file, *args, **kwargs)
        if str(file).endswith(f"checkpoint-{step}/optimizer.pt"):
            os.truncate(file, os.stat(file).st_size // 2)
            _die()

    torch.save = save


def _before_seal(step):
    """With everything written but the seal."""
    whole = storing.seal
    storing.seal = lambda folder, content: _die() if folder.name == f"checkpoint-{step}" else whole(folder, content)


def _before_rotation(step):
    """With the new checkpoint whole and the old one still there."""
    whole = storing.rotate_checkpoints

    def rotate(*args, **kwargs):
        if os.path.exists(os.path.join(args[0], f"checkpoint-{step}", "seal.json")):
            _die()
        whole(*args, **kwargs)

    storing.rotate_checkpoints = rotate


def _in_final_save(step):
    """With what was learned in the hidden folder, and no seal on it."""
    whole = trainer.ZOFOTrainer.save_final

    def save(self, folder, home):
        whole(self, folder, home)
        _die()

    trainer.ZOFOTrainer.save_final = save


def _between_renames(step):
    """With some of the final parts in their places, and the others still in the hidden folder."""
    whole = os.replace

    def replace(source, target):
        if ".zofo.new" in str(source) and str(target).endswith("/upper"):
            _die()
        whole(source, target)

    os.replace = replace


_MOMENTS = {
    "in_step": _in_step,
    "writing_weights": _writing_weights,
    "writing_optimizer": _writing_optimizer,
    "before_seal": _before_seal,
    "before_rotation": _before_rotation,
    "in_final_save": _in_final_save,
    "between_renames": _between_renames,
}


def _in_process(function):
    """Starts a function in a process of its own; returns the process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        status = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _status(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _train(arguments, kill=None, step=0):
    if kill:
        _MOMENTS[kill](step)
    return cli.main(arguments)


def _live(job):
    """A run, or its first life, what it left behind, and its second life; the report goes to a file."""
    output = Path(job["output"])
    arguments = ["train", "--config", job["config"], "--output_dir", str(output)]
    report = {"statuses": [_status(_in_process(lambda: _train(arguments, job["kill"], job["step"])))]}
    if job["kill"]:
        report["whole"] = last_sealed(output).name
        report["folders"] = sorted(f.name for f in output.glob("checkpoint-*"))
        more = ["--resume_from_checkpoint", "true"]
        report["statuses"].append(_status(_in_process(lambda: _train([*arguments, *more]))))
    output.with_suffix(".json").write_text(json.dumps(report))
    return 0


if __name__ == "__main__":
    waiting, running = json.load(sys.stdin), 0
    while waiting or running:
        if waiting and running < 2:
            _in_process(functools.partial(_live, waiting.pop(0)))
            running += 1
        else:
            os.wait()
            running -= 1
