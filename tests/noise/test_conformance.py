"""Conformance vectors: keys and noise as bits, which another program must give to take part in a run.

`conformance.json` holds, for streams of every distribution, the key (64 bits), indices and the bits of float32 there;
and for directions of low rank the bits of A and B, transposed, without a scale. Run as a script, this file writes it
anew. The tests compute the same in NumPy, from the equations alone.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_noise import hashes, integers, multiplier

from zofo import noise
from zofo.zo.low_rank import Matrix

FILE = Path(__file__).with_name("conformance.json")
NAME = "model.layers.0.self_attn.q_proj.weight"
STREAMS = [(0, 0, 0, ""), (1, 0, 0, NAME), (0, 1, 0, NAME), (0, 0, 1, NAME), (42, 7, 3, NAME), (42, 7, -1, NAME)]
STARTS = (0, 1000, 2**32 - 3, 2**40 + 5)
MATRICES = [(1, (5, 3)), (2, (3, 4))]  # rank and shape
COUNT, QUERIES = 6, 2


def bits(values):
    return [f"{value:08x}" for value in np.asarray(values, np.float32).reshape(-1).view(np.uint32).tolist()]


def written():
    """What the file holds, by this package."""
    streams = [
        {
            "seed": seed, "step": step, "query": query, "name": name, "distribution": distribution, "start": start,
            "key": f"{noise.stream_key(seed, step, query, name):016x}",
            "float32": bits(noise.sample(noise.stream_key(seed, step, query, name), start, COUNT, distribution)),
        }
        for seed, step, query, name in STREAMS for distribution in ("normal", "rademacher") for start in STARTS
    ]  # fmt: skip
    low_rank = []
    for rank, shape in MATRICES:
        a, b = Matrix(torch.empty(shape), NAME, rank).drawn(42, 7, range(QUERIES))
        key = noise.stream_key(42, 7, 0, NAME, part="low rank ")
        low_rank += [
            {
                "seed": 42, "step": 7, "query": query, "name": NAME, "rank": rank, "shape": list(shape),
                "key": f"{key:016x}", "A transposed": bits(a[query]), "B transposed": bits(b[query]),
            }
            for query in range(QUERIES)
        ]  # fmt: skip
    return {"streams": streams, "low_rank": low_rank}


def plain_key(text):
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def plain(key, start, count, distribution="normal"):
    """Elements of a stream, in float32."""
    if distribution == "rademacher":
        return np.where(hashes(key, start, count) >> 31, 1.0, -1.0)
    return integers(key, start, count) * multiplier(1.0)


STORED = json.loads(FILE.read_text())


def test_the_file_is_what_this_package_gives():
    assert written() == STORED


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_streams_are_the_equations(distribution):
    rows = [row for row in STORED["streams"] if row["distribution"] == distribution]
    assert len(rows) == len(STREAMS) * len(STARTS)
    for row in rows:
        key = plain_key("{seed}/{step}/{query}/{name}".format(**row))
        assert f"{key:016x}" == row["key"]
        assert bits(plain(key, row["start"], COUNT, distribution)) == row["float32"]


def test_directions_of_low_rank_are_the_equations():
    assert len(STORED["low_rank"]) == len(MATRICES) * QUERIES
    for row in STORED["low_rank"]:
        key = plain_key("low rank {seed}/{step}/0/{name}".format(**row))
        (n, m), rank = row["shape"], row["rank"]
        numbers = plain(key, row["query"] * rank * (n + m), rank * (n + m))
        assert f"{key:016x}" == row["key"]
        assert bits(numbers[: rank * n]) == row["A transposed"]
        assert bits(numbers[rank * n :]) == row["B transposed"]


if __name__ == "__main__":
    FILE.write_text(json.dumps(written(), indent=1) + "\n")
