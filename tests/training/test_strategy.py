"""How a run is shared: what is refused and why, and what DeepSpeed's engine is asked to do."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from finetune.assemble.loading import load_base
from finetune.errors import TrainingError
from finetune.methods.adapter import attach
from finetune.training import deepspeed
from finetune.training.checkpoint import Checkpoints
from finetune.training.deepspeed import DeepSpeed
from finetune.training.fsdp2 import SplitBase
from finetune.training.log import RunLog
from finetune.training.loop import Trainer
from finetune.training.replicated import Replicated
from finetune.training.strategy import strategy_of
from tests.matrix import LORA, recipe_of, rows


def launched(kind, *, fsdp=None, zero=None):
    """An accelerator as a launch of this kind gives it."""
    fsdp = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False} | (fsdp or {})
    plugins = {
        "fsdp_plugin": SimpleNamespace(**{"cpu_offload": OffloadPolicy(), **fsdp}),
        "deepspeed_plugin": SimpleNamespace(**{"zero_stage": 2, "deepspeed_config": {}, **(zero or {})}),
    }
    return SimpleNamespace(distributed_type=DistributedType[kind], state=SimpleNamespace(**plugins))


@pytest.mark.parametrize(
    ("kind", "kind_of_strategy"),
    [("NO", Replicated), ("MULTI_CPU", Replicated), ("MULTI_GPU", Replicated), ("FSDP", SplitBase),
     ("DEEPSPEED", DeepSpeed)],
)  # fmt: skip
def test_the_launch_decides_how_a_run_is_shared(make_recipe, kind, kind_of_strategy):
    assert type(strategy_of(launched(kind), make_recipe("a"))) is kind_of_strategy


STREAM = {"data": {"source": "parquet", "root": "rows", "streaming": True}}
QUANTIZED = {"model": {"quantization": "4bit"}}
DORA = {"method": {"use_dora": True}}
FULL_MODULES = {"method": [LORA, {"name": "full_modules", "parameters": ["norms"]}]}


@pytest.mark.parametrize(
    ("kind", "plugin", "changes", "message"),
    [
        ("MEGATRON_LM", {}, {}, r"MEGATRON_LM: it must be NO, MULTI_CPU, MULTI_GPU, FSDP \(version 2\) or DEEPSPEED"),
        ("FSDP", {"fsdp": {"fsdp_version": 1}}, {}, "fsdp_version must be 2, got 1, .* Set fsdp_version: 2"),
        ("FSDP", {"fsdp": {"cpu_ram_efficient_loading": True}}, {}, "Set fsdp_cpu_ram_efficient_loading: false"),
        ("FSDP", {"fsdp": {"activation_checkpointing": True}}, {}, "and train.gradient_checkpointing: true"),
        ("FSDP", {"fsdp": {"cpu_offload": CPUOffloadPolicy()}}, {}, "Set fsdp_offload_params: false"),
        ("FSDP", {}, QUANTIZED, "a 4bit base cannot be sharded. Remove model.quantization"),
        ("FSDP", {}, DORA, "DoRA needs whole weights"),
        ("DEEPSPEED", {"zero": {"zero_stage": 0}}, {}, "zero_stage must be 1, 2 or 3, got 0, which shards nothing"),
        ("DEEPSPEED", {"zero": {"deepspeed_config": {"optimizer": {}}}}, {}, "config must not set 'optimizer'"),
        ("DEEPSPEED", {"zero": {"zero_stage": 3}}, QUANTIZED, "a 4bit base cannot be sharded. Remove model.quant"),
        (
            "DEEPSPEED",
            {"zero": {"zero_stage": 3}},
            FULL_MODULES,
            "zero_stage 3 cannot be used with full_modules, which replaces whole parameters of the base",
        ),
        (
            "DEEPSPEED",
            {"zero": {"zero_stage": 3}},
            {"task": {"name": "contrastive"}},
            "1 or 2 for the contrastive loss, got 3",
        ),
        ("DEEPSPEED", {}, STREAM, "Set data.streaming: false"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(make_recipe, kind, plugin, changes, message):
    with pytest.raises(TrainingError, match=message) as caught:
        strategy_of(launched(kind, **plugin), make_recipe("a", **changes))
    assert f"distributed_type is {kind}" in str(caught.value)


@pytest.mark.parametrize("launch", [launched("DEEPSPEED"), launched("FSDP")])
def test_zero_2_and_fsdp2_take_full_modules(make_recipe, launch):
    assert strategy_of(launch, make_recipe("a", **FULL_MODULES))


class Engine:
    """Does what DeepSpeed's engine does with the calls of accelerate's wrapper, for one process of two.

    The other process has the same rows, so a gradient averaged over both is that of one.
    """

    def __init__(self, model, optimizer, max_norm):
        self.module, self.calls, self.max_norm = model, [], max_norm
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.optimizer = SimpleNamespace(
            optimizer=optimizer,
            param_groups=optimizer.param_groups,
            single_partition_of_fp32_groups=parameters,  # the real one's are flat
            _lazy_init_hp_params_optimizer_state=lambda: None,
        )

    def __call__(self, **inputs):
        self.calls.append("forward")
        return self.module(**inputs)

    def set_gradient_accumulation_boundary(self, is_boundary):
        self.calls.append("last" if is_boundary else "more")

    def backward(self, loss):
        self.calls.append("backward")
        (loss / 2).backward()

    def step(self):
        self.calls.append("step")
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        self.optimizer.optimizer.step()
        self.optimizer.optimizer.zero_grad()


@pytest.fixture
def zero(monkeypatch):
    """Return a function: stage -> a DeepSpeed strategy of the first of two processes, on the engine above."""
    library = SimpleNamespace(
        safe_get_full_grad=lambda p: p.grad,
        safe_set_full_fp32_param=lambda p, value: p.data.copy_(value),
        zero=SimpleNamespace(GatheredParameters=whole),
    )
    monkeypatch.setattr(deepspeed, "importlib", SimpleNamespace(import_module=lambda name: library))
    monkeypatch.setattr(deepspeed, "set_hf_deepspeed_config", lambda config: None)

    def make(stage=2):
        plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={}, dschf=None)

        def prepare(model, optimizer):
            library.safe_get_full_optimizer_state = lambda p, slot: optimizer.state[p][slot]
            library.safe_set_full_optimizer_state = lambda p, value, slot: optimizer.state[p][slot].copy_(value)
            engine = Engine(model, optimizer, plugin.deepspeed_config["gradient_clipping"])
            return engine, SimpleNamespace(optimizer=engine.optimizer, param_groups=optimizer.param_groups)

        state = SimpleNamespace(deepspeed_plugin=plugin)
        device = torch.device("cpu")
        return DeepSpeed(SimpleNamespace(state=state, device=device, num_processes=2, prepare=prepare))

    return make


@contextmanager
def whole(parameters, modifier_rank):
    yield


def train(folder, tmp_path, strategy, *, accelerator, steps, restore=False):
    tmp_path.mkdir(exist_ok=True)
    recipe = recipe_of(LORA, folder, tmp_path)
    base = load_base(str(folder), device="cpu")
    torch.manual_seed(0)
    attachment = attach(base.host, recipe.method)
    options = recipe.train.model_copy(
        update={"max_steps": steps, "batch_size": 2, "gradient_accumulation_steps": 3, "save_steps": 1}
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints", {"recipe": {}}, keep=2)
    trainer = Trainer(
        base.model, attachment, base.objective(base.task(base.default_task)), base.collator.training_batch, options,
        accelerator,
        RunLog(tmp_path, every=1), seed=0, strategy=strategy, checkpoints=checkpoints,
    )  # fmt: skip
    if restore:
        trainer.restore(checkpoints.newest(print))
    trainer.train(rows(8))
    return trainer


def test_the_engine_steps_once_an_optimizer_step(zero, tiny_fast_vlm, tmp_path):
    """Eight rows in steps of six: three micro-batches, then one; the same adapter as by the plain strategy."""
    accelerator = Accelerator(cpu=True)
    plain = train(tiny_fast_vlm, tmp_path / "plain", None, accelerator=accelerator, steps=4)
    by_engine = train(tiny_fast_vlm, tmp_path / "zero", zero(), accelerator=accelerator, steps=4)
    micro_batch = ["more", "forward", "backward"]
    last = ["last", "forward", "backward", "step"]
    assert by_engine.strategy.model.calls == 2 * [*micro_batch, *micro_batch, *last, *last]
    expected = plain.strategy.tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in by_engine.strategy.tensors().items())


def test_the_engine_gets_the_calls_that_accelerates_wrapper_makes():
    """Should these change, the strategy has to."""
    made = []
    engine = SimpleNamespace(
        set_gradient_accumulation_boundary=lambda is_boundary: made.append(is_boundary),
        backward=lambda loss: made.append("backward"),
        step=lambda: made.append("step"),
    )
    for last in (False, True):
        DeepSpeedEngineWrapper(engine).backward(None, sync_gradients=last)
    assert made == [False, "backward", True, "backward", "step"]


def test_an_engines_run_goes_on_from_its_checkpoint(zero, tiny_fast_vlm, tmp_path):
    accelerator = Accelerator(cpu=True)
    whole_run = train(tiny_fast_vlm, tmp_path / "whole", zero(), accelerator=accelerator, steps=3)
    train(tiny_fast_vlm, tmp_path / "parts", zero(), accelerator=accelerator, steps=1)
    resumed = train(tiny_fast_vlm, tmp_path / "parts", zero(), accelerator=accelerator, steps=3, restore=True)
    expected = whole_run.strategy.tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.strategy.tensors().items())


def test_rows_of_which_some_have_no_image_are_refused(zero):
    mixed = rows(3)
    mixed[1] = replace(mixed[1], media=())
    zero(stage=2).check_rows({"train": rows(3), "val": mixed})
    zero(stage=3).check_rows({"train": rows(3), "val": []})
    for stage, splits in ((2, {"train": mixed}), (3, {"train": rows(3), "val": mixed})):
        with pytest.raises(TrainingError, match="must have a medium of the type image, but 1 of 3 .*, such as 1. Use"):
            zero(stage).check_rows(splits)


def test_memory_that_runs_out_where_processes_wait_for_one_another_ends_the_run(
    build, tiny_fast_vlm, before_each_forward
):
    def run_out(batch):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    run = build(tiny_fast_vlm, wrap=before_each_forward(run_out), batch_size=4)
    run.trainer.strategy.lockstep = True
    with pytest.raises(TrainingError, match="step 1: out of memory with micro-batches of 4. .* train.batch_size"):
        run.trainer.train(run.examples)


def test_no_process_asks_a_row_alone_where_the_others_would_not(build, tiny_fast_vlm, before_each_forward):
    """So all rows of the micro-batch are named."""
    forwards = []

    def spoil(batch):
        forwards.append(len(batch.examples))
        return lambda terms: {n: replace(t, loss_sum=t.loss_sum * float("nan")) for n, t in terms.items()}

    run = build(tiny_fast_vlm, wrap=before_each_forward(spoil), batch_size=2)
    run.trainer.strategy.lockstep = True
    with pytest.raises(TrainingError, match=r"step 1: the loss is not finite .* Rows: train.jsonl:\d+, train.*:\d+"):
        run.trainer.train(run.examples)
    assert forwards == [2]
