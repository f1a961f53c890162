"""Keeps users, passwords and tokens of a store's address out of what is shown or stored."""

from __future__ import annotations

import re

FILES = ("sqlite:///", "file:")  # followed by a path, which holds no password
URI = re.compile(r"[A-Za-z][\w+.-]*://\S+")


def shown(uri: str) -> str:
    """The address of a store as a message shows it: a path where it is a file; ``***`` for user, password and query.

    Passwords may hold the signs that end one, such as ``@``, ``/`` and ``?``: in doubt more is masked.
    """
    if uri.startswith(FILES) or not URI.match(uri):
        return uri.removeprefix("sqlite:///")
    scheme, _, rest = uri.partition("://")
    place, _, query = rest.partition("?")
    if "@" in query:  # the question mark may be part of the password
        return f"{scheme}://***"
    _, user, host = place.rpartition("@")
    return f"{scheme}://{'***@' if user else ''}{host}{'?***' if query else ''}"


def masked(text: str) -> str:
    """A message without the secrets of the addresses in it."""
    return URI.sub(lambda found: shown(found[0]), text)
