"""Bytes that processes on this machine send each other, as the operating system counts them."""

from __future__ import annotations

from pathlib import Path

_COUNTER = Path("/sys/class/net/lo/statistics/tx_bytes")


def loopback_bytes() -> int:
    """Give the bytes sent so far through the loopback interface, by all programs of this machine.

    Raises:
        OSError: they are not counted here.
    """
    return int(_COUNTER.read_text())


def why_uncounted() -> str | None:
    """Say why the bytes cannot be read; None where they can."""
    try:
        loopback_bytes()
    except (OSError, ValueError) as error:
        return f"the loopback interface's counter cannot be read: {error}"
    return None
