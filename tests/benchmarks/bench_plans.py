"""What choosing a plan for every configuration costs: columns across sites priced per second of one core, open against stated plans.

HANSA_COMPILE=1 python -m tests.benchmarks.bench_plans
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np

from broker.allocation import kernel
from broker.allocation.compile import compile_market
from broker.allocation.compiled import compiled_loop, is_compiled
from broker.allocation.generate import generate
from broker.allocation.instance import Instance, Int

JOBS: Final = 200
SITES: Final = 40
COLUMNS_MAX: Final = 2_000_000


@compiled_loop
def price(instance: Instance, columns_max: int, out: Int, ways: Int) -> int:
    """Price up to `columns_max` spans of all jobs at all their patterns; count the plans that were taken by way."""
    done, spans, patterns = 0, instance.spans, instance.patterns
    for job in range(len(instance.jobs.own)):
        for span in range(spans.start[job], spans.start[job + 1]):
            family = spans.family[span]
            for pattern in range(patterns.family_start[family], patterns.family_start[family + 1]):
                if done == columns_max:
                    return done
                if kernel.span_column(instance, job, span, pattern, out) > 0.0:
                    ways[out[kernel.WAY]] += 1
                done += 1
    return done


def main() -> None:
    """Print the table."""
    stated = compile_market(generate("B", JOBS, SITES, 1, ())).instance
    opened = stated._replace(
        jobs=stated.jobs._replace(
            sync_open=np.ones(JOBS, np.bool_), period_steps=np.full(JOBS, 20.0), fragments=np.full(JOBS, 4.0)
        )
    )
    out = np.zeros(kernel.SPAN_OUT, np.int64)
    rates = {}
    columns_max = COLUMNS_MAX if is_compiled() else 20_000
    print(f"{'plans':8} {'columns':>9} {'million/s':>9}   taken")
    for name, instance in (("stated", stated), ("open", opened)):
        ways = np.zeros(len(kernel.sync_rule.WAYS) + 1, np.int64)
        price(instance, 1_000, out, ways)
        ways[:] = 0
        started = time.process_time()
        done = price(instance, columns_max, out, ways)
        rates[name] = done / (time.process_time() - started)
        named = {
            f"{way.strategy} <= {way.period_steps_max}": int(n)
            for way, n in zip(kernel.sync_rule.WAYS, ways, strict=False)
        }
        taken = ", ".join(f"{way} {n}" for way, n in named.items() if n) or "as stated"
        print(f"{name:8} {done:>9} {rates[name] / 1e6:>9.2f}   {taken}")
    print(f"an open plan costs {rates['stated'] / rates['open']:.1f} times a stated one")


if __name__ == "__main__":
    main()
