"""The order of the rows: a pure function of seed and step, each stream in whole permutations."""

import itertools

import pytest

from plain import make_trainer
from zofo.methods.method import Stream
from zofo.training.bundles import BundleCollator, IterationSampler, sizes_of
from zofo.training.draws import Draws


def plan(lower=0, penalty=0, upper=0):
    """The streams of bilevel, with so many batches."""
    return {
        "lower": Stream("lower", lower, order=0),
        "penalty": Stream("lower", penalty, order=1, counts=False),
        "upper": Stream("upper", upper, order=2),
    }


def sampler_of(lower, upper, streams, size, accumulation, seed):
    tasks = [{"lower": lower, "upper": upper}]
    return IterationSampler(tasks, streams, size, accumulation, seed, Draws(sizes_of(tasks)))


FULL = plan(lower=3, penalty=1, upper=1)


def batches_of(sampler, streams, epochs):
    """{stream: its batches, one list of row numbers each} in the order in which they are read, and how many epochs."""
    found = {"lower": [], "penalty": [], "upper": []}
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        micros = list(sampler)
        assert len(micros) == len(sampler)
        for rows in micros:
            batches = [rows[i : i + sampler.batch_size] for i in range(0, len(rows), sampler.batch_size)]
            order = [name for name, stream in streams.items() for _ in range(stream.batches)]
            for stream, batch in zip(order, batches, strict=True):
                found[stream].append(batch)
    return found


@pytest.mark.parametrize(("lower", "upper", "size"), [(12, 8, 2), (7, 5, 2), (3, 11, 4), (1, 1, 3)])
def test_each_stream_goes_through_its_rows_in_permutations(lower, upper, size):
    sampler = sampler_of(lower, upper, FULL, size, 1, seed=5)
    found = batches_of(sampler, FULL, epochs=20)
    own = {"lower": range(lower), "penalty": range(lower), "upper": range(lower, lower + upper)}
    orders = {}
    for stream, rows in own.items():
        read = list(itertools.chain(*found[stream]))
        passes = [read[i : i + len(rows)] for i in range(0, len(read), len(rows))]
        orders[stream] = passes
        assert len(passes) > 3
        for once in passes[:-1]:
            assert sorted(once) == list(rows)
        assert len(set(passes[-1])) == len(passes[-1])
        if len(rows) > 4:
            assert passes[0] != passes[1]
    if lower > 4:
        assert orders["lower"][0] != orders["penalty"][0]


def test_an_epoch_is_one_pass_over_the_level_that_reads_most_of_its_own_rows():
    assert len(sampler_of(12, 8, FULL, 2, 1, seed=0)) == 4  # lower: 12 / (2 * 3) = 2 iterations; upper: 8 / 2
    assert len(sampler_of(40, 8, FULL, 2, 1, seed=0)) == 7  # 40 / 6, rounded up
    assert len(sampler_of(12, 8, FULL, 2, 3, seed=0)) == 6  # 8 / 6, rounded up: 2 iterations of 3 micro-steps
    assert len(sampler_of(12, 8, plan(upper=1), 2, 1, seed=0)) == 4
    assert len(sampler_of(12, 8, plan(lower=1), 2, 1, seed=0)) == 6


@pytest.mark.parametrize("streams", [FULL, plan(lower=1), plan(upper=1), plan(lower=1, upper=1)])
def test_micro_steps_of_an_iteration_divide_the_rows_of_one_large_batch(streams):
    """So that accumulating A batches of b rows reads what one batch of A·b rows reads."""
    small = batches_of(sampler_of(12, 9, streams, 2, 3, seed=1), streams, epochs=4)
    large = batches_of(sampler_of(12, 9, streams, 6, 1, seed=1), streams, epochs=4)
    for stream, batches in large.items():
        steps = streams[stream].batches
        iterations = len(batches) // max(1, steps)
        for iteration, step in itertools.product(range(iterations), range(steps)):
            micros = [small[stream][(iteration * 3 + part) * steps + step] for part in range(3)]
            assert list(itertools.chain(*micros)) == batches[iteration * steps + step]


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_read_before():
    def fresh(seed=3):
        return sampler_of(12, 9, FULL, 2, 2, seed)

    one, other = fresh(), fresh()
    one.set_epoch(4)
    other.set_epoch(1)
    next(iter(other))
    other.set_epoch(4)
    assert list(one) == list(other) == list(one)
    assert list(fresh()) != list(fresh(seed=4))
    other.set_epoch(5)
    assert list(one) != list(other)


def test_the_collator_gives_each_stream_its_batches():
    collator = BundleCollator(FULL, 2, lambda examples: list(examples))
    assert collator(list("aabbccddee")) == [
        {
            "lower": [["a", "a"], ["b", "b"], ["c", "c"]],
            "penalty": [["d", "d"]],
            "upper": [["e", "e"]],
        }
    ]
    assert BundleCollator(plan(upper=1), 2, list)("xy") == [{"lower": [], "penalty": [], "upper": [["x", "y"]]}]
    of_two = BundleCollator(plan(lower=1, upper=1), 2, list, tasks=2)("aabbccdd")
    assert [bundle["lower"] + bundle["upper"] for bundle in of_two] == [
        [["a", "a"], ["b", "b"]],
        [["c", "c"], ["d", "d"]],
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_the_trainer_reads_the_sampler_s_rows_epoch_after_epoch(tmp_path, workers):
    keys = {"gradient_accumulation_steps": 2, "max_steps": 9, "lower_steps": 1}
    trainer = make_trainer(tmp_path, dataloader_num_workers=workers, **keys)
    read = []

    def step(number, progress, micro):
        read.extend(micro)
        return {"loss": 0.0}

    trainer.method.step = step
    trainer.train()
    sampler = sampler_of(8, 4, trainer.method.streams(trainer.args), 2, 2, seed=42)
    assert len(sampler) == 4
    collate = trainer.get_train_dataloader().collate_fn
    expected = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        expected += [collate([trainer.train_dataset[i] for i in rows])[0] for rows in sampler]
    assert len(read) == 18
    for found, wanted in zip(read, expected, strict=False):
        for stream, batches in wanted.items():
            ids = [batch["input_ids"].tolist() for batch in found[stream]]
            assert ids == [batch["input_ids"].tolist() for batch in batches]
