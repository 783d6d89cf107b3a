import pytest

from finetune.adapters.reference import AdapterRef, as_folder, check_alias, check_name_part
from finetune.errors import AdapterReferenceError

HEX = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "choice", "canonical"),
    [
        ("medical/brain-mri", {"alias": "latest"}, "medical/brain-mri@latest"),
        ("medical/brain-mri@latest", {"alias": "latest"}, "medical/brain-mri@latest"),
        ("medical/brain-mri@17", {"version": 17}, "medical/brain-mri@17"),
        ("medical/brain-mri@prod", {"alias": "prod"}, "medical/brain-mri@prod"),
        ("medical/brain-mri@v1.0_rc-2", {"alias": "v1.0_rc-2"}, "medical/brain-mri@v1.0_rc-2"),
        (f"medical/brain-mri@sha256:{HEX}", {"digest": HEX}, f"medical/brain-mri@sha256:{HEX}"),
    ],
)
def test_every_form_is_read_and_written_back(text, choice, canonical):
    ref = AdapterRef.parse(text)
    assert ref == AdapterRef(namespace="medical", name="brain-mri", **choice)
    assert str(ref) == canonical
    assert AdapterRef.parse(str(ref)) == ref
    assert ref.full_name == "medical/brain-mri"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "brain-mri",
        "/brain-mri",
        "medical/",
        "medical/brain/mri",
        "Medical/brain",
        "medical/brain_mri",
        "medical/-brain",
        "medical/brain-",
        "medical/" + "a" * 65,
        "../brain",
        "medical/..",
        "medical\\brain",
        "medical/brain\n",
        "medical/bräin",
        " medical/brain",
        "medical/brain@",
        "medical/brain@0",
        "medical/brain@017",
        "medical/brain@-1",
        "medical/brain@1.0",
        "medical/brain@١",
        "medical/brain@" + "9" * 13,
        "medical/brain@Prod",
        "medical/brain@prod\n",
        "medical/brain@prod@1",
        "medical/brain@" + "a" * 65,
        "medical/brain@sha256:",
        f"medical/brain@sha256:{HEX[1:]}",
        f"medical/brain@sha256:{HEX.upper()}",
        f"medical/brain@sha256:{HEX}\n",
        None,
        17,
    ],
)
def test_what_is_no_reference_is_shown_with_the_four_forms(text):
    with pytest.raises(AdapterReferenceError) as caught:
        AdapterRef.parse(text)
    assert repr(text)[:100] in str(caught.value)
    for form in ("ns/name,", "ns/name@17", "ns/name@prod", "ns/name@sha256:<64 hex digits>"):
        assert form in str(caught.value)


@pytest.mark.parametrize("ref", [3, b"medical/brain", ["medical/brain"]])
def test_what_is_neither_a_reference_nor_a_path_is_refused_as_such(ref):
    with pytest.raises(AdapterReferenceError, match="is neither an adapter reference nor a folder"):
        as_folder(ref)


def test_errors_name_the_fault():
    with pytest.raises(AdapterReferenceError, match="a namespace or name must be 1 to 64 .*; got 'Brain'"):
        AdapterRef.parse("medical/Brain")
    with pytest.raises(AdapterReferenceError, match="'/' between namespace and name is missing"):
        AdapterRef.parse("medical")
    with pytest.raises(AdapterReferenceError, match="an alias must be a letter .*; got 'Prod'"):
        AdapterRef.parse("medical/brain@Prod")
    with pytest.raises(AdapterReferenceError, match="a digest must be 64 of 0-9 and a-f, got '12'"):
        AdapterRef.parse("medical/brain@sha256:12")


def test_a_long_string_is_cut_in_the_message():
    with pytest.raises(AdapterReferenceError) as caught:
        AdapterRef.parse("x" * 100_000)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("part", ["con", "nul", "aux", "prn", "com1", "com9", "lpt1", "com0"])
def test_windows_devices_are_no_names(part):
    with pytest.raises(AdapterReferenceError, match=f"must not be a device name of Windows, got '{part}'"):
        AdapterRef.parse(f"medical/{part}")
    with pytest.raises(AdapterReferenceError, match="device name of Windows"):
        AdapterRef.parse(f"{part}/brain")


def test_parts_at_their_limits():
    assert check_name_part("a" * 64) == "a" * 64
    assert check_name_part("0") == "0"
    assert check_name_part("com10") == "com10"
    assert check_alias("a" * 64) == "a" * 64
    for number in ("1", "007"):
        with pytest.raises(AdapterReferenceError, match="an alias must be a letter"):
            check_alias(number)


def test_a_reference_that_exists_is_valid():
    with pytest.raises(AdapterReferenceError, match="a namespace or name must be"):
        AdapterRef(namespace="..", name="brain", version=1)
    with pytest.raises(AdapterReferenceError, match="exactly one of version, alias and digest"):
        AdapterRef(namespace="medical", name="brain")
    with pytest.raises(AdapterReferenceError, match="exactly one of version, alias and digest"):
        AdapterRef(namespace="medical", name="brain", version=1, alias="prod")
    for version in (0, -1, True, "1", 10**12):
        with pytest.raises(AdapterReferenceError, match="a version must be a whole number from 1, got"):
            AdapterRef(namespace="medical", name="brain", version=version)


def test_a_name_has_no_version():
    assert AdapterRef.parse_name("medical/brain").full_name == "medical/brain"
    with pytest.raises(AdapterReferenceError, match="'medical/brain@1' must have the form ns/name, without a version"):
        AdapterRef.parse_name("medical/brain@1")
