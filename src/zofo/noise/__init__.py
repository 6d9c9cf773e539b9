"""The noise z: `streams` is the interface, `eager` defines the bits, `cpu` (C) and `gpu` (Triton) write them faster."""

from zofo.noise.eager import Distribution as Distribution
from zofo.noise.streams import Sum as Sum
from zofo.noise.streams import Term as Term
from zofo.noise.streams import add_ as add_
from zofo.noise.streams import normal as normal
from zofo.noise.streams import rademacher as rademacher
from zofo.noise.streams import representable as representable
from zofo.noise.streams import sample as sample
from zofo.noise.streams import stream_key as stream_key
from zofo.noise.streams import warm_up as warm_up
from zofo.noise.streams import write_rows as write_rows
from zofo.noise.streams import write_sums as write_sums
