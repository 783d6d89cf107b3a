"""Who can change a file, and what is done with those that others can."""

import contextlib
import os
import stat
from types import SimpleNamespace

import pytest

from finetune.core.cache import Notes, cache_home, write_note
from finetune.core.file_owner import changeable_by_others
from finetune.errors import TrustError
from finetune.registry.storage.local import LocalStore
from finetune.registry.storage.location import default_location
from finetune.registry.trust.key_files import asks_for_passphrase, default_key_path
from finetune.registry.trust.policy import load_policy
from finetune.registry.trust.rollback_protection import SeenEntries
from finetune.registry.trust.signing import SigningKey

OTHER_UID = 65534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")

# What is done to a folder that holds private/file, and how the refusal ends; "{}" is the folder.
FLAWS = {
    "file of the group": ("private/file", 0o620, "its group can write {}/private/file (mode 0620): chmod g-w "),
    "file that others can write": (
        "private/file",
        0o602,
        "all users can write {}/private/file (mode 0602): chmod o-w ",
    ),
    "file that group and others can write": (
        "private/file",
        0o666,
        "all users can write {}/private/file (mode 0666): chmod go-w ",
    ),
    "folder of the group": ("private", 0o770, "its group can write {}/private (mode 0770): chmod g-w "),
    "folder that all can write": ("private", 0o777, "all users can write {}/private (mode 0777): chmod go-w "),
    "parent of the group": ("", 0o2775, "its group can write {} (mode 2775): chmod g-w "),
}

MAKERS = [
    lambda: write_note(cache_home() / "some" / "note", "text"),
    lambda: Notes("notes").put({"key": "note"}),
    lambda: LocalStore(default_location()).put("key", b"data"),
    lambda: SeenEntries("somewhere").remember("ns/name", 1, "0" * 64),
]


@pytest.fixture
def place(tmp_path):
    """A folder above another one, in which a file lies."""
    place = tmp_path / "a place"
    (place / "private").mkdir(parents=True, mode=0o700)
    (place / "private" / "file").write_text("mine")
    (place / "private" / "file").chmod(0o600)
    return place


def test_what_the_user_alone_can_write_is_fine(place):
    assert changeable_by_others(place / "private" / "file") is None
    for mode in (0o644, 0o444, 0o755):
        (place / "private" / "file").chmod(mode)
        assert changeable_by_others(place / "private" / "file") is None


@pytest.mark.parametrize("through_link", [False, True], ids=["itself", "through a link"])
@pytest.mark.parametrize(("name", "mode", "message"), FLAWS.values(), ids=FLAWS)
def test_what_others_can_write_is_named(place, tmp_path, name, mode, message, through_link):
    (place / name).chmod(mode)
    path = place / "private" / "file"
    if through_link:
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "folder").symlink_to("../a place/private")
        (tmp_path / "links" / "file").symlink_to(tmp_path / "links" / "folder" / "file")
        path = tmp_path / "links" / "file"
    where = place / name if name else place
    assert changeable_by_others(path) == f"{message.format(place)}'{where}'"
    where.chmod(mode & ~0o022)
    assert changeable_by_others(path) is None


def test_without_rights_to_chmod_or_chown_the_error_names_a_way_out(place, monkeypatch):
    uid = os.geteuid()
    path = place / "private" / "file"
    place.chmod(0o775)
    monkeypatch.setattr("os.geteuid", lambda: 12345)
    elsewhere = ": put it in a folder of your own, or on a read-only mount"
    if uid == 0:
        assert changeable_by_others(path) == f"its group can write {place} (mode 0775){elsewhere}"
    monkeypatch.setattr("finetune.core.file_owner._user", lambda uid: "somebody")
    monkeypatch.setattr("os.lstat", lambda path: os.stat_result([0o100600, 0, 0, 1, 777, 0, 0, 0, 0, 0]))
    assert changeable_by_others(path).startswith(f"/ belongs to somebody{elsewhere}; ")


def test_modes_are_not_checked_on_a_read_only_mount(place, monkeypatch):
    place.chmod(0o777)
    monkeypatch.setattr("os.statvfs", lambda path: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert changeable_by_others(place / "private" / "file") is None


def test_a_link_in_a_folder_of_others_is_no_better_than_a_file_there(place, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    link = tmp_path / "shared" / "link"
    link.symlink_to(place / "private" / "file")
    assert changeable_by_others(link).startswith(f"all users can write {tmp_path / 'shared'} (mode 0777)")
    (tmp_path / "shared").chmod(0o1777)
    assert changeable_by_others(link) is None, "as in /tmp, no other user can replace it"


@only_root
@pytest.mark.parametrize("name", ["private/file", "private", ""])
def test_a_file_of_another_user_is_named(place, name):
    where = place / name if name else place
    os.chown(where, OTHER_UID, -1)
    problem = changeable_by_others(place / "private" / "file")
    assert problem.startswith(f"{where} belongs to ") and problem.endswith(f": chown root '{where}'")


@only_root
def test_a_link_of_another_user_is_named(place, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(place / "private" / "file")
    os.chown(link, OTHER_UID, -1, follow_symlinks=False)
    assert changeable_by_others(link).endswith(f"chown -h root {link}")


def test_links_that_lead_nowhere_or_round_and_round(tmp_path):
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "nowhere").symlink_to("none/../../x")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        changeable_by_others(tmp_path / "round")
    with pytest.raises(FileNotFoundError):
        changeable_by_others(tmp_path / "nowhere")
    (tmp_path / "up").symlink_to("..")
    assert changeable_by_others(tmp_path / "up" / tmp_path.name / "up") is None


@pytest.mark.parametrize(("name", "mode", "message"), FLAWS.values(), ids=FLAWS)
@pytest.mark.parametrize("read", [SigningKey.load, asks_for_passphrase, load_policy], ids=["key", "asked", "policy"])
def test_no_such_policy_and_no_such_key_is_believed(place, name, mode, message, read):
    file = place / "private" / "file"
    file.write_text("keys: []\n")
    (place / name).chmod(mode)
    with pytest.raises(TrustError, match="others on this machine|others .* private key"):
        read(file)
    (place / name).chmod(mode & 0o700)
    with contextlib.suppress(TrustError):  # it is no key
        assert read(file) is not None
        return
    with pytest.raises(TrustError, match="must be a private key as PEM"):
        read(file)


@only_root
def test_a_key_of_another_user_is_refused(tmp_path):
    SigningKey.generate().save(tmp_path / "key.pem", "me")
    os.chown(tmp_path / "key.pem", OTHER_UID, -1)
    with pytest.raises(TrustError, match="key.pem: others on this machine can replace this private key: .*belongs to"):
        SigningKey.load(tmp_path / "key.pem")


@pytest.mark.parametrize("umask", [0, 0o002, 0o077])
def test_a_key_that_was_made_can_be_used_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        SigningKey.generate().save(tmp_path / "home" / ".finetune" / "keys" / "me.pem", "me")
    finally:
        os.umask(before)
    SigningKey.load(tmp_path / "home" / ".finetune" / "keys" / "me.pem")
    assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o755 & ~umask


def test_a_key_can_be_used_beside_what_other_commands_made(tmp_path, monkeypatch):
    for name in ("CACHE", "REGISTRY", "SEEN"):
        monkeypatch.delenv(f"FINETUNE_{name}", raising=False)
    before = os.umask(0o002)
    try:
        for number, make in enumerate(MAKERS):
            home = tmp_path / f"home {number}"
            home.mkdir(mode=0o700)
            monkeypatch.setenv("HOME", str(home))
            make()
            assert (home / ".finetune").is_dir()
            SigningKey.generate().save(default_key_path("me"), "me")
            SigningKey.load(default_key_path("me"))
    finally:
        os.umask(before)


def test_every_command_to_run_is_in_one_error(place):
    place.chmod(0o775)
    (place / "private").chmod(0o770)
    problem = changeable_by_others(place / "private" / "file")
    assert problem.endswith(f"chmod g-w '{place}/private'") and f"chmod g-w '{place}'; " in problem


def test_no_key_is_made_where_it_could_not_be_used(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o775)
    with pytest.raises(TrustError, match=r"none was made: its group can write .*shared .mode 0775.: chmod g-w .*--out"):
        SigningKey.generate().save(tmp_path / "shared" / "keys" / "me.pem", "me")
    assert list(tmp_path.rglob("*.pem*")) == []
