"""Which rows a step sees, and the schedule: pure functions."""

import math
from dataclasses import replace

import numpy as np
import pytest

from finetune.recipe import TrainSection
from finetune.training.plan import Plan, describe_padding, learning_rate_factor, padding


def plan(batch_size, accumulation, processes, rows=22, epochs=2.0):
    options = TrainSection(epochs=epochs, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    return Plan.of(options, num_rows=rows, num_processes=processes, seed=5)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)]
)
def test_every_split_of_a_step_sees_the_same_rows(batch_size, accumulation, processes):
    whole, split = plan(8, 1, 1), plan(batch_size, accumulation, processes)
    assert split.total_steps == whole.total_steps == 6
    for step in range(6):
        mine = [split.micro_batches(step, p) for p in range(processes)]
        assert len({len(batches) for batches in mine}) == 1, "a process would wait for another"
        seen = [row for batches in mine for batch in batches for row, _, supervised in batch if supervised]
        assert sorted(seen) == sorted(whole.rows(step).tolist())


def test_an_epoch_sees_each_row_once_in_an_order_of_its_own():
    it = plan(8, 1, 1)
    epochs = [np.concatenate([it.rows(step) for step in range(first, first + 3)]).tolist() for first in (0, 3)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_stream_goes_on_where_it_was_left():
    it = plan(2, 2, 1)
    whole = list(it.stream(0, 0))
    done = sum(len(it.micro_batches(step, 0)) for step in range(4))
    assert list(it.stream(4, 0)) == whole[done:]


def test_steps_of_a_part_of_an_epoch():
    assert plan(8, 1, 1, epochs=0.5).total_steps == 2
    assert plan(8, 1, 1, epochs=0.01).total_steps == 1


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("constant", 1, 1), ("linear", 0.5, 0.011), ("cosine", 0.5, 0.0003)]
)
def test_schedules(schedule, middle, end):
    options = TrainSection(max_steps=100, lr_scheduler_type=schedule, warmup_ratio=0.1)
    factors = [learning_rate_factor(step, options, 100) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11) and factors[9] == pytest.approx(10 / 11)
    assert factors[10] == 1 and factors[55] == pytest.approx(middle) and factors[99] == pytest.approx(end, abs=1e-3)
    assert all(math.isfinite(f) and f > 0 for f in factors)


def test_a_draw_names_its_epoch():
    it = plan(2, 2, 2)
    epochs = [{draw.epoch for batch in it.micro_batches(step, 1) for draw in batch} for step in range(6)]
    assert epochs == [{0}, {0}, {0}, {1}, {1}, {1}], "a row that fills up too"


LENGTHS = [int(n) for n in np.random.default_rng(1).integers(10, 400, 1003)]


def grouped(batch_size=8, accumulation=1, processes=1, lengths=LENGTHS, seed=5, epochs=2.0):
    options = TrainSection(epochs=epochs, batch_size=batch_size, gradient_accumulation_steps=accumulation)
    return Plan.of(options, num_rows=len(lengths), num_processes=processes, seed=seed, lengths=lengths)


def epoch_of(it, number):
    steps = range(number * it.steps_per_epoch, (number + 1) * it.steps_per_epoch)
    return [it.rows(step).tolist() for step in steps]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes"), [(8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)]
)
def test_groups_do_not_depend_on_how_a_step_is_split(batch_size, accumulation, processes):
    whole, split = grouped(), grouped(batch_size, accumulation, processes)
    for step in (0, 7, whole.steps_per_epoch - 1, whole.steps_per_epoch):
        seen = [
            draw.row
            for p in range(processes)
            for batch in split.micro_batches(step, p)
            for draw in batch
            if draw.supervised
        ]
        assert sorted(seen) == sorted(whole.rows(step).tolist())


def test_an_epoch_in_groups_sees_each_row_once_in_an_order_of_its_own():
    it = grouped()
    first, second = epoch_of(it, 0), epoch_of(it, 1)
    for epoch in (first, second):
        assert sorted(row for step in epoch for row in step) == list(range(1003))
        assert [len(step) for step in epoch] == [8] * 125 + [3]
    assert first != second and first != epoch_of(grouped(seed=6), 0)
    assert {frozenset(step) for step in first} != {frozenset(step) for step in second}, "new company, too"
    assert first == epoch_of(grouped(), 0)


def test_the_rows_of_a_step_are_of_like_length_and_steps_come_in_any_order():
    steps = epoch_of(grouped(), 0)[:-1]
    spreads = [max(LENGTHS[r] for r in step) - min(LENGTHS[r] for r in step) for step in steps]
    assert np.mean(spreads) < 20, "of 390; two steps' worth of a mega-batch of 400 rows is 16"
    means = [np.mean([LENGTHS[r] for r in step]) for step in steps]
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3, "neighbours would be alike"


def test_the_rows_left_for_the_last_step_are_any():
    """Were they the end of a sorted stretch, the shortest rows would always share the smallest step."""
    left = [LENGTHS[row] for seed in range(60) for row in epoch_of(grouped(seed=seed), 0)[-1]]
    assert abs(np.mean(left) - np.mean(LENGTHS)) < 30, "the standard error is 8"


def test_micro_batches_are_pieces_of_the_sorted_step():
    it = grouped(2, 4)
    for step in (0, 60):
        sizes = [[LENGTHS[draw.row] for draw in batch] for batch in it.micro_batches(step, 0)]
        flat = [size for batch in sizes for size in batch]
        assert flat == sorted(flat, reverse=True)


def test_an_epoch_is_drawn_once_and_its_neighbour_beside_it(monkeypatch):
    it, drawn = grouped(), []
    draw = Plan._draw
    monkeypatch.setattr(Plan, "_draw", lambda self, epoch: drawn.append(epoch) or draw(self, epoch))
    border = it.steps_per_epoch
    for step in range(border - 2, border + 2):
        it.rows(step)
        it.rows(max(0, step - 2))  # the loop is behind the workers
    assert drawn == [0, 1]


def test_padding_by_hand():
    it = grouped(2, 1, lengths=[4, 1, 4, 1], epochs=1.0)
    assert padding(it, it.lengths) == 0
    mixed = replace(it, lengths=None)
    waste = sum(abs(it.lengths[a] - it.lengths[b]) for a, b in epoch_of(mixed, 0))
    assert padding(mixed, it.lengths) == pytest.approx(waste / (10 + waste))
    cost = f"{waste / (10 + waste):.1%}"
    assert describe_padding(it, it.lengths) == (
        f"padding is 0.0% of all tokens; with train.group_by_length: false it would be {cost}"
    )
    assert describe_padding(mixed, it.lengths) == (
        f"padding is {cost} of all tokens; with train.group_by_length: true it would be 0.0%"
    )
