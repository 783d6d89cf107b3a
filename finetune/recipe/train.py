"""Section of the recipe for training."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from finetune.recipe.section import Fraction, Place, PositiveInt, Section


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML reads a bare off as False


def _resume(value: Any) -> Any:
    return {False: "never", True: "auto"}[value] if isinstance(value, bool) else value  # as in other tools


class TrainSection(Section):
    """The settings of training. An optimizer step reads batch_size x gradient_accumulation_steps x processes rows."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(default=None, examples=[3])
    """Number of times that training reads each row; set exactly one of epochs and max_steps."""
    max_steps: PositiveInt | None = Field(default=None, examples=[1000])
    """Number of optimizer steps of the run."""
    batch_size: PositiveInt = Field(default=16, examples=[4])
    """Number of rows of a micro-batch on one process."""
    gradient_accumulation_steps: PositiveInt = Field(default=1, examples=[4])
    """Number of micro-batches of an optimizer step on one process."""
    optim: Literal["adamw_torch", "adamw_8bit"] = "adamw_torch"
    """The optimizer: torch's AdamW, fused if the device supports it, or bitsandbytes' with its state in 8 bit."""
    gradient_checkpointing: bool = False
    """True to compute layers again in the backward pass, which takes more time and less memory."""
    learning_rate: Annotated[float, Field(gt=0)] = Field(default=1e-3, examples=[2e-4])
    """Highest learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """Schedule of the learning rate after the warm-up."""
    warmup_ratio: Fraction = Field(default=0.03, examples=[0.1])
    """Share of all optimizer steps in which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, examples=[0.01])
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(default=1.0, examples=[0.5])
    """Largest norm of the gradient, which is clipped to it; null: no clipping."""
    eval_steps: PositiveInt | None = Field(default=None, examples=[200])
    """Number of optimizer steps between validations; by default those of an epoch. The weights of the best validation
    become the adapter: of the best score, of equal scores the lowest loss, of equal losses the latest."""
    eval_batch_size: PositiveInt = Field(default=32, examples=[8])
    """Number of rows of a batch when answers are generated."""
    early_stopping_patience: PositiveInt | None = Field(default=None, examples=[3])
    """Number of validations in a row without a better score, or an equal one at a lower loss, that ends the run."""
    end_decided_validations: bool = Field(default=False, exclude_if=lambda value: not value)
    """True to end a validation once it can no longer be the best, even if all rows that are left were right. The same
    weights are chosen in less time, but the score and loss of such a validation stay unknown."""
    logging_steps: PositiveInt | None = Field(default=None, examples=[5])
    """Number of optimizer steps between lines of the log; by default 10, or fewer if a run has less than 100."""
    trackers: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(
        default=[], examples=[["tensorboard", "wandb"]]
    )
    """Experiment trackers that get the numbers of the log, by accelerate's names."""
    save_steps: PositiveInt | None = Field(default=None, examples=[100])
    """Number of optimizer steps between checkpoints; by default as eval_steps."""
    save_total_limit: PositiveInt = Field(default=2, examples=[1])
    """Number of checkpoints that are kept, the newest ones."""
    resume: Annotated[Literal["auto", "never", "extend"], BeforeValidator(_resume)] = "auto"
    """auto (or true): continue an unfinished run in the run's folder, refuse a finished one; never (or false): start
    again, keep a finished run in the folder's ``previous``; extend: continue a run to a greater length."""
    group_by_length: bool = False
    """True to let rows of similar length share an optimizer step: less padding, but less variety within a step."""
    num_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(default="auto", examples=[4])
    """Number of processes that prepare batches ahead; auto: up to 8 for each GPU as there are cores, none on a CPU."""
    num_threads: PositiveInt | Literal["auto"] = Field(default="auto", examples=[1])
    """Number of threads of a process that compute on a CPU; auto: OMP_NUM_THREADS, or one for each core."""
    feature_store: Annotated[Literal["auto", "off"], BeforeValidator(_off)] = "auto"
    """auto: the frozen towers' features of an image are computed once and kept on disk, if that changes no result."""
    feature_store_max_bytes: PositiveInt = Field(default=50_000_000_000, examples=[200_000_000_000])
    """Largest number of bytes of all kept features; those that no run used for a week may be deleted to make room."""
    torch_compile: bool = False
    """True to compile each layer of the language tower with torch.compile before training."""
    output_dir: Place = Field(default="runs", examples=["/data/runs"])
    """The run's folder is output_dir/name."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSection":
        if (self.epochs is None) == (self.max_steps is None):
            got = "neither" if self.epochs is None else f"epochs {self.epochs:g} and max_steps {self.max_steps}"
            raise ValueError(f"exactly one of epochs and max_steps must be set, got {got}. Set one, and only one")
        return self
