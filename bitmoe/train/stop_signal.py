"""SIGTERM and SIGINT as a wish to stop: finish the step, save, end with status 75."""

import signal


class StopSignal:
    """Remembers that a stop was asked for; a second SIGINT interrupts at once."""

    def __init__(self):
        self.received: str | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
