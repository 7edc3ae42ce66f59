"""The columns of the step table by their formulas, in float64; `steps.py` says what they are coefficients of."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .betas import Float64
from .timesteps import Timesteps

if TYPE_CHECKING:
    from ..schedule import Schedule

Columns = tuple[Float64, Float64, Float64, Float64, Float64]
"""c1, c2, c3, c4 and s."""


class Levels:
    """Signal and noise of each row, before and after it: A, P, their roots, and those of 1 - A and 1 - P.

    Row i leaves timestep here[i] and arrives at there[i], at the data where that is -1.
    """

    def __init__(self, schedule: Schedule, here: Timesteps, there: Timesteps) -> None:
        def at_both_ends(values: Float64, at_data: float) -> tuple[Float64, Float64]:
            return values[here], np.where(there >= 0, values[there], at_data)

        self.A, self.P = at_both_ends(schedule.alphas_cumprod, 1.0)
        self.sqrt_A, self.sqrt_P = at_both_ends(schedule.sqrt_alphas_cumprod, 1.0)
        self.noise_A, self.noise_P = at_both_ends(schedule.one_minus_alphas_cumprod, 0.0)
        self.sigma_A, self.sigma_P = at_both_ends(schedule.sqrt_one_minus_alphas_cumprod, 0.0)
        # 1 - A/P as a difference of noise levels, which loses less to cancellation than one of ratios near 1.
        self.beta = (self.noise_A - self.noise_P) / self.P
        # The posterior's variance (DDPM eq. 7); 0 in a row that arrives at the data.
        self.small = self.beta * self.noise_P / self.noise_A

    def x0_from(self, prediction: str) -> tuple[Float64, Float64]:
        """a and b of x0 = a x - b m."""
        if prediction == "eps":
            return 1.0 / self.sqrt_A, self.sigma_A / self.sqrt_A
        if prediction == "v":
            return self.sqrt_A, self.sigma_A
        return np.zeros_like(self.A), np.full_like(self.A, -1.0)

    def eps_from(self, prediction: str) -> tuple[Float64, Float64]:
        """p and q of eps = p x + q m, taken from the network's own output and not from a clipped x0."""
        if prediction == "eps":
            return np.zeros_like(self.A), np.ones_like(self.A)
        if prediction == "v":
            return self.sigma_A, self.sqrt_A
        return 1.0 / self.sigma_A, -self.sqrt_A / self.sigma_A

    def ddpm(self, variance: str) -> Columns:
        """The posterior q(x_prev | x_t, x0). A learned variance has sqrt(beta) in s, which says only: noise or none."""
        c1 = self.sqrt_P * self.beta / self.noise_A
        c2 = self.sqrt_A / self.sqrt_P * self.noise_P / self.noise_A
        s = np.sqrt(self.small if variance == "fixed_small" else self.beta)
        nothing = np.zeros_like(c1)
        return c1, c2, nothing, nothing, s

    def logvar_range(self) -> Float64:
        """[steps, 2]: the log variances between which learned_range chooses (Nichol & Dhariwal 2021, eq. 15).

        The smaller is the posterior's. In the last row that is log 0; as no noise is drawn there, it has the next
        row's instead, as in the authors' code.
        """
        smallest = self.small.copy()
        smallest[-1] = smallest[-2] if len(smallest) > 1 else self.beta[-1]
        return np.asarray(np.log(np.stack([smallest, self.beta], axis=1)))

    def ddim(self, eta: float, prediction: str, rederive: bool) -> Columns:
        """`rederive` takes eps from the clipped x0, else from the network's output."""
        s = eta * (self.sigma_P / self.sigma_A) * np.sqrt(self.beta)
        d_squared = self.noise_P - s * s
        # At eta = 1 on a zero-SNR step the two are equal, and a rounding error must not turn the root into a NaN.
        if (d_squared < -1e-12).any():
            row = int(np.argmin(d_squared))
            raise ValueError(
                f"eta={eta} adds more noise in row {row} than the state there may hold; choose eta in [0, 1]"
            )
        d = np.sqrt(np.maximum(d_squared, 0.0))
        nothing = np.zeros_like(d)
        if rederive:
            c2 = d / self.sigma_A
            return self.sqrt_P - self.sqrt_A * c2, c2, nothing, nothing, s
        p, q = self.eps_from(prediction)
        return self.sqrt_P.copy(), d * p, d * q, nothing, s

    def dpmsolver(self, order: int) -> Columns:
        """DPM-Solver++(2M), or its first order, which is DDIM (Lu et al. 2022, arXiv 2211.01095, Algorithm 2)."""
        with np.errstate(divide="ignore"):  # -inf without signal, inf at the data
            before, after = (
                0.5 * (np.log(signal) - np.log(noise))
                for signal, noise in ((self.A, self.noise_A), (self.P, self.noise_P))
            )
        h = after - before
        c1 = -self.sqrt_P * np.expm1(-h)
        half = np.zeros_like(h)  # c1 / (2 r) with r = (h of the row before) / h; none in row 0 and where h is infinite
        if order == 2:
            second = 1 + np.flatnonzero(np.isfinite(h[1:]))
            half[second] = c1[second] * h[second] / (2.0 * h[second - 1])
        nothing = np.zeros_like(h)
        return c1 + half, self.sigma_P / self.sigma_A, nothing, -half, nothing
