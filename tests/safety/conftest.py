import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny base and good adapters of it, by name."""
    from tests.matrix import LORA, PROMPT, train_cell
    from tests.tiny import FAMILIES

    everywhere = {**LORA, "towers": {"vision": "all-linear", "projector": "all-linear"}}
    methods = {
        "lora": everywhere,
        "parts": [LORA, PROMPT, {"name": "full_modules", "parameters": ["projector", "norms"]}],
        "neighbour": [{**everywhere, "use_dora": True}, PROMPT, {"name": "full_modules", "parameters": ["norms"]}],
    }
    root = tmp_path_factory.mktemp("safety")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(root / "home"))
        patch.setenv("FINETUNE_CACHE", str(root / "cache"))
        base = FAMILIES["qwen2_5_vl"](root / "base")
        for name, method in methods.items():
            train_cell(base, method, root / name)
    return {"base": base} | {name: root / name / "adapter" for name in methods}


@pytest.fixture(scope="session")
def stages():
    """The stage of the test before, for the next one to take over."""
    return []


@pytest.fixture
def stage(folders, stages):
    """A base with a neighbour; kept between tests for as long as each shows that it left all as it was."""
    from finetune.serving.loading import load
    from tests.safety.watching import Stage

    if not stages or not stages[-1].is_whole:
        neighbour = folders["neighbour"]
        good = {name: folders[name] for name in ("lora", "parts")}
        stages[:] = [Stage(load(neighbour, base=str(folders["base"]), device="cpu"), folders["base"], neighbour, good)]
    return stages[-1]


@pytest.fixture
def canary(tmp_path):
    """A file that must not appear."""
    return tmp_path / "canary"


@pytest.fixture
def refused(stage, tmp_path, canary):
    """Return a function that offers the forgery of a case, checks the refusal, and that nothing was harmed.

    It is offered to the base; or to ``act``, such as a registry's publish, which has no base to harm.
    """
    from tests.safety.watching import MAX_MESSAGE, bounded

    def offer(case, act=None):
        folder = case.make(stage.good[case.of], tmp_path / "adapter")
        with (bounded if act else stage.unharmed)(folder, canary):
            with pytest.raises(case.error, match=case.message) as caught:
                (act or stage.vlm.add)(folder)
        text = str(caught.value)
        assert type(caught.value) is case.error
        assert text.isprintable() and len(text) <= MAX_MESSAGE, f"{len(text)} characters: {text[:2000]!r}"

    return offer
