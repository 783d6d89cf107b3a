"""An export from end to end: read and check the adapter, load its base, call the target, and save the folder."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError

from finetune.adapters.folder import read_folder, verify
from finetune.adapters.reference import as_folder
from finetune.assemble.loading import load_base
from finetune.core.outside_text import safe_line
from finetune.errors import ExportError
from finetune.export.choosing import NO_ADAPTER, check_choice, check_quantization
from finetune.export.output import new_output, refuse_occupied
from finetune.export.parity import outputs, rows_of
from finetune.export.target import Source
from finetune.export.verdict import Export, describe, overall, record_of, write_record
from finetune.methods.hooks import AdapterHooks
from finetune.plugins import find
from finetune.registry import AdapterRegistry
from finetune.serving.known_bases import find_base
from finetune.serving.loaded_adapter import bring_in

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune.adapters.folder import AdapterFolder
    from finetune.export.target import Target
    from finetune.recipe import Quantization

DEFAULT_OUTPUT = "exports/{name}-{target}"


def export_adapter(
    ref: str | Path,
    *,
    to: str,
    output: str | Path | None = None,
    registry: str | Path | AdapterRegistry | None = None,
    base: str | None = None,
    revision: str | None = None,
    device: str = "cpu",
    quantization: Quantization | None = None,
    log: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Export:
    """Write an adapter in the form of another program, and check that it does there what it does here.

    The base is loaded in fp32 for that, 4 bytes a parameter, whatever its dtype in training. With ``quantization`` its
    language tower is quantized, which is enough to compare an adapter that PEFT loads beside the base.

    Args:
        ref: a registry reference such as ``medical/brain-mri@prod``, or an adapter's folder.
        to: the target, a name of ``tables.EXPORT_TARGETS``.
        output: the folder to make, which appears whole or not at all; None for ``DEFAULT_OUTPUT``.
        registry: a folder, a URL such as ``s3://bucket/prefix``, or a registry; ``$FINETUNE_REGISTRY`` or
            ``~/.finetune/registry`` by default.
        base: the base's folder, hub id or embedded name; None for the folder where this base was last seen.
        revision: the revision of a hub id.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        quantization: the quantization of the base's language tower, ``4bit`` or ``8bit``, for targets that write no
            weight of the base; None for none.
        log: the function that logs one line for each step.
        **options: the options of the target.

    Returns:
        The export: its folder and its checks, which stand in its ``export.json`` too.

    Raises:
        ExportError: there is no such target or option, the adapter cannot go there, or it does not do there what it
            does here; nothing is left.
        AdapterError: the adapter is damaged, or does not fit the base.
        RegistryError: the registry cannot be read, or the output cannot be written.
        SystemExit: SIGTERM came, in the main thread of a program that does not handle it; nothing is left.
    """
    check_choice(to, options)
    target: Target = find("exports", to, what="target", error=ExportError)(**options)
    check_quantization(to, quantization)
    named, adapter = _read(ref, registry)
    output = Path(output or DEFAULT_OUTPUT.format(name=adapter.manifest.full_name.replace("/", "-"), target=to))
    output = output.expanduser().absolute()
    refuse_occupied(output)
    target.refuse(adapter.manifest)
    if base is None:
        base = find_base(adapter.manifest.base)
        revision = revision or adapter.manifest.base.revision
    with new_output(output) as folder:
        log(f"{named} to {to}: loading its base {base} in {quantization or 'float32'}")
        source = _source(named, adapter, base, revision=revision, device=device, quantization=quantization)
        log("writing, reading back and comparing")
        try:
            comparisons = target.make(source, folder)
        except SafetensorError as error:  # it wraps what the system says
            raise ExportError(f"cannot write {output}: {str(error).strip().splitlines()[0]}") from error
        for comparison in comparisons:
            log(describe(comparison))
        if overall(comparisons) == "failed":
            failed = [describe(c) for c in comparisons if c.verdict == "failed"] or ["nothing could be told apart"]
            raise ExportError(f"{named} does not do as {to} what it does here, so nothing was kept. {' '.join(failed)}")
        record = record_of(source, folder, comparisons, target=to, options=asdict(cast("Any", target)))
        write_record(folder, record)
    if record["verdict"] == "inconclusive":
        warnings.warn(
            f"{named}: its effect on the rows compared is below what rounding makes, so outputs could not show that "
            f"{output} has it; its tensors are equal to those that were to be written. Try it on images of its own.",
            stacklevel=2,
        )
    return Export(folder=output, verdict=record["verdict"], record=record)


def _read(ref: str | Path, registry: str | Path | AdapterRegistry | None) -> tuple[str, AdapterFolder]:
    """Return the name of an adapter's version, the same wherever it lies, and the adapter, every byte checked."""
    if str(ref) == "base":
        raise ExportError(NO_ADAPTER)
    if (path := as_folder(ref)) is not None:
        adapter = read_folder(path)
        return f"{adapter.manifest.full_name}@sha256:{adapter.digest}", adapter
    if not isinstance(registry, AdapterRegistry):
        registry = AdapterRegistry(registry)
    version = registry.resolve(str(ref))
    if version.warning:
        warnings.warn(safe_line(version.warning), stacklevel=3)
    manifest, files = registry.read(version)
    return version.ref, verify(manifest, files, digest=version.digest, source=Path(version.ref))


def _source(
    ref: str,
    adapter: AdapterFolder,
    base: str,
    *,
    revision: str | None,
    device: str,
    quantization: Quantization | None,
) -> Source:
    """Load the base, and have base and adapter answer the rows, after every check that a load makes."""
    live = load_base(base, revision=revision, dtype="float32", device=device, quantization=quantization)
    rows, hooks = rows_of(live, adapter.manifest.probe), AdapterHooks()
    plain = outputs(live, rows)
    loaded = bring_in(live, hooks, adapter, ref=ref)
    with hooks.using(loaded):
        adapted = outputs(live, rows, loaded.placeholders)
    hooks.remove(loaded.updates)
    return Source(
        ref=ref,
        adapter=adapter,
        base=live,
        updates=loaded.updates,
        placeholders=loaded.placeholders,
        rows=rows,
        plain=plain,
        adapted=adapted,
    )
