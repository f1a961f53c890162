"""What many tests share: one thread, the same examples on every machine, and a tiny model that is ready to be cut."""

from __future__ import annotations

import base64
import errno
import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    import torch

    from ffgym.prepare.paths import Prepared

# Before torch is imported: on models this small, threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["FFGYM_CACHE_SIZE"] = "0"  # a test that wants the store says so

# Ray ends workers that take a minute to start, and some of them where the whole machine is short of memory.
os.environ |= {"RAY_worker_register_timeout_seconds": "900", "RAY_memory_monitor_refresh_ms": "0"}
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # else each server starts ten processes that nobody asks

# A shell has what it puts in the background ignore Ctrl-C, and so would every process that the tests start there.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile(
    "ffgym",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # busy machines are
)
hypothesis.settings.load_profile("ffgym")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that several workers end at the same time."""
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("demo", "slow", "browser"))))


def random_windows(count: int, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Token ids for the tiny models, shape (count, length)."""
    import torch

    return torch.randint(3, 128, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(name="random_windows", scope="session")
def random_windows_fixture() -> Callable[..., torch.Tensor]:
    return random_windows


@pytest.fixture(scope="module")
def only_builtins() -> Iterator[None]:
    """No plugins but ffgym's own, whatever is installed here, no tracking server, and a wide terminal."""
    from ffgym.plugins import discovery

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(discovery.ENVIRONMENT_VARIABLE, "")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("COLUMNS", "200")
        yield


@pytest.fixture
def prepared_llama() -> Prepared:
    """A tiny random llama (3 layers, 2 KV groups, 48 channels) with its paths; fresh for every test."""
    from ffgym.criteria.wanda import Wanda
    from ffgym.prepare.paths import prepare
    from ffgym.testing.models import tiny_model

    return prepare(tiny_model("llama"), Wanda(), random_windows(8), ridge=0.01)


@pytest.fixture(scope="session")
def glass() -> tuple[Any, torch.Tensor]:
    """The tiny model that has really been trained, and 32 windows of 96 tokens of its own prose: copy before cutting.

    It is asked to write them itself, so that calibration and evaluation text are of the kind it knows.
    """
    import torch
    from glass_model import glass_model

    model, tokenizer = glass_model()
    start = tokenizer(["Alice", "The", "She", "He"] * 8, return_tensors="pt", padding=True)
    torch.manual_seed(0)
    with torch.no_grad():
        written = model.generate(
            **start, do_sample=True, min_new_tokens=100, max_new_tokens=100, pad_token_id=0, top_k=0
        )
    return model.requires_grad_(False), written[:, -96:].contiguous()


@pytest.fixture
def make_env(prepared_llama: Prepared) -> Callable[..., Any]:
    """``make_env(**options)``: a PruningEnv on the tiny llama and 12 search windows of 32 tokens."""
    from ffgym.envs.pruning_env import PruningEnv
    from ffgym.pruning.budget import Budget
    from ffgym.rewards.perplexity import Perplexity

    def make(budget: Budget | None = None, **options: Any) -> PruningEnv:
        prunable = prepared_llama.prunable
        budget = budget or Budget(prunable.sublayers)
        return PruningEnv(prunable, Perplexity(), random_windows(12, seed=1), budget, **options)

    return make


@pytest.fixture
def uniform_env(prepared_llama: Prepared, make_env: Callable[..., Any]) -> Any:
    """One shape for all layers: at sparsity 0.3 two of them use up the budget; 5 windows are reserved."""
    from ffgym.pruning.budget import Budget

    prunable = prepared_llama.prunable
    budget = Budget(prunable.sublayers, shapes=prunable.family.stock_shapes(prunable.model))
    return make_env(budget, sparsity=0.3, reserved=5)


@pytest.fixture(scope="session")
def hooked_episodes() -> Callable[[Callable[[], object]], AbstractContextManager[None]]:
    """``with hooked_episodes(hook)``: it is called before each episode that was measured, not replayed, is recorded.

    It may raise, as Ctrl-C between two episodes would.
    """
    from ffgym.envs.vector import PruningVectorEnv

    measured = PruningVectorEnv._measured

    @contextmanager
    def hooked(hook: Callable[[], object]) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PruningVectorEnv, "_measured", lambda *given: (hook(), measured(*given))[1])
            yield

    return hooked


@pytest.fixture
def steps(hooked_episodes: Any) -> Iterator[list[int]]:
    """Grows by one with every episode that is measured; Ctrl-C comes when its length passes ``steps[0]``."""
    seen = [10**6]

    def counted() -> None:
        if len(seen) > seen[0]:
            raise KeyboardInterrupt
        seen.append(len(seen))

    with hooked_episodes(counted):
        yield seen


ONE_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="session", autouse=True)
def drawing() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Pictures are saved as one pixel, as drawing takes half the time of a run; ``with drawing():`` draws them."""
    from matplotlib.figure import Figure

    savefig = Figure.savefig

    @contextmanager
    def drawn() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", savefig)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **options: path.write_bytes(ONE_PIXEL))
        yield drawn


@pytest.fixture
def drawn(drawing: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Pictures are drawn in this test."""
    with drawing():
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, as playwright drives it."""
    sync_api, chromium = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    flags = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-sync")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def dark_style() -> Any:
    """A block in which pictures of the caller's are black and tiny, and need TeX."""
    import matplotlib.style

    own = {**matplotlib.style.library["dark_background"], "savefig.dpi": 10, "text.usetex": True}
    return matplotlib.rc_context(own)


@pytest.fixture
def small_files() -> Callable[[int], AbstractContextManager[None]]:
    """``with small_files(size):`` no file of this process grows beyond so many bytes, as on a full disk.

    Not even the one that pytest prints to, so the block holds nothing but what is to fail.
    """
    resource: Any = pytest.importorskip("resource")

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limited


@pytest.fixture
def read_only_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tries whether it may write somewhere may not, as on a disk that is mounted read-only."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """``install(package, source)``: install plugins as pip would, as a module and its dist-info on sys.path."""
    from ffgym.plugins import discovery

    monkeypatch.delenv(discovery.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    modules: list[str] = []

    def add(package: str, source: str, *, version: str = "1.0") -> None:
        module = package.replace("-", "_")
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", "utf-8")
        (info / "entry_points.txt").write_text(f"[ffgym]\n{package}-entry = {module}\n", "utf-8")
        importlib.invalidate_caches()
        discovery.forget()

    discovery.forget()
    yield add
    discovery.forget()
    for module in modules:
        sys.modules.pop(module, None)


PATIENT = """
import os, time
import ffgym
from ffgym.rewards.perplexity import Perplexity

class Patient(Perplexity):
    \"\"\"Holds a process up after as many episodes as its environment says.\"\"\"

    name = "patient"
    episodes = 0

    def __call__(self, pruned, dense):
        type(self).episodes += 1
        if self.episodes > int(os.environ.get("FFGYM_PATIENT_EPISODES", 10**9)):
            time.sleep(3600)
        return super().__call__(pruned, dense)

@ffgym.hookimpl
def ffgym_rewards():
    return [Patient]
"""


@pytest.fixture
def patient(
    install: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], dict[str, str]]:
    """Install the reward ``patient``; ``patient(episodes)`` is the environment of a process that it holds up there."""
    from ffgym.plugins import discovery

    install("acme-patient", PATIENT)
    monkeypatch.setenv(discovery.ENVIRONMENT_VARIABLE, "acme-patient-entry")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    return lambda episodes: {**os.environ, "PYTHONPATH": path, "FFGYM_PATIENT_EPISODES": str(episodes)}


WORDS = [f"w{i}" for i in range(120)]


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """A tokenizer for the tiny models: 120 words and 3 special tokens, one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", padding_side="left")


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: Any) -> dict[str, Any]:
    """A RunConfig as plain data, on a saved tiny llama and corpora of random words."""
    import numpy as np

    from ffgym.testing.models import tiny_model

    folder: Path = tmp_path_factory.mktemp("tiny-run")
    tiny_model("llama").save_pretrained(folder / "model")
    word_tokenizer.save_pretrained(folder / "model")
    for name, seed in (("search.txt", 0), ("report.txt", 1)):
        text = " ".join(np.random.default_rng(seed).choice(WORDS, 2000))
        (folder / name).write_text(text, encoding="utf-8")
    return {
        "model": {"name": str(folder / "model"), "dtype": "float32", "device": "cpu"},
        "data": {
            "calibration": str(folder / "search.txt"),
            "search": str(folder / "search.txt"),
            "report": str(folder / "report.txt"),
            "window": 32,
            "calibration_tokens": 256,
            "search_tokens": 256,
            "report_tokens": 64,
        },
        "search": {"episodes": 24, "episode_tokens": 64, "final_tokens": 64},
    }
