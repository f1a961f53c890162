"""Keeps passwords and tokens of a store's address out of what is shown or stored."""

from __future__ import annotations

import re
from urllib.parse import unquote, unquote_plus

FILES = ("sqlite:///", "file:")  # followed by a path, which holds no password
URI = re.compile(r"[A-Za-z][\w+.-]*:/+\S+")
SHORTEST = 3  # a shorter text is no secret, and masking it would garble words


def shown(uri: str) -> str:
    """The address of a store as a message shows it: a path where it is a file; ``***`` for user, password and query.

    Passwords may hold the signs that end one, such as ``@``, ``/`` and ``?``: in doubt more is masked.
    """
    if uri.startswith(FILES) or not URI.match(uri):
        return uri.removeprefix("sqlite:///")
    start, rest = re.split(r"(?<=:)/+", uri, maxsplit=1)
    place, *query = re.split(r"[?#]", rest, maxsplit=1)
    if query and "@" in query[0]:  # the question mark may be part of the password
        return f"{start}//***"
    _, user, host = place.rpartition("@")
    name, colon, port = host.partition(":")
    if colon and not host.startswith("[") and not port.partition("/")[0].isdigit():  # USER:PASSWORD without a host
        host = f"{name}:***"
    return f"{start}//{'***@' if user else ''}{host}{'?***' if query else ''}"


def masked(text: str, uri: str = "") -> str:
    """A message without the secrets of the addresses in it.

    Args:
        uri: the address that it was given: its secrets are masked wherever they stand, quoted or not.
    """
    if uri and not uri.startswith(FILES):
        text = text.replace(uri, shown(uri))
        for secret in sorted(_secrets(uri), key=len, reverse=True):
            text = text.replace(secret, "***")
    return URI.sub(lambda found: shown(found[0]), text)


def _secrets(uri: str) -> set[str]:
    """Password and query's values; of a server also a user without a password, which is a token."""
    rest = uri.partition("://")[2]
    user, colon, password = rest.rpartition("@")[0].partition(":")
    named = [password if colon else user if uri.startswith("http") else ""]
    named += [part.rpartition("=")[2] for part in re.split(r"[?#&;]", rest)[1:]]
    return {form for word in named for form in (word, unquote(word), unquote_plus(word)) if len(form) >= SHORTEST}
