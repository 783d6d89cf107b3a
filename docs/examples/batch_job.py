"""A batch job: it answers the questions about images in a Parquet file, each by the adapter of its row.

    python docs/examples/batch_job.py questions.parquet answers.parquet --base pocket

Columns: `image` (bytes, a path beside the file, or the struct of both that datasets writes), `question`, and optionally
`adapter` (a reference; null for the plain base). The output has all columns except the images, and `answer` and
`error`, one of which is null. A row that cannot be answered stops no other.

The job stores the answers of each batch beside the output, so the same command resumes a stopped job. Name versions, as
in `medical/phantoms@3`, if an alias could move during the job.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

import finetune
from finetune.errors import AdapterError, DataError, FinetuneError, NotFoundError, YankedError

OF_A_ROW = (DataError, AdapterError, NotFoundError, YankedError)  # anything else stops the job


def main() -> int:
    """Answer the questions of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--base", required=True, help="folder, hub id or embedded name")
    parser.add_argument("--registry", help="where the adapters are; the user's own by default")
    parser.add_argument("--batch-size", type=int, default=16, help="rows that are answered at once")
    args = parser.parse_args()
    try:
        return run(args)
    except (FinetuneError, OSError, pa.ArrowException) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command resumes the job", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    """Answer the remaining rows, and write all answers to one file."""
    source = pq.ParquetFile(args.questions)
    names, rows = set(source.schema_arrow.names), source.metadata.num_rows
    if not {"image", "question"} <= names or {"answer", "error"} & names or not rows:
        raise DataError(
            f"{args.questions}: the columns must be image and question, and may be adapter and any other but answer "
            f"and error, with at least one row; they are {', '.join(sorted(names))}, with {rows} rows"
        )
    parts = args.answers.with_name(f"{args.answers.name}.parts")
    begin(parts, args)
    vlm = finetune.load("base", base=args.base, registry=args.registry)
    bad = 0
    with tqdm(total=rows, unit="row") as bar:
        for number, batch in enumerate(source.iter_batches(args.batch_size)):
            part = parts / f"{number:08d}.parquet"
            if not part.exists():
                write(pa.Table.from_batches([answered(vlm, batch, args.questions.parent)]), part)
            bad += len(batch) - pq.read_table(part, columns=["error"])["error"].null_count
            bar.update(len(batch))
            bar.set_postfix(errors=bad)
    gather(sorted(parts.glob("*.parquet")), args.answers)
    shutil.rmtree(parts)
    print(f"{args.answers}: {rows} rows, {bad} of them with an error")
    return 0


def begin(parts: Path, args: argparse.Namespace) -> None:
    """Make the folder of the parts; parts that exist must be of the same job."""
    with args.questions.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    job = {"questions": digest, "base": args.base, "registry": args.registry, "batch_size": args.batch_size}
    note = parts / "job.json"
    if not note.exists():
        parts.mkdir(parents=True, exist_ok=True)
        aside = parts / "job.tmp"
        aside.write_text(json.dumps(job))
        os.replace(aside, note)
    elif (before := json.loads(note.read_text())) != job:
        other = ", ".join(key for key in job if job[key] != before.get(key))
        raise DataError(f"{parts} holds answers of a job with another {other}. Remove it, or write to another file.")


def answered(vlm: finetune.VisionLanguageModel, batch: pa.RecordBatch, folder: Path) -> pa.RecordBatch:
    """Return the rows without images, with their answers or errors."""
    rows = batch.to_pylist()
    images = [image_of(row["image"], folder) for row in rows]
    questions = [row["question"] for row in rows]
    adapters = [row.get("adapter") for row in rows]
    try:
        answers, errors = vlm.ask_batch(images, questions, adapters=adapters), [None] * len(rows)
    except OF_A_ROW:  # of at least one row: answer each row alone to find it
        asked = zip(images, questions, adapters, strict=True)
        answers, errors = zip(*(alone(vlm, *each) for each in asked), strict=True)
    kept = batch.drop_columns(["image"])
    kept = kept.append_column("answer", pa.array(answers, pa.string()))
    return kept.append_column("error", pa.array(errors, pa.string()))


def alone(vlm, image, question, adapter) -> tuple[str | None, str | None]:
    """Return the answer to one row, or its error."""
    try:
        with vlm.using(adapter):
            return vlm.ask(image, question), None
    except OF_A_ROW as error:
        return None, str(error)


def image_of(cell, folder: Path) -> bytes | Path | None:
    """Return the image of a cell."""
    if isinstance(cell, dict):
        cell = cell["bytes"] or cell["path"]
    return folder / cell if isinstance(cell, str) else cell


def gather(parts: list[Path], path: Path) -> None:
    """Write the parts as one file, which appears complete or not at all."""
    aside = path.with_name(f"{path.name}.tmp")
    with pq.ParquetWriter(aside, pq.read_schema(parts[0])) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))
    os.replace(aside, path)


def write(table: pa.Table, path: Path) -> None:
    """Write a file that appears complete or not at all."""
    aside = path.with_suffix(".tmp")
    pq.write_table(table, aside)
    os.replace(aside, path)


if __name__ == "__main__":
    sys.exit(main())
