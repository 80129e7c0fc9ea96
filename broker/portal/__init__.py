"""The portal: the market in a browser, server-rendered. It adds pages to the API's app and has no state of its own.

    from broker.portal import portal
    app.register_blueprint(portal)

README.md is its chapter. Works with the services of `broker` as the API does, in the same process.
"""

from __future__ import annotations

from broker.portal import pages
from broker.portal.blueprint import ACCESS, portal

__all__ = ["ACCESS", "pages", "portal"]
