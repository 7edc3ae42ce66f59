"""The Frechet distance between Gaussians, and the mean and covariance of features that it is taken of, in float64."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from ._rows import FloatArray, as_rows

S = TypeVar("S", bound="FeatureStatistics")


class Ranks(Protocol):
    """What is asked of the processes that share the work: `ddpm_fast.training.processes.World`."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        ...


class FeatureStatistics:
    """Mean and covariance of feature vectors that come a batch at a time, in float64 (Chan et al. 1979).

    `count`, `mean` (D,), `covariance` (D, D), the unbiased one; NumPy arrays. How the features are cut into batches and
    parts changes them by rounding of float64 only.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: FloatArray = np.zeros(0)
        self._scatter: FloatArray = np.zeros((0, 0))  # sum of (f - mean) (f - mean)^T
        self._given: FloatArray | None = None  # a covariance from a file that does not say of how many samples

    def update(self, features: Any) -> None:
        """features (N, D), finite. Nothing is kept of a batch but its sums, taken about its own mean."""
        rows = as_rows("features", features).cpu().numpy()
        self._check(rows.shape[1], "features must have {} elements a sample as before, got {}")
        if len(rows) == 0:
            return
        mean = rows.mean(0)
        around = rows - mean
        self._add(len(rows), mean, around.T @ around)

    def merge(self, other: FeatureStatistics) -> None:
        """Takes in the statistics of other samples, as if they had come here as batches. `other` is left as it is."""
        if other._given is not None:
            raise ValueError(f"these statistics came without a count of samples and cannot be merged; {_NEED_COUNT}")
        if other.count:
            self._check(len(other.mean), "the statistics to merge must be of {} elements a sample as these, got {}")
            self._add(other.count, other.mean, other._scatter)

    def gather(self, world: Ranks) -> None:
        """Merges the statistics of all processes, in the order of their ranks: all end with the same bits.

        world: `ddpm_fast.training.processes.World` or anything with rank, size and sum(tensor), the sum over processes
        in place. Every process must call it; a process without any samples may.
        """
        if world.size == 1:
            return
        sizes = torch.zeros(world.size, dtype=torch.float64)
        sizes[world.rank] = len(self.mean) if self._given is None else -1
        world.sum(sizes)
        width = int(sizes.max())
        # All processes see the same sizes, so all raise or none does.
        if int(sizes.min()) < 0:
            raise ValueError(f"the statistics of a process came without a count of samples; {_NEED_COUNT}")
        if any(int(size) not in (0, width) for size in sizes):
            raise ValueError(f"all processes must have features of one size, got {[int(size) for size in sizes]}")
        whole = type(self)()
        for rank in range(world.size):  # one at a time: a covariance of 2048 features is 32 MiB
            packed = torch.zeros(1 + width + width * width, dtype=torch.float64)
            if rank == world.rank and self.count:
                parts = (np.array([self.count], np.float64), self.mean, self._scatter.ravel())
                packed = torch.from_numpy(np.concatenate(parts))
            world.sum(packed)
            count, mean, scatter = packed.numpy()[:1], packed.numpy()[1 : 1 + width], packed.numpy()[1 + width :]
            if count[0]:
                whole._check(width, "")
                whole._add(int(count[0]), mean, scatter.reshape(width, width))
        self.count, self.mean, self._scatter = whole.count, whole.mean, whole._scatter

    @property
    def covariance(self) -> FloatArray:
        if self._given is not None:
            return self._given
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self._scatter / (self.count - 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes an .npz that pytorch-fid reads too: mu (D,), sigma (D, D), float64; and count, which it does not know.

        The file is written under a temporary name and renamed.
        """
        covariance, target = self.covariance, Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                np.savez(file, mu=self.mean, sigma=covariance, count=np.int64(self.count))
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls: type[S], path: str | os.PathLike[str]) -> S:
        """Statistics from a file of `save`, or of pytorch-fid (mu and sigma alone).

        The latter do not say of how many samples they are, so nothing can be added to them; `count` is 0.
        Raises FileNotFoundError, or ValueError for a file that is no such .npz.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                if not hasattr(file, "files"):
                    raise ValueError("it holds one array")
                missing = [name for name in ("mu", "sigma") if name not in file.files]
                if missing:
                    raise ValueError(f"it has no {' and no '.join(missing)}")
                mu, sigma = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
                count = int(file["count"]) if "count" in file.files else 0
        except FileNotFoundError:
            raise FileNotFoundError(f"no such file of feature statistics: {path}") from None
        except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} must be an .npz with mu (D,) and sigma (D, D): {error}") from None
        if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
            raise ValueError(f"{path} must hold mu (D,) and sigma (D, D), got shapes {mu.shape} and {sigma.shape}")
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"{path} must hold finite values, got NaN or infinite ones")
        found = cls()
        found.mean = mu
        if count > 1:
            found.count, found._scatter = count, sigma * (count - 1)
        else:
            found._given = sigma
        return found

    def _check(self, width: int, message: str) -> None:
        """Room for features of that many elements; ValueError where there are some of another number already."""
        if self._given is not None:
            raise ValueError(f"these statistics came without a count of samples: nothing can be added; {_NEED_COUNT}")
        if self.count == 0:
            self.mean, self._scatter = np.zeros(width), np.zeros((width, width))
        if width != len(self.mean):
            raise ValueError(message.format(len(self.mean), width))

    def _add(self, count: int, mean: FloatArray, scatter: FloatArray) -> None:
        apart, whole = mean - self.mean, self.count + count
        self._scatter += scatter + np.outer(apart, apart) * (self.count * count / whole)
        self.mean = self.mean + apart * (count / whole)
        self.count = whole


_NEED_COUNT = "files of FeatureStatistics.save have one, files of pytorch-fid do not"


def frechet_distance(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> float:
    """Squared Frechet distance between N(mu1, sigma1) and N(mu2, sigma2) (Dowson and Landau 1982), in float64:

        |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    Of Inception features it is the FID (Heusel et al. 2017). The last trace is the sum of the square roots of the
    eigenvalues of s sigma2 s, s = sigma1^(1/2): symmetric, so that singular matrices (fewer samples than dimensions)
    need no care.

    Args:
        mu1, mu2: (D,).
        sigma1, sigma2: (D, D), symmetric, with no negative eigenvalues but by rounding.
    """
    means = [np.asarray(mu, np.float64) for mu in (mu1, mu2)]
    sigmas = [np.asarray(sigma, np.float64) for sigma in (sigma1, sigma2)]
    d = means[0].size
    for i, (mu, sigma) in enumerate(zip(means, sigmas, strict=True), 1):
        if mu.shape != (d,) or sigma.shape != (d, d):
            raise ValueError(
                f"mu{i} and sigma{i} must have shapes ({d},) and ({d}, {d}), got {mu.shape} and {sigma.shape}"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"mu{i} and sigma{i} must be finite, got NaN or infinite values")
    values, vectors = np.linalg.eigh(sigmas[0])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ sigmas[1] @ root).clip(min=0)).sum()
    apart = means[0] - means[1]
    return float(apart @ apart + np.trace(sigmas[0]) + np.trace(sigmas[1]) - 2 * shared)
