"""What the dense model loses on windows of text, kept in a file, so that the next search need not measure it again."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ffgym.errors import AssetError
from ffgym.files import FileFormat

LINE = FileFormat("line of known losses", tuple[str, float], AssetError, "Delete the file: it is written again.")


@dataclass(frozen=True)
class KnownLosses:
    """Losses of one prepared dense model by window; processes may read and add to its file at the same time."""

    # a line a window, its digest and its loss; lines that are damaged count as not there; None keeps nothing
    file: Path | None

    def among(self, windows: torch.Tensor) -> dict[int, float]:
        """Those that are known, in nats per token, by place among token ids of shape (windows, length), int64."""
        stored = self._read()
        return {place: stored[key] for place, window in enumerate(windows) if (key := _digest(window)) in stored}

    def add(self, windows: torch.Tensor, losses: Mapping[int, float]) -> None:
        """Write down losses by place among the windows; where that is not possible, nothing is kept."""
        if self.file is None or not losses:
            return
        lines = "".join(json.dumps([_digest(windows[place]), loss]) + "\n" for place, loss in losses.items())
        with suppress(OSError), self.file.open("ab", buffering=0) as file:
            file.write(lines.encode())

    def __len__(self) -> int:
        return len(self._read())

    def _read(self) -> dict[str, float]:
        if self.file is None or not self.file.is_file():
            return {}
        found: dict[str, float] = {}
        with suppress(AssetError):
            for source, line in LINE.lines(self.file):
                with suppress(AssetError):
                    digest, loss = LINE.parse(line, source)
                    if math.isfinite(loss):
                        found.setdefault(digest, loss)
        return found


def _digest(window: torch.Tensor) -> str:
    return hashlib.sha256(window.numpy().tobytes()).hexdigest()[:32]
