"""diff, promote, push, fetch, export-archive and import-archive as they are typed."""

import json

import pytest

from finetune.cli import main
from finetune.registry import AdapterRegistry
from tests.registry.folders import edit
from tests.scores import scores_json

pytestmark = pytest.mark.usefixtures("no_sync")
NAME = "medical/brain-mri"


@pytest.fixture
def finetune(registry, capsys):
    """Return a function that runs ``finetune registry ...`` and return exit code, output and errors."""

    def call(*words, location=registry.location):
        code = main(["registry", *map(str, words), "--registry", str(location)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def two(registry, make_adapter):
    registry.publish(make_adapter())
    better = make_adapter(seed=1)
    edit(better, metrics={"base": scores_json(0.25), "test": scores_json(0.8)})
    registry.publish(better)
    return registry


def test_diff(finetune, two):
    code, out, err = finetune("diff", f"{NAME}@1", f"{NAME}@2")
    header, *rows = out.splitlines()
    assert (code, err) == (0, "")
    assert header.split() == ["WHAT", f"{NAME}@1", f"{NAME}@2", "CHANGE"]
    assert rows[0].split() == ["training.seed", "0", "1", "+1"]
    assert rows[1].split() == ["test.exact_match", "0.75", "0.8", "+0.05"]
    assert rows[2].startswith("files.adapter_model.safetensors.sha256  ") and rows[2].count("...") == 2
    answer = json.loads(finetune("diff", NAME, f"{NAME}@1", "--json")[1])
    assert (answer["a"]["version"], answer["b"]["version"]) == (2, 1)
    paths = {each["path"]: (each["a"], each["b"]) for each in answer["differences"]}
    assert paths["test.exact_match"] == (0.8, 0.75)
    assert finetune("diff", NAME, f"{NAME}@2") == (0, f"{NAME}@2 and {NAME}@2 do not differ\n", "")
    two.yank(f"{NAME}@1", reason="wrong rows")
    assert finetune("diff", NAME, f"{NAME}@1")[2].count("warning: medical/brain-mri@1 is yanked: wrong rows") == 1
    assert finetune("diff", NAME, f"{NAME}@7")[0] == 2


def test_promote(finetune, two):
    refused = f"cannot promote {NAME}@1 to prod: test.exact_match>=0.78: it is 0.75. Nothing was changed. "
    promote = (
        "promote",
        f"{NAME}@1",
        "prod",
        "--require",
        "test.exact_match>=0.78",
        "--require",
        "base.exact_match<0.5",
    )
    code, out, err = finetune(*promote)
    assert (code, err) == (1, "") and out.startswith(f"refused: {refused}")
    code, out, _ = finetune(*promote, "--json")
    assert code == 1 and json.loads(out)["promoted"] is False and json.loads(out)["reason"].startswith(refused)
    code, out, _ = finetune(*promote, "--force", "--expect", "0")
    assert code == 0 and out.startswith(f"prod -> {NAME}@1 (aliases: prod; sha256:")
    code, out, _ = finetune("promote", f"{NAME}@2", *promote[2:], "--json")
    assert code == 0 and json.loads(out)["promoted"] is True and json.loads(out)["ref"] == f"{NAME}@2"
    header, *_, forced, plain = finetune("log", NAME)[1].splitlines()
    column = header.index("REQUIRED")
    required = "test.exact_match>=0.78; base.exact_match<0.5"
    assert forced[column:].startswith(f"{required}; FORCED past test.exact_match>=0.78: it is 0.75")
    assert plain[column:].removesuffix("(nobody)").rstrip() == required
    assert json.loads(finetune("log", NAME, "--json")[1])[-1]["gate"]["required"] == required.split("; ")
    assert finetune(*promote, "--expect", "7", "--force")[0] == 2
    with pytest.raises(SystemExit):
        finetune("promote", f"{NAME}@2", "prod")


def test_push_and_fetch(finetune, two, make_adapter, tmp_path):
    two.publish(make_adapter("retail/shoes"))
    other = tmp_path / "other"
    code, out, _ = finetune("push", NAME, "--to", other)
    assert (code, out.split(",")[:3]) == (0, [f"{NAME}: 2 entries", " 2 versions", " 6 files"])
    assert finetune("push", NAME, "--to", other)[:2] == (0, f"{NAME}: nothing new\n")
    code, out, _ = finetune("push", "--all", "--to", other, "--json")
    result = json.loads(out)
    assert code == 0 and [(each["name"], each["entries"]) for each in result["copied"]] == [
        (NAME, 0),
        ("retail/shoes", 1),
    ]
    code, out, _ = finetune("fetch", "--all", "--from", other, location=tmp_path / "third")
    assert code == 0 and [v.ref for v in AdapterRegistry(tmp_path / "third").list()] == [f"{NAME}@2", "retail/shoes@1"]
    AdapterRegistry(other).alias(NAME, "prod", 1)
    two.alias(NAME, "prod", 2)
    code, out, err = finetune("fetch", NAME, "retail/shoes", "--from", other)
    assert (code, err) == (1, "")
    assert out.startswith(
        f"retail/shoes: nothing new\nrefused: {NAME}: "
        "source and target must have the same history, but differ from entry 3 on: in the source"
    )
    code, out, err = finetune("fetch", NAME, "--from", tmp_path / "nowhere")
    assert (code, out, err) == (2, "", f"error: there is no registry at {tmp_path / 'nowhere'}. Check the location.\n")
    assert finetune("push", "medical/nothing", "--to", other)[0] == 2
    for words in (["push", "--to", other], ["push", NAME, "--all", "--to", other], ["push", NAME]):
        with pytest.raises(SystemExit):
            finetune(*words)


def test_archives(finetune, two, tmp_path):
    file, other = tmp_path / "adapters.tar", tmp_path / "other"
    code, out, _ = finetune("export-archive", NAME, "--to", file)
    first, digest = out.splitlines()
    assert code == 0 and first == f"{file}: 1 adapters, 2 entries, {file.stat().st_size} bytes"
    assert len(digest) == len("sha256:") + 64
    code, out, err = finetune("export-archive", "--all", "--to", file)
    assert code == 2 and err.startswith(f"error: {file} exists already")
    result = json.loads(finetune("export-archive", "--all", "--to", tmp_path / "again.tar", "--json")[1])
    assert f"sha256:{result['sha256']}" == digest and result["names"] == [NAME]
    code, out, _ = finetune("import-archive", file, location=other)
    assert code == 0 and out.startswith(f"{NAME}: 2 entries, 2 versions, 6 files")
    assert json.loads(finetune("import-archive", file, "--json", location=other)[1])["refused"] == []
    assert finetune("verify", location=other)[0] == 0
    file.write_bytes(file.read_bytes()[:-600])
    code, out, err = finetune("import-archive", file, location=tmp_path / "third")
    assert code == 2 and "cut off" in err and not (tmp_path / "third").exists()
