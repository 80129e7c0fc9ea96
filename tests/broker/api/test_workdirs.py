"""Uploads of workdirs: resumable, and checked by the rules of bundles when the last byte comes."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile

import pytest

from broker.database.tables import Artifact
from tests.broker.api.conftest import WORKDIR, World, bundle, code_of, spec

DIGEST = hashlib.sha256(WORKDIR).hexdigest()


def _tar(*members: tarfile.TarInfo, content: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.USTAR_FORMAT) as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(content[: member.size]))
    return buffer.getvalue()


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return member


def _bomb() -> bytes:
    """Two files of 300 MiB of noughts: 300 KB as they travel, each small enough, too large together."""
    block = gzip.compress(bytes(30 * 1024 * 1024), 6)
    headers = [gzip.compress(_member(name, size=300 * 1024 * 1024).tobuf(tarfile.USTAR_FORMAT)) for name in "ab"]
    return headers[0] + block * 10 + headers[1] + block * 10


def _folders(count: int) -> bytes:
    return gzip.compress(_member("folder", tarfile.DIRTYPE).tobuf(tarfile.USTAR_FORMAT) * count)


HOSTILE = {
    "symbolic link": (lambda: _tar(_member("out", tarfile.SYMTYPE, "/etc/passwd")), "bundle.member"),
    "hard link": (lambda: _tar(_member("out", tarfile.LNKTYPE, "../x")), "bundle.member"),
    "device": (lambda: _tar(_member("null", tarfile.CHRTYPE)), "bundle.member"),
    "climbing": (lambda: _tar(_member("../../evil.py")), "bundle.path"),
    "absolute": (lambda: _tar(_member("/evil.py")), "bundle.path"),
    "shadow of the runtime": (lambda: bundle(training__py=b""), "bundle.reserved_name"),
    "bomb": (_bomb, "bundle.too_large"),
    "many members": (lambda: _folders(10_001), "bundle.too_large"),
    "not a gzip": (lambda: b"#!/bin/sh\n" * 100, "bundle.invalid"),
    "not a tar": (lambda: gzip.compress(b"x" * 2000), "bundle.invalid"),
    "cut": (lambda: WORKDIR[:-20], "bundle.invalid"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_workdir_that_no_site_would_unpack_is_refused_and_forgotten(world: World, case: str) -> None:
    make, code = HOSTILE[case]
    content = make()
    answer = world.upload("acme", content)
    assert (answer.status_code, code_of(answer)) == (422, code)
    digest = hashlib.sha256(content).hexdigest()
    assert world.call("GET", f"/v1/workdirs/{digest}", "acme").get_json()["held_bytes"] == 0
    assert world.market.database.read(lambda session: session.get(Artifact, digest)) is None
    refused = world.post("/v1/jobs", "acme", spec(workdir_digest=digest))
    assert code_of(refused) == "job.workdir_missing"


def test_an_upload_goes_on_where_it_was_cut(world: World) -> None:
    path = f"/v1/workdirs/{DIGEST}"
    size = len(WORKDIR)
    first = world.call("PUT", f"{path}?offset=0&size={size}", "acme", data=WORKDIR[:50]).get_json()
    assert (first["held_bytes"], first["complete"]) == (50, False)
    state = world.call("GET", f"{path}?size={size}", "acme").get_json()
    assert state == {"digest": DIGEST, "size_bytes": size, "held_bytes": 50, "complete": False}
    assert world.call("HEAD", path, "acme").status_code == 200
    gap = world.call("PUT", f"{path}?offset=80&size={size}", "acme", data=WORKDIR[80:])
    assert (gap.status_code, code_of(gap)) == (409, "artifact.offset")
    last = world.call("PUT", f"{path}?offset=40&size={size}", "acme", data=WORKDIR[40:]).get_json()
    assert (last["held_bytes"], last["complete"]) == (size, True)
    again = world.call("PUT", f"{path}?offset=0&size={size}", "acme", data=WORKDIR).get_json()
    assert again["complete"]


def test_half_an_upload_is_its_tenants_alone(world: World) -> None:
    path = f"/v1/workdirs/{DIGEST}?offset=0&size={len(WORKDIR)}"
    world.call("PUT", path, "rival", data=b"garbage")
    assert world.call("GET", f"/v1/workdirs/{DIGEST}", "acme").get_json()["held_bytes"] == 0
    assert world.call("PUT", path, "acme", data=WORKDIR).get_json()["complete"]


def test_other_bytes_than_the_digest_names_are_refused(world: World) -> None:
    answer = world.call("PUT", f"/v1/workdirs/{'0' * 64}?offset=0&size=3", "acme", data=b"abc")
    assert (answer.status_code, code_of(answer)) == (422, "artifact.digest")


def test_sizes_are_bounded_and_announced_truthfully(world: World) -> None:
    limit = world.market.settings.workdir_bytes_max
    path = f"/v1/workdirs/{DIGEST}"
    answer = world.call("PUT", f"{path}?offset=0&size={limit + 1}", "acme", data=b"x")
    assert (answer.status_code, code_of(answer)) == (413, "artifact.too_large")
    answer = world.call("PUT", f"{path}?offset=0&size=2", "acme", data=b"xyz")
    assert (answer.status_code, code_of(answer)) == (413, "artifact.too_large")
    for query in ("offset=-1&size=5", "offset=0", "size=5", "offset=0&size=99999999999999999999999", "offset=x&size=1"):
        answer = world.call("PUT", f"{path}?{query}", "acme", data=b"x")
        assert (answer.status_code, code_of(answer)) == (422, "request.invalid")


@pytest.mark.parametrize("digest", ["ABC", "0" * 63, "0" * 65, "g" * 64, "..%2F..%2Fetc"])
def test_a_name_that_is_no_digest_reaches_no_file(world: World, digest: str) -> None:
    answer = world.call("PUT", f"/v1/workdirs/{digest}?offset=0&size=1", "acme", data=b"x")
    assert answer.status_code in {404, 422}


def test_a_digest_is_no_pass_to_anothers_workdir_and_tells_nothing_of_it(world: World) -> None:
    path = f"/v1/workdirs/{DIGEST}"
    size = len(WORKDIR)
    assert world.upload("acme", WORKDIR).get_json()["complete"]
    # Who only knows the digest learns not even that it is here.
    nothing = {"digest": DIGEST, "size_bytes": size, "held_bytes": 0, "complete": False}
    assert world.call("GET", f"{path}?size={size}", "rival").get_json() == nothing
    refused = world.post("/v1/jobs", "rival", spec())
    assert (refused.status_code, code_of(refused)) == (422, "job.workdir_missing")
    # A part of the bytes, or others of their length, do not do.
    half = world.call("PUT", f"{path}?offset=0&size={size}", "rival", data=WORKDIR[:50]).get_json()
    assert (half["held_bytes"], half["complete"]) == (50, False)
    assert code_of(world.post("/v1/jobs", "rival", spec())) == "job.workdir_missing"
    wrong = world.call("PUT", f"{path}?offset=50&size={size}", "rival", data=bytes(size - 50))
    assert code_of(wrong) == "artifact.digest"
    assert world.call("GET", path, "acme").get_json()["complete"]  # nor do they spoil the one that is here
    assert world.market.artifacts.file(DIGEST).read_bytes() == WORKDIR
    # The same bytes brought by both are fine.
    assert world.call("PUT", f"{path}?offset=0&size={size}", "rival", data=WORKDIR).get_json()["complete"]
    assert world.call("GET", path, "rival").get_json()["complete"]
    assert code_of(world.post("/v1/jobs", "rival", spec())) != "job.workdir_missing"
