"""Two synthetic domains the pocket model has not seen: medical phantoms and product pictures.

They are drawn by a program, and stand for no patient and no product.
"""

from finetune.example import Example, answer
from finetune.pocket.medical import draw_phantom
from finetune.pocket.retail import draw_product
from finetune.recipe import ProceduralData, TaskSection

_DRAW = {"medical": draw_phantom, "retail": draw_product}


def read_domain(section: ProceduralData, split: str, *, task: TaskSection, seed: int) -> list[Example]:
    """Returns the rows of one split: a question a picture, kinds in turn; pure functions of the data's seed.

    Args:
        section: the recipe's data section.
        split: ``train``, ``val`` or ``test``; no two share a picture.
        task: how a question is put.
        seed: the run's; unused, since the rows are the data's own.
    """
    rows = section.rows.get(split, 0)  # type: ignore[call-overload]
    examples = []
    for index in range(rows):
        scene = _DRAW[section.name](section.seed, split, index)
        question = scene.questions[index % len(scene.questions)]
        examples.append(
            Example(
                id=f"{section.name}:{split}:{index}",
                messages=[*task.ask(question.text), answer(question.answer)],
                images=[scene.picture],
                answers=[question.answer],
                meta={"kind": question.kind, "question": question.text, "picture": f"{split}:{index}"},
            )
        )
    return examples
