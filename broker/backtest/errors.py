"""What a backtest refuses: each kind with a stable code, and a message that names the file and the line."""

from __future__ import annotations

from typing import ClassVar


class BacktestError(Exception):
    """Something that a backtest refuses; the message says what, where and what to do next."""

    code: ClassVar[str] = "backtest.refused"


class TraceError(BacktestError):
    """A trace that cannot be replayed as it is."""

    code: ClassVar[str] = "backtest.trace_invalid"


class SitesError(BacktestError):
    """A sites file that does not describe a federation for this trace."""

    code: ClassVar[str] = "backtest.sites_invalid"


class TableError(BacktestError):
    """A throughput table that cannot be read or lacks what the sites offer."""

    code: ClassVar[str] = "backtest.throughput_invalid"


class OptionError(BacktestError):
    """An option of the run that makes no sense, such as a policy that does not exist."""

    code: ClassVar[str] = "backtest.option_invalid"
