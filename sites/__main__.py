"""`python -m sites run|join|status`: the site's commands without the rest of Hansa."""

from sites.site_cli import app

app(prog_name="hansa site")
