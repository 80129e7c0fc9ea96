"""Drivers: how a site's ranks are started, watched and ended, whatever engine runs them."""
