"""People's accounts as an admin sees them: the list, a new one, another password, closing one."""

from __future__ import annotations

from http import HTTPStatus

from flask import redirect, request, url_for
from werkzeug.wrappers import Response

from broker.api.context import the_market
from broker.errors import BrokerError, RefusedError
from broker.identity.passwords import PASSWORD_LENGTH_MAX, Role, change_password, create_user, disable_user
from broker.portal.blueprint import Access, page, show, the_actor, the_person
from broker.queries.accounts import ACCOUNTS_PER_PAGE, list_accounts

LOGIN_LENGTH_MAX = 100


class OwnAccountError(RefusedError):
    """An admin who would shut themself out."""

    code = "user.own_account"


@page("/admin/accounts", Access.ADMIN)
def accounts() -> Response:
    """List people's accounts."""
    return show("accounts.html", done=request.args.get("done", "")[:LOGIN_LENGTH_MAX], **_listed())


@page("/admin/accounts/new", Access.ADMIN, method="POST")
def new_account() -> Response:
    """Give a person an account."""
    login = request.form.get("login", "").strip()[:LOGIN_LENGTH_MAX]
    role, tenant_id = request.form.get("role", ""), request.form.get("tenant_id", "").strip()[:64]
    site_id = request.form.get("site_id", "").strip()[:64]
    values = {"login": login, "role": role, "tenant_id": tenant_id, "site_id": site_id}
    try:
        if not login or not login.isprintable() or role not in set(Role):
            raise RefusedError("give the account a name and one of the roles")
        create_user(
            the_market(), login, _password(), Role(role), tenant_id or None, site_id=site_id or None, actor=the_actor()
        )
    except BrokerError as error:
        return show("accounts.html", error.status, refused=str(error), values=values, **_listed())
    return _back(login)


@page("/admin/accounts/password", Access.ADMIN, method="POST")
def set_password() -> Response:
    """Set a person's password; all of their sessions end."""
    login = request.form.get("login", "")[:LOGIN_LENGTH_MAX]
    try:
        change_password(the_market(), login, _password(), actor=the_actor())
    except BrokerError as error:
        return show("accounts.html", error.status, refused=str(error), **_listed())
    return _back(login)


@page("/admin/accounts/close", Access.ADMIN, method="POST")
def close_account() -> Response:
    """Close a person's account for good; its name must be typed, since nothing opens it again."""
    login = request.form.get("login", "")[:LOGIN_LENGTH_MAX]
    try:
        if login == the_person().login:
            raise OwnAccountError("this is your own account; let another admin close it")
        disable_user(the_market(), login, actor=the_actor())
    except BrokerError as error:
        return show("accounts.html", error.status, refused=str(error), **_listed())
    return _back(login)


def _password() -> str:
    # One character beyond the limit is enough for the refusal.
    return request.form.get("password", "")[: PASSWORD_LENGTH_MAX + 1]


def _back(login: str) -> Response:
    return redirect(url_for("portal.accounts", done=login), HTTPStatus.SEE_OTHER)


def _listed() -> dict[str, object]:
    after = request.args.get("after", "")
    rows = the_market().database.read(lambda session: list_accounts(session, after=after))
    shown = rows[:ACCOUNTS_PER_PAGE]
    return {
        "rows": shown,
        "roles": list(Role),
        "next": shown[-1].login if len(rows) > ACCOUNTS_PER_PAGE else None,
    }
