"""Running averages over a consumer's inputs, in float32 or wider whatever the model's dtype.

Sums of x x^T in float32 lose the covariance where a channel's mean is 100 times its standard deviation, and real models
have such channels. So x - s is summed, where s is the mean of the first batch, and the result is centred. Products are
made in the inputs' dtype (x - s of bfloat16 inputs is rounded to bfloat16) and added up in float32.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

import torch

from ffgym.errors import CalibrationError
from ffgym.pruning.factors import as_factor, as_multiplied_, products_in
from ffgym.pruning.precision import WITHOUT_FLOAT64, float64_device, in_float64
from ffgym.types import LayerStats

GRADIENT_STATISTICS = frozenset({"gradient", "output_gradient"})
BLOCK = 256  # rows of symmetric sums: few enough to leave out nearly half of the products
OVERFLOW_HINT = (
    "The model overflows on the calibration text: use --set model.dtype=float32 or bfloat16. If it does so with "
    "these too, its weights are damaged: write or download it again."
)


def kept_bytes(outputs: int, channels: int, names: Set[str]) -> int:
    """Bytes that the statistics with these names take of a consumer of shape (outputs, channels), vectors aside."""
    sizes = {"second_moment": channels**2, "gradient": outputs * channels, "output_gradient": outputs**2}
    return sum(size * torch.float32.itemsize for name, size in sizes.items() if name in names)


@dataclass(frozen=True)
class InputMoments:
    """Mean and covariance of a consumer's inputs x (n channels)."""

    tokens: int  # how many tokens the averages run over
    mean: torch.Tensor  # E[x], shape (n,), float64
    covariance: torch.Tensor  # Cov[x], shape (n, n), float32

    def moment(self, *, centred: bool) -> torch.Tensor:
        """Cov[x], or E[x x^T], shape (n, n), new, in the precision that factors of so many channels are computed in."""
        moment = as_factor(self.covariance, len(self.mean))
        moment = moment.clone() if moment is self.covariance else moment
        mean = self.mean.to(moment)
        return moment if centred else moment.addr_(mean, mean)

    def stats(self, names: Set[str]) -> LayerStats:
        """Statistics for criteria and heuristics: those of ``mean``, ``square``, ``second_moment`` that are named.

        Vectors are float64 (float32 on a device without it), so that variances follow from them; matrices float32.
        """
        device = self.covariance.device
        mean, square = self.mean, in_float64(self.covariance.diagonal()) + self.mean**2
        rounded = mean.float().to(device)
        if device.type in WITHOUT_FLOAT64:
            mean, square = rounded, square.float().to(device)
        return LayerStats(
            tokens=self.tokens,
            mean=mean if "mean" in names else None,
            square=square if "square" in names else None,
            second_moment=torch.addr(self.covariance, rounded, rounded) if "second_moment" in names else None,
        )

    def reorder(self, columns: torch.Tensor) -> InputMoments:
        """The same inputs with channels in another order: ``columns``, shape (n,), int64."""
        here = columns.to(self.covariance.device)
        covariance = self.covariance.index_select(0, here).index_select(1, here)
        return InputMoments(self.tokens, self.mean[columns], covariance)


class Moments:
    """Accumulates mean and covariance of vectors x with n channels.

    Args:
        channels: n.
        device: where the sums live.
    """

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._shift: torch.Tensor | None = None
        wide = float64_device(torch.device(device))
        self._sum, self._multiplied = torch.zeros(2, channels, dtype=torch.float64, device=wide)
        self._products = torch.zeros(channels, channels, dtype=torch.float32, device=device)

    def update(self, inputs: torch.Tensor) -> None:
        """Add a batch of inputs.

        Args:
            inputs: shape (..., n), any floating dtype, not empty.
        """
        if self._shift is None:
            self._shift = inputs.reshape(-1, inputs.shape[-1]).float().mean(dim=0)
        x = shifted(inputs, self._shift)
        self.tokens += x.shape[0]
        self._sum += in_float64(x.sum(dim=0))  # batches are summed in their own dtype
        x = as_multiplied_(x, inputs.dtype)
        self._multiplied += in_float64(x.sum(dim=0))
        with products_in(inputs.dtype):
            add_products_(self._products, x)

    def result(self) -> InputMoments:
        """Mean and covariance of the tokens seen so far, at least one."""
        return self._averaged(self._products / self.tokens)

    def take(self) -> InputMoments:
        """The same, but in the memory of the sums, so that nothing can be added afterwards."""
        products, self._products = self._products, self._products.new_empty(0)
        return self._averaged(products.div_(self.tokens))

    def _averaged(self, products: torch.Tensor) -> InputMoments:
        assert self._shift is not None, "nothing was added"
        here = (self._multiplied / self.tokens).float().to(products.device)
        mean = in_float64(self._shift) + self._sum / self.tokens
        return InputMoments(self.tokens, mean, mirror_(products).addr_(here, here, alpha=-1))


def add_products_(sums: torch.Tensor, x: torch.Tensor) -> None:
    """Add x^T x to symmetric sums, but only to blocks on and above the diagonal, see `mirror_`.

    Args:
        sums: shape (n, n), float32.
        x: shape (tokens, n), float32.
    """
    for start in range(0, len(sums), BLOCK):
        sums[start : start + BLOCK, start:].addmm_(x[:, start : start + BLOCK].T, x[:, start:])


def mirror_(sums: torch.Tensor) -> torch.Tensor:
    """Fill in the blocks below the diagonal, shape (n, n)."""
    for end in range(BLOCK, len(sums), BLOCK):
        sums[end:, end - BLOCK : end] = sums[end - BLOCK : end, end:].T
    return sums


def shifted(inputs: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """x - s of every token, shape (tokens, n), float32, new."""
    return inputs.reshape(-1, inputs.shape[-1]).to(torch.float32, copy=True).sub_(shift)


def require_finite(*parts: InputMoments | LayerStats) -> None:
    """Raise ``CalibrationError``, naming the first statistic that holds NaN or infinity, where a model overflows."""
    for stats in parts:
        for name, value in vars(stats).items():
            if torch.is_tensor(value) and not torch.isfinite(value).all():
                raise CalibrationError(
                    f"the {name.replace('_', ' ')} on the calibration text holds NaN or infinity", hint=OVERFLOW_HINT
                )
