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
    """Write an adapter in the format of another program, and check that it has the same effect there.

    The base is loaded in fp32 for that, 4 bytes per parameter. With ``quantization`` its language tower is quantized,
    which is enough to compare an adapter that PEFT loads beside the base.

    Args:
        ref: a registry reference such as ``medical/brain-mri@prod``, or an adapter's folder.
        to: the target, a name of ``tables.EXPORT_TARGETS``.
        output: the folder to make, which appears complete or not at all; None for ``DEFAULT_OUTPUT``.
        registry: folder, URL (``s3://...``) or registry; ``$FINETUNE_REGISTRY`` or ``~/.finetune/registry`` by default.
        base: the base's folder, hub id or embedded name; None for the folder where this machine last used it.
        revision: the revision of a hub id.
        device: ``auto``, ``cpu``, ``cuda`` or ``mps``.
        quantization: ``4bit`` or ``8bit`` for the language tower, if the target writes no weights of the base; or None.
        log: the function that logs one line for each step.
        **options: the options of the target.

    Returns:
        The export: its folder, and its checks, as in its ``export.json``.

    Raises:
        ExportError: the target or an option is wrong, or the adapter cannot have its effect there; no files are left.
        AdapterError: the adapter is damaged, or does not fit the base.
        RegistryError: the registry cannot be read, or the output cannot be written.
        SystemExit: SIGTERM came, in the main thread of a program that does not handle it; no files are left.
    """
    check_choice(to, options)
    target: Target = find("exports", to, what="target", error=ExportError)(**options)
    check_quantization(to, quantization)
    named, adapter = _read(ref, registry)
    name = adapter.manifest.full_name.replace("/", "-")
    output = Path(output or DEFAULT_OUTPUT.format(name=name, target=to)).expanduser().absolute()
    refuse_occupied(output)
    target.refuse(adapter.manifest)
    if base is None:
        base, revision = find_base(adapter.manifest.base), revision or adapter.manifest.base.revision
    with new_output(output) as folder:
        log(f"{named} to {to}: loading its base {base} in {quantization or 'float32'}")
        source = _source(named, adapter, base, revision=revision, device=device, quantization=quantization)
        record = _write(target, source, folder, to=to, output=output, log=log)
    if record["verdict"] == "inconclusive":
        warnings.warn(
            f"{named}: its effect on the compared rows is below the rounding error, so outputs cannot confirm the "
            f"export {output}. Its tensors equal those of the adapter. Test it on images of its domain.",
            stacklevel=2,
        )
    return Export(folder=output, verdict=record["verdict"], record=record)


def _write(
    target: Target, source: Source, folder: Path, *, to: str, output: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """Write the files of an export and their record, and return the record.

    Args:
        target: the target.
        source: the adapter and base to export.
        folder: the empty folder to write into.
        to: the name of the target.
        output: the final place of the folder, for errors.
        log: the function that logs one line for each step.

    Raises:
        ExportError: the files cannot be written, or a comparison failed.
    """
    log("writing, reading back and comparing")
    try:
        comparisons = target.make(source, folder)
    except SafetensorError as error:  # it wraps the error of the system
        raise ExportError(f"cannot write {output}: {str(error).strip().splitlines()[0]}") from error
    for comparison in comparisons:
        log(describe(comparison))
    if overall(comparisons) == "failed":
        failed = [describe(c) for c in comparisons if c.verdict == "failed"] or ["no comparison shows its effect"]
        raise ExportError(
            f"The {to} export of {source.ref} must have the adapter's effect, but differs, so no files were kept. "
            f"{' '.join(failed)}"
        )
    record = record_of(source, folder, comparisons, target=to, options=asdict(cast("Any", target)))
    write_record(folder, record)
    return record


def _read(ref: str | Path, registry: str | Path | AdapterRegistry | None) -> tuple[str, AdapterFolder]:
    """Return the name of an adapter's version and the adapter, with every byte verified.

    Raises:
        ExportError: ``ref`` is the plain base.
    """
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
    """Load the base and, after every check of a load, compute the outputs of base and adapter."""
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
