import subprocess
import sys

import numpy as np
import pytest

from ffgym.errors import OutputError
from ffgym.report.figures import reward_figure, units_kept_figure
from ffgym.types import Allocation, Episode, Sublayer

SUBLAYERS = [
    sublayer
    for layer in range(4)
    for sublayer in (
        Sublayer(layer, "attention", 2, 32, 100, 100, 2, 16, 4),
        Sublayer(layer, "mlp", 64, 1, 3, 3, depth=4),
    )
]
FOUND = Allocation((2, 30, 1, 64, 2, 0, 0, 20), 500, 1568)
UNIFORM = Allocation((2, 40) * 4, 1200, 1568)


def episode(index: int, sparsity: float = 0.2, **kwargs) -> Episode:
    values = {"reward": 0.5 + index / 100, "failed": False} | kwargs
    return Episode(
        index=index,
        update=index // 4,
        action=np.zeros(8, np.float32),
        kept=FOUND.kept,
        loss=3.0,
        dense_loss=2.9,
        target_sparsity=sparsity,
        sparsity=sparsity,
        fidelity=1.0,
        tokens=256,
        **values,
    )


def png_size(path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_units_kept_is_a_png_at_150_dpi_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "new" / "kept.png"
    units_kept_figure(SUBLAYERS, {"found": FOUND, "uniform": UNIFORM}, path)
    assert png_size(path) == (1350, 780)


@pytest.mark.parametrize("count", [1, 7])
def test_units_kept_with_any_number_of_references(tmp_path, count):
    units_kept_figure(SUBLAYERS, {f"a{i}": UNIFORM for i in range(count)}, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").is_file()


def test_reward_figure_grows_a_panel_when_the_schedule_moves(tmp_path):
    still, moving = tmp_path / "still.png", tmp_path / "moving.png"
    reward_figure({"agent": [episode(i) for i in range(8)]}, still)
    reward_figure({"agent": [episode(i, 0.05 + i / 100) for i in range(8)], "random": []}, moving)
    assert png_size(moving)[1] > png_size(still)[1]


def test_failed_episodes_of_any_reward_are_drawn(tmp_path):
    failed = [episode(i, reward=reward, failed=True) for i, reward in enumerate((float("nan"), float("-inf"), -1e9))]
    reward_figure({"agent": failed, "random": [*failed, episode(4)]}, tmp_path / "reward.png")
    assert (tmp_path / "reward.png").is_file()


def test_a_picture_that_cannot_be_written_names_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/kept\.png"):
        units_kept_figure(SUBLAYERS, {"found": FOUND}, tmp_path / "file" / "kept.png")


def test_drawing_needs_no_screen_and_leaves_pyplot_alone(tmp_path):
    code = (
        "import sys; from ffgym.report import card, figures, table; assert 'matplotlib' not in sys.modules;"
        "assert 'torch' not in sys.modules; figures.new_figure(1, 1); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
