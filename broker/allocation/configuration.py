"""A configuration: what a job could be given, and how fast it would then run.

`broker.allocation.candidates` lists the configurations of a job; the model chooses among them;
a placement is the one that the job won.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from pydantic import Field, model_validator

from broker.allocation.document import Row
from training.spec import SITES_PER_JOB_MAX, SiteId, SyncPlan
from training.throughput import Prediction, SitePart

# Bounds on the work per job; the next step up is a column oracle instead of enumeration.
SPANS_TRIED_MAX: Final = 1024
# A job near its end gets a shorter term, so that its hold need not cover time it will not use:
# a quarter more than predicted, since predictions err, and long enough to be worth a lease.
TERM_MARGIN: Final = 1.25
TERM_S_MIN: Final = 60
PLAN_STATED: Final = (
    "strategy",
    "codec",
    "period_steps",
    "outer_learning_rate",
    "outer_momentum",
    "checkpoint_rounds",
    "patience_s",
)


class Part(Row):
    """The share of one pool in a configuration. `pool_id` is `site/gpu_type`."""

    pool_id: str
    site_id: SiteId
    gpu_type: str
    gpus: int = Field(ge=1)


class Traffic(Row):
    """What the job's synchronisation sends over one directed link, averaged over time."""

    from_site: SiteId
    to_site: SiteId
    bytes_per_s: int = Field(ge=0, description="rounded up")


class Configuration(Row):
    """GPUs in one or several pools, the resolved sync plan, and the predicted speed.

    The times are of one inner step: compute, all-reduce inside the slowest site, and the share of
    the sync round between sites; `hub_site` is set where there are several sites.
    """

    parts: tuple[Part, ...] = Field(min_length=1, max_length=SITES_PER_JOB_MAX)
    sync: SyncPlan
    hub_site: SiteId | None = None
    samples_per_s: float = Field(gt=0)
    compute_s: float = Field(ge=0)
    intra_site_s: float = Field(ge=0)
    inter_site_s: float = Field(ge=0)
    step_s: float = Field(gt=0)
    traffic: tuple[Traffic, ...] = ()

    @model_validator(mode="after")
    def _in_site_order(self) -> Configuration:
        sites = self.site_ids
        if list(sites) != sorted(set(sites)):
            message = f"parts must be sorted by site, each site once; got {', '.join(sites)}"
            raise ValueError(message)
        return self

    @property
    def key(self) -> str:
        """The configuration's name: its GPUs by pool, such as `ada/H100:8+bob/H100:8`.

        The sync plan and the hub follow from the pools and the links, so a site's veto of a key
        also holds when a link's speed changes the codec.
        """
        return "+".join(f"{part.pool_id}:{part.gpus}" for part in self.parts)

    @property
    def site_ids(self) -> tuple[str, ...]:
        """The sites of the configuration, in order."""
        return tuple(part.site_id for part in self.parts)

    @property
    def gpus(self) -> int:
        """All GPUs, in all sites together."""
        return sum(part.gpus for part in self.parts)


def as_sold(plan: SyncPlan, *, is_open: bool) -> SyncPlan:
    """Return what a configuration states of a plan: all that the market weighs, and no more than that.

    The rest stays as the tenant wrote it (`SyncPlan.placed`). `is_open` says that the plan was the market's to choose.
    """
    stated = set(PLAN_STATED)
    if is_open:
        stated |= {"fragments", "overlap_steps"} if plan.strategy == "streaming" else {"fragments"}
    return SyncPlan.model_validate(plan.model_dump(include=stated))


def configuration_of(
    parts: Sequence[SitePart], sync: SyncPlan, hub_site: str | None, prediction: Prediction
) -> Configuration:
    """Return the configuration that a prediction is of."""
    return Configuration(
        parts=tuple(
            Part(
                pool_id=f"{part.site_id}/{part.gpu_type}", site_id=part.site_id, gpu_type=part.gpu_type, gpus=part.gpus
            )
            for part in parts
        ),
        sync=sync,
        hub_site=hub_site,
        samples_per_s=prediction.samples_per_s,
        compute_s=prediction.compute_s,
        intra_site_s=prediction.intra_site_s,
        inter_site_s=prediction.inter_site_s,
        step_s=prediction.step_s,
        traffic=tuple(
            Traffic(from_site=row.from_site, to_site=row.to_site, bytes_per_s=math.ceil(row.bytes_per_s))
            for row in prediction.traffic
        ),
    )
