"""What makes tests faster and none of them weaker; imported for its effect, before anything is run."""

import functools
import os

import jinja2

from zofo.commands import results

# A killed process loses nothing of what it has written; only a power cut does, and no test cuts the power.
os.fsync = lambda descriptor: None
# The template of peft's model card is compiled anew for each adapter that is saved: a tenth of the time of a tiny run.
jinja2.Environment.compile = functools.lru_cache(jinja2.Environment.compile)
# The picture of the curves is half of the time of a tiny run; tests that look at one put `plot_curves` back.
results.plot_curves = lambda *args: False
