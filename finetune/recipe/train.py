"""The optimisation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from finetune.recipe.section import Fraction, PositiveInt, Section


class TrainSection(Section):
    """The optimisation. One optimizer step sees batch_size x gradient_accumulation_steps x processes rows."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Times that each row is seen; give exactly one of epochs and max_steps."""
    max_steps: PositiveInt | None = None
    """Length in optimizer steps."""
    batch_size: PositiveInt = 16
    """Rows of a micro-batch on one process."""
    gradient_accumulation_steps: PositiveInt = 1
    """Micro-batches of an optimizer step."""
    gradient_checkpointing: bool = False
    """Whether layers are computed again in the backward pass, which takes longer and less memory."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Highest rate of AdamW."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """How the rate falls after the warm-up."""
    warmup_ratio: Fraction = 0.03
    """Share of all optimizer steps in which the rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are clipped to this norm; null: not at all."""
    eval_steps: PositiveInt | None = None
    """Optimizer steps between validations; by default once an epoch."""
    eval_batch_size: PositiveInt = 32
    """Rows of a batch when answers are generated."""
    early_stopping_patience: PositiveInt | None = None
    """Validations without a better score after which the run ends."""
    logging_steps: PositiveInt = 10
    """Optimizer steps between lines of the log."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Programs that are told what the log is told, through accelerate."""
    save_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints; by default as eval_steps."""
    save_total_limit: PositiveInt = 2
    """How many checkpoints are kept, the newest."""
    resume: Literal["auto", "never"] = "auto"
    """auto: an unfinished run in the run's folder goes on; never: it starts again."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that prepare batches on the side; 0: none."""
    output_dir: str = "runs"
    """The run's folder is output_dir/name."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give exactly one of epochs and max_steps")
        return self
