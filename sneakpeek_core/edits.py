"""Live edits: a schedule proposed from any thread; it lands at a chunk boundary or is refused."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from .schedule import Schedule


@dataclass(eq=False)
class Edit:
    """A proposed schedule. `state` is "waiting", then "landed", or "refused" with a `message`."""

    schedule: Schedule
    state: str = "waiting"
    message: str = ""
    latent_frame: int = -1  # the first one made under it, once it has landed
    _settled: threading.Event = field(default_factory=threading.Event, repr=False)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the edit has landed or was refused; return False when time ran out."""
        return self._settled.wait(timeout)

    def settle(self, state: str, latent_frame: int, message: str = "") -> None:
        self.state, self.latent_frame, self.message = state, latent_frame, message
        self._settled.set()
