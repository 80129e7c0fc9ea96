"""What a job is: the one document that a tenant writes and every part of Hansa reads.

A person writes YAML (`training.jobfile` reads it), the wire carries the JSON of `JobSpec`. The
outer keys are SkyPilot's (`name workdir resources setup run envs`), the market's own stand under
one key, `market`. Nothing here imports torch, and nothing here touches a file.
"""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import PurePosixPath
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from training.catalogue import GPU_TYPES

GPUS_PER_JOB_MAX: Final = 4096
SITES_PER_JOB_MAX: Final = 8
ENVS_MAX: Final = 100
RUN_LENGTH_MAX: Final = 4096
PROFILE_ROWS_MAX: Final = 32
SECRETS_PER_JOB_MAX: Final = 16
DATASETS_PER_JOB_MAX: Final = 16
# One credit is a million micro-credits; a job may hold at most a billion credits.
BUDGET_MICROS_MAX: Final = 10**15
SAMPLES_MAX: Final = 10**13

# A workdir must not shadow the runtime's own packages: `training.launch` imports them first, and
# a shadow would either be ignored (a puzzle) or run in our place (a hole).
RESERVED_WORKDIR_NAMES: Final = frozenset({"broker", "sites", "pricing", "training"})

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]
SiteId = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]{0,30}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
# It becomes a file's name: no stroke, no dot in front.
SecretName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_.-]{0,62}$")]
EnvironmentName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")]
EnvironmentValue = Annotated[str, StringConstraints(max_length=4096)]

# New words go to the end of these lists: recorded markets name a strategy and a codec by its place.
Strategy = Literal["auto", "local", "diloco", "every_step", "streaming", "sparse", "quorum", "neighbour", "async"]
Codec = Literal["auto", "fp32", "int8", "topk2", "bf16", "int4", "fp4", "sign", "lowrank"]
Topology = Literal["exponential", "ring", "metropolis"]
MergeRule = Literal["mean", "norm_cap", "trimmed_mean", "centred_clipping"]
# Of two contributions that differ nobody can say which is wrong.
ROBUST_SITES_MIN: Final = 3
# Strategies that merge by the plan's rule, and `local`, as which such a job may be placed; the others have a merge of their own.
_MERGED_BY_RULE: Final = frozenset({"auto", "local", "diloco", "streaming", "sparse", "every_step"})

# What a strategy takes where the plan leaves it open.
_NEEDS: Final[dict[str, dict[str, object]]] = {
    # Gradients of one step, as exact as all-reduce inside a site.
    "every_step": {"codec": "fp32", "period_steps": 1},
    # Without a carry's help 4 bits are the floor; int4's mean is right (arXiv 2501.18512 and 2604.21428).
    "streaming": {"codec": "int4"},
    "sparse": {"codec": "topk2"},
}
# Timeouts nest: grace < patience < process group (training.ranks.group_timeout).
GRACE_SHARE: Final = 60


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class GpuRequest(_Strict):
    """One acceptable kind of GPU and how many of it, in all sites together."""

    gpu_type: str
    count_min: int = Field(ge=1, le=GPUS_PER_JOB_MAX)
    count_max: int = Field(ge=1, le=GPUS_PER_JOB_MAX)

    @field_validator("gpu_type")
    @classmethod
    def _known_type(cls, gpu_type: str) -> str:
        return _known(gpu_type)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.count_min > self.count_max:
            message = f"count_min {self.count_min} is above count_max {self.count_max}"
            raise ValueError(message)
        return self


class Resources(_Strict):
    """What the job may run on: any one of the listed requests."""

    accelerators: tuple[GpuRequest, ...] = Field(min_length=1, max_length=len(GPU_TYPES))

    @model_validator(mode="after")
    def _each_type_once(self) -> Self:
        types = [request.gpu_type for request in self.accelerators]
        if len(set(types)) != len(types):
            message = "each GPU type may be listed once; give a range such as 2..8 instead"
            raise ValueError(message)
        return self


class Workload(_Strict):
    """How much there is to compute, and what one sample costs.

    `samples` is the size of the job: it is done when that many samples are in its round log.
    `flops_per_sample` counts the forward and the backward pass (about 6 x parameters x tokens per
    sample for a transformer).
    """

    samples: int = Field(ge=1, le=SAMPLES_MAX)
    batch_per_gpu: int = Field(ge=1, le=1_000_000)
    parameters: int = Field(ge=1, le=10**13)
    flops_per_sample: float = Field(gt=0, le=1e21)


class SyncPlan(_Strict):
    """How sites of one job agree: the policy on its round log.

    `period_steps` is H, the inner steps between two exchanges of the same parameters. `patience_s` is the one timeout
    a user sees; every other is derived from it. The numbers further down belong to single strategies
    (training/README.md, Strategies), and the others ignore them.
    """

    strategy: Strategy = "auto"
    codec: Codec = "auto"
    period_steps: int = Field(default=20, ge=1, le=10_000)
    outer_learning_rate: float = Field(default=0.7, gt=0, le=2)
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    checkpoint_rounds: int = Field(default=5, ge=1, le=10_000)
    patience_s: float = Field(default=60.0, ge=1, le=3600)
    target_utilisation: float = Field(default=0.95, ge=0.5, le=0.999, description="share of time that computes")
    max_egress_gb: float | None = Field(default=None, gt=0, le=1e9, description="each site's, over the whole job")
    fragments: int = Field(default=4, ge=1, le=64, description="streaming: P, of which one travels at a time")
    overlap_steps: int = Field(default=1, ge=0, le=1000, description="streaming: tau, inner steps while it travels")
    mixing: float = Field(default=0.0, ge=0, lt=1, description="streaming: alpha, the local share kept")
    quorum_sites: int | None = Field(default=None, ge=1, le=SITES_PER_JOB_MAX, description="quorum: K, else most sites")
    topology: Topology = "exponential"
    nesterov_delay: int = Field(default=4, ge=1, le=64, description="async: arrivals between two momentum steps")
    merge: MergeRule = Field(default="mean", description="others bear a wrong site among three or more")

    @model_validator(mode="before")
    @classmethod
    def _completed(cls, data: object) -> object:
        """Let a strategy say what it needs where the tenant leaves it open, so that the market prices just that."""
        if not isinstance(data, dict):
            return data
        needs = _NEEDS.get(str(data.get("strategy")), {})
        asked = {name: value for name, value in data.items() if (name, value) != ("codec", "auto")}
        return {"codec": "auto"} | needs | asked if needs else data

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if self.strategy == "every_step" and self.period_steps != 1:
            message = "every_step exchanges gradients at every step; leave period_steps out, or choose diloco"
            raise ValueError(message)
        if self.merge != "mean" and self.strategy not in _MERGED_BY_RULE:
            known = ", ".join(sorted(_MERGED_BY_RULE))
            message = f"{self.strategy} merges in its own way; merge: {self.merge} goes with {known}"
            raise ValueError(message)
        if self.merge == "trimmed_mean" and self.codec in {"auto", "topk2"}:
            message = (
                "trimmed_mean drops what few sites send, which is nearly all that topk2 sends; name another codec "
                "(int8, fp32), or choose norm_cap"
            )
            raise ValueError(message)
        return self

    @property
    def round_steps(self) -> int:
        """The inner steps between two sync rounds: H, or H / P where fragments take turns."""
        return self.period_steps // self.fragments if self.strategy == "streaming" else self.period_steps

    @property
    def grace_s(self) -> float:
        """How long a met quorum waits for the rest: a sixtieth of the patience, 1 s by default."""
        return self.patience_s / GRACE_SHARE

    def quorum_of(self, sites: int) -> int:
        """Return how many of `sites` contributions seal a round."""
        if self.strategy == "async":
            return 1
        if self.strategy != "quorum":
            return sites
        return min(sites, self.quorum_sites or sites // 2 + 1)

    def placed(self, market: SyncPlan) -> SyncPlan:
        """Return this plan as the market resolved it; what the market does not weigh stays as the tenant wrote it."""
        weighed: tuple[str, ...] = ("strategy", "codec", "period_steps")
        if self.strategy == "auto":
            weighed = (*weighed, "overlap_steps", "outer_learning_rate", "outer_momentum")
        return self.model_copy(update={name: getattr(market, name) for name in weighed})

    @property
    def between_sites(self) -> Strategy:
        """The strategy on several sites: `auto` is diloco there."""
        return "diloco" if self.strategy == "auto" else self.strategy


class DataTerms(_Strict):
    """Where the job's data lies and how far from there it may be read.

    Sites outside `residency` are no places for the job; within it, each GB read elsewhere costs what its home asks.
    """

    home_site: SiteId
    residency: Literal["site", "region", "continent", "world"] = "world"
    bytes_per_sample: float = Field(default=0.0, ge=0, le=1e12, description="read once for each sample")


class DataReference(_Strict):
    """A dataset that ranks find in $HANSA_DATA/NAME, read-only; its manifest's SHA-256 names every byte of it.

    `sites` are those that may have it, None any. Without a source, or with `egress_ok: false`, only those that hold it
    already are places for the job. `size_gb` is the most that it may have.
    """

    name: Name
    sha256: Digest
    size_gb: float = Field(gt=0, le=1e6)
    source: str | None = Field(
        default=None,
        max_length=2000,
        pattern=r"^(https?|file)://[A-Za-z0-9._:\[\]-]*/[A-Za-z0-9._~/%+,=@-]*$",
        description="the folder that holds manifest.json: https://…, or file:///… of the sites' hosts",
    )
    sites: tuple[SiteId, ...] | None = Field(default=None, min_length=1, max_length=1000)
    egress_ok: bool = True


class BidStepTerms(_Strict):
    """Progress above a speed is worth less to the tenant."""

    above_samples_per_s: float = Field(gt=0, le=1e15)
    bid_micros_per_million_samples: int = Field(ge=0, le=BUDGET_MICROS_MAX)


class ProfileTerms(_Strict):
    """What a step of the script took on one GPU, as `hansa profile` measured it; the market starts from it.

    It is the tenant's word, as `flops_per_sample` is: speeds that sites report soon weigh more, and none answers for it.
    """

    gpu_type: str
    batch_per_gpu: int = Field(ge=1, le=1_000_000)
    steps: int = Field(ge=1, le=1_000_000, description="how many were timed")
    step_s: float = Field(gt=0, le=1e6, description="the median step")

    @field_validator("gpu_type")
    @classmethod
    def _known_type(cls, gpu_type: str) -> str:
        return _known(gpu_type)


class MarketTerms(_Strict):
    """What the tenant offers and where the job may go.

    `budget_micros` is held at submit and never exceeded. The bid is a value per million samples:
    what progress is worth. Left out, it is the budget spread over all samples, so that a tenant
    who only knows the most that a job may cost has bid already.
    """

    budget_micros: int = Field(ge=1, le=BUDGET_MICROS_MAX)
    bid_micros_per_million_samples: int | None = Field(default=None, ge=1, le=BUDGET_MICROS_MAX)
    sites_max: int = Field(default=1, ge=1, le=SITES_PER_JOB_MAX)
    sites_allowed: tuple[SiteId, ...] | None = Field(default=None, min_length=1, max_length=1000)
    deadline_ms: int | None = Field(default=None, ge=0, description="UTC milliseconds")
    start: Literal["round", "now"] = Field(
        default="round", description="now: at once at the last prices, for small jobs; refused where that cannot be"
    )
    bid_steps: tuple[BidStepTerms, ...] = Field(
        default=(), max_length=16, description="lower and lower bids for speed beyond what the first bid is for"
    )
    data: DataTerms | None = None
    mixed_types: bool = Field(default=False, description="two sites may give GPUs of different types")
    workload: Workload
    profile: tuple[ProfileTerms, ...] = Field(
        default=(), max_length=PROFILE_ROWS_MAX, description="what `hansa profile` measured"
    )
    sync: SyncPlan = SyncPlan()

    @model_validator(mode="after")
    def _has_sites_to_compare(self) -> Self:
        if self.sync.merge != "mean" and self.sites_max < ROBUST_SITES_MIN:
            message = (
                f"merge: {self.sync.merge} compares at least {ROBUST_SITES_MIN} sites, but sites_max is "
                f"{self.sites_max}; raise it, or leave merge out"
            )
            raise ValueError(message)
        return self

    @model_validator(mode="after")
    def _streams_in_turn(self) -> Self:
        """Check what a market's snapshot does not carry, so not every SyncPlan that is read can be asked for it."""
        sync = self.sync
        if sync.strategy == "streaming" and sync.period_steps % sync.fragments:
            message = f"period_steps {sync.period_steps} is not a multiple of the {sync.fragments} fragments"
            raise ValueError(message)
        if sync.strategy == "streaming" and sync.overlap_steps >= sync.period_steps // sync.fragments:
            longest = sync.period_steps // sync.fragments - 1
            message = (
                f"overlap_steps {sync.overlap_steps} reaches into the next fragment's turn; at most {longest} fit "
                f"between {sync.fragments} fragments in {sync.period_steps} steps"
            )
            raise ValueError(message)
        return self


class JobSpec(_Strict):
    """A training job as the wire carries it; `workdir_digest` names the uploaded bundle."""

    name: Name
    run: str = Field(min_length=1, max_length=RUN_LENGTH_MAX)
    setup: str | None = Field(default=None, max_length=RUN_LENGTH_MAX)
    envs: dict[EnvironmentName, EnvironmentValue] = Field(default_factory=dict, max_length=ENVS_MAX)
    workdir_digest: Digest
    resources: Resources
    secrets: tuple[SecretName, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=SECRETS_PER_JOB_MAX,
        description="names of the tenant's stored secrets; ranks find each as a file in $HANSA_SECRETS",
    )
    market: MarketTerms

    data: tuple[DataReference, ...] | None = Field(default=None, min_length=1, max_length=DATASETS_PER_JOB_MAX)

    @field_validator("data")
    @classmethod
    def _each_dataset_once(cls, data: tuple[DataReference, ...] | None) -> tuple[DataReference, ...] | None:
        if data is not None and len({reference.name for reference in data}) != len(data):
            message = "each dataset needs a name of its own"
            raise ValueError(message)
        return data

    @field_validator("run")
    @classmethod
    def _runs_a_script(cls, run: str) -> str:
        split_run(run)
        return run

    @field_validator("envs")
    @classmethod
    def _not_ours(cls, envs: dict[str, str]) -> dict[str, str]:
        for name in envs:
            if name.startswith(("HANSA_", "LD_", "PYTHON")):
                message = f"{name} is set by the site; choose a name without HANSA_, LD_ or PYTHON in front"
                raise ValueError(message)
        return envs

    @field_validator("secrets")
    @classmethod
    def _each_secret_once(cls, secrets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if secrets is not None and len(set(secrets)) != len(secrets):
            message = "each secret may be named once"
            raise ValueError(message)
        return secrets

    @model_validator(mode="after")
    def _bids_fall(self) -> Self:
        steps = self.market.bid_steps
        bids = [self.bid_micros_per_million_samples, *(step.bid_micros_per_million_samples for step in steps)]
        speeds = [step.above_samples_per_s for step in steps]
        if any(later >= earlier for earlier, later in itertools.pairwise(bids)) or any(
            later <= earlier for earlier, later in itertools.pairwise(speeds)
        ):
            message = "market.bid_steps must fall below the bid, each below the one before, at rising speeds"
            raise ValueError(message)
        return self

    @property
    def bid_micros_per_million_samples(self) -> int:
        """What a million samples are worth to the tenant, stated or derived from the budget."""
        if self.market.bid_micros_per_million_samples is not None:
            return self.market.bid_micros_per_million_samples
        return max(1, self.market.budget_micros * 1_000_000 // self.market.workload.samples)


def _known(gpu_type: str) -> str:
    if gpu_type not in GPU_TYPES:
        known = ", ".join(sorted(GPU_TYPES))
        message = f"unknown GPU type {gpu_type!r}; the market knows {known}"
        raise ValueError(message)
    return gpu_type


def split_run(run: str) -> list[str]:
    """Return the script and its arguments from a `run` line, without the leading `python`.

    There is no shell: the ranks are started as `python -m training.launch SCRIPT ARGUMENTS`.

    Raises ValueError where the line does not name a Python file inside the workdir.
    """
    try:
        words = shlex.split(run)
    except ValueError as error:
        message = f"run cannot be read ({error}); quote its arguments as in a shell"
        raise ValueError(message) from None
    if words and re.fullmatch(r"python3?", words[0]):
        words = words[1:]
    if not words or not words[0].endswith(".py"):
        message = "run must name a Python file in the workdir, such as: python train.py --width 64"
        raise ValueError(message)
    script = PurePosixPath(words[0])
    if script.is_absolute() or ".." in script.parts:
        message = f"run names {words[0]!r}, which lies outside the workdir"
        raise ValueError(message)
    return words
