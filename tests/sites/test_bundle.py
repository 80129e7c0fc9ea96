from __future__ import annotations

import contextlib
import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sites import bundle
from sites.bundle import BundleLimits
from sites.errors import BundleError


def archive(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=form) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def file(name: str, content: bytes = b"x") -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), content


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def unpack(packed: bytes, folder: Path, limits: BundleLimits | None = None) -> Path:
    path = folder / "bundle.tar.gz"
    path.write_bytes(packed)
    bundle.unpack(path, bundle.digest_of(packed), folder / "workdir", limits)
    return folder / "workdir"


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def test_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "data/empty").mkdir(parents=True)
    (source / "train.py").write_text("print('hello')\n")
    (source / "data/tokens.bin").write_bytes(bytes(range(256)) * 5000)
    (source / "run.sh").write_text("#!/bin/sh\n")
    (source / "run.sh").chmod(0o750)
    workdir = unpack(bundle.pack(source), tmp_path)
    assert tree(workdir) == tree(source)
    assert (workdir / "run.sh").stat().st_mode & 0o777 == 0o755


def test_equal_folders_give_equal_bundles(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file_name in ("b.py", "a.py") if name == "one" else ("a.py", "b.py"):
            (tmp_path / name / file_name).write_text(file_name)
    assert bundle.pack(tmp_path / "one") == bundle.pack(tmp_path / "two")


def test_ignored_names_are_left_out(tmp_path: Path) -> None:
    for name in ("train.py", "notes.txt", "big/data.bin", "keep/data.bin", ".git/config", "__pycache__/train.pyc"):
        (tmp_path / "w" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "w" / name).write_text(name)
    (tmp_path / "w/.hansaignore").write_text("# comment\n*.txt\nbig/\n")
    workdir = unpack(bundle.pack(tmp_path / "w"), tmp_path)
    assert [name for name, content in tree(workdir).items() if content] == ["keep/data.bin", "train.py"]


# Named, since an archive's own bytes hold the time at which it was packed.
HOSTILE = {
    "parent folder": (archive(file("../escape.py")), "bundle.path"),
    "absolute path": (archive(file("/etc/cron.d/job")), "bundle.path"),
    "parent inside the path": (archive(file("a/../../b")), "bundle.path"),
    "line feed in a name": (archive(file("a\nb.py")), "bundle.path"),
    "one name twice": (archive(file("a.py"), file("./a.py")), "bundle.path"),
    "file as a folder": (archive(file("a"), file("a/b")), "bundle.path"),
    "symbolic link": (archive(special("out", tarfile.SYMTYPE, "/etc/passwd")), "bundle.member"),
    "hard link": (archive(special("out", tarfile.LNKTYPE, "/etc/passwd")), "bundle.member"),
    "device": (archive(special("null", tarfile.CHRTYPE)), "bundle.member"),
    "pipe": (archive(special("pipe", tarfile.FIFOTYPE)), "bundle.member"),
    "long name in PAX": (archive(file("n" * 300), form=tarfile.PAX_FORMAT), "bundle.member"),
    "long name in GNU": (archive(file("n" * 300), form=tarfile.GNU_FORMAT), "bundle.member"),
    "training package": (archive(file("training/__init__.py")), "bundle.reserved_name"),
    "broker module": (archive(file("broker.py")), "bundle.reserved_name"),
    "sites library": (archive(file("sites.cpython-311-x86_64-linux-gnu.so")), "bundle.reserved_name"),
    "cut off": (archive(file("a.py"))[:-20], "bundle.invalid"),
    "not gzip": (b"not gzip at all", "bundle.invalid"),
    "not tar": (gzip.compress(b"\xff" * 2048), "bundle.invalid"),
    "nothing": (gzip.compress(b""), "bundle.invalid"),
}


@pytest.mark.parametrize(("packed", "code"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bundle_is_refused_and_leaves_nothing(packed: bytes, code: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError) as refused:
        unpack(packed, tmp_path)
    assert refused.value.code == code
    with pytest.raises(BundleError) as inspected:
        bundle.inspect(io.BytesIO(packed))
    assert inspected.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.tar.gz"]


def test_bundle_with_other_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar.gz"
    path.write_bytes(archive(file("a.py")))
    with pytest.raises(BundleError) as refused:
        bundle.unpack(path, "0" * 64, tmp_path / "workdir")
    assert refused.value.code == "bundle.digest"
    assert not (tmp_path / "workdir").exists()


def test_bomb_is_cut_without_filling_memory(tmp_path: Path) -> None:
    limits = BundleLimits(unpacked_bytes_max=1_000_000, members_max=50)
    bomb = archive(file("zeros", bytes(50_000_000)))
    assert len(bomb) < 100_000
    tracemalloc.start()
    try:
        with pytest.raises(BundleError) as refused:
            unpack(bomb, tmp_path, limits)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert refused.value.code == "bundle.too_large"
    with pytest.raises(BundleError) as many:
        bundle.inspect(io.BytesIO(archive(*(file(f"f{n}", b"") for n in range(51)))), limits)
    assert many.value.code == "bundle.too_large"


def test_header_that_lies_about_its_size_asks_for_no_memory(tmp_path: Path) -> None:
    info = tarfile.TarInfo("huge")
    info.size = 4_000_000_000
    packed = gzip.compress(info.tobuf(tarfile.USTAR_FORMAT))
    with pytest.raises(BundleError) as refused:
        unpack(packed, tmp_path)
    assert refused.value.code == "bundle.too_large"


def test_links_reserved_names_and_large_folders_are_not_packed(tmp_path: Path) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link/data").symlink_to("/etc/passwd")
    (tmp_path / "reserved/pricing").mkdir(parents=True)
    (tmp_path / "large").mkdir()
    (tmp_path / "large/data").write_bytes(bytes(2000))
    codes = []
    for name in ("link", "reserved", "large"):
        with pytest.raises(BundleError) as refused:
            bundle.pack(tmp_path / name, BundleLimits(unpacked_bytes_max=1000))
        codes.append(refused.value.code)
    assert codes == ["bundle.member", "bundle.reserved_name", "bundle.too_large"]


def test_summary_names_the_digest_and_the_size(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("12345")
    packed = bundle.pack(tmp_path)
    summary = bundle.inspect(io.BytesIO(packed))
    assert summary == bundle.BundleSummary(bundle.digest_of(packed), members=1, unpacked_bytes=5)


@settings(max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 1535))
def test_flipped_bytes_never_raise_anything_but_a_bundle_error(noise: bytes, offset: int) -> None:
    plain = bytearray(gzip.decompress(archive(file("a/b.py", b"content"), file("c.py"))))
    plain[offset : offset + len(noise)] = noise
    with contextlib.suppress(BundleError):
        bundle.inspect(io.BytesIO(gzip.compress(bytes(plain))))
