"""JSON that is none, that means two things, or that takes more than it is worth: as manifest and as config."""

import json

import pytest

from finetune.errors import ManifestError
from tests.safety.forging import Case, Forgery, names, nothing

_DEEP = "[" * 10_000 + "]" * 10_000


def manifest_text(change):
    return lambda forgery: forgery.manifest_text(change)


def put(value, *path):
    """Put a value into the manifest."""

    def forge(forgery: Forgery) -> None:
        place = forgery.manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return forge


def config_text(change):
    def forge(forgery: Forgery) -> None:
        changed = change(json.dumps(forgery.good_config()))
        forgery.config = changed if isinstance(changed, bytes) else changed.encode("utf-8", "surrogatepass")

    return forge


def config_with(**fields):
    def forge(forgery: Forgery) -> None:
        forgery.config = forgery.good_config() | fields

    return forge


TEXTS = [
    ("a key twice", lambda text: '{"name":"other",' + text[1:], "a key must be unique, but 'name' is given twice"),
    (
        "a key twice below",
        lambda text: text.replace('"adapter": {', '"adapter": {"parts": [],'),
        "'parts' is given twice",
    ),
    ("10,000 levels", lambda text: f'{{"a":{_DEEP},{text[1:]}', "must be nested at most 32 levels deep"),
    ("40 levels", lambda text: f'{{"a":{"[" * 40}{"]" * 40},{text[1:]}', "must be nested at most 32 levels deep"),
    ("10,000 levels that do not end", lambda text: "[" * 10_000, "must be nested at most 32 levels deep"),
    ("an integer of a million digits", lambda text: f'{{"a":{"7" * 10**6},{text[1:]}', "not JSON"),
    (
        "a number of a million digits",
        lambda text: f'{{"a":{"7" * 10**6}.5,{text[1:]}',
        "'7+... is too large",
    ),
    (
        "a number beyond all",
        lambda text: f'{{"a":1e999,{text[1:]}',
        "numbers must be finite 64-bit floats, but '1e999' is too large",
    ),
    ("NaN", lambda text: f'{{"a":NaN,{text[1:]}', "numbers must be finite, got NaN"),
    ("Infinity", lambda text: f'{{"a":-Infinity,{text[1:]}', "numbers must be finite, got -Infinity"),
    ("a lone surrogate", lambda text: f'{{"a":"\\ud800",{text[1:]}', "not JSON: .*surrogates not allowed"),
    ("a lone surrogate in bytes", lambda text: f'{{"a":"\ud800",{text[1:]}', "not JSON: .*can't decode"),
    ("no UTF-8", lambda text: text.encode().replace(b"LORA", b"LOR\xff", 1), "not JSON: .*can't decode"),
    ("UTF-16", lambda text: text.encode("utf-16"), "not JSON: .*can't decode"),
    ("UTF-32", lambda text: text.encode("utf-32-le"), "not JSON"),
    ("a byte order mark", lambda text: b"\xef\xbb\xbf" + text.encode(), "not JSON: Unexpected UTF-8 BOM"),
    ("something behind it", lambda text: text + "{}", "not JSON: Extra data"),
    ("a comment", lambda text: "// good\n" + text, "not JSON"),
    ("a comma at the end", lambda text: text[:-1] + ",}", "not JSON"),
    ("a zero byte", lambda text: text.replace("LORA", "LOR\0", 1), "not JSON: Invalid control character"),
    ("4 MB of empty lists", lambda text: "[" + "[]," * 1_300_000 + "[]]", "must hold at most 150000 values"),
    (
        "100,000 numbers",
        lambda text: f'{{"a":[{"1.5," * 100_000}1],{text[1:]}',
        "a: Extra inputs|must not have the fields a",
    ),
    (
        "149,000 keys",
        lambda text: "{" + ",".join(f'"{i}":1' for i in range(149_000)) + "}",
        "149... fields are wrong|must be .*, got None",
    ),
    ("a list", lambda text: f"[{text}]", "Input should be a valid dictionary|must hold a JSON object"),
    ("null", lambda text: "null", "Input should be a valid dictionary|must hold a JSON object"),
    ("a text", lambda text: '"x"', "Input should be a valid dictionary|must hold a JSON object"),
]
MANIFESTS = [
    ("an unknown field", put(1, "color"), "color: Extra inputs are not permitted"),
    ("remote code", put(True, "trust_remote_code"), "trust_remote_code: Extra inputs are not permitted"),
    ("remote code of the adapter", put(True, "adapter", "trust_remote_code"), "trust_remote_code: Extra inputs"),
    ("an unknown field of a part", put({"x": "y"}, "adapter", "parts", 0, "auto_map"), "auto_map: Extra inputs"),
    ("a key for a terminal", put(1, "\x1b[2J\u202e"), r"'\\x1b\[2J\\u202e': Extra inputs"),
    ("a key of a megabyte", put(1, "k" * 2**20), r"'k+\.\.\.: Extra inputs"),
    ("no probe", lambda forgery: forgery.manifest.pop("probe"), "probe: Field required"),
    ("no files", lambda forgery: forgery.manifest.pop("files"), "files: Field required"),
    ("another schema", put(4, "schema_version"), "schema_version: Input should be 3"),
    ("true for a number", put(True, "training", "steps"), "steps: Input should be a valid integer"),
    ("a text for a number", put("3", "training", "steps"), "steps: Input should be a valid integer"),
    ("one for true", put(1, "synthetic"), "synthetic: Input should be a valid boolean"),
    ("a time that is no time", put("\x1b[2J", "created"), "created: String should match pattern"),
    ("a licence of a megabyte", put("x" * 2**20, "license"), "license: String should have at most 65536 characters"),
    ("100,000 parents", put(["x"] * 300_000, "parents"), "must hold at most 150000 values"),
    ("a digest with a line end", put("0" * 64 + "\n", "base", "config"), "config: String should match pattern"),
    ("a digest of other digits", put("\u0661" * 64, "base", "config"), "config: String should match pattern"),
    ("a hub id that leads up", put("../../etc", "base", "hub_id"), "hub_id: String should match pattern"),
    ("a hub id that is a URL", put("http://x/y", "base", "hub_id"), "hub_id: String should match pattern"),
    ("a revision that leads up", put("../x", "base", "revision"), "revision: String should match pattern"),
    ("weight files elsewhere", put({"../x": "0" * 64}, "base", "files"), "files.../x.*: String should match pattern"),
    ("a toolchain for a terminal", put({"torch": "\x1b[2J"}, "toolchain"), "toolchain.torch: String should match"),
    (
        "33 files",
        lambda f: f.manifest["files"].update({f"f{i}": {"sha256": "0" * 64, "size": 1} for i in range(70)}),
        "at most 64",
    ),
]
CONFIGS = [
    ("code of its own", config_with(auto_mapping={"parent_library": "os"}), "must not have the fields auto_mapping"),
    ("remote code", config_with(trust_remote_code=True), "must not have the fields trust_remote_code"),
    ("an unknown field", config_with(color="red"), "must not have the fields color"),
    ("a field for a terminal", config_with(**{"\x1b[2J": 1}), r"must not have the fields '\\x1b\[2J'"),
    ("all biases", config_with(bias="all"), "bias must be 'none', got 'all'"),
    ("biases of LoRA", config_with(bias="lora_only"), "bias must be 'none', got 'lora_only'"),
    (
        "the head as a whole",
        config_with(modules_to_save=["lm_head"]),
        r"modules_to_save must be None, got \['lm_head'\]",
    ),
    ("a hostile regex", config_with(target_modules="(a+)+$"), r"target_modules must be .*, got '\(a\+\)\+\$'"),
    ("every module", config_with(target_modules=".*"), r"target_modules must be .*, got '\.\*'"),
    ("all linear modules", config_with(target_modules="all-linear"), "target_modules must be .*, got 'all-linear'"),
    ("another module", config_with(target_modules=["lm_head"]), r"target_modules must be .*, got \['lm_head'\]"),
    ("trainable", config_with(inference_mode=False), "inference_mode must be True, got False"),
    (
        "another base",
        config_with(base_model_name_or_path="evil/base"),
        "base_model_name_or_path must be None, got 'evil/base'",
    ),
    ("another type", config_with(peft_type="ADALORA"), "peft_type must be 'LORA', got 'ADALORA'"),
    ("another rank", config_with(r=2_000_000), "r must be 4, got 2000000"),
    ("another alpha", config_with(lora_alpha=1e38), r"lora_alpha must be 16.*, got 1e\+38"),
    ("DoRA", config_with(use_dora=True), "use_dora must be False, got True"),
    ("layers repeated", config_with(layer_replication=[[0, 2], [0, 2]]), "must not have the fields layer_replication"),
    (
        "another library",
        config_with(megatron_config={}, megatron_core="os"),
        "must not have the fields megatron_config",
    ),
    (
        "how it was initialised",
        config_with(loftq_config={}, eva_config={}, corda_config={}),
        "must not have the fields corda_config",
    ),
    *(
        (f"initialised by {name}", config_with(init_lora_weights=name), "must not have the fields init_lora_weights")
        for name in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "eva", "orthogonal")
    ),
]
_OF_MANIFESTS = ("a key twice", "a key twice below")  # they name its keys
CASES = [
    *(Case(f"manifest: {n}", nothing, ManifestError, m, after=manifest_text(change)) for n, change, m in TEXTS),
    *(Case(f"config: {n}", config_text(change), ManifestError, m) for n, change, m in TEXTS if n not in _OF_MANIFESTS),
    Case(
        "config: a key twice",
        config_text(lambda text: '{"r":8,' + text[1:]),
        ManifestError,
        "a key must be unique, but 'r' is given twice",
    ),
    *(Case(f"manifest: {name}", forge, ManifestError, message) for name, forge, message in MANIFESTS),
    *(Case(f"config: {name}", forge, ManifestError, message) for name, forge, message in CONFIGS),
]


@pytest.mark.parametrize("case", CASES, ids=names)
def test_strange_json_is_refused(refused, case):
    refused(case)
