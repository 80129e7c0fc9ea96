"""Markets by seed: the two families that the optimiser is measured on, of any size.

Family A is loose: a job may fill a pool. Family B is fragmented: a job gets at most a quarter of
any pool and links carry 0.3 of their bandwidth, so that jobs must span sites and links are scarce.
Demand is 1.3 times the GPUs there are. Jobs are a mix of known models, from a small image
classifier to a language model of seven billion parameters, with GPU types of the catalogue.

The same arguments give the same market, on every machine that runs the same numpy: all draws come
from numpy's PCG64. A feature's draws are its own, so that turning it on leaves the rest as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal, get_args

import numpy as np

from broker.allocation.errors import AllocationError
from broker.allocation.generate_features import FEATURES, add_features
from broker.allocation.instance import NONE, Flag, Int
from broker.allocation.snapshot import JOBS_MAX, LINKS_MAX
from broker.allocation.table_rows import TablesBuilder
from broker.allocation.tables import CODECS, RESIDENCIES, STRATEGIES, Tables
from training.catalogue import GPU_TYPES

Family = Literal["A", "B"]

SITES_MAX: Final = 4_000
NOW_MS: Final = 1_800_000_000_000
CREDIT: Final = 1_000_000
TERM_S: Final = 3600
LOAD: Final = 1.3
# Family B: what is left of a pool for one job, and of a link's bandwidth.
QUOTA_SHARE: Final = 0.25
BANDWIDTH_SHARE: Final = 0.3

# GPU type, what sites ask for an hour in credits (near what clouds ask for them on demand at length).
TYPES: Final = (("A100", 1.10), ("H100", 3.20), ("RTX6000", 0.42), ("T4", 0.20), ("V100", 0.60))
_ACHIEVED: Final = np.array([GPU_TYPES[name].peak_flops_per_s * GPU_TYPES[name].achieved_share for name, _ in TYPES])
_ASKS: Final = np.array([ask for _, ask in TYPES])
# parameters, FLOPs of forward and backward per sample, samples per GPU and step, bytes read per
# sample, whether it fits small GPUs, and its share of jobs. A transformer costs 6 x parameters x
# tokens per sample; the others are three times their published forward pass.
_MODELS: Final = np.array(
    [
        (11.2e6, 1.7e9, 256, 3e3, 1, 0.18),  # ResNet-18, CIFAR-10
        (25.6e6, 2.5e10, 64, 110e3, 1, 0.20),  # ResNet-50, ImageNet
        (61.9e6, 2.0e11, 16, 150e3, 1, 0.12),  # YOLOv3
        (38e6, 1.6e11, 24, 240e3, 1, 0.10),  # DeepSpeech 2
        (110e6, 3.4e11, 32, 4e3, 1, 0.18),  # BERT base, 512 tokens
        (355e6, 2.2e12, 16, 4e3, 1, 0.12),  # GPT-2 medium, 1,024 tokens
        (1.3e9, 1.6e13, 8, 8e3, 0, 0.07),  # 1.3 B, 2,048 tokens
        (6.7e9, 8.2e13, 4, 8e3, 0, 0.03),  # 6.7 B, 2,048 tokens
    ]
)
_COUNTS: Final = np.array([1, 2, 4, 8, 16, 32, 64])
_COUNT_SHARES: Final = np.array([0.2, 0.2, 0.2, 0.2, 0.12, 0.06, 0.02])


class GenerateError(AllocationError):
    """A market that cannot be drawn as asked."""

    code = "allocation.generate_invalid"


def generate(family: Family, jobs: int, sites: int, seed: int, features: Iterable[str] = ()) -> Tables:
    """Return a market of a family. `features` are of FEATURES. Raises GenerateError where none can be drawn."""
    chosen = frozenset(features)
    _possible(family, jobs, sites, seed, chosen)
    draw = np.random.Generator(np.random.PCG64(seed))
    build = TablesBuilder()
    regions = max(1, sites // 12)
    continents = min(6, max(2, sites // 30))
    region = draw.integers(0, regions, sites)
    continent = region % continents
    site_names = [f"site{index:04d}" for index in range(sites)]
    texts = sorted(
        {
            *site_names,
            *(f"region{index:03d}" for index in np.unique(region)),
            *(f"continent{index}" for index in np.unique(continent)),
            *(name for name, _ in TYPES),
        }
    )
    names = {text: index for index, text in enumerate(texts)}
    pool_site, pool_type = _pools(draw, sites)
    book = _Book(draw, jobs, sites)
    build.add(
        "sites",
        site_id=[names[name] for name in site_names],
        listens=draw.random(sites) < 0.7,
        region=[names[f"region{index:03d}"] for index in region],
        continent=[names[f"continent{index}"] for index in continent],
        to_region=np.zeros(sites, np.int64),
        to_continent=np.full(sites, 20_000),
        beyond=np.full(sites, 80_000),
    )
    size = draw.choice([0.25, 0.5, 1.0, 1.0, 2.0, 4.0], len(pool_site))
    # The sizes' demand by type is not matched: some types are dear, which is what prices are for.
    capacity = np.maximum(2, np.rint(size * book.gpus.sum() / LOAD / size.sum())).astype(np.int64)
    build.add(
        "pools",
        site=pool_site,
        gpu_type=[names[TYPES[index][0]] for index in pool_type],
        capacity_gpus=capacity,
        ask_micros_per_gpu_hour=np.rint(_ASKS[pool_type] * draw.uniform(0.85, 1.2, len(pool_site)) * CREDIT),
        flops_per_s=np.full(len(pool_site), np.nan),
        intra_site_bits_per_s=np.full(len(pool_site), np.nan),
        job_gpus_max=np.maximum(1, np.floor(capacity * QUOTA_SHARE)) if family == "B" else np.full(len(capacity), -1),
        drains_at_ms=np.full(len(pool_site), -1),
    )
    _links(build, draw, region, continent, BANDWIDTH_SHARE if family == "B" else 1.0)
    book.write(build, names)
    build.add(
        "market",
        version=[2],
        round_number=[1],
        taken_at_ms=[NOW_MS],
        seed=[seed],
        term_s=[TERM_S],
        market_equity_micros=[0],
        fee_basis_points=[100],
        floor_penalty_micros_per_gpu_hour=[0],
        slots=[1],
        slot_s=[3600],
        waiting_discount=[0.0],
    )
    build.add("names", text=texts)
    tables = build.tables()
    return add_features(tables, chosen, seed) if chosen else tables


def _possible(family: str, jobs: int, sites: int, seed: int, features: frozenset[str]) -> None:
    """Refuse what cannot be drawn."""
    unknown = sorted(features - set(FEATURES))
    for wrong, message in (
        (family not in get_args(Family), f"there is no family {family!r}; choose A (loose) or B (fragmented)"),
        (not 1 <= jobs <= JOBS_MAX, f"jobs is {jobs}; choose 1 to {JOBS_MAX}"),
        (not 1 <= sites <= SITES_MAX, f"sites is {sites}; choose 1 to {SITES_MAX}"),
        (not 0 <= seed < 2**63, f"seed is {seed}; choose a whole number from 0 to 2^63 - 1"),
        (bool(unknown), f"unknown feature {unknown[:1]}; choose of {', '.join(FEATURES)}"),
    ):
        if wrong:
            raise GenerateError(message)


def _pools(draw: np.random.Generator, sites: int) -> tuple[Int, Int]:
    """Return site and type of the pools: 3 to 5 types at each site, in canonical order."""
    rank = draw.random((sites, len(TYPES))).argsort(axis=1).argsort(axis=1)
    site, kind = np.nonzero(rank < draw.integers(3, 6, sites)[:, None])
    return site, kind


def _links(build: TablesBuilder, draw: np.random.Generator, region: Int, continent: Int, share: float) -> None:
    """Add a ring and random chords, of degree 6 on average, each both ways."""
    sites = len(region)
    ring = np.stack([np.arange(sites), (np.arange(sites) + 1) % sites], axis=1)
    chords = draw.integers(0, sites, (2 * sites, 2))
    pairs = np.sort(np.concatenate([ring, chords]), axis=1)
    pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
    if 2 * len(pairs) > LINKS_MAX:
        raise GenerateError(f"{sites} sites would have {2 * len(pairs)} links, at most {LINKS_MAX}; choose fewer sites")
    near = region[pairs[:, 0]] == region[pairs[:, 1]]
    same = continent[pairs[:, 0]] == continent[pairs[:, 1]]
    bandwidth = draw.choice([1e9, 2.5e9, 1e10, 1e10, 2.5e10, 1e11], len(pairs)) * share
    delay = np.where(near, draw.uniform(0.001, 0.005, len(pairs)), draw.uniform(0.01, 0.03, len(pairs)))
    delay = np.where(same, delay, delay + 0.05)
    both = np.concatenate([pairs, pairs[:, ::-1]])
    order = np.lexsort((both[:, 1], both[:, 0]))
    price = np.where(near, 0, np.where(same, 10_000, 50_000))
    build.add(
        "links",
        from_site=both[order, 0],
        to_site=both[order, 1],
        bandwidth_bits_per_s=np.tile(bandwidth, 2)[order],
        delay_s=np.tile(delay, 2)[order],
        loss=np.zeros(len(order)),
        egress_price_micros_per_gb=np.tile(price, 2)[order],
    )


class _Book:
    """The jobs of a market as they are drawn."""

    def __init__(self, draw: np.random.Generator, jobs: int, sites: int) -> None:
        """Draw everything about the jobs that does not depend on pools."""
        model = draw.choice(len(_MODELS), jobs, p=_MODELS[:, 5] / _MODELS[:, 5].sum())
        self.parameters, self.flops, self.batch, self.read = _MODELS[model, :4].T
        small = _MODELS[model, 4] > 0
        # Large models want many GPUs.
        count = _COUNTS[draw.choice(len(_COUNTS), jobs, p=_COUNT_SHARES)]
        self.gpus: Int = np.where(small, count, np.maximum(8, count))
        self.types = _accepted(draw, small)
        self.sites_max: Int = draw.choice([1, 2, 3], jobs, p=[0.5, 0.3, 0.2])
        self.period: Int = draw.choice([20, 50, 100, 500], jobs)
        self.home: Int = draw.integers(0, sites, jobs)
        self.residency: Int = draw.choice([1, 2, 3], jobs, p=[0.25, 0.35, 0.40])
        # What a million samples cost on an A100 at its usual ask, and a bid around that.
        a100 = _ACHIEVED[0]
        cost = 1e6 * self.flops / a100 / 3600 * _ASKS[0] * CREDIT
        self.bid: Int = np.maximum(1, np.rint(cost * draw.lognormal(0.35, 0.5, jobs))).astype(np.int64)
        speed = self.gpus * a100 / self.flops
        hours = np.exp(draw.uniform(np.log(0.5), np.log(300), jobs))
        self.samples: Int = np.clip(np.rint(speed * hours * 3600), 1, 1e13).astype(np.int64)
        # A hold pays for a term at most: value levels off between half and three times the usual speed.
        worth = self.bid * speed * 3600 / 1e6
        self.hold: Int = np.rint(worth * TERM_S / 3600 * np.exp(draw.uniform(np.log(0.5), np.log(6), jobs))).astype(
            np.int64
        )
        slack = np.exp(draw.uniform(np.log(0.5), np.log(4), jobs))
        due = NOW_MS + np.rint(hours * slack * 3_600_000).astype(np.int64)
        self.deadline: Int = np.where(draw.random(jobs) < 0.25, due, NONE)

    def write(self, build: TablesBuilder, names: dict[str, int]) -> None:
        """Add the jobs and their requests."""
        jobs = len(self.gpus)
        digits = max(5, len(str(jobs - 1)))
        whole = np.zeros(jobs, np.int64)
        build.add(
            "jobs",
            job_id=[f"job{index:0{digits}d}" for index in range(jobs)],
            version=whole + 1,
            submitted_ms=NOW_MS - 1_000 * (jobs - np.arange(jobs)),
            sites_max=self.sites_max,
            site_list=np.full(jobs, NONE),
            samples=self.samples,
            batch_per_gpu=self.batch,
            parameters=self.parameters,
            flops_per_sample=self.flops,
            strategy=whole + STRATEGIES.index("auto"),
            codec=whole + CODECS.index("auto"),
            period_steps=self.period,
            outer_learning_rate=whole + 0.7,
            outer_momentum=whole + 0.9,
            checkpoint_rounds=whole + 5,
            patience_s=whole + 60.0,
            samples_done=whole,
            bid_micros_per_million_samples=self.bid,
            hold_left_micros=self.hold,
            deadline_ms=self.deadline,
            tenant_id=np.full(jobs, NONE),
            data_home=self.home,
            data_residency=np.minimum(self.residency, len(RESIDENCIES) - 1),
            data_bytes_per_sample=self.read,
            mixed_types=np.zeros(jobs, np.bool_),
        )
        owner, kind = np.nonzero(self.types)
        build.add(
            "accelerators",
            job=owner,
            gpu_type=np.array([names[name] for name, _ in TYPES])[kind],
            count_min=np.maximum(1, self.gpus[owner] // 4),
            count_max=2 * self.gpus[owner],
        )


def _accepted(draw: np.random.Generator, small: Flag) -> Flag:
    """Return which types each job accepts: large models none of the small GPUs, at least one always."""
    chance = draw.random((len(small), len(TYPES)))
    fits = np.array([name in {"A100", "H100"} for name, _ in TYPES]) | small[:, None]
    chance = np.where(fits, chance, 1.0)
    accepted: Flag = (chance < 0.6) | (chance == chance.min(axis=1, keepdims=True)) & fits
    return accepted
