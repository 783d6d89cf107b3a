"""Keys are read from a file or the environment, never told, and compared as a whole."""

import hmac

import pytest

from finetune.errors import LaunchError, RequestError
from finetune.server.keys import Keys, read_keys

KEY, OTHER = "k" * 16, "o" * 32


def test_keys_are_read_from_a_file_or_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"# of the team\n{KEY}\n\n  {OTHER}  \n")
    assert read_keys(file, {"FINETUNE_API_KEYS": "ignored" * 5}) == (KEY, OTHER)
    assert read_keys(None, {"FINETUNE_API_KEYS": f"{KEY}, {OTHER}"}) == (KEY, OTHER)
    assert read_keys(None, {}) == ()


@pytest.mark.parametrize(
    "text, message",
    [("", "at least one API key, got none"), ("# none\n", "at least one API key, got none"),
     (f"{KEY}\nshort\n", "line 2: an API key must have 16"),
     (f"{KEY}é\n", "line 1"), (f"{KEY} {KEY}\n", "line 1")],
    ids=["empty", "comment", "short", "letters", "space"],
)  # fmt: skip
def test_a_file_without_good_keys_is_refused_and_no_key_shown(tmp_path, text, message):
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(LaunchError, match=message) as caught:
        read_keys(file, {})
    assert KEY not in str(caught.value) and "short" not in str(caught.value)


def test_other_mistakes_are_refused(tmp_path):
    with pytest.raises(LaunchError, match="cannot be read"):
        read_keys(tmp_path / "none", {})
    with pytest.raises(LaunchError, match=r"\$FINETUNE_API_KEYS must hold at least one API key"):
        read_keys(None, {"FINETUNE_API_KEYS": " "})
    with pytest.raises(LaunchError, match=r"\$FINETUNE_API_KEYS, key 2"):
        read_keys(None, {"FINETUNE_API_KEYS": f"{KEY} b"})


def test_a_key_is_compared_in_constant_time_with_all(monkeypatch):
    compared = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or compare(a, b))
    keys = Keys([KEY, OTHER])
    for given in (KEY, OTHER, "x", KEY[:-1]):
        compared.clear()
        if given in (KEY, OTHER):
            keys.check(f"Bearer {given}".encode(), host="a.example")
        else:
            with pytest.raises(RequestError, match="does not know this API key"):
                keys.check(f"bearer {given}".encode(), host="localhost")
        assert compared == [(32, 32)] * 2


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:80", "127.9.9.9", "[::1]:8000", "[::1]"])
def test_without_keys_requests_to_the_name_of_this_machine_are_allowed(host):
    Keys([]).check(None, host=host)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", ""]
)
def test_without_keys_no_other_name_leads_here(host):
    with pytest.raises(RequestError, match="answers for Host localhost only, got") as caught:
        Keys([]).check(None, host=host)
    assert caught.value.status == 403
