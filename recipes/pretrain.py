"""Rebuild the embedded pocket model from nothing, evaluate it on held-out worlds, and write its card.

    python recipes/pretrain.py [--output-dir runs/pretrain] [--device cpu|cuda] [--evaluate FOLDER] [--install]

Took 56 minutes on one CPU core, of two that several runs shared; a stopped run resumes from its last
checkpoint. --evaluate FOLDER evaluates a finished model alone. --install puts the model in the package. Expect at least
.75 over all held-out questions.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import finetune.pocket
from finetune.adapters.base_check import check_base
from finetune.launch.command import CommandParser, exit_code_of
from finetune.preflight import check_output_folder
from finetune.recipe import task_of


def main() -> int:
    return exit_code_of(_pretrain)


def _pretrain() -> int:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/pretrain"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--evaluate", type=Path, metavar="FOLDER")
    parser.add_argument("--install", action="store_true")
    args = parser.parse_args()
    check_output_folder(args.output_dir, key="--output-dir")
    if args.evaluate is not None:
        check_base(str(args.evaluate))
    from finetune.assemble.loading import load_base  # imports torch: not before the arguments are checked
    from finetune.evaluation.evaluate import evaluate_rows
    from finetune.evaluation.predict import Predictor
    from finetune.pocket.card import shortfalls, write_card
    from finetune.pocket.domains import read_world
    from finetune.pocket.pretrain import PretrainOptions, pretrain

    started, minutes = time.monotonic(), None
    if args.evaluate is None:
        pretrain(PretrainOptions(folder=args.output_dir, device=args.device))
        minutes = (time.monotonic() - started) / 60
    folder = args.evaluate or args.output_dir / "model"
    base = load_base(str(folder), device=args.device)
    task = task_of("generative").model_copy(update={"answer_normalization": "vqa"})
    rows = read_world(0, "test", rows_per_type=150, task=task)
    predictor = Predictor(
        model=base.model, task=base.task(task), prompt_batch=base.collator.prompt_batch, batch_size=100
    )
    scores, _ = evaluate_rows(predictor, rows)
    parameters = sum(p.numel() for p in base.model.parameters())
    (folder / "README.md").write_text(write_card(scores.to_json(), parameters=parameters, minutes=minutes))
    print((folder / "README.md").read_text())
    problems = shortfalls(scores.to_json())
    print("\n".join(f"NOT HELD  {problem}" for problem in problems) or "held      all that the card promises")
    if args.install and not problems:
        shutil.copytree(folder, Path(finetune.pocket.__file__).parent / "model", dirs_exist_ok=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
