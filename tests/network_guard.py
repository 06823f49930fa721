"""A fixture that makes every connection beyond loopback fail the test that tried it.

Import it in tests/conftest.py (`from network_guard import no_outside_network`): it then guards every test.
It sees this process only; a test that starts a subprocess watches that itself.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest


class OutsideConnection(BaseException):
    """A test tried to leave this machine. No Exception, so that no handler takes it for a broken network."""


def is_inside(host: object) -> bool:
    """Whether a host name or address is loopback, or empty or unspecified (for binding)."""
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    if name.lower() in ("", "localhost"):
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(autouse=True)
def no_outside_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Patches name look-ups and connects; an attempt that a thread swallowed fails the test at its end."""
    tried: list[str] = []

    def refuse(host: object) -> None:
        if not is_inside(host):
            tried.append(str(host))
            raise OutsideConnection(f"a test tried to reach {host}: tests stay on loopback")

    def guarded(connect: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                refuse(address[0])
            return connect(self, address)

        return wrapper

    look_up = socket.getaddrinfo

    def guarded_look_up(host: Any, *args: Any, **options: Any) -> Any:
        refuse(host)
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)
    yield
    assert not tried, f"this test tried to reach {', '.join(tried)}: tests stay on loopback"
