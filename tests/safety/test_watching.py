"""What watches over the cases can fail: each kind of harm, done on purpose, is seen."""

import pickle
import time

import pytest
import torch

from tests.safety.forging import pickled
from tests.safety.watching import ROOM_BYTES, bounded


def test_a_payload_really_writes(canary):
    payload = pickled(canary)
    assert not canary.exists()
    pickle.loads(payload).close()
    assert canary.exists()


def test_memory_and_time_are_bounded(tmp_path, canary, monkeypatch):
    with pytest.raises(AssertionError, match="memory grew by"), bounded(tmp_path, canary):
        torch.ones(2 * ROOM_BYTES // 4)
    with pytest.raises(AssertionError, match="memory grew by"), bounded(tmp_path, canary):
        bytes(2 * ROOM_BYTES).replace(b"\0", b"1")
    (tmp_path / "weights").write_bytes(bytes(ROOM_BYTES))
    with bounded(tmp_path, canary):
        torch.ones(2 * ROOM_BYTES // 4)
    monkeypatch.setattr("tests.safety.watching.MAX_SECONDS", 0.2)
    with pytest.raises(AssertionError, match="s of CPU"), bounded(tmp_path, canary):
        start = time.process_time()
        while time.process_time() < start + 0.3:
            pass


def change_a_weight(vlm):
    bias = next(parameter for name, parameter in vlm.model.named_parameters() if name.endswith("bias"))
    bias.data.view(-1)[0] += 1e-6


def change_a_neighbours_weight(vlm):
    next(update for update in vlm.adapter.updates.values() if hasattr(update, "prompt")).prompt.mul_(1.0001)


def leave_a_module(vlm):
    vlm.model.model.add_module("ghost", torch.nn.Identity())


def leave_a_hook(vlm):
    vlm.model.model.register_forward_hook(lambda *args: None)


def leave_a_buffer(vlm):
    vlm.model.register_buffer("ghost", torch.zeros(1))


def leave_an_entry(vlm):
    vlm.switcher._cache._loaded_adapters["ghost"] = vlm.adapter


def leave_a_point(vlm):
    vlm.switcher._hooks._users["ghost"] += 1


def replace_a_forward(vlm):
    vlm.model.lm_head.forward = lambda x: torch.nn.Linear.forward(vlm.model.lm_head, x)


def switch_off(vlm):
    vlm.use(None)


HARMS = [
    (change_a_weight, "changed: "),
    (change_a_neighbours_weight, "changed: "),
    (leave_a_module, "a ghost at "),
    (leave_a_hook, "a ghost at "),
    (leave_a_buffer, "tensors came or went"),
    (leave_an_entry, "a ghost at "),
    (leave_a_point, "a ghost at "),
    (replace_a_forward, "a ghost at "),
    (switch_off, "another adapter became active"),
]


@pytest.mark.parametrize(("harm", "message"), HARMS, ids=lambda value: getattr(value, "__name__", None))
def test_harm_is_seen(stage, tmp_path, canary, harm, message):
    with pytest.raises(AssertionError, match=message), stage.unharmed(tmp_path, canary):
        harm(stage.vlm)
    assert not stage.is_whole


def test_an_adapter_that_is_let_in_is_seen(stage, tmp_path, canary):
    with pytest.raises(AssertionError, match="came or went|a ghost at"), stage.unharmed(tmp_path, canary):
        stage.vlm.add(stage.good["lora"])
    assert not stage.is_whole


def test_an_execution_is_seen(stage, tmp_path, canary):
    with pytest.raises(AssertionError, match="something was executed"), stage.unharmed(tmp_path, canary):
        pickle.loads(pickled(canary)).close()


def test_the_good_ones_load(stage):
    assert stage.is_whole
    for name in stage.good:
        stage.check_next(name)
    stage.check_untouched()
