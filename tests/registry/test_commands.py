import argparse
import json
import os
from pathlib import Path

import pytest

from finetune.errors import ConflictError, FinetuneError, NotFoundError
from finetune.registry import AdapterRegistry
from finetune.registry import cli as commands

pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def finetune(registry, capsys):
    """Return a function that runs ``finetune registry ...`` and return its exit code and output."""

    def call(*words: object, location: str | None = registry.location):
        parser = argparse.ArgumentParser(prog="finetune")
        commands.add_parser(parser.add_subparsers(required=True))
        where = [] if location is None else ["--registry", location]
        args = parser.parse_args(["registry", *map(str, words), *where])
        assert args.run is commands.run
        code = args.run(args)
        out, err = capsys.readouterr()
        assert err == call.warning
        return code, out

    call.warning = ""
    return call


def test_the_walk(finetune, make_adapter, tmp_path):
    folder = make_adapter()
    code, out = finetune("publish", folder, "--name", "medical/brain-mri", "--alias", "prod", "--alias", "v1")
    assert code == 0
    assert out.startswith("published medical/brain-mri@1 (aliases: latest, prod, v1; sha256:")
    code, out = finetune("pull", "medical/brain-mri@prod", "--into", tmp_path / "out")
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (folder / "manifest.json").read_bytes()
    finetune("publish", make_adapter(seed=1))
    code, out = finetune("alias", "medical/brain-mri", "prod", "2", "--expect", "1")
    assert out.startswith("prod -> medical/brain-mri@2 (aliases: latest, prod; sha256:")
    code, out = finetune("alias", "medical/brain-mri", "prod", "v1")
    assert out.startswith("prod -> medical/brain-mri@1 (aliases: prod, v1; ")
    code, out = finetune("verify")
    assert code == 0
    assert out.endswith(" bytes, 0 problems\n")


def test_tables_are_aligned(finetune, make_adapter):
    finetune("publish", make_adapter("medical/a"))
    finetune("publish", make_adapter("retail/clothing-store"), "--alias", "prod")
    code, out = finetune("list")
    header, *rows = out.splitlines()
    assert header.split() == ["REF", "ALIASES", "METHOD", "TASK", "PUBLISHED", "BY", "YANKED"]
    assert [row.split()[0] for row in rows] == ["medical/a@1", "retail/clothing-store@1"]
    for column in ("METHOD", "TASK"):
        start = header.index(column)
        assert all(row[start - 1] == " " and row[start] != " " for row in rows)
    assert all(line == line.rstrip() for line in out.splitlines())
    assert "lora" in rows[0] and "vqa" in rows[0] and "latest, prod" in rows[1]
    assert finetune("list", "medical")[1].count("\n") == 2


def test_resolve_shows_what_the_log_keeps(finetune, make_adapter):
    finetune("publish", make_adapter())
    lines = dict(line.split(None, 1) for line in finetune("resolve", "medical/brain-mri")[1].splitlines())
    assert lines["ref"] == "medical/brain-mri@1"
    assert lines["digest"].startswith("sha256:")
    assert lines["synthetic"] == "yes"
    assert lines["base_id"] == "toy/base"
    assert (
        "test: blank_image.exact_match: 0.25; exact_match: 0.75; majority.exact_match: 0.5; n: 40" in lines["metrics"]
    )


def test_rollback(finetune, make_adapter):
    for seed in range(2):
        finetune("publish", make_adapter(seed=seed), "--alias", "prod")
    code, out = finetune("rollback", "medical/brain-mri", "prod", "--expect", "2")
    assert code == 0 and out.startswith("prod -> medical/brain-mri@1 (aliases: prod; sha256:")
    code, out = finetune("rollback", "medical/brain-mri", "prod", "--to", "2", "--json")
    assert json.loads(out)["aliases"] == ["latest", "prod"]


def test_yank_and_its_undoing(finetune, make_adapter, tmp_path):
    for seed in range(2):
        finetune("publish", make_adapter(seed=seed), "--alias", "prod")
    code, out = finetune("yank", "medical/brain-mri@2", "--reason", "wrong rows")
    assert (code, out) == (
        0,
        "yanked medical/brain-mri@2: wrong rows\n"
        "prod points to it and cannot be resolved until you move it: "
        "finetune registry alias medical/brain-mri prod VERSION\n",
    )
    assert finetune("list")[1].splitlines()[1].startswith("medical/brain-mri@1  latest")
    header, first, second = finetune("list", "--all")[1].splitlines()
    assert second.startswith("medical/brain-mri@2  prod") and second.endswith("  wrong rows")
    assert first[header.index("YANKED") :] == ""
    header, *_, last = finetune("log", "medical/brain-mri")[1].splitlines()
    assert last.split()[1] == "yank" and last[header.index("YANKED AFTER") :].split()[0] == "2"
    finetune.warning = "warning: medical/brain-mri@2 is yanked: wrong rows. Use another version.\n"
    answer = json.loads(finetune("resolve", "medical/brain-mri@2", "--json")[1])
    assert f"warning: {answer['warning']}\n" == finetune.warning and answer["yanked"] == "wrong rows"
    assert finetune("pull", "medical/brain-mri@2", "--into", tmp_path / "x") == (0, f"{tmp_path / 'x'}\n")
    finetune.warning = ""
    assert finetune("yank", "medical/brain-mri@1")[1].splitlines() == [
        "yanked medical/brain-mri@1: no reason was given"
    ]
    out = finetune("yank", "medical/brain-mri@2")[1]
    assert "every version is yanked now, so latest cannot be resolved" in out
    out = finetune("yank", "medical/brain-mri@2", "--undo")[1]
    assert out.startswith("no longer yanked: medical/brain-mri@2 (aliases: latest, prod; ")


def test_log_shows_every_entry(finetune, make_adapter):
    finetune("publish", make_adapter())
    finetune("alias", "medical/brain-mri", "prod", "1")
    header, first, second = finetune("log", "medical/brain-mri")[1].splitlines()
    assert header.split()[:3] == ["SEQ", "OP", "VERSION"]
    assert first.split()[:4] == ["1", "publish", "1", "latest=1"]
    assert second.split()[:5] == ["2", "alias", "1", "latest=1,", "prod=1"]


def test_log_shows_the_version_that_an_entry_is_about(finetune, make_adapter):
    for seed in range(3):
        finetune("publish", make_adapter(seed=seed))
    for words in (("alias", "prod", "2"), ("alias", "prod", "1"), ("rollback", "prod")):
        finetune(words[0], "medical/brain-mri", *words[1:])
    finetune("yank", "medical/brain-mri@1")
    finetune("yank", "medical/brain-mri@1", "--undo")
    _, *lines = finetune("log", "medical/brain-mri")[1].splitlines()
    assert [line.split()[1:3] for line in lines[3:]] == [
        ["alias", "2"], ["alias", "1"], ["rollback", "2"], ["yank", "1"], ["unyank", "1"],
    ]  # fmt: skip
    entries = json.loads(finetune("log", "medical/brain-mri", "--json")[1])
    assert [(entry["version"], entry["concerns"]) for entry in entries[3:5]] == [(3, 2), (3, 1)]


def test_json_is_one_value(finetune, make_adapter, tmp_path):
    def answer(*words):
        return json.loads(finetune(*words, "--json")[1])

    published = answer("publish", make_adapter())
    assert published["ref"] == "medical/brain-mri@1" and published["aliases"] == ["latest"]
    assert answer("resolve", "medical/brain-mri") == published
    assert answer("list") == [published]
    assert answer("list", "nobody") == []
    assert answer("pull", published["ref"], "--into", tmp_path / "x") == {"path": str(tmp_path / "x")}
    assert answer("alias", "medical/brain-mri", "prod", "1")["aliases"] == ["latest", "prod"]
    assert [entry["op"] for entry in answer("log", "medical/brain-mri")] == ["publish", "alias"]
    report = answer("verify")
    assert report["problems"] == [] and report["objects"] == 7


def test_problems_end_with_1(finetune, make_adapter, registry):
    finetune("publish", make_adapter())
    blob = next(p for p in Path(registry.location, "blobs").rglob("*") if p.is_file())
    blob.write_bytes(b"X" + blob.read_bytes()[1:])
    code, out = finetune("verify")
    assert code == 1
    assert f"{blob.name}: its sha256 is" in out and out.endswith(", 1 problems\n")
    code, out = finetune("verify", "--json")
    assert code == 1 and len(json.loads(out)["problems"]) == 1


def test_list_by_base_task_and_metric(finetune, make_adapter):
    finetune("publish", make_adapter("medical/a"))
    finetune("publish", make_adapter("retail/b"))
    asked = (
        "--base",
        "toy/base",
        "--task",
        "vqa",
        "--metric",
        "test.exact_match>=0.75",
        "--metric",
        "base.exact_match<1",
    )
    assert finetune("list", *asked)[1].count("\n") == 3
    assert [v["ref"] for v in json.loads(finetune("list", "retail", *asked, "--json")[1])] == ["retail/b@1"]
    assert finetune("list", "--metric", "test.exact_match>0.75")[1].endswith(" meet the conditions\n")
    with pytest.raises(FinetuneError, match="a condition must be .* got 'accuracy'"):
        finetune("list", "--metric", "accuracy")


def test_gc_and_reindex(finetune, make_adapter, registry):
    finetune("publish", make_adapter())
    assert finetune("gc") == (
        0,
        "0 objects, 0 bytes can be deleted: add --delete; 0 more that no log names are too young to delete\n",
    )
    junk = Path(registry.location, "blobs", "sha256", "00", "0" * 64)
    junk.parent.mkdir(exist_ok=True)
    junk.write_bytes(b"12345")
    assert finetune("gc")[1].endswith("; 1 more that no log names are too young to delete\n")
    os.utime(junk, (0, 0))
    header, row, summary = finetune("gc", "--grace", "3.5")[1].splitlines()
    assert header.split() == ["KEY", "BYTES", "WRITTEN", "WHY"]
    assert row.split(None, 3) == [f"blobs/sha256/00/{'0' * 64}", "5", "1970-01-01T00:00:00Z", "no log names it"]
    assert summary.startswith("1 objects, 5 bytes can be deleted: add --delete; ") and junk.exists()
    code, out = finetune("gc", "--delete", "--json")
    assert code == 0 and not junk.exists()
    assert json.loads(out) == {
        "deleted": True,
        "objects": 1,
        "bytes": 5,
        "young": 0,
        "garbage": [
            {
                "key": f"blobs/sha256/00/{'0' * 64}",
                "size": 5,
                "modified": "1970-01-01T00:00:00+00:00",
                "why": "no log names it",
            }
        ],
    }
    assert finetune("gc", "--delete")[1].startswith("0 objects, 0 bytes deleted; ")
    with pytest.raises(FinetuneError, match="`grace` must be at least 2 days, got 1 days"):
        finetune("gc", "--grace", "1")
    answer = json.loads(finetune("reindex", "--json")[1])
    assert answer["names"] == 1 and Path(answer["path"]).exists()
    assert finetune("reindex")[1] == f"1 adapters in {answer['path']}\n"


def test_errors_are_for_the_caller_to_print(finetune, make_adapter):
    with pytest.raises(NotFoundError, match="there is no registry at"):
        finetune("resolve", "medical/brain-mri")
    with pytest.raises(NotFoundError, match="there is no registry at"):
        finetune("verify")
    finetune("publish", make_adapter())
    with pytest.raises(ConflictError, match="must point to version 3 .`expect`., but points to no version"):
        finetune("alias", "medical/brain-mri", "prod", "1", "--expect", "3")
    with pytest.raises(
        FinetuneError, match="location of a registry must be a folder, or a URL that begins with .* got 'ftp://bucket'"
    ):
        finetune("list", location="ftp://bucket")


def test_an_empty_registry_names_the_next_command(finetune, registry):
    assert finetune("list") == (
        0,
        f"no adapters in {registry.location}; `finetune registry publish FOLDER` adds one\n",
    )
    assert "no adapters in namespace 'medical' of" in finetune("list", "medical")[1]
    assert finetune("list", "--json") == (0, "[]\n")


def test_the_environment_gives_the_location(finetune, make_adapter, monkeypatch, tmp_path):
    monkeypatch.setenv("FINETUNE_REGISTRY", str(tmp_path / "elsewhere"))
    finetune("publish", make_adapter(), location=None)
    assert [v.ref for v in AdapterRegistry(tmp_path / "elsewhere").list()] == ["medical/brain-mri@1"]
    assert "medical/brain-mri@1" in finetune("list", location=None)[1]


def test_nothing_that_others_wrote_reaches_the_terminal_raw(finetune, make_adapter):
    folder = make_adapter()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["training"]["task"] = "vqa\x1b[2J\nfake@1  row"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    finetune("publish", folder)
    for words in (("list",), ("resolve", "medical/brain-mri"), ("log", "medical/brain-mri")):
        out = finetune(*words)[1]
        assert "\x1b" not in out
        assert "\nfake" not in out
    assert r"vqa\x1b[2J\nfake@1  row" in finetune("list")[1]


def test_a_verb_is_needed(capsys):
    parser = argparse.ArgumentParser(prog="finetune")
    commands.add_parser(parser.add_subparsers(required=True))
    with pytest.raises(SystemExit):
        parser.parse_args(["registry"])
    assert "the following arguments are required: VERB" in capsys.readouterr().err
