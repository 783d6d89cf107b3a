"""Archives of adapters with their history: what is written comes back, and nothing else is taken."""

import gzip
import io
import os
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from finetune.adapters.manifest import sha256_hex
from finetune.errors import FinetuneError, IntegrityError, NotFoundError, StoreError
from finetune.registry import AdapterRegistry, verify
from finetune.registry.transfer.archive import export_archive, open_archive
from finetune.registry.transfer.copying import copy_adapters, names_in
from finetune.registry.transfer.tars import TarStore, TarWriter

pytestmark = pytest.mark.usefixtures("no_sync")
NAME = "medical/brain-mri"
LONG = f"{'n' * 64}/{'a' * 64}"


@pytest.fixture
def filled(registry, make_adapter):
    for seed in range(2):
        registry.publish(make_adapter(seed=seed))
    registry.alias(NAME, "prod", 1)
    registry.publish(make_adapter(LONG))
    return registry


@pytest.fixture
def archive(filled, tmp_path):
    return Path(export_archive(filled.store, [NAME, LONG], tmp_path / "adapters.tar").path)


@pytest.fixture
def target(tmp_path):
    return AdapterRegistry(tmp_path / "target")


def _import(path, target):
    with open_archive(path) as source:
        return copy_adapters(source, target.store, names_in(source))


def _files(registry, below):
    root = Path(registry.location)
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in (root / below).rglob("*") if p.is_file()}


def test_what_goes_out_comes_in(filled, archive, target):
    copied, refused = _import(archive, target)
    assert [(done.name, done.entries) for done in copied] == [(NAME, 3), (LONG, 1)] and not refused
    for below in ("names", "blobs"):
        assert _files(target, below) == _files(filled, below)
    assert verify(target).problems == []
    assert [done.entries for done in _import(archive, target)[0]] == [0, 0]


def test_equal_histories_give_equal_bytes(filled, archive, target, tmp_path):
    _import(archive, target)
    done = export_archive(target.store, [LONG, NAME, NAME], tmp_path / "again.tar")
    assert Path(done.path).read_bytes() == archive.read_bytes()
    assert (done.names, done.entries, done.bytes) == ([NAME, LONG], 4, archive.stat().st_size)
    assert done.sha256 == sha256_hex(archive.read_bytes())


def test_any_tar_program_can_list_it(archive):
    with tarfile.open(archive, "r:") as tar:
        members = tar.getmembers()
    assert all(member.isreg() and member.mtime == member.uid == member.gid == 0 for member in members)
    assert members[-1].name == "archive.json"
    assert f"names/{LONG}/log/000000000001.json" in [member.name for member in members]


def test_an_export_appears_whole_or_not_at_all(filled, archive, tmp_path):
    with pytest.raises(StoreError, match=r"adapters.tar exists already\. Remove it, or choose another name \(--to\)"):
        export_archive(filled.store, [NAME], archive)
    with pytest.raises(NotFoundError, match="no adapter 'medical/nothing' to copy"):
        export_archive(filled.store, [NAME, "medical/nothing"], tmp_path / "new.tar")
    blob = next(p for p in Path(filled.location, "blobs").rglob("*") if p.is_file())
    blob.write_bytes(b"X" + blob.read_bytes()[1:])
    with pytest.raises(IntegrityError, match=f"{blob.name}: its sha256 is"):
        export_archive(filled.store, [NAME, LONG], tmp_path / "new.tar")
    with pytest.raises(StoreError, match="cannot write .*new.tar"):
        export_archive(filled.store, [NAME], archive / "new.tar")
    assert [p.name for p in tmp_path.iterdir() if "tar" in p.name] == ["adapters.tar"]


def _refuses(path, target, message):
    with pytest.raises(FinetuneError, match=message) as caught:
        _import(path, target)
    assert str(path) in str(caught.value)
    assert not Path(target.location).exists()


def test_every_flipped_bit_is_found(archive, target, tmp_path):
    """One bit at every 61st byte, and at every byte of what says how far the logs go."""
    whole = archive.read_bytes()
    places = {*range(0, len(whole), 61), *range(whole.index(b'{"format":1'), len(whole), 7)}
    for place in sorted(places):
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << random.Random(place).randrange(8)
        path = tmp_path / "spoilt.tar"
        path.write_bytes(spoilt)
        _refuses(path, target, "spoilt.tar")
    assert len(places) > 200


def test_every_cut_is_found(archive, target, tmp_path):
    whole = archive.read_bytes()
    path = tmp_path / "cut.tar"
    for length in (0, 1, 511, 512, 1000, *range(1024, len(whole), 512), len(whole) - 1):
        path.write_bytes(whole[:length])
        _refuses(path, target, "cut off")
    path.write_bytes(whole + bytes(512))
    _refuses(path, target, "nothing may follow its end, but bytes do")
    path.write_bytes(whole + b"x")
    _refuses(path, target, "nothing may follow its end, but bytes do")


def _member(name="blobs/sha256/ab/" + "ab" * 32, data=b"", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def _tar(path, *members, format=tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["before", "alone"])
@pytest.mark.parametrize(
    ("member", "message"),
    [
        (_member("../../evil", b"x"), r"'\.\./\.\./evil' is not a key of a registry"),
        (_member("blobs/../../../evil", b"x"), "is not a key of a registry"),
        (_member("/etc/cron.d/evil", b"x"), "'/etc/cron.d/evil' is not a key of a registry"),
        (_member("C:/evil", b"x"), "is not a key of a registry"),
        (_member("..\\evil", b"x"), "is not a key of a registry"),
        (_member("blobs/.hidden", b"x"), "is not a key of a registry"),
        (_member("blobs//evil", b"x"), "is not a key of a registry"),
        (_member("link", type=tarfile.SYMTYPE, linkname="/etc"), "'link' is a symbolic link; only plain files"),
        (_member(type=tarfile.SYMTYPE, linkname="../../../registry.json"), "is a symbolic link"),
        (_member(type=tarfile.LNKTYPE, linkname="/etc/passwd"), "is a hard link; only plain files are allowed"),
        (_member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "'null' is a device"),
        (_member("sda", type=tarfile.BLKTYPE, devmajor=8), "'sda' is a device"),
        (_member("pipe", type=tarfile.FIFOTYPE), "'pipe' is a pipe"),
        (_member("blobs", type=tarfile.DIRTYPE), "'blobs' is a folder"),
        (_member("a", type=tarfile.GNUTYPE_SPARSE), "'a' is a sparse file"),
        (_member("a", type=tarfile.CONTTYPE), "'a' is of the type b'7'"),
        (_member("a", b"x", type=tarfile.AREGTYPE), r"'a' is of the type b'\\x00'"),
        (_member(mode=0o4777), "the header of blobs/.* differs from the one that export-archive writes"),
        (_member(uid=1000), "differs from the one that export-archive writes"),
        (_member(mtime=1), "differs from the one that export-archive writes"),
        (_member(linkname="x"), "differs from the one that export-archive writes"),
    ],
    ids=lambda value: None if isinstance(value, str) else f"{value[0].name}-{value[0].type}"[:30],
)
def test_what_no_export_writes_is_refused(archive, target, tmp_path, member, message, kind):
    first = _tar(tmp_path / "evil.tar", member).read_bytes()
    if kind == "before":  # a good archive behind it
        size = 512 + (512 if member[1] else 0)
        (tmp_path / "evil.tar").write_bytes(first[:size] + archive.read_bytes())
    _refuses(tmp_path / "evil.tar", target, message)
    assert not list(tmp_path.rglob("*evil")) and not (tmp_path.parent / "evil").exists()


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_extension_headers_are_refused(target, tmp_path, format):
    _refuses(_tar(tmp_path / "a.tar", _member("a" * 200, b"x"), format=format), target, "is of the type b'[Lx]'")


def test_other_kinds_of_files_are_refused(archive, target, tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as file:
        file.writestr("../../evil", b"x" * 600)
    _refuses(tmp_path / "evil.zip", target, "it must be a plain tar, and is a zip file")
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(random.Random(0).randbytes(2000)))
    _refuses(tmp_path / "a.tar.gz", target, "it must be a plain tar, and is compressed: uncompress it")
    (tmp_path / "text").write_text("text " * 400)
    _refuses(tmp_path / "text", target, "it must be a plain tar, and is another file")
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        _refuses(path, target, "not a regular file. Give a file that")
    _refuses(tmp_path, target, "is a directory|Is a directory")
    _refuses(tmp_path / "nothing", target, "No such file")


def _write(path, members) -> Path:
    with open(path, "wb") as file:
        tar = TarWriter(file)
        for key, data in members:
            tar.add(key, len(data), [data])
        tar.finish()
    return path


def _members(archive) -> list[tuple[str, bytes]]:
    with open(archive, "rb") as file:
        store = TarStore(file, archive)
        return [(meta.key, store.get(meta.key).read()) for meta in store.list()]


def test_the_test_writes_what_is_right(archive, tmp_path):
    assert _write(tmp_path / "same.tar", _members(archive)).read_bytes() == archive.read_bytes()


def test_nothing_may_be_missing(archive, target, tmp_path):
    members = _members(archive)
    for n in range(len(members)):
        path = _write(tmp_path / "less.tar", members[:n] + members[n + 1 :])
        _refuses(path, target, "holds no|is missing|must end with the entry|a header must stand")
    assert len(members) == 14


@pytest.mark.parametrize(
    ("key", "data"),
    [
        ("blobs/sha256/ab/" + "ab" * 32, b"whatever"),
        ("blobs/sha256/e3/e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", b""),
        (f"names/{NAME}/log/000000000009.json", b"{}"),
        ("names/medical/other/log/000000000001.json", b"{}"),
        ("registry.json", b"{}"),
        ("a", b"x"),
    ],
)
def test_nothing_may_be_left_over(archive, target, tmp_path, key, data):
    path = _write(tmp_path / "more.tar", [(key, data), *_members(archive)])
    _refuses(path, target, f"it also holds {key}, which no entry in it names")


def test_nothing_may_stand_twice(archive, target, tmp_path):
    members = _members(archive)
    _refuses(
        _write(tmp_path / "twice.tar", [*members, members[0]]),
        target,
        f"a member must be unique, but '{members[0][0]}' is given twice",
    )


def test_a_log_cut_at_its_end_is_found(archive, target, tmp_path):
    members = [m for m in _members(archive) if m[0] != f"names/{NAME}/log/000000000003.json"]
    path = _write(tmp_path / "short.tar", members)
    _refuses(path, target, f"the log of {NAME} must end with the entry 3 that archive.json names, and does not")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"format":1', b'"format":2', "format: Input should be 1"),
        (b'"format":1', b'"format":1,"more":0', "more: Extra inputs"),
        (b'"format":1', b'"format": 1', "not in the canonical form that export-archive writes"),
        (b'"format":1', b'"format":1,"format":1', "a key must be unique, but 'format' is given twice"),
        (b'"heads":{', b'"heads":{"a/b":{"seq":1,"digest":""},', "heads.a/b.digest"),
        (b'"medical/', b'"../medical/', "is not an adapter reference"),
        (b'{"f', b"[" * 100_000 + b'{"f', "must be nested at most"),
    ],
)
def test_the_description_of_an_archive_is_strict(archive, target, tmp_path, old, new, message):
    *members, (key, about) = _members(archive)
    path = _write(tmp_path / "a.tar", [*members, (key, about.replace(old, new, 1))])
    _refuses(path, target, message)


def test_a_huge_claim_costs_nothing(archive, target, tmp_path):
    """A member of 8 GiB in a file of 2 kB, and one in a file with a hole, are refused before they are read."""
    info, _ = _member()
    info.size = 8 * 1024**3 - 1
    path = tmp_path / "huge.tar"
    path.write_bytes(info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    _refuses(path, target, "has 8589934591 bytes by its header, more than the file: it is cut off or forged")
    with open(path, "r+b") as file:
        file.truncate(512 + 8 * 1024**3 + 1024)
    _refuses(path, target, "holds no archive.json")
    info.size = 2**40
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    _refuses(path, target, "differs from the one that export-archive writes")


def test_what_is_too_large_for_a_tar_is_refused(tmp_path):
    with open(tmp_path / "a.tar", "wb") as file, pytest.raises(StoreError, match="cannot put .* into a tar"):
        TarWriter(file).add("a", 8 * 1024**3, [])


def test_one_damaged_adapter_keeps_all_out(archive, target, tmp_path):
    """The last of an archive is checked before the first is written."""
    members = _members(archive)
    n, (key, data) = max((n, m) for n, m in enumerate(members) if m[0].startswith("blobs/"))
    members[n] = (key, bytes([data[0] ^ 1]) + data[1:])
    _refuses(_write(tmp_path / "a.tar", members), target, f"{key}: its sha256 is")


def test_an_archive_is_only_read(archive):
    with open_archive(archive) as source:
        for call in (lambda: source.put("a", b""), lambda: source.delete("a")):
            with pytest.raises(StoreError, match="cannot write to .*: an archive is read-only"):
                call()
        assert [meta.key for meta in source.list("names/medical/")] == [
            meta.key for meta in source.list("names/medical")
        ]
        assert {meta.key.split("/")[0] for meta in source.list()} == {"names", "blobs", "archive.json"}
