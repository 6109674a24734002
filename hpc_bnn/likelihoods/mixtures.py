"""The predictive distribution of a number: a mixture of the samples' distributions with equal weights.

A mixture holds K components for each of n examples and its targets, [K, n, targets, ...]. It gives quantiles, the PIT
of an observation, and the CRPS, which need more than mean and variance. Everything here is Local; give the components
in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Mixture:
    """Equal mixture of K distributions for each target, from their parameters, [K, n, targets, ...] each."""

    def __init__(self, *components: Tensor):
        self.components = components
        self.num_components = len(components[0])

    def of(self, *components: Tensor) -> Mixture:
        """Return a mixture of the same kind."""
        return type(self)(*components)

    def rows(self, start: int, stop: int) -> Mixture:
        """Return the mixture of some examples."""
        return self.map(lambda component: component[:, start:stop])

    def map(self, function: Callable[[Tensor], Tensor]) -> Mixture:
        """Return the mixture whose components are what a function makes of these."""
        return self.of(*map(function, self.components))

    def in_units(self, mean: Tensor, std: Tensor) -> Mixture:
        """Return the mixture of ``std * y + mean``, where they broadcast to [n, targets, ...]."""
        mixture = self.map(Tensor.clone)
        mixture.in_units_(mean, std)
        return mixture

    def in_units_(self, mean: Tensor, std: Tensor) -> None:
        """Become the mixture of ``std * y + mean``, in place, so that no second one is in memory."""
        raise NotImplementedError(f"{type(self).__name__} does not hold for shifted and rescaled targets")

    def cdf(self, z: Tensor) -> Tensor:
        """Return P(Y <= z), [n, targets, ...]."""
        raise NotImplementedError

    def pit(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ends of the interval on which the probability integral transform of y is uniform.

        They are P(Y < y) and P(Y <= y), the nonrandomised PIT (Czado, Gneiting, Held, Predictive model assessment for
        count data, 2009): the same for a continuous distribution.
        """
        low, high = self._by_chunks(lambda part, y: part._pit(y), y)
        return low, high

    def quantile(self, level: float) -> Tensor:
        """Return the quantile of a level between 0 and 1, [n, targets, ...]."""
        return self._by_chunks(lambda part: (part._quantile(level),))[0]

    def crps(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the CRPS of the mixture and the fair CRPS, [n, targets, ...] (units of y).

        The first is ``E|Y - y| - E|Y - Y'| / 2`` (Gneiting and Raftery, 2007). In the fair one Y and Y' never are of
        the same component, so that its expectation does not depend on K (Ferro, 2014); it is NaN for K = 1.
        """
        distance, pairs, own_pairs = self._by_chunks(lambda part, y: part._distances(y), y)
        count = self.num_components
        fair = (pairs - own_pairs) / (count * (count - 1)) if count > 1 else torch.full_like(pairs, math.nan)
        return distance - 0.5 * pairs / count**2, distance - 0.5 * fair

    def _by_chunks(self, function: Callable[..., tuple[Tensor, ...]], *fields: Tensor) -> tuple[Tensor, ...]:
        """Apply a function to blocks of the targets, so that its additional memory is bounded."""
        shape, size = self.components[0].shape[1:], CHUNK_ELEMENTS["cuda" if self.components[0].is_cuda else "cpu"]
        flat = [component.flatten(1) for component in self.components]
        flat += [field.expand(shape).flatten()[None] for field in fields]
        num = len(self.components)
        blocks = [
            function(self.of(*block[:num]), *(field[0] for field in block[num:]))
            for block in zip(*(tensor.split(max(size // self.num_components, 1), dim=1) for tensor in flat))
        ]
        return tuple(torch.cat(columns).view(shape) for columns in zip(*blocks))

    def _quantile(self, level: float) -> Tensor:
        raise NotImplementedError

    def _pit(self, y: Tensor) -> tuple[Tensor, Tensor]:
        value = self.cdf(y)
        return value, value

    def _distances(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return E|Y - y|, the sum of E|Y_i - Y_j'| over ordered pairs of components, and that of the pairs i = j."""
        raise NotImplementedError


CHUNK_ELEMENTS = {"cpu": 2**16, "cuda": 2**22}
"""Numbers of a component tensor that are worked on at once: they fit into the cache of a core (a quarter of the
time); on a GPU they take longer than a kernel launch, and a sort needs little temporary memory."""


class Members(Mixture):
    """K numbers without a density: an ensemble.

    An observation that is exchangeable with the members has each rank among them with probability 1 / (K + 1); PIT and
    quantiles are those of this rule (Hyndman and Fan, 1996, type 6; not beyond the members).
    """

    def in_units_(self, mean: Tensor, std: Tensor) -> None:
        self.components[0].mul_(std).add_(mean)

    def cdf(self, z: Tensor) -> Tensor:
        return (self.components[0] <= z).to(z).mean(0)

    def _pit(self, y: Tensor) -> tuple[Tensor, Tensor]:
        members, num_ranks = self.components[0], self.num_components + 1
        return (members < y).sum(0) / num_ranks, ((members <= y).sum(0) + 1) / num_ranks

    def _quantile(self, level: float) -> Tensor:
        count = self.num_components
        place = min(max(level * (count + 1) - 1, 0), count - 1)
        low = int(place)
        ordered = self.components[0].sort(0).values
        return torch.lerp(ordered[low], ordered[min(low + 1, count - 1)], place - low)

    def _distances(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        members, count = self.components[0], self.num_components
        rank = torch.arange(1 - count, count, 2, dtype=members.dtype, device=members.device)
        pairs = 2 * torch.einsum("k,k...->...", rank, (members - members.mean(0)).sort(0).values)
        return (members - y).abs().mean(0), pairs, torch.zeros_like(pairs)


class GaussianMixture(Mixture):
    """Components of a mean and a standard deviation."""

    def in_units_(self, mean: Tensor, std: Tensor) -> None:
        loc, scale = self.components
        loc.mul_(std).add_(mean)
        scale.mul_(std)

    def cdf(self, z: Tensor) -> Tensor:
        loc, scale = self.components
        return self._standard_cdf((z - loc) / scale).mean(0)

    def rescaled(self, factor: Tensor) -> Mixture:
        """Return the mixture with the scales of the components times a factor, which broadcasts to [n, targets, ...]."""
        loc, scale = self.components
        return self.of(loc, scale * factor)

    def log_densities(self, y: Tensor) -> Tensor:
        """Return the log density of each component at y, [K, n, targets, ...]."""
        loc, scale = self.components
        return self._standard_log_density((y - loc) / scale) - scale.log()

    def slopes(self, y: Tensor) -> Tensor:
        """Return the derivatives of `log_densities` by the logarithm of the factor of `rescaled`, [K, n, targets, ...]."""
        loc, scale = self.components
        return self._pull(((y - loc) / scale).square()) - 1

    def _quantile(self, level: float) -> Tensor:
        loc, scale = self.components
        of_components = loc + scale * self._standard_quantile(level)
        low, high = of_components.amin(0), of_components.amax(0)
        return _root(lambda z: self.cdf(z) - level, low, high)

    def _standard_cdf(self, z: Tensor) -> Tensor:
        return torch.special.ndtr(z)

    def _standard_log_density(self, z: Tensor) -> Tensor:
        return -0.5 * (z.square() + math.log(2 * math.pi))

    def _pull(self, square: Tensor) -> Tensor:
        """Return minus z times the derivative of the standard log density, at the square of z."""
        return square

    def _standard_quantile(self, level: float) -> float:
        return torch.special.ndtri(torch.tensor(level, dtype=torch.float64)).item()

    def _distances(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Grimit, Gneiting, Berrocal, Johnson, The CRPS for circular variables, 2006: E|N(m, s^2)| in closed form
        loc, scale = self.components
        own = 2 / math.sqrt(math.pi) * scale.sum(0)
        variance, pairs = scale.square(), own.clone()
        for shift in range(1, self.num_components):  # pairs (i, i + shift)
            std = (variance[shift:] + variance[:-shift]).sqrt()
            pairs += 2 * _mean_distance(loc[shift:] - loc[:-shift], std).sum(0)
        return _mean_distance(loc - y, scale).mean(0), pairs, own


def _mean_distance(mean: Tensor, std: Tensor) -> Tensor:
    """Return E|X| of X ~ N(mean, std^2)."""
    z = mean / std
    return std * (math.sqrt(2 / math.pi) * torch.exp(-0.5 * z.square())) + mean * torch.special.erf(z / math.sqrt(2))


def student_t_log_norm(df: float) -> float:
    """Return the log density of the standard Student-t distribution at 0 (nats)."""
    return math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)


class StudentTMixture(GaussianMixture):
    """Components of a location and a scale, with ``df`` degrees of freedom."""

    def __init__(self, loc: Tensor, scale: Tensor, df: float):
        super().__init__(loc, scale)
        self.df = df

    def of(self, *components: Tensor) -> Mixture:
        return StudentTMixture(*components, df=self.df)

    def _standard_cdf(self, z: Tensor) -> Tensor:
        from scipy.special import stdtr  # torch has no incomplete beta function

        return torch.from_numpy(stdtr(self.df, z.cpu().numpy())).to(z)

    def _standard_log_density(self, z: Tensor) -> Tensor:
        return student_t_log_norm(self.df) - (self.df + 1) / 2 * torch.log1p(z.square() / self.df)

    def _pull(self, square: Tensor) -> Tensor:
        return (self.df + 1) * square / (self.df + square)

    def _standard_quantile(self, level: float) -> float:
        from scipy.special import stdtrit

        return float(stdtrit(self.df, level))

    def _distances(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # E|Y_i - y| and E|Y_i - Y_i'| in closed form (Jordan, Krueger, Lerch, Evaluating probabilistic forecasts with
        # scoringRules, 2019). Pairs: 2 F (1 - F) is the mean of 2 F_i (1 - F_i), whose integrals these are, plus twice the variance
        # of the F_i, whose tails are short for any df: by sinh-sinh quadrature (Takahasi, Mori, 1974)
        df, (loc, scale) = self.df, self.components
        if df <= 1:
            infinite = torch.full_like(y, math.inf)
            return infinite, torch.zeros_like(y), torch.zeros_like(y)
        z = (y - loc) / scale
        density = torch.exp(student_t_log_norm(df) - (df + 1) / 2 * torch.log1p(z.square() / df))
        distance = z * (2 * self._standard_cdf(z) - 1) + 2 * density * (df + z.square()) / (df - 1)
        log_beta = [math.lgamma(0.5) + math.lgamma(b) - math.lgamma(b + 0.5) for b in (df - 0.5, df / 2)]
        own = 4 * math.sqrt(df) / (df - 1) * math.exp(log_beta[0] - 2 * log_beta[1]) * scale.sum(0)
        centre, width = loc.mean(0), loc.std(0, correction=0) + scale.mean(0)
        pairs = own / self.num_components
        for node in range(-7 * NODES_PER_UNIT // 2, 7 * NODES_PER_UNIT // 2 + 1):
            u = node / NODES_PER_UNIT
            inner = math.pi / 2 * math.sinh(u)
            weight = math.pi / 2 * math.cosh(u) * math.cosh(inner) / NODES_PER_UNIT
            below = self._standard_cdf((centre + math.sinh(inner) * width - loc) / scale)
            pairs += 2 * weight * width * below.var(0, correction=0)
        return (scale * distance).mean(0), pairs * self.num_components**2, own


NODES_PER_UNIT = 32
"""Density of the nodes of the quadrature. Relative error of the CRPS, measured for df from 1.01 to 30: below 1e-6 where the scales
are at least 0.2 of the spread of the locations plus the mean scale, below 1e-3 at 0.05, below 0.03 at 0.01."""


# --- counts and yes-no targets -----------------------------------------------------------------------------


MAX_COUNTS = 2**12
"""Counts that a predictive may span before its CRPS is that of normal distributions: their error is below 1e-5 of it then."""


class PoissonMixture(Mixture):
    """Components of a rate."""

    def cdf(self, z: Tensor) -> Tensor:
        return self._cdfs(z).mean(0)

    def _cdfs(self, z: Tensor) -> Tensor:
        (rate,) = self.components
        above = torch.special.gammaincc(z.floor().clamp_min(0).expand_as(rate) + 1, rate)
        return torch.where(z < 0, 0.0, above)

    def _pit(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.cdf(y - 1), self.cdf(y)

    def _range(self) -> tuple[Tensor, Tensor]:
        """Return whole numbers between which all but 1e-10 of each component lies."""
        (rate,) = self.components
        reach = 8 * rate.sqrt() + 25
        return (rate - reach).amin(0).floor().clamp_min(0), (rate + reach).amax(0).ceil()

    def _quantile(self, level: float) -> Tensor:
        low, high = self._range()  # the quantile is the least k with F(k) >= level
        is_open = low < high
        while bool(is_open.any()):
            middle = ((low + high) / 2).floor()
            is_enough = self.cdf(middle) >= level
            above, below = torch.where(is_enough, low, middle + 1), torch.where(is_enough, middle, high)
            is_open = (above < below) & ((above > low) | (below < high))  # above 2^53 no number lies between them
            low, high = above, below
        return torch.where(low.isnan(), low, high)  # NaN where a rate is no number

    def _distances(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # E|Y_i - y| and E|Y_i - Y_i'| in closed form (Wei, Held, Calibration tests for count data, TEST 2014); for the pairs the sum
        # of 2 F (1 - F), or for very many counts, where it would take as long as they are many, the formula of normal distributions
        (rate,) = self.components
        count = y.floor().clamp_min(0)
        mass = (torch.xlogy(count, rate) - rate - torch.lgamma(count + 1)).exp()
        distance = torch.where(y < 0, rate - y, (y - rate) * (2 * self._cdfs(y) - 1) + 2 * rate * mass)
        own = 2 * rate * (torch.special.i0e(2 * rate) + torch.special.i1e(2 * rate))
        pairs, (low, high) = torch.zeros_like(y), self._range()
        is_wide = ~(high - low <= MAX_COUNTS)  # or no number
        narrow, low = self.of(rate[:, ~is_wide]), low[~is_wide]
        of_narrow = torch.zeros_like(low)
        for offset in range(int((high[~is_wide] - low).max()) + 1 if low.numel() else 0):
            below = narrow.cdf(low + offset)
            of_narrow += 2 * below * (1 - below)
        pairs[~is_wide] = of_narrow * self.num_components**2
        if is_wide.any():
            rate = rate[:, is_wide]
            of_wide = own[:, is_wide].sum(0)
            for shift in range(1, self.num_components):
                std = (rate[shift:] + rate[:-shift]).sqrt()
                of_wide += 2 * _mean_distance(rate[shift:] - rate[:-shift], std).sum(0)
            pairs[is_wide] = of_wide
        return distance.mean(0), pairs, own.sum(0)


class BernoulliMixture(Mixture):
    """Components of the probability of 1."""

    def cdf(self, z: Tensor) -> Tensor:
        none = 1 - self.components[0].mean(0)
        return torch.where(z < 0, 0, torch.where(z < 1, none, 1))

    def _pit(self, y: Tensor) -> tuple[Tensor, Tensor]:
        none = 1 - self.components[0].mean(0)
        return torch.where(y <= 0, 0, none), self.cdf(y)

    def _quantile(self, level: float) -> Tensor:
        none = 1 - self.components[0].mean(0)
        return (none < level).to(none)

    def _distances(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (p,) = self.components
        total = p.sum(0)
        distance = (p * (1 - y).abs() + (1 - p) * y.abs()).mean(0)
        return distance, 2 * total * (self.num_components - total), (2 * p * (1 - p)).sum(0)


# --- roots -----------------------------------------------------------------------------------------------


ROOT_TOLERANCE = 1e-8
"""Error of a quantile, relative to the distance of the outermost quantiles of the components."""


def _root(function: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Return where an increasing function is 0, elementwise, between ends that hold the roots.

    Inverse quadratic interpolation where it is safe, otherwise bisection (Chandrupatla, 1997).
    """
    a, b = high, low
    fa, fb = function(a), function(b)
    c, fc = a, fa
    t = torch.full_like(a, 0.5)
    tolerance = ROOT_TOLERANCE * (high - low)
    best, is_done = a, torch.zeros_like(a, dtype=torch.bool)
    for _ in range(100):
        x = a + t * (b - a)
        fx = function(x)
        is_same = fx.sign() == fa.sign()
        c, fc = torch.where(is_same, a, b), torch.where(is_same, fa, fb)
        b, fb = torch.where(is_same, b, a), torch.where(is_same, fb, fa)
        a, fa = x, fx
        # What is done stays: a root does not depend on those beside it, as a process grid deals them out
        best = torch.where(is_done, best, torch.where(fa.abs() < fb.abs(), a, b))
        least = tolerance / (b - a).abs()
        is_done = is_done | (least > 0.5) | (fa == 0) | (a == b)
        if bool(is_done.all()):
            break
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        is_safe = (phi.square() < xi) & ((1 - phi).square() < 1 - xi)
        inverse = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        t = torch.where(is_safe, inverse, 0.5).clamp(min=least, max=1 - least)
        t = torch.where(is_done | ~t.isfinite(), 0.5, t)
    return best
