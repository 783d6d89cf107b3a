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


def whole(tower: str, *more: str):
    def forge(forgery: Forgery) -> None:
        part = forgery.part("full_modules")
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


RANK = "r must be a whole number from 1 to 4096, got"
ALPHA = "lora_alpha must be a number above 0 and below 1e6, got"
LORA = [
    ("a rank of two millions", option("r", 2_000_000), f"{RANK} 2000000"),
    ("a rank of 4096", option("r", 4096), "the rank of .* must be from 1 to [0-9]+, got 4096"),
    ("a rank of 0", option("r", 0), f"{RANK} 0"),
    ("a rank below zero", option("r", -1), f"{RANK} -1"),
    ("a rank in words", option("r", "8"), f"{RANK} '8'"),
    ("a rank of a half", option("r", 8.5), f"{RANK} 8.5"),
    ("a rank of 4.0", option("r", 4.0), f"{RANK} 4.0"),
    ("a true rank", option("r", True), f"{RANK} True"),
    ("no rank", option("r", None), f"{RANK} None"),
    ("a list of ranks", option("r", [8] * 10_000), rf"{RANK} \[8, 8.*\.\.\."),
    ("a rank of 4000 digits", option("r", 10**4000), rf"{RANK} 10000.*\.\.\."),
    ("another rank", option("r", 2), "must have the shape .* on this base, got"),
    ("an alpha of 1e38", option("lora_alpha", 1e38), rf"{ALPHA} 1e\+38"),
    ("an alpha of 0", option("lora_alpha", 0), f"{ALPHA} 0"),
    ("an alpha below zero", option("lora_alpha", -16.0), f"{ALPHA} -16.0"),
    ("an alpha in words", option("lora_alpha", "16"), f"{ALPHA} '16'"),
    ("a true alpha", option("lora_alpha", True), f"{ALPHA} True"),
    ("no alpha", option("lora_alpha", None), f"{ALPHA} None"),
    ("a dropout of 1", option("lora_dropout", 1.0), "lora_dropout must be a number from 0 to below 1, got 1.0"),
    ("a dropout below zero", option("lora_dropout", -0.5), "lora_dropout must be a number from 0 to below 1, got -0.5"),
    ("rsLoRA in words", option("use_rslora", "yes"), "use_rslora must be true or false, got 'yes'"),
    ("DoRA of 1", option("use_dora", 1), "use_dora must be true or false, got 1"),
    (
        "DoRA without its lengths",
        option("use_dora", True),
        "tensors must be those of its modules on this base: .*magnitude",
    ),
    ("a regex of ranks", option("rank_pattern", {"(a+)+$": 4}), "manifest.*|rank_pattern must map names"),
    ("a list of patterns", option("rank_pattern", [1]), "rank_pattern must map names of the adapter's modules"),
    (
        "a rank for a module",
        option("rank_pattern", {f"{LAYER}.q_proj": 2_000_000}),
        "the rank of .*q_proj' must be a whole number from 1 to 4096, got 2000000",
    ),
    ("a rank for another", option("rank_pattern", {"lm_head": 4}), "rank_pattern must map names of the adapter's"),
    ("an alpha for another", option("alpha_pattern", {"lm_head": 4}), "alpha_pattern must map names of the adapter's"),
    ("an alpha for a module", option("alpha_pattern", {f"{LAYER}.q_proj": 1e38}), rf"{ALPHA} 1e\+38"),
    ("no rank at all", without("r"), "the options of a LoRA adapter must be .*; missing or unknown: r"),
    (
        "no options",
        part("lora", options={}),
        "the options of a LoRA adapter must be .*; missing or unknown: alpha_pattern",
    ),
    ("all biases", option("bias", "all"), "missing or unknown: bias"),
    ("a hostile regex", option("target_modules", "(a+)+$"), "missing or unknown: target_modules"),
    ("the head as a whole", option("modules_to_save", ["lm_head"]), "missing or unknown: modules_to_save"),
    ("code of its own", option("auto_mapping", {"parent_library": "os"}), "missing or unknown: auto_mapping"),
    ("remote code", option("trust_remote_code", True), "missing or unknown: trust_remote_code"),
    ("layers repeated", option("layer_replication", [[0, 2]]), "missing or unknown: layer_replication"),
    ("an option for a terminal", option("\x1b[2J", 1), "String should match pattern"),
    *(
        (f"initialised by {name}", option("init_lora_weights", name), "missing or unknown: init_lora_weights")
        for name in ("pissa", "olora", "corda", "loftq", "eva")
    ),
]
MODULES = [
    ("an unknown module", modules("language", "model.nowhere"), "this base has no module 'model.nowhere'"),
    ("a module twice", modules("language", f"{LAYER}.q_proj"), "q_proj' is given twice"),
    ("the head", modules("language", "lm_head"), "'lm_head' must be in the language tower of this base"),
    (
        "the embedding",
        modules("language", "model.language_model.embed_tokens"),
        "must be a linear module on this base, got a Embedding",
    ),
    (
        "what is no layer",
        modules("language", "model.language_model.layers"),
        "must be a linear module on this base, got a ModuleList",
    ),
    ("the whole model", modules("language", "model"), "'model' must be in the language tower of this base"),
    ("the root", modules("language", ""), "String should match pattern"),
    ("a method", modules("language", "model.language_model.forward"), "this base has no module"),
    ("what leads up", modules("language", "../x"), "String should match pattern"),
    ("a hostile regex", modules("language", "(a+)+$"), "String should match pattern"),
    ("every module", modules("language", ".*"), "String should match pattern"),
    ("a name of a megabyte", modules("language", "x" * 2**20), "at most 256 characters"),
    ("a name for a terminal", modules("language", "\x1b[2J"), "String should match pattern"),
    ("below a layer", below, "this base has no module '.*base_layer'|must be in the language tower of this base"),
    ("20,001 modules", modules("language", *(f"m{i}" for i in range(20_001))), "at most 20000 items"),
    (
        "an unknown tower",
        modules("head", "lm_head"),
        "modules of the tower 'head', but this base only has language, projector, vision",
    ),
    ("vision said to be language", moved("vision", "language"), "must be in the language tower of this base"),
    ("language said to be vision", moved("language", "vision"), "must be in the vision tower of this base"),
    ("no modules", part("lora", modules={}), "tensors must be those of its modules on this base: 0 missing"),
    ("no parts", lambda f: f.adapter.update(parts=[]), "parts: List should have at least 1 item"),
    ("nine parts", nine_parts, "parts: List should have at most 8 items"),
    ("a part twice", a_part_twice, "a method must be unique, but 'lora' is given twice"),
    ("an unknown method", another_method, "needs the method 'os.system', which no installed package provides"),
    (
        "another type",
        lambda f: f.adapter.update(peft_type="LOKR"),
        "peft_type must be 'LORA' for lora .*, got 'LOKR'",
    ),
    ("named as transformers 4 did", renamed_for_v4, r"no module 'model.layers.0.*Another release of transformers"),
]
NOT_WHOLE = "full_modules must be of the projector or of norms of the language tower"
PARTS = [
    ("the head as a whole", whole("language", "lm_head.weight"), NOT_WHOLE),
    ("the embedding as a whole", whole("language", "model.language_model.embed_tokens.weight"), NOT_WHOLE),
    ("a norm of the vision tower", whole("vision", "model.visual.blocks.0.norm1.weight"), NOT_WHOLE),
    ("vision said to be the projector", whole("projector", "model.visual.blocks.0.norm1.weight"), NOT_WHOLE),
    ("what LoRA has too", whole("language", f"{LAYER}.q_proj.bias"), "q_proj.bias' is given twice"),
    ("the projector by LoRA too", a_projector_twice, "mlp.0.bias' is given twice"),
    ("an unknown parameter", whole("projector", "model.nowhere.weight"), "no parameter 'model.nowhere.weight'"),
    ("a buffer", whole("language", "model.language_model.rotary_emb.inv_freq"), "no parameter '.*inv_freq'"),
    ("a module", whole("projector", "model.visual.merger"), "this base has no parameter 'model.visual.merger'"),
    (
        "a parameter that is no name",
        option("parameters", [7], method="full_modules"),
        "the parameters of full_modules must be those that their modules list, got .7.",
    ),
    (
        "parameters in words",
        option("parameters", "all", method="full_modules"),
        "the options of full_modules must be a non-empty list, parameters",
    ),
    (
        "no parameters",
        option("parameters", [], method="full_modules"),
        "the options of full_modules must be a non-empty list, parameters",
    ),
    (
        "one parameter less",
        lambda f: f.part("full_modules")["options"]["parameters"].pop(),
        "must be those that their modules list",
    ),
    (
        "an option more",
        option("code", "x", method="full_modules"),
        "the options of full_modules must be a non-empty list, parameters",
    ),
    *(
        (f"a prompt of {value!r} tokens", option("num_virtual_tokens", value, method="prompt_tuning"), message)
        for value, message in (
            (10**9, "num_virtual_tokens must be from 1 to 1024, got 1000000000"),
            (0, "num_virtual_tokens must be from 1 to 1024, got 0"),
            (-1, "the options of a tuned prompt must be the numbers"),
            ("5", "the options of a tuned prompt must be the numbers"),
            (5.0, "the options of a tuned prompt must be the numbers"),
            (True, "the options of a tuned prompt must be the numbers"),
            (6, "prompt_embeddings must have the shape .6, 64. on this base, got .5, 64."),
        )
    ),
    (
        "a wider prompt",
        option("token_dim", 128, method="prompt_tuning"),
        "must fit the .* of this base, got token_dim 128",
    ),
    (
        "a placeholder beyond all",
        option("placeholder_token_id", 10**9, method="prompt_tuning"),
        "placeholder_token_id 1000000000",
    ),
    ("a placeholder below zero", option("placeholder_token_id", -1, method="prompt_tuning"), "the options of a tuned"),
    (
        "the placeholder that pads",
        option("placeholder_token_id", 0, method="prompt_tuning"),
        "must have no special meaning for this base, got 0",
    ),
    (
        "a prompt with modules",
        part("prompt_tuning", modules={"language": ["x"]}),
        "a tuned prompt must list no modules",
    ),
    (
        "a prompt without options",
        part("prompt_tuning", options={}),
        "the options of a tuned prompt must be the numbers",
    ),
]


CASES = [
    *(Case(name, forge, ManifestError, message) for name, forge, message in LORA),
    *(Case(f"modules: {name}", forge, ManifestError, message) for name, forge, message in MODULES),
    *(Case(f"parts: {name}", forge, ManifestError, message, of="parts") for name, forge, message in PARTS),
    *(
        Case(f"an alpha of {text}", nothing, ManifestError, message, after=in_text("lora_alpha", text))
        for text, message in (("NaN", "finite, got NaN"), ("1e999", "too large"), ("Infinity", "finite, got Infinity"))
    ),
]


def test_a_prompt_cannot_stand_where_images_do(stage, refused):
    image = stage.vlm.model.config.image_token_id
    forge = option("placeholder_token_id", image, method="prompt_tuning")
    refused(Case("image", forge, ManifestError, f"must have no special meaning for this base, got {image}", of="parts"))


@pytest.mark.parametrize("case", CASES, ids=names)
def test_strange_options_are_refused(refused, case):
    refused(case)
