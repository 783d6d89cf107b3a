"""What others wrote into manifests and entries reaches terminals, logs, pages and cards as harmless text."""

import json
import warnings
from types import SimpleNamespace

import pytest

from finetune.adapters.manifest import AdapterManifest
from finetune.cli import main
from finetune.errors import FinetuneError
from finetune.registry.log.commits import log_key
from finetune.registry.transfer.hub import write_hub_folder
from finetune.serving.switcher import Switcher
from tests.hostile_text import HOSTILE, LINE, harms_in
from tests.registry.folders import edit, forge
from tests.scores import scores_json

NAME = "medical/brain-mri"


@pytest.fixture
def hostile(registry, make_adapter):
    """A registry with two versions, hostile in every field that takes any text."""
    for seed in (0, 1):
        folder = make_adapter(seed=seed)
        (folder / "README.md").unlink()
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"]["README.md"]
        edit(
            folder,
            files=manifest["files"],
            training=manifest["training"] | {"task": HOSTILE + str(seed), "domain": HOSTILE},
            task=manifest["task"] | {"system_prompt": HOSTILE, "question_template": HOSTILE + "{question}"},
            metrics={
                "base": scores_json(0.25, metric=HOSTILE, unit=HOSTILE),
                "test": scores_json(0.5 + seed / 4, metric=HOSTILE, unit=HOSTILE),
            },
            license=HOSTILE,
            intended_use=HOSTILE,
            parents=[HOSTILE],
        )
        registry.publish(folder)
    registry.yank(f"{NAME}@2", reason="reason")
    entry = registry.store.root / log_key(*NAME.split("/"), 3)
    forge(entry, actor=LINE, yanked={"2": LINE})
    return registry


@pytest.mark.parametrize(
    "words",
    [
        ["list", "--all"], ["log", NAME], ["resolve", f"{NAME}@1"], ["resolve", f"{NAME}@2"],
        ["diff", f"{NAME}@1", f"{NAME}@2"], ["verify"], ["pull", f"{NAME}@2"], ["yank", f"{NAME}@1", "--reason", LINE],
        ["promote", f"{NAME}@1", "prod", "--require", f"{LINE}>=0.9"], ["resolve", LINE], ["list", LINE],
    ],
    ids=lambda words: " ".join(words[:2])[:30].encode("ascii", "ignore").decode().strip() or "words",
)  # fmt: skip
def test_the_commands_show_it_harmless(hostile, capsys, words):
    main(["registry", *words, "--registry", hostile.location])
    shown = "".join(capsys.readouterr())
    assert shown and harms_in(shown) == []
    assert words[0] not in ("list", "log", "resolve") or LINE in words or r"\u202e" in shown


def test_programs_get_it_exactly(hostile, capsys):
    main(["registry", "list", "--all", "--json", "--registry", hostile.location])
    first, second = json.loads(capsys.readouterr().out)
    assert {first["yanked"], second["yanked"]} == {None, LINE}
    assert {v["summary"]["task"] for v in (first, second)} == {HOSTILE + "0", HOSTILE + "1"}


def test_a_warning_is_harmless(hostile):
    switcher = Switcher.__new__(Switcher)
    switcher._registry = lambda: hostile
    switcher._bring_in = lambda ref, digest, fetch: fetch()
    switcher.base = SimpleNamespace(model=SimpleNamespace(device="cpu"))
    with warnings.catch_warnings(record=True) as caught, pytest.raises(FinetuneError):
        warnings.simplefilter("always")
        switcher._ready(f"{NAME}@2", hostile.resolve(f"{NAME}@2"))
    (warning,) = [str(one.message) for one in caught if "yanked" in str(one.message)]
    assert harms_in(warning) == [] and r"\u202e" in warning


def test_a_card_holds_no_live_markup(hostile, tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    folder = write_hub_folder(hostile, hostile.resolve(f"{NAME}@1"), tmp_path / "hub")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert harms_in(text) == []
    assert AdapterManifest.parse((folder / "manifest.json").read_bytes()).license == HOSTILE
    page = text.split("---\n", 2)[2]
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(page)
    inner = [child for token in tokens for child in token.children or []]
    assert not {"html_block", "html_inline", "link_open", "image"} & {token.type for token in [*tokens, *inner]}
    assert "http" not in "".join(token.content for token in inner if token.type == "text")
    assert [token.type for token in tokens].count("td_open") == 12, "four values: metric, two baselines, truncated"
    assert [token.type for token in tokens].count("fence") == 1
    for field in ("Intended use: `", "Licence: `", "task `"):
        assert field in page
