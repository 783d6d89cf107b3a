"""Mirrors on the Hugging Face Hub: the folder, its card, and its own client against a stand-in on loopback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune.cli import main
from finetune.errors import IntegrityError, ManifestError, StoreError
from finetune.registry import AdapterRegistry
from finetune.registry.transfer.hub import write_hub_folder
from tests.registry.folders import edit, same
from tests.registry.hub_server import TOKEN, Repo, running_hub
from tests.scores import scores_json

pytestmark = pytest.mark.usefixtures("no_sync")
NAME = "medical/brain-mri"
REPO = "clinic/brain-mri"


@pytest.fixture
def publish(registry, make_adapter):
    """Return a function that publishes an adapter without a card of its own, whose manifest has other fields."""

    def publish(name=NAME, seed=0, **fields):
        folder = make_adapter(name, seed)
        (folder / "README.md").unlink()
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"]["README.md"]
        edit(folder, **{**manifest, **fields})
        return registry.publish(folder)

    return publish


def _card(folder: Path) -> tuple[dict, str]:
    _, front, page = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), page


def test_the_folder_is_the_adapter_and_a_card(registry, publish, tmp_path):
    version = publish(license="Apache-2.0", intended_use="to show\n---\nwhat is there", synthetic=False)
    folder = write_hub_folder(registry, version, tmp_path / "deep" / "hub")
    pulled = registry.pull(version)
    assert {p.name for p in folder.iterdir()} == {p.name for p in pulled.iterdir()} | {"README.md"}
    assert all((folder / p.name).read_bytes() == p.read_bytes() for p in pulled.iterdir())
    assert os.listdir(tmp_path / "deep") == ["hub"]
    front, page = _card(folder)
    assert front == {
        "base_model": "toy/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "license": "apache-2.0",
        "tags": ["finetune-vlm", "lora", "medical"],
        "model-index": [
            {
                "name": NAME,
                "results": [
                    {
                        "task": {"type": "image-text-to-text"},
                        "dataset": {"name": f"{NAME}, test split", "type": "medical"},
                        "metrics": [
                            {"type": "exact_match", "value": 0.75},
                            {"type": "blank_image.exact_match", "value": 0.25},
                            {"type": "majority.exact_match", "value": 0.5},
                            {"type": "truncated", "value": 0},
                        ],
                    }
                ],
            }
        ],
    }
    assert f"# {NAME}, version 1" in page and f"sha256:{version.digest}" in page
    assert (
        "| exact_match | 0.25 (0 to 1) | 0.75 (0 to 1) |" in page and "Intended use: to show --- what is there" in page
    )
    assert "drawn by a program" not in page


def test_the_card_has_the_unit_of_every_value(registry, publish, tmp_path):
    errors = {"metric": "mean_error", "interval": (0.5, 2.0), "majority": 3.0, "blank_image": 4.25, "unit": "m"}
    metrics = {"base": scores_json(2.5, **errors), "test": scores_json(1.25, **errors)}
    _, page = _card(write_hub_folder(registry, publish(metrics=metrics), tmp_path / "hub"))
    assert "| mean_error | 2.5 m (0.5 to 2) | 1.25 m (0.5 to 2) |" in page
    assert "| majority.mean_error | 3 m | 3 m |" in page and "| blank_image.mean_error | 4.25 m | 4.25 m |" in page
    assert "| truncated | 0 | 0 |" in page


def test_the_card_lists_what_is_not_known(registry, publish, tmp_path):
    base = {"model_type": "toy", "files": {"model.safetensors": "0" * 64}, "config": "0" * 64}
    front, page = _card(write_hub_folder(registry, publish(base=base, metrics={}), tmp_path / "hub"))
    assert not front.keys() & {"base_model", "license", "license_name", "model-index"}
    assert front["tags"][-1] == "synthetic" and "drawn by a program" in page
    assert "a local base" in page and "Licence: not stated" in page and "|" not in page


@pytest.mark.parametrize(
    ("license", "fields"),
    [
        ("MIT", {"license": "mit"}),
        ("Clinic Research 2", {"license": "other", "license_name": "Clinic Research 2"}),
        ("a: b\n- c", {"license": "other", "license_name": "a: b\n- c"}),
    ],
)
def test_licences_are_those_of_the_hub(registry, publish, tmp_path, license, fields):
    front, _ = _card(write_hub_folder(registry, publish(license=license), tmp_path / "hub"))
    assert {key: front[key] for key in front if key.startswith("license")} == fields


def test_what_peft_refuses_is_not_called_its_own(registry, publish, make_adapter, tmp_path):
    adapter = {
        "peft_type": "FINETUNE_VLM",
        "parts": [{"method": m, "options": {}, "modules": {}} for m in ("lora", "full_modules")],
        "tensors": {"a": {"shape": [2], "dtype": "F32"}},
    }
    task = {"name": "contrastive", "text_template": "a photo of {label}", "answer_normalization": "vqa"}
    front, page = _card(write_hub_folder(registry, publish(adapter=adapter, task=task), tmp_path / "hub"))
    assert "library_name" not in front and "PEFT" not in page
    assert front["pipeline_tag"] == "zero-shot-image-classification" and front["tags"][1:3] == ["lora", "full_modules"]


def test_a_card_of_the_adapters_own_stays(registry, make_adapter, tmp_path):
    version = registry.publish(make_adapter())
    assert same(write_hub_folder(registry, version, tmp_path / "hub"), registry.pull(version))


def test_a_folder_is_never_replaced(registry, publish, tmp_path):
    version = publish()
    for path in (tmp_path / "file", tmp_path / "folder" / "file"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    for into in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(StoreError, match=r"something already. Choose a folder that does not exist yet \(--hub"):
            write_hub_folder(registry, version, into)
    with pytest.raises(StoreError, match="cannot write"):
        write_hub_folder(registry, version, tmp_path / "file" / "hub")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_nothing_damaged_is_mirrored(registry, publish, tmp_path):
    version = publish()
    blob = Path(registry.location, "blobs", "sha256", version.digest[:2], version.digest)
    blob.write_bytes(b"X" + blob.read_bytes()[1:])
    with pytest.raises(IntegrityError):
        write_hub_folder(registry, version, tmp_path / "hub")
    assert not (tmp_path / "hub").exists()


def test_a_downloaded_repository_is_an_adapter_folder(registry, publish, tmp_path):
    version = publish()
    folder = write_hub_folder(registry, version, tmp_path / "hub")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "download" / "manifest.json.metadata").write_text("x")
    other = AdapterRegistry(tmp_path / "other")
    assert other.publish(folder).digest == version.digest
    assert same(other.pull(NAME), registry.pull(NAME)), "what the hub added is not published"
    (folder / "notes.txt").write_text("x")
    with pytest.raises(IntegrityError, match="also holds 'notes.txt', which its manifest does not list"):
        other.publish(folder)
    (folder / "notes.txt").unlink()
    weights = folder / "adapter_model.safetensors"
    weights.rename(tmp_path / "blob")
    weights.symlink_to(tmp_path / "blob")
    with pytest.raises(IntegrityError, match="'adapter_model.safetensors' must be a plain file, not a link"):
        other.publish(folder)
    (folder / "manifest.json").rename(tmp_path / "manifest.json")
    (folder / "manifest.json").symlink_to(tmp_path / "manifest.json")
    with pytest.raises(ManifestError, match="must be a regular file, got a symbolic link"):
        other.publish(folder)


@pytest.fixture
def hub():
    with running_hub() as hub:
        yield hub


@pytest.fixture
def run(hub, registry, tmp_path):
    """Return a function that runs Python in a process that knows the hub, as a user's does."""
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}

    def run(*words, token=TOKEN):
        done = subprocess.run(
            [sys.executable, *map(str, words)], env=env | {"HF_TOKEN": token}, capture_output=True, text=True
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def mirror(run, registry):
    """Return a function that types ``finetune registry mirror ... --hub ...``."""

    def mirror(ref, *options, repo=REPO, **more):
        words = ["registry", "mirror", ref, "--hub", repo, *options, "--registry", registry.location]
        return run("-m", "finetune.cli", *words, **more)

    return mirror


DOWNLOAD = "import sys; from huggingface_hub import snapshot_download as s; s(*sys.argv[1:3], local_dir=sys.argv[3])"


def test_versions_go_up_and_come_down(hub, mirror, run, registry, publish, tmp_path):
    first, second = publish(), publish(seed=1)
    code, out, err = mirror(f"{NAME}@1", "--json")
    assert code == 0, err
    repo = hub.repos[REPO]
    assert repo.private
    assert json.loads(out) == {"repo_id": REPO, "tag": "v1", "revision": repo.tags["v1"]}
    folder = write_hub_folder(registry, first, tmp_path / "hub")
    wanted = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert repo.at("v1")[1] == {**wanted, ".gitattributes": repo.commits[0][".gitattributes"]}
    assert repo.messages[1:] == [f"{NAME}@1 (sha256:{first.digest})"]

    repo.commit({**repo.commits[-1], "old.bin": b"left by another program"}, "by hand")
    code, out, err = mirror(NAME)
    assert (code, out) == (0, f"{REPO} at v2 ({repo.oids[-1]}) is {NAME}@2\n"), err
    assert repo.tags == {"v1": repo.oids[1], "v2": repo.oids[3]}
    assert repo.at("main")[1].keys() == {*wanted, ".gitattributes"}

    assert mirror(f"{NAME}@1")[:2] == (0, f"{REPO} at v1 ({repo.tags['v1']}) is {NAME}@1\n")
    assert len(repo.commits) == 4, "what is tagged is not uploaded again"

    for tag, version in (("v1", first), ("v2", second)):
        script = DOWNLOAD.replace("s(*sys.argv[1:3]", "s(sys.argv[1], revision=sys.argv[2]")
        code, _, err = run("-c", script, REPO, tag, tmp_path / tag)
        assert code == 0, err
        assert {".cache", ".gitattributes", "README.md"} < set(os.listdir(tmp_path / tag))
        assert AdapterRegistry(tmp_path / "other").publish(tmp_path / tag).digest == version.digest


def test_what_would_be_lost_is_refused(hub, mirror, registry, publish):
    publish()
    publish("medical/other", seed=1)
    hub.repos[REPO] = Repo(private=False)
    hub.repos[REPO].commit({"README.md": b"# mine", "model.safetensors": b"years of work"}, "mine")
    code, _, err = mirror(NAME)
    assert (
        code == 2
        and f"error: {REPO} must be empty or hold an adapter of a registry, but holds model.safetensors. Choose another"
        in err
    )
    assert len(hub.repos[REPO].commits) == 2 and not hub.repos[REPO].tags
    assert mirror("medical/other", repo="clinic/other")[0] == 0
    code, _, err = mirror(NAME, repo="clinic/other")
    assert (
        code == 2
        and "error: clinic/other must hold versions of medical/brain-mri, but holds medical/other. Choose another"
        in err
    )
    other = hub.repos["clinic/other"]
    del other.tags["v1"]
    other.commit({**other.commits[-1], "manifest.json": _manifest_of(registry, "medical/other", b"0.75", b"0.99")}, "!")
    other.tags["v1"] = other.oids[-1]
    code, _, err = mirror("medical/other", repo="clinic/other")
    assert code == 2 and "clinic/other: the tag v1 must point to the manifest sha256:" in err


def _manifest_of(registry, name, old, new):
    return (registry.pull(name) / "manifest.json").read_bytes().replace(old, new)


def test_an_upload_that_broke_off_goes_on(hub, mirror, publish):
    """Refused at the tag, it has made the commit; the second time nothing is left to commit."""
    publish()
    hub.refuse = lambda method, path: "/tag/" in path
    code, _, err = mirror(NAME)
    assert code == 2 and f"error: the hub refused {REPO}:" in err
    hub.refuse = lambda method, path: False
    assert mirror(NAME)[0] == 0
    assert hub.repos[REPO].tags == {"v1": hub.repos[REPO].oids[1]} and len(hub.repos[REPO].commits) == 2


def test_errors_are_one_line_with_a_way_out(hub, mirror, publish):
    publish()
    for options, message in (
        (
            {"token": "hf_wrong"},
            "Invalid username or password. Log in with `hf auth login`, and check that the token may",
        ),
        ({"repo": "no repository"}, "'no repository' is not a valid id of a repository on the hub:"),
    ):
        code, out, err = mirror(NAME, **options)
        assert (code, out) == (2, "") and message in " ".join(err.split()) and "Traceback" not in err
    assert mirror(NAME, "--public")[0] == 0 and not hub.repos[REPO].private


def test_the_folder_by_command(registry, publish, capsys, tmp_path):
    publish()
    words = ["registry", "mirror", NAME, "--hub-folder", str(tmp_path / "hub"), "--registry", registry.location]
    assert main(words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'hub'}\n"
    assert (tmp_path / "hub" / "README.md").is_file()
    assert main(words) == 2
    for more in ([], ["--hub", "a/b", "--hub-folder", "c"]):
        with pytest.raises(SystemExit):
            main(["registry", "mirror", NAME, *more])
