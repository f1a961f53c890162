"""The Hugging Face hub: what its names look like, and whether it answers."""

from __future__ import annotations

import functools
import re
import time
from typing import Literal

ASKED_EVERY = 60.0  # seconds: where packets are dropped, each question costs HUB_SECONDS; yet a network may come back
HUB_SECONDS = 5.0


def is_hub_id(name: str) -> bool:
    """Whether something on the hub can have this name."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def hub_error(kind: Literal["model", "dataset"], name: str, revision: str | None = None) -> Exception | None:
    """What one short question about a repository raised; ``None`` where the hub said that it is there.

    An ``HfHubHTTPError`` is the hub's answer. Each other type is a way to get none: no name service, no route, a
    proxy's refusal, ``HF_HUB_OFFLINE``.
    """
    return _asked(kind, name, revision, int(time.monotonic() / ASKED_EVERY))


@functools.cache
def _asked(kind: str, name: str, revision: str | None, interval: int) -> Exception | None:
    from huggingface_hub import HfApi

    try:
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=HUB_SECONDS)
    except Exception as error:
        return error
    return None
