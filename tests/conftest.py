"""What holds for every test: no visits to hubs, one thread, the same pseudo-random examples each time."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# The networks are so small that a second thread costs more than it computes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

from tests.device_traffic import forbidden_calls
from tests.embedded_hosts import host, host_of, models

settings.register_profile("project", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("project")

__all__ = ["forbidden_calls", "host", "host_of", "models"]  # fixtures that any test may ask for
