"""What can be known is checked before what is slow: each mistake is answered before torch is imported.

All of them are made in one process, in which none may import torch. What needs torch is answered before the next
slower stage begins.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from finetune.errors import DataError, MethodError, ModelError, RecipeError, TrustError
from finetune.runs import train as runs
from finetune.runs.find_lr import find_lr

ROOT = Path(__file__).parents[2]
CPU_SECONDS = 2.0  # of one answer, imports included; about half a second on a machine at rest

# name -> (words of the command line, what the one line on stderr says). {here} is the folder of the test.
MISTAKES = {
    "no recipe file": (["train", "{here}/none.yaml"], "none.yaml: the recipe cannot be read: No such file"),
    "not YAML": (["train", "{here}/broken.yaml"], "broken.yaml: the recipe must be valid YAML"),
    "unknown key": (["train", "R", "train.epoch=3"], "train.epoch: unknown key. Did you mean 'epochs'?"),
    "unknown method": (["train", "R", "method.name=lorra"], "unknown method.name"),
    "unknown task": (["train", "R", "task.name=vqaa"], "unknown task.name"),
    "unknown source": (["train", "R", "data.source=jsnol"], "unknown data.source 'jsnol'"),
    "no tower": (["train", "R", "method.towers.language=none"], "method.towers: at least one tower must be adapted"),
    "no data root": (["train", "R", "data.root={here}/dta"], "no such folder. Did you mean '{here}/data'?"),
    "no train file": (["train", "R", "data.train=trian.jsonl"], "trian.jsonl: no such file. Check data.root"),
    "no default val file": (["train", "{here}/no_val.yaml"], "set data.val: null for none"),
    "no test file": (["train", "R", "data.test=tset.jsonl"], "tset.jsonl: no such file. Check data.root and data.test"),
    "no Parquet file": (
        ["train", "P"],
        "data.val must match at least one file, got val*.parquet, which matches none. Parquet files there: "
        "train.parquet",
    ),
    "no saved folder": (["train", "R", 'data={{source: saved, root: "{here}/data"}}'], "dataset_info.json"),
    "no rows": (["train", "R", "data.val=empty.jsonl"], "empty.jsonl: the file must have at least one row, got none"),
    "field missing": (["train", "R", "data.question=qestion"], "a row must have the field 'qestion'"),
    "image of the first row": (["train", "R", "data.val=lost.jsonl"], "lost.png does not exist"),
    "column missing": (
        ["train", "P", "data.val=null", "data.test=null", "data.answer=anser"],
        "data.answer must name a column",
    ),
    "publish name": (["train", "R", "adapter.publish=-a/b"], "must not start or end with '-'; got '-a'"),
    "alias": (
        ["train", "R", "adapter.aliases=[Prod!]"],
        "an alias must be a letter a-z, then at most 63 of a-z, 0-9, '.', '_' and '-'; got 'Prod!'",
    ),
    "registry is a file": (["train", "R", "adapter.publish=a/b"], "{here}/file is not a folder"),
    "no signing key": (["train", "R", "adapter.publish=a/b"], "no such signing key"),
    "run folder": (["train", "R", "train.output_dir={here}/file/runs"], "train.output_dir: {here}/file/runs/mine"),
    "parent": (["train", "R", "adapter.init_from=retail/none"], "adapter.init_from: retail/none: no adapter"),
    "finished run": (["train", "R", "name=done"], "train.resume=never runs it again"),
    "no base": (["train", "R", "model.name_or_path={here}/bsae"], "no model at '{here}/bsae'"),
    "name of a base": (["train", "R", "model.name_or_path=pockt"], "Did you mean 'pocket'?"),
    "base without config": (["train", "R", "model.name_or_path={here}/data"], "must hold config.json, and does not"),
    "unsupported base": (
        ["train", "R", "model.name_or_path={here}/bert"],
        "must be a vision-language model of transformers, got bert",
    ),
    "base of pointers": (["train", "R", "model.name_or_path={here}/lfs"], "git lfs pull"),
    "base cut short": (
        ["train", "R", "model.name_or_path={here}/short"],
        "The file is incomplete: download the model again",
    ),
    "base not on this machine": (["train", "R", "model.name_or_path=acme/vlm"], "hf download acme/vlm"),
    "sweep": (["sweep", "R", "train.learning_rate=1e-3,1e-2", "data.val=vla.jsonl"], "vla.jsonl: no such file"),
    "sweep, bad key": (["sweep", "R", "train.learning=1,2"], "train.learning: unknown key"),
    "find-lr, range": (
        ["find-lr", "R", "--first", "1", "--last", "0.1"],
        "the last one above the first, got 1.0 and 0.1",
    ),
    "find-lr, data": (["find-lr", "R", "data.train=trian.jsonl"], "trian.jsonl: no such file"),
    "ask, no image": (["ask", "base", "{here}/data/a.pgn", "?", "--base", "pocket"], "mean '{here}/data/a.png'?"),
    "ask, no image file": (["ask", "base", "{here}/file", "?", "--base", "pocket"], "not a readable image"),
    "ask, a folder": (
        ["ask", "base", "{here}", "?", "--base", "pocket"],
        "an image must be a file, got the folder {here}",
    ),
    "ask, no adapter": (["ask", "retail/none", "{here}/data/a.png", "?"], "no adapter 'retail/none'"),
    "ask, base": (["ask", "base", "{here}/data/a.png", "?", "--base", "{here}/bsae"], "no model at '{here}/bsae'"),
    "ask, another base": (
        ["ask", "tests/regression/0.1.0/adapters/qwen3-vl-lora", "{here}/data/a.png", "?", "--base", "pocket"],
        "the adapter was trained on another base: its model_type is",
    ),
    "ask, a path": (["ask", "runs/mine", "{here}/data/a.png", "?"], "write ./runs/mine/adapter"),
    "ask, a run": (["ask", "./runs/mine", "{here}/data/a.png", "?"], "The adapter of this run is runs/mine/adapter"),
    "export, target": (["export", "retail/none", "--to", "onyx"], "Did you mean 'onnx'?"),
    "export, adapter": (["export", "retail/none", "--to", "peft"], "no adapter 'retail/none'"),
    "export, folder": (["export", "retail/none", "--to", "peft", "--output", "{here}/data"], "holds something already"),
    "serve, adapter": (["serve", "retail/none", "--port", "0"], "no adapter 'retail/none'"),
    "serve, port": (["serve", "--base", "pocket", "--port", "{port}"], "cannot listen on 127.0.0.1, port {port}"),
    "serve, base": (["serve", "--base", "pockt", "--port", "0"], "Did you mean 'pocket'?"),
    "app, adapter": (["app", "retail/none", "--port", "0"], "no adapter 'retail/none'"),
    "app, port": (["app", "--base", "pocket", "--port", "{port}"], "cannot listen on 127.0.0.1, port {port}"),
    "warm, adapter": (["registry", "warm", "retail/none", "--base", "pocket"], "no adapter 'retail/none'"),
    "demo, folder": (["demo", "--output-dir", "{here}/file"], "{here}/file is not a folder"),
    "schema, folder": (["schema", "{here}/file/schema.json"], "{here}/file is not a folder"),
    "evaluate, adapter": (["recipes/evaluate.py", "retail/none", "--on", "R"], "no adapter 'retail/none'"),
    "evaluate, data": (["recipes/evaluate.py", "base", "--on", "R", "--set", "data.test=t.jsonl"], "no such file"),
    "train.py": (["recipes/train.py", "R", "data.val=vla.jsonl"], "vla.jsonl: no such file"),
    "launch": (["launch", "R", "data.val=vla.jsonl"], "vla.jsonl: no such file"),
    "export.py": (["recipes/export.py", "retail/none", "--to", "peft"], "no adapter 'retail/none'"),
}
ENVIRONMENT = {
    "registry is a file": {"FINETUNE_REGISTRY": "{here}/file"},
    "no signing key": {"FINETUNE_SIGNING_KEY": "{here}/none.pem"},
}
MAKE_THEM = """
import contextlib, io, json, os, runpy, sys, time, traceback
def run(words):
    if words[0].endswith(".py"):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    elif words[0] == "launch":
        from finetune.launch.launcher import main
        sys.exit(main(words[1:]))
    else:
        from finetune.cli import main
        sys.exit(main(words))
for name, words, variables in json.loads(sys.stdin.read()):
    before, start, plain = set(sys.modules), time.process_time(), dict(os.environ)
    os.environ.update(variables)
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            run(words)
        except SystemExit as stopped:
            code = stopped.code
        except Exception:
            code = traceback.format_exc()
    os.environ.clear()
    os.environ.update(plain)
    heavy = {"torch", "transformers", "accelerate", "datasets", "peft"} & (set(sys.modules) - before)
    print(json.dumps([name, code, err.getvalue(), sorted(heavy), time.process_time() - start]))
"""


def _write_folder(here: Path) -> None:
    """Write data, recipes, bases and a finished run, with what is wrong with some of them."""
    data = here / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(data / "a.png")
    row = {"image": "a.png", "question": "What?", "answer": "black"}
    for name in ("train", "val", "test"):
        (data / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (data / "lost.jsonl").write_text(json.dumps({**row, "image": "lost.png"}) + "\n")
    (data / "empty.jsonl").write_text("\n")
    (here / "only_train").mkdir()
    (here / "only_train" / "train.jsonl").write_text(json.dumps({**row, "image": "../data/a.png"}) + "\n")
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"question": ["What?"], "answer": ["black"]}), here / "only_train" / "train.parquet")
    recipe = {
        "name": "mine",
        "domain": "testing",
        "model": {"name_or_path": "pocket"},
        "method": {"name": "lora"},
        "data": {"source": "jsonl", "root": str(data)},
        "train": {"max_steps": 1, "output_dir": str(here / "runs")},
    }
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    other = {"source": "jsonl", "root": str(here / "only_train")}
    (here / "no_val.yaml").write_text(yaml.safe_dump({**recipe, "data": other}))
    (here / "parquet.yaml").write_text(yaml.safe_dump({**recipe, "data": {**other, "source": "parquet"}}))
    (here / "broken.yaml").write_text("name: [")
    (here / "file").write_text("not a folder")
    (here / "runs" / "mine" / "adapter").mkdir(parents=True)
    (here / "runs" / "mine" / "adapter" / "manifest.json").write_text("{}")
    (here / "runs" / "done").mkdir()
    (here / "runs" / "done" / "result.json").write_text("{}")
    for name in ("mine", "done"):
        (here / "runs" / name / "recipe.json").write_text(json.dumps(recipe))
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    whole = len(header).to_bytes(8, "little") + header + bytes(16)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    for name, model_type, weights in (
        ("bert", "bert", whole),
        ("lfs", "llava", pointer),
        ("short", "llava", whole[:-4]),
    ):
        (here / name).mkdir()
        (here / name / "config.json").write_text(json.dumps({"model_type": model_type}))
        (here / name / "model.safetensors").write_bytes(weights)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """name -> (exit code, stderr, heavy modules, seconds of CPU), of all mistakes made in one process."""
    here = tmp_path_factory.mktemp("early")
    _write_folder(here)
    names = {"R": str(here / "recipe.yaml"), "P": str(here / "parquet.yaml")}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        facts = {"here": here, "port": taken.getsockname()[1]}

        def filled(word):
            return names.get(word) or (
                str(ROOT / word) if word.startswith(("recipes/", "tests/")) else word.format(**facts)
            )

        made = [
            (name, [filled(word) for word in words], {k: filled(v) for k, v in ENVIRONMENT.get(name, {}).items()})
            for name, (words, _) in MISTAKES.items()
        ]
        env = {k: v for k, v in os.environ.items() if not k.startswith("FINETUNE_")}
        env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "FINETUNE_REGISTRY": str(here / "registry")}
        env |= {"FINETUNE_CACHE": str(here / "cache"), "HOME": str(here / "home")}
        command = [sys.executable, "-c", MAKE_THEM]
        done = subprocess.run(command, input=json.dumps(made), capture_output=True, text=True, cwd=here, env=env)
    assert done.returncode == 0, done.stderr
    return facts, {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_before_torch_is_imported(name, answers):
    facts, found = answers
    code, output, heavy, seconds = found[name]
    wanted = MISTAKES[name][1].format(**facts)
    assert heavy == [], output
    assert code == 2, output
    assert output.startswith("error: ") and wanted in output and "Traceback" not in output, output
    assert seconds < CPU_SECONDS


# What needs torch


@pytest.fixture
def nothing_slow(monkeypatch):
    """Fails the test where rows or weights are read."""

    def reached(*args, **options):
        raise AssertionError("a slower stage has begun")

    for name in ("base_of", "read_run_rows"):
        monkeypatch.setattr(f"finetune.runs.run.{name}", reached)
    monkeypatch.setattr("finetune.assemble.loading.load_base", reached)


@pytest.mark.parametrize("run", [runs.train, find_lr])
def test_a_target_that_no_tower_has_is_found_before_rows_and_weights(run, tiny_fast_vlm, make_recipe, nothing_slow):
    method = {"name": "lora", "towers": {"language": ["q_porj"]}}
    with pytest.raises(MethodError, match=r"language: 'q_porj' matches no linear module .* Did you mean 'q_proj'\?"):
        run(make_recipe(tiny_fast_vlm, method=[method]))


def test_a_tower_without_linear_modules_is_found_before_rows_and_weights(tiny_fast_vlm, make_recipe, nothing_slow):
    with pytest.raises(MethodError, match="the vision tower has no linear module"):
        runs.train(make_recipe(tiny_fast_vlm, method=[{"name": "lora", "towers": {"vision": "all-linear"}}]))


def test_the_skeleton_of_each_family_has_the_names_of_the_loaded_model(tiny_family):
    from finetune.assemble.loading import load_base
    from finetune.methods.targets import named_targets
    from finetune.recipe import TowerTargets

    base = load_base(str(tiny_family))
    skeleton = base.family.skeleton(str(tiny_family))
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert base.family.towers(skeleton) == base.towers
    wanted = TowerTargets()
    assert named_targets(skeleton, base.towers, wanted) == named_targets(base.model, base.towers, wanted)


def test_loading_a_base_in_python_answers_as_early(tmp_path):
    from finetune.assemble.loading import load_base

    with pytest.raises(ModelError, match=r"no model at 'pockt'.* Did you mean 'pocket'\?"):
        load_base("pockt")


def test_a_run_in_python_checks_all_splits_before_the_base(make_recipe, rows_folder, nothing_slow):
    (rows_folder / "val.jsonl").unlink()
    with pytest.raises(ValueError, match=r"val\.jsonl: no such file\. data\.val is val\.jsonl by default"):
        runs.train(make_recipe("pocket"))


def test_only_the_main_process_looks_for_registry_and_key(make_recipe, rows_folder, monkeypatch):
    from finetune.preflight import check_recipe

    monkeypatch.setenv("FINETUNE_SIGNING_KEY", str(rows_folder / "none.pem"))
    recipe = make_recipe("pocket")
    with pytest.raises(TrustError, match="no such signing key"):
        check_recipe(recipe)
    monkeypatch.setenv("RANK", "8")
    check_recipe(recipe)


def test_a_key_that_needs_a_passphrase_is_not_opened_beforehand(make_recipe, tmp_path, monkeypatch):
    from finetune.preflight import check_recipe
    from finetune.registry.trust.signing import SigningKey

    path = tmp_path / "key.pem"
    SigningKey.generate().save(path, "me", passphrase="secret")
    monkeypatch.setenv("FINETUNE_SIGNING_KEY", str(path))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda prompt: pytest.fail("the terminal was asked"))
    check_recipe(make_recipe("pocket"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: False)
    with pytest.raises(TrustError, match="the key is encrypted"):
        check_recipe(make_recipe("pocket"))


def test_an_image_that_cannot_be_read_is_found_before_the_weights(make_recipe, rows_folder, nothing_slow):
    """Far behind the first rows, in the last split."""
    (rows_folder / "images" / "25.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"25\.png: not a readable"):
        runs.train(make_recipe("pocket"))


def test_a_run_folder_below_a_file_is_refused(make_recipe, rows_folder, nothing_slow):
    with pytest.raises(RecipeError, match="train.output_dir: .* cannot be written"):
        runs.train(make_recipe("pocket", train={"output_dir": str(rows_folder / "val.jsonl")}))
