"""Fixtures that any test may ask for."""

from tests.embedded_hosts import host, host_of, models

__all__ = ["host", "host_of", "models"]
