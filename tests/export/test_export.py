"""The room: what is done for every target, and what is left when something fails."""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import finetune
from finetune import tables
from finetune.cli import main
from finetune.errors import AdapterReferenceError, BaseMismatchError, ExportError, IntegrityError, NotFoundError
from finetune.export.exporting import export_adapter
from finetune.lookup import import_string
from finetune.methods.hooks import reached
from finetune.registry import AdapterRegistry
from tests.export.targets import SEEN


@pytest.fixture
def fake(monkeypatch):
    """Put a target in the table that does as it is told."""
    monkeypatch.setitem(tables.EXPORT_TARGETS, "fake", "tests.export.targets:Fake")
    for option in ("verdicts", "reason"):
        monkeypatch.setitem(tables.EXPORT_OPTIONS, option, ("fake",))
    SEEN.clear()


def test_the_tables_name_the_fields_of_the_targets():
    for name, place in tables.EXPORT_TARGETS.items():
        taken = {option for option, targets in tables.EXPORT_OPTIONS.items() if name in targets}
        assert {field.name for field in fields(import_string(place))} == taken, name
    assert {target for targets in tables.EXPORT_OPTIONS.values() for target in targets} <= set(tables.EXPORT_TARGETS)


def test_what_a_target_is_given(fake, saved, tmp_path):
    base, adapter = saved("llava", "everything")
    export_adapter(adapter, to="fake", output=tmp_path / "out", base=base)
    name, source = SEEN
    assert name == "testing/cell" and source.ref == f"testing/cell@sha256:{source.adapter.digest}"
    assert source.base.model.dtype == torch.float32 and source.base.quantization is None
    length = source.rows["probe"].inputs["input_ids"].shape[1]
    assert source.plain["probe"].shape[0] == length == source.adapted["probe"].shape[0] - 3
    assert not torch.equal(source.plain["probe"], source.adapted["probe"][3:])
    assert not reached(source.base.model), "nothing is attached"


def test_the_verdict_beside_the_files(fake, saved, tmp_path):
    base, adapter = saved()
    version = AdapterRegistry().publish(adapter)
    done = finetune.export_adapter("testing/cell", to="fake", output=tmp_path / "out", base=base)
    assert done.folder == tmp_path / "out" and done.verdict == "passed"
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record == json.loads(json.dumps(done.record))
    assert (record["ref"], record["manifest"], record["target"]) == ("testing/cell@1", version.digest, "fake")
    assert record["base"] == json.loads((adapter / "manifest.json").read_text())["base"]
    assert record["files"] == {
        name: {"sha256": hashlib.sha256(text).hexdigest(), "size": len(text)}
        for name, text in (("a", b"aa"), ("sub/b", b"b"))
    }
    comparison = {"what": "thing 0", "verdict": "passed", "largest_difference": 0.5, "tolerance": 0.25, "effect": None}
    assert record["comparisons"] == [comparison] and record["verdict"] == "passed"
    assert {"python", "torch", "transformers", "peft", "finetune-vlm"} <= record["toolchain"].keys()
    assert str(tmp_path) not in json.dumps(record) and base not in json.dumps(record), "no local path"


def test_an_inconclusive_export_is_kept_with_a_warning(fake, saved, tmp_path):
    base, adapter = saved()
    with pytest.warns(
        UserWarning, match="outputs cannot confirm the export .*out. Its tensors equal those of the adapter"
    ):
        done = export_adapter(
            adapter, to="fake", output=tmp_path / "out", base=base, verdicts=("passed", "inconclusive")
        )
    assert done.verdict == "inconclusive" and (tmp_path / "out" / "export.json").exists()


@pytest.mark.filterwarnings("ignore:.*its effect on the probe is below the noise")
def test_an_effect_that_no_output_shows_is_inconclusive_or_nothing(saved, tmp_path):
    base, adapter = saved("llava", "lora", strength=1e-7)
    for target in ("peft", "merged"):
        with pytest.warns(UserWarning, match="its effect on the compared rows is below the rounding error"):
            done = export_adapter(adapter, to=target, output=tmp_path / target, base=base)
        verdicts = {
            comparison["what"].partition(" ")[0]: comparison["verdict"] for comparison in done.record["comparisons"]
        }
        assert done.verdict == "inconclusive" and verdicts["the"] == "passed", "equal tensors"
        assert {verdict for what, verdict in verdicts.items() if what != "the"} == {"inconclusive"}
    with pytest.raises(
        ExportError, match="Rounding to bfloat16 changes outputs by .* so outputs cannot show its effect"
    ):
        export_adapter(adapter, to="merged", output=tmp_path / "out", base=base, dtype="bfloat16")


@pytest.mark.parametrize("verdicts", [("passed", "failed"), ("inconclusive",), ()], ids=lambda v: "+".join(v) or "none")
def test_what_is_not_shown_to_be_right_is_not_kept(fake, saved, tmp_path, verdicts):
    base, adapter = saved()
    with pytest.raises(
        ExportError, match=r"The fake export of testing/cell@sha256:\w+ must have .* effect, but differs, so no files"
    ):
        export_adapter(adapter, to="fake", output=tmp_path / "out", base=base, verdicts=verdicts)
    assert not list(tmp_path.glob("*out*"))


STEPS = [
    ("fake", "finetune.export.exporting.load_base"),
    ("fake", "finetune.export.exporting.bring_in"),
    ("fake", "finetune.export.exporting.outputs"),
    ("fake", "tests.export.targets.Fake.make"),
    ("fake", "finetune.export.verdict.hashlib.file_digest"),
    ("fake", "finetune.export.exporting.write_record"),
    ("peft", "finetune.export.peft.bake_scaling"),
    ("peft", "finetune.export.peft.model_card"),
    ("peft", "finetune.export.peft.load_file"),
    ("peft", "peft.PeftModel.from_pretrained"),
    ("merged", "finetune.export.merged.merge"),
    ("merged", "finetune.export.merged.compare"),
    ("merged", "transformers.PreTrainedModel.save_pretrained"),
    ("merged", "finetune.export.merged.shutil.copyfile"),
    ("merged", "finetune.export.merged.model_card"),
    ("merged", "finetune.export.merged.load_base"),
    ("merged", "finetune.export.merged._compare"),
]


@pytest.mark.parametrize(("target", "step"), STEPS, ids=[f"{t} {s.rpartition('.')[2]}" for t, s in STEPS])
def test_whatever_step_fails_nothing_is_left(fake, saved, tmp_path, monkeypatch, target, step):
    base, adapter = saved()
    reached = []

    def fail(*args, **options):
        reached.append(step)
        raise MemoryError("injected")

    export_options = {"bake_scaling": True} if target == "peft" else {}
    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(MemoryError, match="injected"):
            export_adapter(adapter, to=target, output=tmp_path / "out", base=base, **export_options)
    assert reached and not list(tmp_path.glob("*out*"))


def test_an_error_of_the_system_is_one_line(fake, saved, tmp_path, monkeypatch):
    from safetensors import SafetensorError

    base, adapter = saved()

    def fail(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("tests.export.targets.Fake.make", fail)
    with pytest.raises(ExportError, match="^cannot write .*out: Error while serializing: I/O error: No space left"):
        export_adapter(adapter, to="fake", output=tmp_path / "out", base=base)


def test_refused_before_anything_is_done(fake, saved, tmp_path, monkeypatch):
    base, adapter = saved()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "no adapter").mkdir()
    monkeypatch.setattr("finetune.export.exporting.load_base", lambda *args, **options: pytest.fail("loaded"))

    def refused(error, message, ref=adapter, to="fake", output=tmp_path / "out", **options):
        with pytest.raises(error, match=message):
            export_adapter(ref, to=to, output=output, base=base, **options)

    refused(ExportError, "unknown target 'megred'. Did you mean 'merged'\\? Allowed: .*merged.*peft", to="megred")
    refused(ExportError, "the target peft takes no option 'dtype'. It takes: bake_scaling.", to="peft", dtype="auto")
    refused(ExportError, "takes no option 'dtyp'. Did you mean 'dtype'\\?", to="merged", dtyp="auto")
    refused(ExportError, "full holds something already", output=tmp_path / "full")
    refused(ExportError, "it cannot go there", reason="it cannot go there")
    refused(NotFoundError, "testing/nobody", ref="testing/nobody")
    refused(AdapterReferenceError, "not an adapter reference", ref="nowhere")
    refused(IntegrityError, "manifest.json must be a regular file, but is missing", ref=tmp_path / "no adapter")
    assert not list(tmp_path.glob("*out*")) and os.listdir(tmp_path / "full") == ["file"]


def test_the_base_has_to_be_the_adapters(fake, saved, tmp_path):
    _, adapter = saved("llava")
    other, _ = saved("fast_vlm")
    with pytest.raises(BaseMismatchError, match="model_type is fast_vlm, not llava"):
        export_adapter(adapter, to="fake", output=tmp_path / "out", base=other)
    with pytest.raises(BaseMismatchError, match="this machine knows no folder of it. Give its folder: base=PATH"):
        export_adapter(adapter, to="fake", output=tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_the_command(saved, tmp_path, capsys, monkeypatch):
    base, adapter = saved()
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(adapter), "--to", "peft", "--base", base, "--bake-scaling"]) == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "exports" / "testing-cell-peft"
    assert "passed: PEFT on the same base with the adapter: largest difference" in shown and f"{folder}: done" in shown
    assert json.loads((folder / "export.json").read_text())["options"] == {"bake_scaling": True}
    assert main(["export", str(adapter), "--to", "peft", "--base", base]) == 2
    assert "testing-cell-peft holds something already" in capsys.readouterr().err
    AdapterRegistry("reg").publish(adapter)
    words = ["export", "testing/cell@1", "--to", "merged", "--base", base, "--output", "m", "--json"]
    assert main([*words, "--dtype", "bfloat16", "--registry", "reg"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (
        record["folder"] == str(tmp_path / "m") and record["verdict"] == "passed" and record["ref"] == "testing/cell@1"
    )
    assert {k: record[k] for k in record if k != "folder"} == json.loads((tmp_path / "m" / "export.json").read_text())


def test_what_the_command_refuses(saved, capsys):
    base, adapter = saved("llava", "prompt")
    assert main(["export", str(adapter), "--to", "merged", "--base", base]) == 2
    assert "error: testing/cell cannot be merged: its tuned prompt" in capsys.readouterr().err
    assert main(["export", "base", "--to", "merged"]) == 2
    assert "An export needs an adapter, got ref 'base', which is the plain base" in capsys.readouterr().err
    assert main(["export", "a/b", "--to", "merged", "--bake-scaling"]) == 2
    assert "takes no option 'bake_scaling'. It takes: dtype, max_shard_size." in capsys.readouterr().err


def test_a_wrong_word_is_refused_without_loading_torch():
    code = (
        "import sys; from finetune.cli import main; code = main(['export', 'a/b', '--to', 'pef']); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "unknown target 'pef'. Did you mean 'peft'?" in done.stderr


def test_the_recipe_script_is_the_command():
    script = Path(__file__).parents[2] / "recipes" / "export.py"
    done = subprocess.run([sys.executable, script, "a/b", "--to", "pef"], capture_output=True, text=True)
    assert done.returncode == 2 and "Did you mean 'peft'?" in done.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stop", ["terminate", "kill"])
def test_the_command_stopped_half_way(saved, tmp_path, stop):
    base, adapter = saved()
    words = [
        sys.executable,
        "-m",
        "finetune.cli",
        "export",
        adapter,
        "--to",
        "merged",
        "--base",
        base,
        "--output",
        "out",
    ]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while not (tmp_path / ".out.exporting" / "new").exists():
            assert process.poll() is None
            time.sleep(0.02)
        getattr(process, stop)()
        process.stdout.read()
    assert process.returncode == (143 if stop == "terminate" else -9)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.exporting").exists() == (stop == "kill")
    assert subprocess.run(words, cwd=tmp_path, capture_output=True).returncode == 0
    assert not (tmp_path / ".out.exporting").exists() and (tmp_path / "out" / "export.json").exists()
