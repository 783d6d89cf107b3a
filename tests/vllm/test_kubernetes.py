"""The Kubernetes example: its parts name each other, and its flags, variables and metric are vLLM's and ours."""

import re
from pathlib import Path

import pytest
import yaml

from finetune.export.vllm_rules import MAX_LORA_RANKS, VERSION
from finetune.registry.trust.policy import load_policy
from finetune.vllm_plugin.name import NAME

ROOT = Path(__file__).parents[2]
OBJECTS = list(yaml.safe_load_all((ROOT / "recipes" / "serve" / "kubernetes" / "vllm.yaml").read_text()))
DOCS = (ROOT / "docs" / "vllm.md").read_text()


def one(kind):
    (found,) = [part for part in OBJECTS if part["kind"] == kind]
    return found


@pytest.fixture
def container():
    (found,) = one("Deployment")["spec"]["template"]["spec"]["containers"]
    return found


def flags_of(words):
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def test_parts_name_each_other(container):
    deployment = one("Deployment")
    pod = deployment["spec"]["template"]
    assert (
        pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"] == one("Service")["spec"]["selector"]
    )
    target = one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    (port,) = container["ports"]
    assert one("Service")["spec"]["ports"][0]["targetPort"] == port["name"]
    assert f"--port={port['containerPort']}" in container["args"]
    assert str(port["containerPort"]) == pod["metadata"]["annotations"]["prometheus.io/port"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["spec"]["volumes"]}


def test_secrets_come_from_the_secret(container):
    secret, wanted = one("Secret"), {}
    for variable in container["env"]:
        if "valueFrom" in variable:
            reference = variable["valueFrom"]["secretKeyRef"]
            assert reference["name"] == secret["metadata"]["name"]
            wanted[variable["name"]] = reference["key"]
    assert set(wanted.values()) == set(secret["stringData"])
    assert {"VLLM_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} == set(wanted)


def test_the_plugin_is_named_wherever_its_routes_are_open(container):
    values = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert (values["VLLM_ALLOW_RUNTIME_LORA_UPDATING"], values["VLLM_PLUGINS"]) == ("1", NAME)
    assert f"export VLLM_PLUGINS={NAME} VLLM_ALLOW_RUNTIME_LORA_UPDATING=1" in DOCS


def test_our_own_variables_are_read_somewhere(container):
    code = "".join(path.read_text() for path in (ROOT / "finetune").rglob("*.py"))
    ours = [variable["name"] for variable in container["env"] if variable["name"].startswith("FINETUNE_")]
    assert len(ours) == 4
    for name in ours:
        assert f'"{name}"' in code, name


def test_the_policy_can_be_used(tmp_path):
    path = tmp_path / "trust.yaml"
    path.write_text(one("ConfigMap")["data"]["trust.yaml"])
    load_policy(path)


def test_one_version_and_an_allowed_rank(container):
    assert (
        container["image"].endswith(f":v{VERSION}") and f"vllm-openai:v{VERSION}" in DOCS and f"vLLM {VERSION}" in DOCS
    )
    assert f"\nversion={VERSION}\n" in (ROOT / "tests" / "vllm" / "install_vllm.sh").read_text()
    (rank,) = [word.partition("=")[2] for word in container["args"] if word.startswith("--max-lora-rank")]
    assert int(rank) in MAX_LORA_RANKS


@pytest.mark.vllm
def test_flags_variables_and_metric_are_those_of_vllm(container, inside):
    arguments = inside("arguments", {})
    assert arguments["version"] == VERSION and tuple(arguments["max_lora_ranks"]) == MAX_LORA_RANKS
    in_docs = re.findall(r"vllm serve (?:.|\\\n)*?(?=[\n`])", DOCS)
    words = [*container["args"], *" ".join(in_docs).split()]
    assert len(in_docs) == 3 and flags_of(words) <= set(arguments["arguments"])
    variables = [variable["name"] for variable in container["env"]] + re.findall(r"\bVLLM_[A-Z_]+", DOCS)
    assert {name for name in variables if name.startswith("VLLM_")} <= set(arguments["environment"])
    (metric,) = one("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"].replace("_", ":", 1) in arguments["metrics"]
