"""The names that a recipe may use, and the places of their code. A lookup imports the code."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FamilyEntry:
    """The place of the class of a family, and the facts about it that are needed before torch is imported.

    Attributes:
        target: the place of the class, ``"module:Class"``.
        architecture: the architecture of its models, the same as in the class.
        towers: the names of the towers that its models have.
    """

    target: str
    architecture: str = "generative"
    towers: tuple[str, ...] = ("language", "projector", "vision")


@dataclass(frozen=True)
class Entry:
    """The place of the code behind a name, and of the section of a recipe that chooses it.

    Attributes:
        target: the place of the code, ``"module:attribute"``.
        config: ``"module:attribute"`` of the section; None for the attribute ``Config`` of the target. A target that
            imports torch needs one, because recipes are read without torch.
    """

    target: str
    config: str | None = None


# transformers' `model_type` -> family
FAMILIES: dict[str, FamilyEntry] = {
    "clip": FamilyEntry("finetune.families.clip:ClipFamily", architecture="dual_encoder"),
    "fast_vlm": FamilyEntry("finetune.families.fast_vlm:FastVlmFamily"),
    "gemma3": FamilyEntry("finetune.families.gemma3:Gemma3Family"),
    "idefics3": FamilyEntry("finetune.families.idefics3:Idefics3Family"),
    "internvl": FamilyEntry("finetune.families.internvl:InternVlFamily"),
    "llava": FamilyEntry("finetune.families.llava:LlavaFamily"),
    "llava_onevision": FamilyEntry("finetune.families.llava_onevision:LlavaOnevisionFamily"),
    "paligemma": FamilyEntry("finetune.families.paligemma:PaliGemmaFamily"),
    "qwen2_5_vl": FamilyEntry("finetune.families.qwen2_5_vl:Qwen25VlFamily"),
    "qwen3_vl": FamilyEntry("finetune.families.qwen3_vl:Qwen3VlFamily"),
    "smolvlm": FamilyEntry("finetune.families.smolvlm:SmolVlmFamily"),
}
# For any other class of AutoModelForImageTextToText.
GENERIC_FAMILY = FamilyEntry("finetune.families.generic:GenericFamily")

METHODS: dict[str, str | Entry] = {
    "lora": Entry("finetune.methods.lora:Lora", "finetune.recipe.method:LoraSection"),
    "full_modules": Entry("finetune.methods.full_modules:FullModules", "finetune.recipe.method:FullModulesSection"),
    "head": Entry("finetune.methods.linear_head:Head", "finetune.recipe.method:HeadSection"),
    "prompt_tuning": Entry("finetune.methods.prompt_tuning:PromptTuning", "finetune.recipe.method:PromptTuningSection"),
}

# Methods that a task adds, and no recipe names.
METHODS_OF_TASKS = ("head",)
# Method -> the reason why it cannot be merged into the base.
UNMERGEABLE: dict[str, str] = {
    "head": "the head of its task replaces the language head, and has another shape",
    "prompt_tuning": "its tuned prompt stands before the tokens of each row, and no weight of the base can hold it",
}

# Families whose positions and masks do not change when PEFT puts a prompt before inputs_embeds: PEFT opens their tuned
# prompts and gives the same logits.
PEFT_PROMPTS = ("idefics3", "internvl", "llava", "smolvlm")

# Importing these modules loads no torch.
TASKS: dict[str, str | Entry] = {
    "caption": "finetune.tasks.caption:CaptionTask",
    "classify": "finetune.tasks.classify:ClassifyTask",
    "contrastive": "finetune.tasks.contrastive:ContrastiveTask",
    "vqa": "finetune.tasks.vqa:VqaTask",
}
# The task of a recipe that names none.
DEFAULT_TASK = "vqa"

# Name of a metric -> class(options of the task), a finetune.interfaces:Metric.
METRICS: dict[str, str | Entry] = {
    "accuracy": "finetune.metrics.accuracy:Accuracy",
    "anls": "finetune.metrics.anls:Anls",
    "auroc": "finetune.metrics.auroc:Auroc",
    "balanced_accuracy": "finetune.metrics.balanced_accuracy:BalancedAccuracy",
    "bleu_1": "finetune.metrics.bleu:Bleu1",
    "bleu_4": "finetune.metrics.bleu:Bleu4",
    "cer": "finetune.metrics.error_rates:Cer",
    "cider_d": "finetune.metrics.cider_d:CiderD",
    "exact_match": "finetune.metrics.exact_match:ExactMatch",
    "macro_f1": "finetune.metrics.macro_f1:MacroF1",
    "recall_at_fpr": "finetune.metrics.recall_at_fpr:RecallAtFpr",
    "rouge_l": "finetune.metrics.rouge_l:RougeL",
    "token_f1": "finetune.metrics.token_overlap:TokenF1",
    "token_recall": "finetune.metrics.token_overlap:TokenRecall",
    "vqa_accuracy": "finetune.metrics.vqa_accuracy:VqaAccuracy",
    "wer": "finetune.metrics.error_rates:Wer",
}
# The metrics of a task with answers, if its recipe names none.
ANSWER_METRICS = ("exact_match",)
# Those of a task with captions.
CAPTION_METRICS = ("cider_d", "bleu_4", "rouge_l")
# Those of a task that gives each label of a closed set a score.
LABEL_METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc")

# `data.source` -> function(section, split, task=, seed=, bad=) -> list of Example
SOURCES: dict[str, str | Entry] = {
    "hub": Entry("finetune.data.hub:read_hub", "finetune.recipe.data:HubData"),
    "jsonl": Entry("finetune.data.jsonl:read_jsonl", "finetune.recipe.data:JsonlData"),
    "parquet": Entry("finetune.data.arrow:read_parquet", "finetune.recipe.data:ParquetData"),
    "saved": Entry("finetune.data.arrow:read_saved", "finetune.recipe.data:SavedData"),
    "mix": Entry("finetune.data.mix:read_mix", "finetune.recipe.data:MixData"),
    "procedural": Entry("finetune.pocket.domains:read_domain", "finetune.recipe.data:ProceduralData"),
}

# Objectives, which a run minimises over the outputs of a task.
OBJECTIVES: dict[str, str | Entry] = {
    "contrastive": Entry(
        "finetune.objectives.contrastive:Contrastive", "finetune.recipe.objective:ContrastiveObjectiveSection"
    ),
    "cross_entropy": Entry(
        "finetune.objectives.cross_entropy:CrossEntropy", "finetune.recipe.objective:CrossEntropySection"
    ),
}

# Bases that come with the package -> function() -> folder
EMBEDDED_BASES: dict[str, str] = {
    "pocket": "finetune.pocket:model_folder",
}


@dataclass(frozen=True, kw_only=True)
class Incompatible:
    """An option of a method that does not work on an architecture, on one family or when quantized."""

    option: str  # method, or method.option
    architecture: str | None = None
    model_type: str | None = None
    quantization: str | None = None
    reason: str
    instead: str


INCOMPATIBLE = (
    Incompatible(
        option="prompt_tuning",
        architecture="dual_encoder",
        reason="its text tower reads the embedding at the end of a short text, and its images pass no tuned prompt",
        instead="Set method: {name: lora}, which adapts the text tower, the vision tower or both.",
    ),
    Incompatible(
        option="lora.towers.projector",
        model_type="gemma3",
        reason="its projector is a single matrix and no linear module",
        instead="Train it as a whole: add {name: full_modules, parameters: [projector]} to method.",
    ),
    Incompatible(
        option="lora.use_dora",
        quantization="8bit",
        reason="PEFT cannot read the norm of an 8-bit weight",
        instead="Use model.quantization: 4bit, or use_dora: false.",
    ),
)

# The options of a LoRA adapter, in PEFT's names.
LORA_OPTIONS = {"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"}

# Fields of PEFT's adapter_config.json with the only value that this package accepts: any other value would change the
# base, train or replace a part of it, or have another meaning in another engine.
FIXED_PEFT_CONFIG: dict[str, object] = {
    "task_type": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "modules_to_save": None,
    "inference_mode": True,
}

# The targets of an export: `--to` -> a frozen dataclass with the methods of finetune.export.target:Target.
EXPORT_TARGETS: dict[str, str] = {
    "gguf": "finetune.export.gguf:Gguf",
    "merged": "finetune.export.merged:Merged",
    "onnx": "finetune.export.onnx:Onnx",
    "peft": "finetune.export.peft:Peft",
    "vllm": "finetune.export.vllm:Vllm",
}

# Targets that contain nothing of the base, which may be quantized while they are compared.
TARGETS_BESIDE_THE_BASE = ("peft", "vllm")

# Option -> the targets that have a field of this name.
EXPORT_OPTIONS: dict[str, tuple[str, ...]] = {
    "bake_scaling": ("peft",),
    "dtype": ("gguf", "merged"),
    "max_shard_size": ("merged",),
    "max_lora_rank": ("vllm",),
}
