"""What an adapter says of itself: ranks, scales, modules, parameters and prompts that are not for this base."""

import pytest

from finetune.errors import ManifestError
from tests.safety.forging import Case, Forgery, names, nothing

LAYER = "model.language_model.layers.0.self_attn"


def option(name: str, value, *, method: str = "lora"):
    def forge(forgery: Forgery) -> None:
        forgery.part(method)["options"][name] = value

    return forge


def without(name: str):
    return lambda forgery: forgery.options.pop(name)


def in_text(name: str, text: str):
    """Write a number that no JSON library of ours would write."""

    def after(forgery: Forgery) -> None:
        forgery.manifest_text(lambda manifest: manifest.replace(f'"{name}": 16.0', f'"{name}": {text}'))

    return after


def modules(tower: str, *more: str):
    """Names more modules, as if the adapter changed them."""

    def forge(forgery: Forgery) -> None:
        forgery.modules[tower] = [*forgery.modules.get(tower, []), *more]

    return forge


def overrides(tower: str, *more: str):
    def forge(forgery: Forgery) -> None:
        part = forgery.part("overrides")
        part["modules"][tower] = [*part["modules"].get(tower, []), *more]
        part["options"]["parameters"] += more

    return forge


def part(method: str, **fields):
    return lambda forgery: forgery.part(method).update(fields)


def moved(old: str, new: str):
    """List the modules of one tower as those of another."""

    def forge(forgery: Forgery) -> None:
        forgery.modules[new] = forgery.modules[new] + forgery.modules.pop(old)

    return forge


def another_method(forgery: Forgery) -> None:
    forgery.adapter["parts"][0]["method"] = "os.system"
    forgery.adapter["peft_type"] = "FINETUNE_VLM"


def a_part_twice(forgery: Forgery) -> None:
    forgery.adapter["parts"] *= 2


def nine_parts(forgery: Forgery) -> None:
    forgery.adapter["parts"] = [forgery.adapter["parts"][0] | {"method": f"m{i}"} for i in range(9)]


def a_projector_twice(forgery: Forgery) -> None:
    """By LoRA and as a whole."""
    forgery.part("lora")["modules"]["projector"] = ["model.visual.merger.mlp.0"]


def renamed_for_v4(forgery: Forgery) -> None:
    """As transformers 4 saved them: the language model had no name of its own, and the vision tower stood beside it."""
    for old, new in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        forgery.rename(old, new)


def below(forgery: Forgery) -> None:
    """Names the module that a layer of PEFT's holds, where a neighbour has one."""
    forgery.rename(f"{LAYER}.q_proj", f"{LAYER}.q_proj.base_layer")


RANK = "is not a number between 1 and 4096"
ALPHA = "is not a number between 0 and 1e6"
LORA = [
    ("a rank of two millions", option("r", 2_000_000), f"rank 2000000 {RANK}"),
    ("a rank of 4096", option("r", 4096), "rank 4096 of .* is not between 1 and"),
    ("a rank of 0", option("r", 0), f"rank 0 {RANK}"),
    ("a rank below zero", option("r", -1), f"rank -1 {RANK}"),
    ("a rank in words", option("r", "8"), f"rank '8' {RANK}"),
    ("a rank of a half", option("r", 8.5), f"rank 8.5 {RANK}"),
    ("a rank of 4.0", option("r", 4.0), f"rank 4.0 {RANK}"),
    ("a true rank", option("r", True), f"rank True {RANK}"),
    ("no rank", option("r", None), f"rank None {RANK}"),
    ("a list of ranks", option("r", [8] * 10_000), r"rank \[8, 8.*\.\.\. is not a number"),
    ("a rank of 4000 digits", option("r", 10**4000), r"rank 10000.*\.\.\. is not a number"),
    ("another rank", option("r", 2), "has shape .*on this base it must be"),
    ("an alpha of 1e38", option("lora_alpha", 1e38), rf"lora_alpha 1e\+38 {ALPHA}"),
    ("an alpha of 0", option("lora_alpha", 0), f"lora_alpha 0 {ALPHA}"),
    ("an alpha below zero", option("lora_alpha", -16.0), f"lora_alpha -16.0 {ALPHA}"),
    ("an alpha in words", option("lora_alpha", "16"), f"lora_alpha '16' {ALPHA}"),
    ("a true alpha", option("lora_alpha", True), f"lora_alpha True {ALPHA}"),
    ("no alpha", option("lora_alpha", None), f"lora_alpha None {ALPHA}"),
    ("a dropout of 1", option("lora_dropout", 1.0), "lora_dropout 1.0 is not a number from 0 to below 1"),
    ("a dropout below zero", option("lora_dropout", -0.5), "lora_dropout -0.5 is not a number"),
    ("rsLoRA in words", option("use_rslora", "yes"), "use_rslora must be true or false, not 'yes'"),
    ("DoRA of 1", option("use_dora", 1), "use_dora must be true or false, not 1"),
    ("DoRA without its lengths", option("use_dora", True), "tensors are not those its modules have: .*magnitude"),
    ("a regex of ranks", option("rank_pattern", {"(a+)+$": 4}), "manifest.*|rank_pattern must map names"),
    ("a list of patterns", option("rank_pattern", [1]), "rank_pattern must map names of the adapter's modules"),
    ("a rank for a module", option("rank_pattern", {f"{LAYER}.q_proj": 2_000_000}), "rank 2000000 of .*q_proj"),
    ("a rank for another", option("rank_pattern", {"lm_head": 4}), "rank_pattern must map names of the adapter's"),
    ("an alpha for another", option("alpha_pattern", {"lm_head": 4}), "alpha_pattern must map names of the adapter's"),
    ("an alpha for a module", option("alpha_pattern", {f"{LAYER}.q_proj": 1e38}), rf"lora_alpha 1e\+38 {ALPHA}"),
    ("no rank at all", without("r"), "the options of a LoRA adapter are .*; wrong: r"),
    ("no options", part("lora", options={}), "the options of a LoRA adapter are .*; wrong: alpha_pattern"),
    ("all biases", option("bias", "all"), "wrong: bias"),
    ("a hostile regex", option("target_modules", "(a+)+$"), "wrong: target_modules"),
    ("the head as a whole", option("modules_to_save", ["lm_head"]), "wrong: modules_to_save"),
    ("code of its own", option("auto_mapping", {"parent_library": "os"}), "wrong: auto_mapping"),
    ("remote code", option("trust_remote_code", True), "wrong: trust_remote_code"),
    ("layers repeated", option("layer_replication", [[0, 2]]), "wrong: layer_replication"),
    ("an option for a terminal", option("\x1b[2J", 1), "String should match pattern"),
    *(
        (f"initialised by {name}", option("init_lora_weights", name), "wrong: init_lora_weights")
        for name in ("pissa", "olora", "corda", "loftq", "eva")
    ),
]
MODULES = [
    ("a module nobody has", modules("language", "model.nowhere"), "this base has no module 'model.nowhere'"),
    ("a module twice", modules("language", f"{LAYER}.q_proj"), "q_proj is changed twice"),
    ("the head", modules("language", "lm_head"), "'lm_head' does not stand in the language tower"),
    (
        "the embedding",
        modules("language", "model.language_model.embed_tokens"),
        "is a Embedding on this base, not a lin",
    ),
    ("what is no layer", modules("language", "model.language_model.layers"), "on this base, not a linear module"),
    ("the whole model", modules("language", "model"), "'model' does not stand in the language tower"),
    ("the root", modules("language", ""), "String should match pattern"),
    ("a method", modules("language", "model.language_model.forward"), "this base has no module"),
    ("what leads up", modules("language", "../x"), "String should match pattern"),
    ("a hostile regex", modules("language", "(a+)+$"), "String should match pattern"),
    ("every module", modules("language", ".*"), "String should match pattern"),
    ("a name of a megabyte", modules("language", "x" * 2**20), "at most 256 characters"),
    ("a name for a terminal", modules("language", "\x1b[2J"), "String should match pattern"),
    ("below a layer", below, "this base has no module '.*base_layer'|does not stand in the language tower"),
    ("20,001 modules", modules("language", *(f"m{i}" for i in range(20_001))), "at most 20000 items"),
    (
        "a tower nobody has",
        modules("head", "lm_head"),
        "this base has no tower 'head', .* it has language, projector, vision",
    ),
    ("vision said to be language", moved("vision", "language"), "does not stand in the language tower"),
    ("language said to be vision", moved("language", "vision"), "does not stand in the vision tower"),
    ("no modules", part("lora", modules={}), "tensors are not those its modules have: 0 missing"),
    ("no parts", lambda f: f.adapter.update(parts=[]), "parts: List should have at least 1 item"),
    ("nine parts", nine_parts, "parts: List should have at most 8 items"),
    ("a part twice", a_part_twice, "a method stands twice"),
    ("a method nobody has", another_method, "needs the method 'os.system', which is not known here"),
    (
        "another type",
        lambda f: f.adapter.update(peft_type="LOKR"),
        "peft_type is 'LOKR', for lora .* it must be 'LORA'",
    ),
    ("named as transformers 4 did", renamed_for_v4, r"no module 'model.layers.0.*another release of transformers"),
]
NOT_WHOLE = "is neither the projector's nor a norm of the language tower"
PARTS = [
    ("the head as a whole", overrides("language", "lm_head.weight"), NOT_WHOLE),
    ("the embedding as a whole", overrides("language", "model.language_model.embed_tokens.weight"), NOT_WHOLE),
    ("a norm of the vision tower", overrides("vision", "model.visual.blocks.0.norm1.weight"), NOT_WHOLE),
    ("vision said to be the projector", overrides("projector", "model.visual.blocks.0.norm1.weight"), NOT_WHOLE),
    ("what LoRA has too", overrides("language", f"{LAYER}.q_proj.bias"), "q_proj.bias is changed twice"),
    ("the projector by LoRA too", a_projector_twice, "mlp.0.bias is changed twice"),
    ("a parameter nobody has", overrides("projector", "model.nowhere.weight"), "no parameter 'model.nowhere.weight'"),
    ("a buffer", overrides("language", "model.language_model.rotary_emb.inv_freq"), "no parameter '.*inv_freq'"),
    ("a module", overrides("projector", "model.visual.merger"), "this base has no parameter 'model.visual.merger'"),
    ("a parameter that is no name", option("parameters", [7], method="overrides"), "not those that their modules name"),
    ("parameters in words", option("parameters", "all", method="overrides"), "a list of parameters"),
    ("no parameters", option("parameters", [], method="overrides"), "a list of parameters"),
    ("one parameter less", lambda f: f.part("overrides")["options"]["parameters"].pop(), "not those that their"),
    ("an option more", option("code", "x", method="overrides"), "the options of overrides are a list of parameters"),
    *(
        (f"a prompt of {value!r} tokens", option("num_virtual_tokens", value, method="prompt_tuning"), message)
        for value, message in (
            (10**9, "num_virtual_tokens 1000000000 is not between 1 and 1024"),
            (0, "num_virtual_tokens 0 is not between 1 and 1024"),
            (-1, "the options of a tuned prompt are the numbers"),
            ("5", "the options of a tuned prompt are the numbers"),
            (5.0, "the options of a tuned prompt are the numbers"),
            (True, "the options of a tuned prompt are the numbers"),
            (6, "prompt_embeddings has shape .5, 64.; on this base it must be .6, 64."),
        )
    ),
    ("a wider prompt", option("token_dim", 128, method="prompt_tuning"), "for embeddings of 128 values"),
    ("a placeholder beyond all", option("placeholder_token_id", 10**9, method="prompt_tuning"), "id 1000000000; this"),
    ("a placeholder below zero", option("placeholder_token_id", -1, method="prompt_tuning"), "the options of a tuned"),
    ("the placeholder that pads", option("placeholder_token_id", 0, method="prompt_tuning"), "id 0 has a meaning"),
    ("a prompt with modules", part("prompt_tuning", modules={"language": ["x"]}), "a tuned prompt changes no modules"),
    ("a prompt without options", part("prompt_tuning", options={}), "the options of a tuned prompt are the numbers"),
]  # fmt: skip


CASES = [
    *(Case(name, forge, ManifestError, message) for name, forge, message in LORA),
    *(Case(f"modules: {name}", forge, ManifestError, message) for name, forge, message in MODULES),
    *(Case(f"parts: {name}", forge, ManifestError, message, of="parts") for name, forge, message in PARTS),
    *(
        Case(f"an alpha of {text}", nothing, ManifestError, message, after=in_text("lora_alpha", text))
        for text, message in (("NaN", "NaN is not a number"), ("1e999", "too large"), ("Infinity", "is not a number"))
    ),
]


def test_a_prompt_cannot_stand_where_images_do(stage, refused):
    image = stage.vlm.model.config.image_token_id
    forge = option("placeholder_token_id", image, method="prompt_tuning")
    refused(Case("image", forge, ManifestError, f"token id {image} has a meaning for this base", of="parts"))


@pytest.mark.parametrize("case", CASES, ids=names)
def test_strange_options_are_refused(refused, case):
    refused(case)
