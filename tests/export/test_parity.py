"""What counts as the same: differences that rounding makes, effects that it hides, values that are none."""

import pytest
import torch

from finetune.export.parity import compare, compare_tensors, outputs, rows_of
from finetune.export.target import Comparison
from finetune.export.verdict import describe, overall

PLAIN = torch.tensor([[0.0, 10.0], [3.0, -4.0]])  # the largest output is 10: 1e-3 of it is .01


@pytest.mark.parametrize(
    ("off", "effect", "verdict"),
    [
        (0.0, 1.0, "passed"),
        (0.009, 1.0, "passed"),
        (0.011, 1.0, "failed"),
        (float("nan"), 1.0, "failed"),
        (float("inf"), 1.0, "failed"),
        (0.004, 0.0090, "passed"),
        (0.005, 0.0090, "inconclusive"),
        (0.0, 0.0009, "inconclusive"),
        (0.0, 0.0, "inconclusive"),
        (0.5, 0.0, "failed"),
    ],
)
def test_outputs(off, effect, verdict):
    wanted = PLAIN + effect * torch.eye(2)
    got = wanted + off * torch.eye(2)
    found = compare("it", {"probe": got}, wanted={"probe": wanted}, plain={"probe": PLAIN}, rounding=1e-3)
    assert found.verdict == verdict
    assert found.tolerance == pytest.approx(0.01) and found.effect == pytest.approx(effect, abs=1e-6)


def test_the_base_alone_never_passes():
    """Whatever the adapter does: what gives the base's outputs is either off, or cannot be told apart."""
    for effect in (1e-6, 1e-3, 9e-3, 1.1e-2, 1.0):
        wanted = PLAIN + effect
        found = compare("it", {"probe": PLAIN}, wanted={"probe": wanted}, plain={"probe": PLAIN}, rounding=1e-3)
        assert found.verdict == ("inconclusive" if effect < 0.0099 else "failed")


def test_one_row_that_is_off_is_enough_and_fewer_positions_are_the_last():
    wanted = {"probe": PLAIN + 1, "text 1": PLAIN - 1}
    plain = dict.fromkeys(wanted, PLAIN)
    assert compare("it", {n: w[-1:] for n, w in wanted.items()}, wanted=wanted, plain=plain).verdict == "passed"
    assert compare("it", wanted | {"text 1": PLAIN}, wanted=wanted, plain=plain).verdict == "failed"


def test_tensors():
    one = torch.ones(2)
    assert compare_tensors("t", [(one, one.clone())]).verdict == "passed"
    for other in (one + 1e-7, one.half(), torch.ones(3), torch.tensor([1.0, float("nan")])):
        assert compare_tensors("t", [(one, one), (other, one)]).verdict == "failed"


def test_the_verdict_on_all():
    def of(*verdicts):
        return overall([Comparison(what="", verdict=v, largest_difference=0, tolerance=0) for v in verdicts])

    assert of("passed", "passed") == "passed"
    assert of("passed", "inconclusive") == "inconclusive"
    assert of("passed", "failed", "inconclusive") == "failed"
    assert of("inconclusive") == of() == "failed", "nothing speaks for it"
    line = describe(Comparison(what="x", verdict="passed", largest_difference=1e-6, tolerance=1e-4, effect=2.0))
    assert line == "passed: x: largest difference 1e-06, at most 0.0001 allowed; the adapter's own effect is 2"


def test_rows_differ_in_text_and_image(saved):
    from finetune.adapters.folder import read_folder
    from finetune.assemble.loading import load_base

    folder, adapter = saved()
    base = load_base(folder, device="cpu")
    rows = rows_of(base, read_folder(adapter).manifest.probe)
    assert list(rows) == ["probe", "text 1", "text 2"]
    found = outputs(base, rows)
    assert len({values.shape for values in found.values()}) == 3
    assert all(
        values.dtype == torch.float32 and values.shape[1] == found["probe"].shape[1] for values in found.values()
    )
