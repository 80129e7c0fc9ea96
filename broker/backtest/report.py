"""A backtest's results as one self-contained HTML page, and as JSON for who goes on computing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from broker.backtest.bids import ASSUMPTIONS
from broker.backtest.coalition import SITES_EXACT_MAX
from broker.backtest.misreport import Temptation, quantiles
from broker.backtest.plots import Axis, Line, bars, cumulative, lines, spanning
from broker.backtest.policies.market import TERM_S
from broker.backtest.replay import ALONE, FEDERATED, PolicyRun, Results
from broker.backtest.value import CONFIDENCE, RESAMPLES, Interval
from broker.backtest.workload import ELASTIC_GPUS_MAX
from pricing.money import format_credits

Real = NDArray[np.float64]

HOUR_S: Final = 3600.0
DAY_S: Final = 86_400.0
PRICE_POINTS: Final = 400
PRICES_SHOWN: Final = 9

_STYLE: Final = """
:root{color-scheme:light}
body{font:15px/1.5 system-ui,sans-serif;color:#1b1b1b;background:#fff;max-width:1120px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0 0 .2rem}h2{font-size:1.15rem;margin:2.2rem 0 .4rem}p{margin:.4rem 0 .8rem}
table{border-collapse:collapse;margin:.6rem 0 1rem;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .7rem;border-bottom:1px solid #ddd;text-align:right;vertical-align:top}
th{font-weight:600;border-bottom:2px solid #999}th:first-child,td:first-child{text-align:left;white-space:nowrap}
td.text,th.text{text-align:left}.wide{overflow-x:auto}.note{color:#555;font-size:.92em}
.figures{display:flex;flex-wrap:wrap;gap:1rem 2.4rem;margin:1rem 0}.figures div{min-width:9rem}
.figures b{display:block;font-size:1.5rem;font-weight:600}.figures span{color:#555;font-size:.9em}
svg{max-width:100%;height:auto;display:block;margin:.5rem 0 1rem}svg text{font:12px system-ui,sans-serif;fill:#222}
svg .grid{stroke:#e4e4e4;stroke-width:1}svg .ink{stroke:#222;stroke-width:1.2}
"""


def html(results: Results) -> str:
    """Return the page."""
    sections = [
        _head(results),
        _assumptions(results),
        _policies(results),
        _completion(results),
        _federation(results),
        _games(results),
        _misreports(results),
        _prices(results),
        _sites(results),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Backtest of {escape(results.trace.name)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(section for section in sections if section)}</body></html>\n"
    )


def common(results: Results) -> NDArray[np.bool_]:
    """Return which jobs every policy finished: completion times are compared on these alone."""
    finished = np.ones(len(results.workload), dtype=bool)
    for each in results.runs:
        finished &= each.run.finished == 1
    return finished


def document(results: Results) -> dict[str, Any]:
    """Return the results as plain values. What depends on the machine stands under `timing` alone."""
    shared = common(results)
    reference = results.run("alone") or results.runs[0]
    return {
        "trace": {"name": results.trace.name, "jobs": len(results.workload), "omitted_jobs": results.omitted_jobs},
        "settings": {
            "bids": results.settings.bids.value,
            "seed": results.settings.seed,
            "bid_draws": results.settings.bid_draws,
            "patience": results.settings.patience,
            "round_s": results.settings.round_s,
            "throughput": results.table,
            "solver": results.solver,
            "capacity_rule": results.sites.capacity_rule,
        },
        "sites": [
            {
                "name": name,
                "gpu_type": results.sites.gpu_types[kind],
                "capacity_gpus": int(capacity),
                "ask_micros": int(ask),
            }
            for name, kind, capacity, ask in zip(
                results.sites.names,
                results.sites.kind.tolist(),
                results.sites.capacity,
                results.sites.ask_micros,
                strict=True,
            )
        ],
        "policies": {each.run.policy: _policy_document(each, shared, reference) for each in results.runs},
        "jobs_finished_by_all": int(shared.sum()),
        "welfare_ratio": {name: _interval(interval) for name, interval in results.ratios.items()},
        "weekly_welfare": {name: _rounded(series) for name, series in results.weekly.items()},
        "site_gains": {
            name: [
                {
                    "site": gain.site,
                    "surplus": round(gain.surplus, 4),
                    "rent": round(gain.rent, 4),
                    "alone": round(gain.alone, 4),
                    "worse_off": gain.worse_off,
                }
                for gain in gains
            ]
            for name, gains in results.gains.items()
        },
        "games": [
            {
                "time": results.trace.time(game.time_s).isoformat(),
                "jobs": game.jobs,
                "grand": round(game.grand, 6),
                "alone": _rounded(game.alone),
                "owen": _rounded(game.owen),
                "published": _rounded(game.published),
                "shapley": _rounded(game.shapley),
                "shapley_error": _rounded(game.shapley_error),
                "core_slack": round(game.core_slack, 6),
                "published_slack": round(game.published_slack, 6),
                "gap": round(game.gap, 6),
                "coalitions": game.coalitions,
                "distance": round(game.distance, 6),
                "owen_worse_off": game.worse_off(),
            }
            for game in results.games
        ],
        "misreports": {
            kind: {
                "agents": len(found),
                "of_payoff_median_p95": _rounded(quantiles([each.of_payoff for each in found])),
                "of_stake_median_p95": _rounded(quantiles([each.of_stake for each in found])),
            }
            for kind, found in _by_kind(results.temptations).items()
        },
        "timing": {
            each.run.policy: {
                "wall_s": round(each.wall_s, 3),
                "cpu_s": round(each.cpu_s, 3),
                "events_per_minute": round(each.events_per_minute),
            }
            for each in results.runs
        },
    }


def as_json(results: Results) -> str:
    """Return the results as JSON text, keys in order."""
    return json.dumps(document(results), indent=1, sort_keys=True) + "\n"


def _policy_document(each: PolicyRun, shared: NDArray[np.bool_], reference: PolicyRun) -> dict[str, Any]:
    run = each.run
    return {
        "welfare": round(float(run.welfare.sum()), 4),
        "value": round(float(run.value.sum()), 4),
        "cost": round(float(run.cost.sum()), 4),
        "welfare_over_reference": _finite(float(run.welfare.sum() / reference.run.welfare.sum())),
        "completion_s": {key: _finite(value) for key, value in _completion_figures(run.completion_s[shared]).items()},
        "waiting_mean_s": _finite(_mean(run.waiting_s[shared])),
        "makespan_s": round(run.makespan_s, 3),
        "utilisation": _rounded(run.utilisation),
        "away_share": round(run.away_share, 6),
        "restart_share": round(run.restart_share, 6),
        "uplift_share": round(run.uplift_share, 6),
        "site_rent": _rounded(run.site_rent),
        "site_surplus": _rounded(run.site_surplus),
        "counters": run.counters,
        "events": run.events,
        "rounds": each.rounds,
        "bound_gap": round(each.bound_gap, 8),
    }


def _completion_figures(seconds: Real) -> dict[str, float]:
    if not len(seconds):
        return dict.fromkeys(("mean", "p50", "p95", "p99"), float("nan"))
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
    return {"mean": float(seconds.mean()), "p50": float(p50), "p95": float(p95), "p99": float(p99)}


def _head(results: Results) -> str:
    first, last = results.trace.time(results.trace.arrival_s[0]), results.trace.time(results.trace.arrival_s[-1])
    market, alone = results.run(FEDERATED), results.run("alone")
    figures = []
    for reference, interval in results.ratios.items():
        figures.append(
            (
                f"{interval.estimate:.3f}",
                f"welfare, market over {reference}"
                + (f" [{interval.low:.3f}, {interval.high:.3f}]" if np.isfinite(interval.low) else ""),
            )
        )
    for gains_of, gains in results.gains.items():
        figures.append((f"{sum(gain.worse_off for gain in gains)} of {len(gains)}", f"sites worse off than {gains_of}"))
    if market and alone:
        shared = common(results)
        ours, theirs = _mean(market.run.completion_s[shared]), _mean(alone.run.completion_s[shared])
        figures.append(
            (f"{ours / HOUR_S:.2f} h", f"mean completion; alone {theirs / HOUR_S:.2f} h (jobs that all finished)")
        )
    if market:
        figures.append((f"{market.run.away_share:.0%}", "of GPU time away from home"))
        figures.append((f"{market.events_per_minute:,.0f}", "job events per minute, market"))
    cells = "".join(f"<div><b>{value}</b><span>{escape(label)}</span></div>" for value, label in figures)
    return (
        f"<h1>Backtest of {escape(results.trace.name)}</h1><p>{len(results.workload):,} jobs of {len(results.sites)} "
        f"sites with {int(results.sites.capacity.sum()):,} GPUs, {first:%Y-%m-%d} to {last:%Y-%m-%d} (UTC).</p>"
        f'<div class="figures">{cells}</div>'
    )


def _assumptions(results: Results) -> str:
    settings = results.settings
    patience = (
        "Jobs wait for as long as it takes."
        if settings.patience is None
        else f"A job withdraws an hour plus {settings.patience:g} times its traced duration after its arrival; "
        "what it has done until then counts, what is left does not."
    )
    points = [
        (
            "<b>The trace has arrivals, durations, GPU counts and clusters. It has no bids, no GPU types, no asks and no "
            "models</b> (columns that it does have are used): all of these are assumed, as follows."
        ),
        f"Capacity of a site: {escape(results.sites.capacity_rule)}.",
        "GPU types and asks: from the sites file, listed at the end.",
        (
            f"Bids, seed {settings.seed}: {escape(ASSUMPTIONS[settings.bids])}. Value grows with progress; the same step is "
            "worth the same at every site."
        ),
        (
            f"Speeds: {escape(results.table)}. A job's model is drawn from the families that run on its GPU count at home; its "
            "work is its traced duration at that speed, so at home on the traced GPUs it takes what it took."
        ),
        (
            f"Elastic policies (sia, market) may use half or twice the traced GPUs, up to {ELASTIC_GPUS_MAX}; the others use "
            "the traced number."
        ),
        "No policy runs a job where its bid is below the site's ask.",
        (
            f"A restart costs {settings.costs.restart_s:g} s and staging away from home {settings.costs.staging_s:g} s, with the "
            "GPUs held and paid."
        ),
        patience,
        (
            f"The market holds a round at most every {settings.round_s / 60:g} minutes and only after a change; between rounds the "
            f"last prices stand. A price is locked for {TERM_S / HOUR_S:g} h. Cleared by {escape(results.solver)}."
        ),
        (
            "Welfare is the value of progress less the asks of the GPU time used. Nothing fails, and a site is one pool: "
            "nodes, and links between sites, are not simulated."
        ),
    ]
    if results.omitted_jobs:
        points.append(f"{results.omitted_jobs:,} jobs of clusters that the sites file does not list were left out.")
    return f"<h2>What is assumed</h2><ul>{''.join(f'<li>{point}</li>' for point in points)}</ul>"


def _policies(results: Results) -> str:
    shared = common(results)
    reference = results.run("alone") or results.runs[0]
    base = float(reference.run.welfare.sum())
    total = results.sites.capacity.sum()
    rows = []
    for each in results.runs:
        run = each.run
        figures = _completion_figures(run.completion_s[shared])
        welfare = float(run.welfare.sum())
        rows.append(
            (
                run.policy,
                f"{welfare:,.0f}",
                f"{welfare / base:.3f}" if base > 0 else "n/a",
                f"{run.finished.sum():,}",
                _hours(figures["mean"]),
                _hours(figures["p50"]),
                _hours(figures["p99"]),
                _hours(_mean(run.waiting_s[shared])),
                f"{run.makespan_s / DAY_S:.1f}",
                f"{float((run.utilisation * results.sites.capacity).sum() / total):.1%}",
                f"{run.away_share:.1%}",
                f"{run.counters['moves']:,} / {run.counters['preemptions']:,}",
                f"{each.events_per_minute:,.0f}",
                f"{each.run.events / max(each.cpu_s, 1e-9) * 60:,.0f}",
            )
        )
    meanings = "".join(f"<li><b>{each.run.policy}</b>: {escape(each.sentence)}</li>" for each in results.runs)
    chart = bars(
        [(each.run.policy, [float(each.run.welfare.sum()) / base]) for each in results.runs],
        [""],
        spanning(
            f"welfare over that of {reference.run.policy}",
            [float(each.run.welfare.sum()) / base for each in results.runs] + [1.0],
        ),
        title="Welfare by policy",
        marker=1.0,
    )
    return (
        "<h2>Policies</h2>"
        + (chart if base > 0 else "")
        + _table(
            (
                "policy",
                "welfare, credits",
                f"over {reference.run.policy}",
                "finished",
                "completion h, mean",
                "median",
                "p99",
                "waiting h",
                "makespan d",
                "used",
                "away",
                "moves / pauses",
                "events/min",
                "by CPU time",
            ),
            rows,
        )
        + f'<p class="note">Completion and waiting: the {int(shared.sum()):,} jobs that every policy finished. '
        "Used: share of capacity while jobs arrive. Away: share of GPU time outside the job's home. "
        f"Events: arrivals, starts, moves, pauses, finishes and withdrawals per minute of wall time.</p><ul>{meanings}</ul>"
    )


def _completion(results: Results) -> str:
    shared = common(results)
    if not shared.any():
        return ""
    series, low, high = [], float("inf"), 0.0
    for each in results.runs:
        x, y = cumulative((each.run.completion_s[shared] / HOUR_S).tolist())
        series.append(Line(each.run.policy, x, y))
        low, high = min(low, *x), max(high, *x)
    axis = Axis("time from arrival to finish (hours, logarithmic)", max(low, 1e-2), max(high, 0.1) * 1.05, log=True)
    return "<h2>Completion times</h2>" + lines(
        series, axis, Axis("share of jobs", 0.0, 1.0), title="Completion times by policy", steps=True
    )


def _federation(results: Results) -> str:
    if not results.ratios:
        return ""
    settings = results.settings
    rows = [
        (
            f"market over {reference}",
            f"{interval.estimate:.4f}",
            f"{interval.low:.4f} to {interval.high:.4f}" if np.isfinite(interval.low) else "too few weeks",
        )
        for reference, interval in results.ratios.items()
    ]
    parts = [
        "<h2>What the federation is worth</h2>",
        _table(("welfare", "ratio", f"{CONFIDENCE:.0%} interval"), rows),
        (
            f'<p class="note">Block bootstrap, {RESAMPLES:,} resamples of {settings.block_weeks}-week blocks of arrivals'
            f"{f' and {settings.bid_draws} draws of bids' if settings.bid_draws > 1 else ', one draw of bids'}. "
            "Against market-alone it is the federation's gain alone, against alone also the market's.</p>"
        ),
    ]
    names = [name for name in (*ALONE, FEDERATED) if name in results.weekly]
    weeks = len(results.weekly[FEDERATED])
    if weeks > 1:
        values = [value for name in names for value in results.weekly[name].tolist()]
        parts.append(
            lines(
                [Line(name, list(range(1, weeks + 1)), results.weekly[name].tolist()) for name in names],
                Axis(
                    "week of arrival", 1, weeks, ticks=tuple((float(week), str(week)) for week in range(1, weeks + 1))
                ),
                spanning("welfare (credits per week)", values),
                title="Welfare by week",
            )
        )
    for reference, gains in results.gains.items():
        worse = [gain.site for gain in gains if gain.worse_off]
        parts.append(f"<h2>Each site, in the federation and {escape(reference)}</h2>")
        parts.append(
            bars(
                [(gain.site, [gain.alone, gain.federated]) for gain in gains],
                (reference, "market"),
                spanning("credits over the run", [value for gain in gains for value in (gain.alone, gain.federated)]),
                title=f"Sites against {reference}",
            )
        )
        parts.append(
            _table(
                ("site", "tenants keep", "rent", "together", reference, "ratio"),
                [
                    (
                        gain.site,
                        f"{gain.surplus:,.0f}",
                        f"{gain.rent:,.0f}",
                        f"{gain.federated:,.0f}",
                        f"{gain.alone:,.0f}",
                        f"{gain.federated / gain.alone:.3f}" if gain.alone > 0 else "n/a",
                    )
                    for gain in gains
                ],
            )
        )
        parts.append(
            f"<p>{len(worse)} of {len(gains)} sites worse off over the run{': ' + escape(', '.join(worse)) if worse else ''}. "
            "Rent is price above ask times GPU-hours sold, the realised Owen transfer at the published prices.</p>"
        )
    return "".join(parts)


def _games(results: Results) -> str:
    games = results.games
    if not games:
        return ""
    names = results.sites.names
    exact = len(names) <= SITES_EXACT_MAX
    total = {
        key: np.array([getattr(game, key) for game in games]).mean(axis=0)
        for key in ("alone", "owen", "published", "shapley")
    }
    failures = sum(len(game.worse_off()) for game in games)
    ratio = sum(game.grand for game in games) / max(1e-9, sum(sum(game.alone) for game in games))
    slack = min(game.core_slack for game in games)
    short = sum(game.published_slack < -game.gap - 1e-6 * max(1.0, game.grand) for game in games)
    rows = [
        (
            name,
            f"{total['alone'][site]:.3f}",
            f"{total['owen'][site]:.3f}",
            f"{total['published'][site]:.3f}",
            f"{total['shapley'][site]:.3f}",
        )
        for site, name in enumerate(names)
    ]
    error = np.mean([np.mean(game.shapley_error) for game in games])
    return (
        "<h2>Coalitions at single moments</h2>"
        f"<p>{len(games)} moments spread over the arrivals, {min(game.jobs for game in games)} to "
        f"{max(game.jobs for game in games)} jobs present, everyone placed anew. "
        f"{'All' if exact else 'Sampled'} coalitions: {sum(game.coalitions for game in games):,} LPs.</p><ul>"
        f"<li>LP welfare of all together over the sum of the sites alone: <b>{ratio:.3f}</b>.</li>"
        f"<li>Owen point, sites below their stand-alone value: <b>{failures}</b> of {len(games) * len(names)}.</li>"
        f"<li>Least core slack of the Owen point: <b>{slack:.6f}</b> credits/h (the theorem says 0 or more).</li>"
        f"<li>With whole placements at published prices, some coalition falls short by more than the gap in <b>{short}</b> of "
        f"{len(games)} moments (least slack {min(game.published_slack for game in games):.4f} credits/h, largest gap "
        f"{max(game.gap for game in games):.4f}).</li>"
        f"<li>Owen and Shapley divide {np.mean([game.distance for game in games]):.1%} of the total differently "
        f"(half the L1 distance){'' if exact else f'; Shapley by Monte Carlo, mean standard error {error:.3f}'}.</li></ul>"
        + _table(("site, mean credits/h", "alone", "Owen", "published", "Shapley"), rows)
    )


def _misreports(results: Results) -> str:
    found = _by_kind(results.temptations)
    if not found:
        return ""
    labels = {"bid": "buyers, bid scaled", "ask": "sites, ask scaled", "capacity": "sites, capacity withheld"}
    rows = []
    for kind, each in found.items():
        payoff_median, payoff_p95 = quantiles([one.of_payoff for one in each])
        stake_median, stake_p95 = quantiles([one.of_stake for one in each])
        tempted = sum(one.gain > 0 for one in each)
        largest = max(each, key=lambda one: one.gain)
        rows.append(
            (
                labels[kind],
                f"{len(each)}",
                f"{payoff_median:.2%} / {payoff_p95:.2%}",
                f"{stake_median:.2%} / {stake_p95:.2%}",
                f"{tempted}",
                f"{largest.gain:.3f} at a factor of {largest.factor:g}",
            )
        )
    return (
        "<h2>Does it pay to misreport?</h2>"
        + _table(
            (
                "who",
                "agents and moments",
                "of payoff, median / p95",
                "of stake, median / p95",
                "gain at all",
                "largest, credits/h",
            ),
            rows,
        )
        + '<p class="note">Best of a grid of misreports against the truth, one agent at a time, the round cleared again: a '
        "lower bound of a best response. A site's payoff is its rent and its own tenants' surplus, its "
        "stake its sales and their value; a buyer's stake is its best value. Of payoff: or of a hundredth of the stake, "
        "where the payoff is less (who sells at its ask earns nothing when truthful).</p>"
    )


def _prices(results: Results) -> str:
    market = results.run(FEDERATED)
    if market is None or not market.price_series:
        return ""
    times = np.array([time_s for time_s, _ in market.price_series])
    prices = np.array([row for _, row in market.price_series]) / 1e6
    buckets = np.minimum(
        PRICE_POINTS - 1, ((times - times[0]) / max(1.0, times[-1] - times[0]) * PRICE_POINTS).astype(int)
    )
    # Means over equal stretches of time, each price weighted by how long it stood.
    held = np.minimum(np.diff(times, append=times[-1:] + results.settings.round_s), DAY_S)
    weight = np.bincount(buckets, weights=held, minlength=PRICE_POINTS)
    days = (
        times[0] + (np.arange(PRICE_POINTS) + 0.5) * (times[-1] - times[0]) / PRICE_POINTS - results.trace.arrival_s[0]
    ) / DAY_S
    series = []
    for site, name in enumerate(results.sites.names):
        mean = np.bincount(buckets, weights=held * prices[:, site], minlength=PRICE_POINTS)
        with np.errstate(invalid="ignore", divide="ignore"):
            series.append(
                Line(
                    f"{name} ({results.sites.gpu_types[results.sites.kind[site]]})",
                    days.tolist(),
                    (mean / weight).tolist(),
                )
            )
    series = [
        Line(line.name, [x for x, y in zip(line.x, line.y, strict=True) if y == y], [y for y in line.y if y == y])  # noqa: PLR0124  leaves out nan
        for line in series
    ]
    top = [y for line in series for y in line.y]
    return (
        "<h2>Prices</h2>"
        + lines(
            series[:PRICES_SHOWN],
            spanning("days since the first arrival", [0.0, *days.tolist()]),
            spanning("price (credits per GPU-hour)", top),
            title="Prices of the pools",
            steps=True,
        )
        + f'<p class="note">{market.rounds:,} rounds; means over {days[1] - days[0]:.2f} days'
        f"{'' if len(series) <= PRICES_SHOWN else '; the first nine sites'}. Welfare below the rounds' bound: {market.bound_gap:.3%}; "
        f"uplift {market.run.uplift_share:.3%} of turnover.</p>"
    )


def _sites(results: Results) -> str:
    sites = results.sites
    jobs = np.bincount(results.workload.home, minlength=len(sites))
    used = [each for each in results.runs if each.run.policy in {"alone", FEDERATED}]
    header = (
        "site",
        "GPU type",
        "GPUs",
        "ask, credits/GPU-h",
        "own jobs",
        *(f"used, {each.run.policy}" for each in used),
    )
    rows = [
        (
            name,
            sites.gpu_types[sites.kind[site]],
            f"{sites.capacity[site]}",
            format_credits(int(sites.ask_micros[site])),
            f"{jobs[site]:,}",
            *(f"{each.run.utilisation[site]:.1%}" for each in used),
        )
        for site, name in enumerate(sites.names)
    ]
    return "<h2>Sites</h2>" + _table(header, rows)


def _by_kind(temptations: Sequence[Temptation]) -> dict[str, list[Temptation]]:
    found: dict[str, list[Temptation]] = {}
    for each in temptations:
        found.setdefault(each.kind, []).append(each)
    return found


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _hours(seconds: float) -> str:
    return "n/a" if seconds != seconds else f"{seconds / HOUR_S:.2f}"  # noqa: PLR0124  nan


def _mean(values: Real) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _rounded(values: Sequence[float] | Real) -> list[float | None]:
    return [_finite(float(value)) for value in values]


def _finite(value: float) -> float | None:
    return round(value, 6) if np.isfinite(value) else None


def _interval(interval: Interval) -> dict[str, float | None]:
    return {"estimate": _finite(interval.estimate), "low": _finite(interval.low), "high": _finite(interval.high)}
