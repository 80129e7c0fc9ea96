"""Artifacts on their way out: whole or by range, never shown in a browser as a page of ours."""

from __future__ import annotations

import re
from typing import Final

from flask import Response, request, send_file

from broker.artifacts import ArtifactStore

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._-]+")


def send_artifact(store: ArtifactStore, digest: str, name: str) -> Response:
    """Send the artifact, or the range that was asked for, as a download called `name`."""
    response = send_file(
        store.file(digest),
        mimetype="application/octet-stream",
        as_attachment=True,
        download_name=_UNSAFE.sub("_", name)[-100:] or "artifact",
        conditional=True,
        etag=digest,
        max_age=0,
    )
    response.headers["Accept-Ranges"] = "bytes"
    response.headers["Hansa-Digest"] = digest
    response.headers["X-Content-Type-Options"] = "nosniff"
    # Flask keeps the file open for a HEAD too; close it with the answer.
    response.direct_passthrough = request.method != "HEAD"
    return response
