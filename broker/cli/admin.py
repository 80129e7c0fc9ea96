"""`hansa admin …`: what the market's admins do, over the public API with an admin's token.

Only `init`, `backup` and `restore` work on the broker's own home: the first makes the market's keys and tables and
the first admin token, before there is a token to call the API with; the others need every key and file of it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from broker.cli import admin_links, admin_rounds, backup_commands, config
from broker.cli.errors import CliError, UsageError
from broker.cli.output import JsonOption, credits_text, print_json, print_table, time_text
from pricing.money import MILLISECONDS_PER_HOUR

if TYPE_CHECKING:
    from broker.cli.client import BrokerClient
    from broker.market import Market

app = typer.Typer(
    help="For the market's admins: tenants, sites, rounds, audit.", no_args_is_help=True, rich_markup_mode=None
)
tenant_app = typer.Typer(help="Tenants, their credits and tokens.", no_args_is_help=True, rich_markup_mode=None)
user_app = typer.Typer(help="People who sign in to the portal.", no_args_is_help=True, rich_markup_mode=None)
site_app = typer.Typer(help="Sites of the federation.", no_args_is_help=True, rich_markup_mode=None)
for name, sub in (("tenant", tenant_app), ("user", user_app), ("site", site_app)):
    app.add_typer(sub, name=name)
admin_rounds.register(app)
admin_links.register(app)
backup_commands.register(app)

FIRST_TOKEN_LIFE_S: Final = 30 * 86_400
SECONDS_PER_DAY: Final = 86_400

TenantId = Annotated[str, typer.Argument(metavar="TENANT")]
SiteId = Annotated[str, typer.Argument(metavar="SITE")]
Login = Annotated[str, typer.Argument(metavar="LOGIN")]
PasswordFile = Annotated[
    Path | None, typer.Option(help="file with the password; left out, you are asked", exists=True, dir_okay=False)
]
CursorOption = Annotated[str | None, typer.Option(help="where the page before ended, as it was told")]


@app.command()
def init(
    label: Annotated[str, typer.Option(help="what the token is for")] = "first admin",
    equity: Annotated[str, typer.Option(help="credits that the market may spend on uplift")] = "0",
    another: Annotated[bool, typer.Option("--another", help="make one more admin token though there is one")] = False,
    as_json: JsonOption = False,
) -> None:
    """Make the market's keys and tables (HANSA_HOME) and print an admin token; on the broker's host only."""
    from broker.bootstrap import open_market
    from broker.identity.tokens import TokenKind, create_token
    from broker.settings import Settings

    equity_micros = 0 if equity == "0" else _micros(equity)
    settings = Settings()
    market = open_market(settings)
    if not another and _has_admin_token(market):
        market.database.close()
        raise UsageError(
            f"the market in {settings.home.resolve()} has an admin token already",
            next_step="use that one; where it is lost, add --another. Equity: hansa admin equity CREDITS",
        )
    token = create_token(market, TokenKind.ADMIN, life_s=FIRST_TOKEN_LIFE_S, label=label)
    if equity_micros:
        _fund_equity(market, equity_micros)
    ca = settings.home.resolve() / "ca.pem"
    ca.write_text(market.authority.ca_pem)
    market.database.close()
    if as_json:
        print_json({"token": token.text, "expires_ms": token.expires_ms, "url": settings.public_url, "ca": str(ca)})
        return
    typer.echo(f"token    {token.text}   (shown once; until {time_text(token.expires_ms)})")
    typer.echo(f"ca       {ca}")
    typer.echo(f"next     hansa config set --url {settings.public_url} --ca {ca} --token …")


@app.command("equity")
def add_equity(
    amount: Annotated[str, typer.Argument(metavar="CREDITS", help="with up to six decimals")],
    key: Annotated[str | None, typer.Option(help="idempotency key: the same key never gives twice")] = None,
    as_json: JsonOption = False,
) -> None:
    """Give the market credits of its own, from which uplift is paid."""
    with _client() as client:
        document = client.admin_post("/equity", {"amount_micros": _micros(amount)}, key)
    if as_json:
        print_json(document)
    else:
        typer.echo(f"the market has {credits_text(document['balance_micros'])} credits of its own")


@app.command()
def freeze(reason: Annotated[str, typer.Option(help="why, for the record")] = "", as_json: JsonOption = False) -> None:
    """Stop taking jobs and placing them; what runs goes on."""
    _act("/freeze", {"reason": reason}, "the market is frozen", as_json=as_json)


@app.command()
def thaw(reason: Annotated[str, typer.Option(help="why, for the record")] = "", as_json: JsonOption = False) -> None:
    """Take and place jobs again."""
    _act("/thaw", {"reason": reason}, "the market is open", as_json=as_json)


@app.command()
def audit(as_json: JsonOption = False) -> None:
    """Recompute what the market promises from its rows; exit 1 where anything breaks it."""
    with _client() as client:
        document = client.admin_get("/audit")
    if as_json:
        print_json(document)
    else:
        for row in document["findings"]:
            typer.echo(f"invariant {row['invariant']}: {row['subject']}: {row['detail']}")
        if document["sound"]:
            typer.echo("sound: every invariant holds")
    if not document["sound"]:
        raise CliError(f"{len(document['findings'])} rows break an invariant", code="audit.unsound")


@app.command()
def ledger(
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20, cursor: CursorOption = None, as_json: JsonOption = False
) -> None:
    """Show a page of balances, the sum of all (nought), and the newest transfers."""
    with _client() as client:
        document = client.admin_get("/ledger", **_page(limit, cursor))
    if as_json:
        print_json(document)
        return
    print_table(
        ("account", ">credits"),
        [(account, credits_text(amount)) for account, amount in sorted(document["balances_micros"].items())],
        empty="no accounts yet",
    )
    typer.echo(f"sum {credits_text(document['sum_micros'])}")
    print_table(
        ("when", "kind", "from", "to", ">credits"),
        [
            (
                time_text(row["created_ms"]),
                row["kind"],
                row["debit_account"],
                row["credit_account"],
                credits_text(row["amount_micros"]),
            )
            for row in document["transfers"]
        ],
        empty="no transfers yet",
    )
    _say_that_there_is_more(document)


@app.command()
def events(limit: Annotated[int, typer.Option(min=1, max=10_000)] = 50, as_json: JsonOption = False) -> None:
    """List what happened in the market, newest first."""
    with _client() as client:
        rows = client.admin_list("/events", limit)
    if as_json:
        print_json({"items": rows})
        return
    print_table(
        ("when", "what", "before", "after", "about", "by", "detail"),
        [
            (
                time_text(row["created_ms"]),
                row["kind"],
                row["before"],
                row["after"],
                row["job_id"] or row["site_id"] or "",
                row["actor"] or "",
                row["detail"],
            )
            for row in rows
        ],
        empty="nothing has happened yet",
    )


@tenant_app.command("create")
def create_tenant(
    tenant_id: TenantId,
    display_name: Annotated[str, typer.Option("--name", help="the tenant's name for people")] = "",
    home_site: Annotated[str | None, typer.Option(help="the site whose own customer it is")] = None,
    as_json: JsonOption = False,
) -> None:
    """Open a tenant with its accounts."""
    body: dict[str, Any] = {"tenant_id": tenant_id, "name": display_name, "home_site": home_site}
    _act(
        "/tenants",
        body,
        f"tenant {tenant_id} is open; next: hansa admin tenant deposit {tenant_id} CREDITS",
        as_json=as_json,
    )


@tenant_app.command("list")
def list_tenants(as_json: JsonOption = False) -> None:
    """List tenants with their balances."""
    with _client() as client:
        rows = client.admin_list("/tenants", 10_000)
    if as_json:
        print_json({"items": rows})
        return
    print_table(
        ("tenant", "name", ">balance", ">held"),
        [
            (row["tenant_id"], row["name"], credits_text(row["balance_micros"]), credits_text(row["held_micros"]))
            for row in rows
        ],
        empty="no tenants yet",
    )


@tenant_app.command("deposit")
def deposit(
    tenant_id: TenantId,
    amount: Annotated[str, typer.Argument(metavar="CREDITS", help="with up to six decimals")],
    key: Annotated[str | None, typer.Option(help="idempotency key: the same key never deposits twice")] = None,
    as_json: JsonOption = False,
) -> None:
    """Give a tenant credits."""
    with _client() as client:
        document = client.admin_post(f"/tenants/{tenant_id}/deposit", {"amount_micros": _micros(amount)}, key)
    if as_json:
        print_json(document)
    else:
        typer.echo(f"{tenant_id} has {credits_text(document['balance_micros'])} credits")


@tenant_app.command("limit")
def limit(
    tenant_id: TenantId,
    budget: Annotated[str, typer.Option(metavar="CREDITS|none", help="an hour, over all of its jobs")] = "none",
    floor: Annotated[int, typer.Option(min=0, help="GPUs that it should have at least; 0: none")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Set a tenant's hourly budget and its floor of GPUs, in place of what they were."""
    from broker.cli.market_commands import budget_micros, budget_text

    body = {"budget_micros_per_hour": budget_micros(budget), "floor_gpus": floor}
    with _client() as client:
        document = client.admin_put(f"/tenants/{tenant_id}/limits", body)
    if as_json:
        print_json(document)
    else:
        typer.echo(f"{tenant_id}: budget {budget_text(document['budget_micros_per_hour'])}, floor {floor} GPUs")


@tenant_app.command("token")
def token(
    tenant_id: TenantId,
    days: Annotated[int, typer.Option(min=1, max=366, help="how long it lives")] = 30,
    scope: Annotated[list[str] | None, typer.Option(help="such as jobs:read; left out, all of a tenant's")] = None,
    label: Annotated[str, typer.Option(help="what it is for")] = "",
    as_json: JsonOption = False,
) -> None:
    """Make an API token for a tenant; it is shown once."""
    body: dict[str, Any] = {"life_s": days * SECONDS_PER_DAY, "label": label}
    if scope:
        body["scopes"] = scope
    with _client() as client:
        document = client.admin_post(f"/tenants/{tenant_id}/tokens", body)
    if as_json:
        print_json(document)
    else:
        typer.echo(document["token"])


@user_app.command("create")
def create_user(
    login: Login,
    *,
    role: Annotated[str, typer.Option(help="tenant, operator or admin")] = "tenant",
    tenant: Annotated[str | None, typer.Option(help="of a tenant's person: whose jobs they see")] = None,
    site: Annotated[str | None, typer.Option(help="of an operator: the site that they run")] = None,
    password_file: PasswordFile = None,
    as_json: JsonOption = False,
) -> None:
    """Give a person an account for the portal."""
    body = {"login": login, "password": _password(password_file), "role": role, "tenant_id": tenant, "site_id": site}
    _act("/users", body, f"{login} may sign in to the portal", as_json=as_json)


@user_app.command("list")
def list_users(as_json: JsonOption = False) -> None:
    """List people's accounts, closed ones too."""
    with _client() as client:
        rows = client.admin_list("/users", 10_000)
    if as_json:
        print_json({"items": rows})
        return
    print_table(
        ("login", "role", "of", "since", "closed"),
        [
            (
                row["login"],
                row["role"],
                row["tenant_id"] or row["site_id"] or "-",
                time_text(row["created_ms"]),
                time_text(row["closed_ms"]),
            )
            for row in rows
        ],
        empty="no accounts yet; make one with: hansa admin user create LOGIN",
    )


@user_app.command("password")
def set_password(login: Login, password_file: PasswordFile = None, as_json: JsonOption = False) -> None:
    """Give a person another password; all of their sessions end."""
    _act(f"/users/{login}/password", {"password": _password(password_file)}, "the password is set", as_json=as_json)


@user_app.command("close")
def close_user(login: Login, as_json: JsonOption = False) -> None:
    """Close a person's account; all of their sessions end."""
    _act(f"/users/{login}/close", {}, f"{login} may no longer sign in", as_json=as_json)


@site_app.command("invite")
def invite(site_id: SiteId, as_json: JsonOption = False) -> None:
    """Print a join string for a site; it works once, for a quarter of an hour."""
    with _client() as client:
        document = client.admin_post("/sites/invite", {"site_id": site_id})
    if as_json:
        print_json(document)
    else:
        typer.echo(document["join_string"])


@site_app.command("list")
def list_sites(as_json: JsonOption = False) -> None:
    """List sites with what they offer."""
    with _client() as client:
        rows = client.admin_list("/sites", 10_000)
    if as_json:
        print_json({"items": rows})
        return
    print_table(
        ("site", "state", "heard", ">leases", "offers"),
        [
            (
                row["site_id"],
                row["state"],
                time_text(row["heard_ms"]),
                row["leases_live"],
                ", ".join(
                    f"{pool['gpu_type']} at {credits_text(pool['ask_micros_per_gpu_hour'])}" for pool in row["pools"]
                ),
            )
            for row in rows
        ],
        empty="no sites yet; invite one with: hansa admin site invite NAME",
    )


@site_app.command("remove")
def remove(
    site_id: SiteId,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take a site out of the market for good."""
    if not yes:
        typer.confirm(f"Remove {site_id} for good? Its running leases end", abort=True)
    _act(f"/sites/{site_id}/remove", {}, f"{site_id} is removed", as_json=as_json)


@site_app.command("statement")
def show_statement(
    site_id: SiteId,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 200,
    cursor: CursorOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a site has earned, by job."""
    with _client() as client:
        document = client.admin_get(f"/sites/{site_id}/statement", **_page(limit, cursor))
    if as_json:
        print_json(document)
        return
    print_table(
        ("job", ">GPU-hours", ">GPUs", ">links", ">earned"),
        [
            (
                row["job_id"],
                f"{row['gpu_milliseconds'] / MILLISECONDS_PER_HOUR:.4f}",
                credits_text(row["payout_micros"]),
                credits_text(row["link_revenue_micros"]),
                credits_text(row["earned_micros"]),
            )
            for row in document["lines"]
        ],
        empty="nothing earned yet",
    )
    typer.echo(f"earned {credits_text(document['earned_micros'])}, owed {credits_text(document['balance_micros'])}")
    _say_that_there_is_more(document)


def _page(limit: int, cursor: str | None) -> dict[str, str | int]:
    return {"limit": limit} if cursor is None else {"limit": limit, "cursor": cursor}


def _say_that_there_is_more(document: dict[str, Any]) -> None:
    if document["next_cursor"]:
        typer.echo(f"there is more: --cursor {document['next_cursor']}")


def _password(password_file: Path | None) -> str:
    if password_file is not None:
        return password_file.read_text().strip()
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))


def _client() -> BrokerClient:
    from broker.cli.client import BrokerClient

    return BrokerClient(config.load(os.environ))


def _act(path: str, body: dict[str, Any], done: str, *, as_json: bool) -> None:
    with _client() as client:
        document = client.admin_post(path, body)
    if as_json:
        print_json(document)
    else:
        typer.echo(done)


def _micros(amount: str) -> int:
    from pricing.errors import PricingError
    from pricing.money import parse_credits

    try:
        return parse_credits(amount)
    except PricingError as error:
        raise UsageError(str(error)) from None


def _has_admin_token(market: Market) -> bool:
    from sqlalchemy import select

    from broker.database.tables import Token
    from broker.identity.tokens import TokenKind

    living = select(Token.token_id).where(
        Token.kind == TokenKind.ADMIN, Token.revoked_ms.is_(None), Token.expires_ms > market.clock.now_ms()
    )
    return market.database.read(lambda session: session.scalar(living.limit(1))) is not None


def _fund_equity(market: Market, amount_micros: int) -> None:
    from broker.tenants import add_equity as give

    market.database.write(
        "fund equity", lambda session: give(session, market, amount_micros, market.ids.new("equity"), actor="init")
    )
