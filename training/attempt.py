"""How a site's agent tells the two processes of an attempt what they are part of.

The agent writes two files in the attempt's folder. `attempt.json` (`AttemptContext`) is for the
ranks, which find it through HANSA_ATTEMPT; it holds no secret. `gateway.json` (`GatewayConfig`)
is for the gateway, which alone may read the key that it names.

    ATTEMPT/
      attempt.json          AttemptContext
      workdir/              the tenant's bundle, unpacked
      gate/ranks.sock       gateway -> ranks (training.roundlog.client), alone in what a sandbox shows of it
      agent.sock            gateway -> agent (views, promises, status, certificate)
      gateway/              gateway.json, key.pem, certificate.pem, ca.pem, state/
      data/NAME             a dataset of the job, read-only
      checkpoint/           round-000120.safetensors …, newest.json
      output/               model.safetensors and whatever else the script leaves
      metrics.jsonl         one measurement a line, written by the gateway
      rank.log, gateway.log what they printed
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, Field

from training.roundlog.view import Hash
from training.spec import Digest, SiteId, SyncPlan, Workload

# Names the folder in which a rank finds each of its job's secrets as a file.
SECRETS_ENVIRONMENT: Final = "HANSA_SECRETS"
# Names the folder in which a rank finds each of its job's datasets.
DATA_ENVIRONMENT: Final = "HANSA_DATA"
ATTEMPT_ENVIRONMENT: Final = "HANSA_ATTEMPT"


class LinkSpeed(BaseModel):
    """The measured bandwidth of one directed link between two sites of the job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    from_site: SiteId
    to_site: SiteId
    bandwidth_bits_per_s: float = Field(gt=0)


class AttemptContext(BaseModel):
    """What the ranks of one site need to know. Paths are as the ranks see them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    site_id: SiteId
    epoch: int = Field(ge=1)
    gpus: int = Field(ge=1)
    seed: int = Field(ge=0)
    workload: Workload
    sync: SyncPlan = Field(description="as resolved by the broker: never auto")
    ranks_socket: str
    checkpoint_dir: str
    output_dir: str
    resume_from: str | None = Field(default=None, description="a checkpoint file to start from")
    heir_of: SiteId | None = Field(default=None, description="the site whose checkpoint counts as this site's own")
    links: tuple[LinkSpeed, ...] = Field(default=(), description="for edge weights; the same at every site")
    record_dir: str | None = Field(default=None, description="where to keep what a replay of the run starts from")


class GatewayConfig(BaseModel):
    """What one gateway process needs: `python -m training.roundlog.gateway gateway.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    job_id: str
    site_id: SiteId
    epoch: int = Field(ge=1)
    authority_key: Hash = Field(description="the broker's Ed25519 public key: views are signed by it")
    key_path: str
    certificate_path: str
    ca_path: str
    listen: str | None = Field(description="host:port to serve other sites on; None only dials out")
    ranks_socket: str
    agent_socket: str
    state_dir: str
    metrics_path: str
    contribution_bytes_max: int = Field(ge=1)
    snapshot_bytes_max: int = Field(default=1 << 36, ge=1, description="largest outer state that is relayed")
    record_dir: str | None = Field(default=None, description="where to keep the whole log, for replay; None keeps none")
    record_bytes_max: int = Field(default=1 << 32, ge=0, description="the contributions that a record keeps, in all")
    connections: int = Field(default=4, ge=1, le=16, description="parallel connections for one blob")
    patience_s: float = Field(gt=0)


class NewestCheckpoint(BaseModel):
    """`checkpoint/newest.json`: written after the file that it names is complete."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    round_number: int = Field(ge=0)
    chain_hash: Hash
    outer_hash: Hash
    file: str = Field(pattern=r"^[A-Za-z0-9._-]{1,100}$")
    digest: Digest
    size_bytes: int = Field(ge=0)
    samples_done: int = Field(ge=0)


def current_attempt() -> AttemptContext | None:
    """Return the attempt that this process is a rank of, None where it runs alone."""
    path = os.environ.get(ATTEMPT_ENVIRONMENT)
    return AttemptContext.model_validate_json(Path(path).read_text()) if path else None
