"""What holds for every test: no visits to hubs, the same pseudo-random examples each time, no time limits on them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from hypothesis import settings

from tests.embedded_hosts import host, host_of, models

settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")

__all__ = ["host", "host_of", "models"]  # fixtures that any test may ask for
