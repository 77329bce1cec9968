"""Exceptions that a host swallows: printed with their traceback, and kept for tests."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    message: str
    error: BaseException | None


@dataclass
class Reports:
    """What was reported so far, oldest first."""

    entries: list[Report] = field(default_factory=list)

    def report(self, message: str, error: BaseException | None = None) -> None:
        self.entries.append(Report(message, error))
        print(f"*** {message}", file=sys.stderr)
        if error is not None:
            traceback.print_exception(error, file=sys.stderr)
