"""The one exception whose text is meant for the person at the WebUI."""

from __future__ import annotations

ERROR_KEY = "IP-Adapter error"
"""Key in a picture's parameters for a sentence that doesn't end the job: API clients see parameters, not comments."""


class IPAdapterError(ValueError):
    """Something the user asked for can't be done; the message is one sentence they can act on.

    Every WebUI of the family answers an API call with the exception's own ``status_code`` and ``detail`` when it
    carries them as instance attributes, and shows ``ClassName: message`` under the gallery in the page.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.status_code = 422
        self.detail = message
