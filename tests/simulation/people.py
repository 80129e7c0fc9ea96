"""What people do in the simulated world: tenants submit and cancel, operators meddle, things break."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select

from broker.cancel import request_cancel
from broker.database.tables import Job
from broker.errors import BrokerError
from broker.submit import submit_job
from broker.transitions import FINAL_JOB_STATES
from tests.simulation.founding import TENANT_ID, WORKDIR
from tests.simulation.simulated_site import SAMPLES_PER_ROUND, SimulatedSite
from training.spec import JobSpec

if TYPE_CHECKING:
    from tests.simulation.world import World


def tenant(world: World) -> None:
    """Let a tenant submit a job, perhaps cancel one, and come back later."""
    if world.faults.meddle > 0:
        world.after(world.rng.random() * 8, lambda: tenant(world))
        _submit(world)
        if world.rng.random() < world.faults.meddle:
            _cancel_one(world)


def _submit(world: World) -> None:
    world.jobs += 1
    least = world.rng.choice([1, 2, 3, 4, 5])
    spec = JobSpec.model_validate(
        {
            "name": f"job-{world.jobs}",
            "run": "python train.py",
            "workdir_digest": WORKDIR,
            "resources": {
                "accelerators": [
                    {"gpu_type": "cpu-slot", "count_min": least, "count_max": least + world.rng.randrange(3)}
                ]
            },
            "market": {
                "budget_micros": world.rng.randrange(5, 80) * 1_000_000,
                # To some an ask matters, so that it may move them; others only want more.
                "bid_micros_per_million_samples": world.rng.randrange(5, 90) * world.rng.choice([2_000, 1_000_000]),
                "sites_max": world.rng.choice([1, 3, 3]),
                "start": world.rng.choice(["round", "round", "round", "now"]),
                "workload": {
                    "samples": world.rng.randrange(5, 60) * SAMPLES_PER_ROUND,
                    "batch_per_gpu": 8,
                    "parameters": 100_000,
                    "flops_per_sample": 1e7,
                },
            },
        }
    )
    try:
        job = submit_job(world.market, TENANT_ID, spec)
    except BrokerError as refusal:
        world.story.add(world.true_s, f"refused: {refusal}")
        return
    world.story.add(world.true_s, f"submitted {job.job_id}: {least}+ slots")


def _cancel_one(world: World) -> None:
    open_jobs = world.market.database.read(
        lambda session: list(session.scalars(select(Job.job_id).where(Job.state.not_in(sorted(FINAL_JOB_STATES)))))
    )
    if open_jobs:
        job_id = world.rng.choice(sorted(open_jobs))
        world.story.add(world.true_s, f"cancel {job_id}")
        request_cancel(world.market, TENANT_ID, job_id)


def mischief(world: World) -> None:
    """Let clocks step, agents die and come back, power fail, and owners change their minds."""
    world.after(0.5, lambda: mischief(world))
    if world.rng.random() < world.faults.step_utc:
        seconds = world.rng.uniform(-300, 300)
        world.story.add(world.true_s, f"UTC steps by {seconds:.0f} s")
        world.clock.step_utc_s(seconds)
    for site in world.sites.values():
        if not site.agent_up:
            if world.rng.random() < 0.1:
                world.story.add(world.true_s, f"{site.site_id}: the agent starts")
                site.start_agent()
        elif world.rng.random() < world.faults.break_site:
            _disable(world, site)
        elif world.rng.random() < world.faults.isolate:
            seconds = world.rng.choice([0.5, 2.0, 4.0, 12.0])
            world.story.add(world.true_s, f"{site.site_id}: cut off for {seconds} s")
            site.isolate(world.true_s + seconds)
        elif world.rng.random() < world.faults.isolate:
            world.part_two(world.rng.random() * 6)
        elif world.rng.random() < world.faults.meddle / 10:
            site.ask = world.rng.randrange(1, 6) * 100_000
            site.draining, site.vetoing = world.rng.random() < 0.1, world.rng.random() < 0.1
        elif world.rng.random() < world.faults.meddle / 3:
            site.ask = world.rng.randrange(1, 9) ** 2 * 20_000


def _disable(world: World, site: SimulatedSite) -> None:
    if world.rng.random() < 0.5:
        world.story.add(world.true_s, f"{site.site_id}: the agent is killed")
        site.kill_agent()
    else:
        world.story.add(world.true_s, f"{site.site_id}: the power fails")
        site.lose_power()
