"""The optimisation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from finetune.recipe.section import Fraction, PositiveInt, Section


class TrainSection(Section):
    """The optimisation. One optimizer step sees batch_size x gradient_accumulation_steps x processes rows."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Exactly one of epochs and max_steps."""
    max_steps: PositiveInt | None = None
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    """Rows of a micro-batch on one process."""
    gradient_accumulation_steps: PositiveInt = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Fraction = 0.03
    """Of all optimizer steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    eval_steps: PositiveInt | None = None
    """Optimizer steps between validations; None: every epoch."""
    eval_batch_size: PositiveInt = 32
    early_stopping_patience: PositiveInt | None = None
    """Validations without a better score."""
    logging_steps: PositiveInt = 10
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = []
    """Accelerate's, told what the log is."""
    save_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints; None: as eval_steps."""
    save_total_limit: PositiveInt = 2
    """Checkpoints kept, the newest."""
    resume: Literal["auto", "never"] = "auto"
    """Auto: an unfinished run in the run's folder goes on."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    output_dir: str = "runs"
    """The run's folder is output_dir/name."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give exactly one of epochs and max_steps")
        return self
