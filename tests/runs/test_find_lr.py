"""The learning-rate range test: the rule on curves drawn by hand, and real runs on a tiny model."""

import pytest

from finetune.cli import main
from finetune.errors import RecipeError, TrainingError
from finetune.runs.find_lr import _Hopeless, _Recorder, curve_of, find_lr, smooth

RATES = [1e-6 * 10 ** (i / 10) for i in range(61)]  # to 1


def curve(fall_from: int, rise_from: int) -> list[float]:
    """Losses of 3 up to one place, then falling by .1 a step, then rising by .3."""
    losses = [3.0]
    for i in range(1, len(RATES)):
        losses.append(losses[-1] - (0.1 if fall_from <= i < rise_from else 0) + (0.3 if i >= rise_from else 0))
    return losses


def test_suggested_is_a_tenth_of_the_rate_where_half_the_fall_is_lost():
    losses = curve(30, 50)
    assert losses[49] == pytest.approx(1.0) and losses[53:55] == pytest.approx([2.2, 2.5])
    found = curve_of(RATES, losses)
    # The mean over seven is lowest at 47: 8.8 / 7. Half-way to 3 is 2.13; it is 1.9 at 52 and 2.2 at 53.
    assert found.suggestion == RATES[53] / 10
    assert found.why == "a tenth of 2.0e-01, at which the loss is half-way back to its start"
    text = str(found)
    assert text.splitlines()[0].split() == ["learning", "rate", "loss"]
    assert text.endswith(f"suggested: train.learning_rate={found.suggestion:.1e} ({found.why})")


@pytest.mark.parametrize(
    ("losses", "why"),
    [
        ([3.0] * 61, "the loss never fell"),
        (curve(60, 20), "the loss never fell"),
        (curve(40, 61), "the loss did not rise again before the end: try a higher last rate"),
    ],
)
def test_a_flat_curve_gives_no_suggestion(losses, why):
    found = curve_of(RATES, losses)
    assert found.suggestion is None and why in found.why
    assert "no suggestion" in str(found)


def test_smoothing_is_centred():
    assert smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0], "too short to smooth"
    spike = [0.0] * 20 + [3.0] + [0.0] * 19
    assert smooth(spike)[17:24] == [0.0, 0.6, 0.6, 0.6, 0.6, 0.6, 0.0]
    assert smooth([4.0, *[0.0] * 39])[0] == pytest.approx(4 / 3)


def test_rates_that_are_too_small_learn_nothing(make_recipe, tiny_fast_vlm, tmp_path):
    found = find_lr(make_recipe(tiny_fast_vlm, train={"batch_size": 18}), first=1e-12, last=1e-10, steps=20)
    assert len(found.losses) == 20
    assert max(found.losses) - min(found.losses) < 1e-3, "all rows at each step, so only the adapter could move it"
    assert found.suggestion is None
    assert not (tmp_path / "runs").exists() and not (tmp_path / "registry").exists(), "nothing is saved"


def test_the_loss_falls_and_rises_with_the_rate(make_recipe, tiny_fast_vlm):
    found = find_lr(make_recipe(tiny_fast_vlm, train={"batch_size": 18}), first=1e-4, last=100.0, steps=40)
    assert found.rates[0] == 1e-4 and found.rates[1] / found.rates[0] == pytest.approx(1e6 ** (1 / 39))
    assert min(found.losses) < 0.6 * found.losses[0]
    assert found.losses[-1] > 1.2 * min(found.losses)
    assert 0.01 < found.suggestion < 0.1


def test_it_ends_when_the_loss_is_hopeless():
    recorder = _Recorder()
    with pytest.raises(_Hopeless):
        for step, loss in enumerate([3.0] * 10 + [1.0] * 10 + [7.0] * 10):
            recorder.step(step, loss=loss, learning_rate=1.0)
    assert recorder.losses[-6:] == [1.0, *[7.0] * 5], "five of 7 are more than twice five of 3; four are not"


def test_what_stops_a_run_at_once_stops_the_test(make_recipe, tiny_fast_vlm, monkeypatch):
    from finetune.training.loop import Trainer

    def refuse(self, *rows, **options):
        raise TrainingError("2 adapter tensors get no gradient")

    monkeypatch.setattr(Trainer, "train", refuse)
    with pytest.raises(TrainingError, match="2 adapter tensors"):
        find_lr(make_recipe(tiny_fast_vlm))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--first", "0"],
            "the first learning rate must be above 0, and the last one above the first, got 0.0 and 1.0",
        ),
        (["--first", "1e-3", "--last", "1e-4"], "the last one above the first, got 0.001 and 0.0001"),
        (["--steps", "5"], "a learning-rate range test must have at least 20 steps, got 5"),
    ],
)
def test_impossible_ranges(options, message, tmp_path, capsys):
    config = tmp_path / "r.yaml"
    config.write_text(
        "{name: a, domain: b, model: {name_or_path: pocket}, method: {name: lora},"
        " data: {source: procedural, name: medical}, train: {epochs: 1}}"
    )
    assert main(["find-lr", str(config), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_recipe_is_checked_first():
    with pytest.raises(RecipeError, match="the last one above the first, got 1.0 and 0.1"):
        find_lr(None, first=1.0, last=0.1)
