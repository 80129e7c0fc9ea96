"""What gunicorn serves: `gunicorn 'broker.api.wsgi:application()'`, settings from the environment."""

from __future__ import annotations

from flask_openapi3.openapi import OpenAPI

from broker.api.app import create_app
from broker.bootstrap import open_market
from broker.portal import portal
from broker.process_logs import configure_logs
from broker.settings import Settings


def application() -> OpenAPI:
    """Open the market and return the API with the portal. Called in each worker, after the fork: connections are its own."""
    configure_logs()
    return create_app(open_market(Settings()), pages=[portal])
