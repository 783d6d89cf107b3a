"""Names a recipe may use, and where the code behind each lives. Nothing is imported until it is looked up."""

# transformers' `model_type` -> family
FAMILIES: dict[str, str] = {
    "fast_vlm": "finetune.families.fast_vlm:FastVlmFamily",
    "idefics3": "finetune.families.idefics3:Idefics3Family",
}

METHODS: dict[str, str] = {
    "lora": "finetune.methods.lora:Lora",
}

TASKS: dict[str, str] = {
    "vqa": "finetune.tasks.vqa:VqaTask",
}

# `data.source` -> function(section, split, task=, seed=, bad=, say=) -> list of Example
SOURCES: dict[str, str] = {
    "hub": "finetune.data.hub:read_hub",
    "jsonl": "finetune.data.jsonl:read_jsonl",
    "mix": "finetune.data.mix:read_mix",
    "parquet": "finetune.data.arrow:read_parquet",
    "procedural": "finetune.pocket.domains:read_domain",
    "saved": "finetune.data.arrow:read_saved",
}

# Bases that come with the package -> function() -> folder
EMBEDDED_BASES: dict[str, str] = {
    "pocket": "finetune.pocket:model_folder",
}

# Fields of PEFT's adapter_config.json that no adapter of ours may set otherwise: each other value would change the
# base, train or replace a part of it, or mean something else in another engine.
FIXED_PEFT_CONFIG: dict[str, object] = {
    "task_type": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "use_rslora": False,
    "use_dora": False,
    "modules_to_save": None,
    "inference_mode": True,
}
