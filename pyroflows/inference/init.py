"""Gaussian approximations of a posterior, found from its log joint density and score alone, to initialise a guide."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from pyroflows.arguments import check_option
from pyroflows.inference.log_joint import LogJoint

__all__ = ["INIT_METHODS", "GaussianInit", "climb", "draws_and_densities", "find_init"]

INIT_METHODS = ("auto", "laplace", "pathfinder", "fullrank", "meanfield", "none")
_DRAWS = 64  # draws from a Gaussian to estimate its ELBO or to improve it; more if there are many latents
_JUDGED = 256  # draws of a Gaussian to judge it by
_CANDIDATES = 128  # points of each width, the best of which are climbed from
_CLIMBERS = 16  # climbs at once from points near the initial values; four if there are many latents
_PRIOR_DRAWS = 64  # draws of the prior, the best and others of which are climbed from
_PRIOR_CLIMBERS = 16  # climbs at once from the prior; four if there are many latents
_ITERATIONS = 100
_PATIENCE = 15  # iterations of batch and match without a better ELBO
_EVERY = 8  # iterations between the recorded points of a climb
_PATHS = 4  # climbs whose Gaussians are compared
_Climb = list[tuple[Tensor, Tensor, Tensor]]  # points, their values, and estimates of the inverse Hessian there


@dataclass(frozen=True)
class GaussianInit:
    """A Gaussian over the unconstrained vector."""

    method: str  # how it was found
    loc: Tensor  # the mean, ``(dim,)``
    scale_tril: Tensor  # the Cholesky factor of the covariance, ``(dim, dim)``
    elbo: float = -math.inf  # in nats, estimated from a few draws, less two standard errors, so that luck does not win


def draws_and_densities(gaussian: GaussianInit, log_joint: LogJoint) -> tuple[Tensor, Tensor, Tensor]:
    """Return draws of a Gaussian, ``(draws, dim)``, with the log joint density and the Gaussian's log-density there."""
    loc, factor = gaussian.loc, gaussian.scale_tril
    u = (loc + torch.randn(_JUDGED, len(loc), dtype=loc.dtype, device=loc.device) @ factor.mT).to(log_joint.dtype)
    log_q = MultivariateNormal(loc, scale_tril=factor, validate_args=False).log_prob(u.to(loc))
    return u, log_joint.value(u), log_q


def _never(_: str) -> bool:
    return False


def find_init(
    log_joint: LogJoint,
    method: str = "auto",
    *,
    diagonal: bool = False,
    seed: int = 0,
    out_of_time: Callable[[str], bool] | None = None,
) -> list[GaussianInit]:
    r"""Find Gaussians near the posterior, the best first.

    "laplace" climbs to a mode by BFGS from several points and takes the inverse Hessian there; "pathfinder" takes the
    Gaussian of the best ELBO among those along the climbs, which for a posterior with a neck is better than that at
    the mode; "fullrank" and "meanfield" fit a full or a diagonal Gaussian by batch and match, from the prior's scale;
    "auto" does all of it, improves the best by batch and match, and takes the best ELBO; "none" takes a standard normal
    around the model's initial values. With ``diagonal``, for many latents, "auto" is "meanfield". ``out_of_time`` is
    told now and then what is being done; once it returns true, what was found until then is returned.

    References:
        Pathfinder: Parallel quasi-Newton variational inference, Zhang et al., 2022 (arXiv:2108.03782); Batch and match:
        black-box variational inference with a score-based divergence, Cai et al., 2024 (arXiv:2402.14758).
    """
    check_option("init", method, INIT_METHODS)
    out_of_time = _never if out_of_time is None else out_of_time
    initial = log_joint.initial.double()
    prior = GaussianInit("none", initial, torch.eye(log_joint.dim).to(initial))
    if method == "none":
        return [prior]
    method = "meanfield" if diagonal and method == "auto" else method
    inits: list[GaussianInit] = []
    generator = torch.Generator().manual_seed(seed)
    if method in ("auto", "laplace", "pathfinder"):
        paths = _distinct(climb(log_joint, _starting_points(log_joint, generator), out_of_time))
        if method != "laplace":
            inits += [_best_of_path(log_joint, path, generator) for path in _while_time(paths, inits, out_of_time)]
        if method != "pathfinder":
            inits += [
                init
                for path in _while_time(paths, inits, out_of_time)
                if (init := _laplace(log_joint, path, generator)) is not None
            ]
    if method in ("auto", "fullrank", "meanfield"):
        for first in [*_sorted(inits)[:2], prior]:
            inits += _batch_and_match(log_joint, first, generator, out_of_time, diagonal=method == "meanfield")
    if not (inits := _sorted(inits)):
        if out_of_time("searching for a start"):
            return [prior]
        advice = "pass init='none', or change the model's initial values"
        raise ValueError(f"expected a Gaussian with a finite ELBO by init={method!r}; got none: {advice}")
    return inits


def _while_time(paths: list[_Climb], inits: list[GaussianInit], out_of_time: Callable[[str], bool]) -> Iterator[_Climb]:
    """Yield paths while there is time; one in any case, if nothing else was found."""
    for number, path in enumerate(paths):
        if out_of_time("comparing Gaussians") and (number or inits):
            return
        yield path


def _sorted(inits: list[GaussianInit]) -> list[GaussianInit]:
    return sorted((init for init in inits if math.isfinite(init.elbo)), key=lambda init: -init.elbo)


def _starting_points(log_joint: LogJoint, generator: torch.Generator) -> Tensor:
    """Return points to climb from: the initial values, the best of many points around them, and draws of the prior."""
    few = log_joint.dim > 100
    width = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64, device="cpu")
    shape = (len(width), _CANDIDATES, log_joint.dim)
    noise = width[:, None, None] * torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")
    candidates = log_joint.initial.double() + noise.to(log_joint.device)
    value = torch.stack([_value_and_score(log_joint, points)[0] for points in candidates])
    best = value.topk(1 if few else _CLIMBERS // len(width)).indices
    near = candidates.gather(1, best[..., None].expand(*best.shape, shape[-1])).flatten(0, 1)
    seed = int(torch.randint(2**31, (), generator=generator, device="cpu"))
    prior = log_joint.prior_draws(_PRIOR_DRAWS, seed=seed).double()
    value, _ = _value_and_score(log_joint, prior)
    prior, value = prior[value.isfinite()], value[value.isfinite()]
    number = _PRIOR_CLIMBERS // 4 if few else _PRIOR_CLIMBERS
    order = value.argsort(descending=True)  # the best and others, since the best may all be on the slopes of one mode
    rows = torch.cat([order[: number // 4], order[number // 4 :].sort().values[: number - number // 4]])
    return torch.cat([log_joint.initial.double()[None], near, prior[rows]])


def _value_and_score(log_joint: LogJoint, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return value and score in float64, in which the algebra here is done whatever the model's dtype."""
    value, score = log_joint.value_and_score(u.to(log_joint.dtype))
    return value.to(u.dtype), score.to(u.dtype)


def climb(log_joint: LogJoint, x: Tensor, out_of_time: Callable[[str], bool] = _never) -> list[_Climb]:
    """Climb by BFGS from several points at once, ``(starts, dim)``; return the path of each that moved."""
    value, score = _value_and_score(log_joint, x)
    eye = torch.eye(x.shape[-1]).to(x)
    inverse = eye.expand(len(x), *eye.shape).clone()
    fresh = torch.ones(len(x), dtype=torch.bool, device=x.device)
    active = value.isfinite()
    learned = inverse  # the last estimates before a reset
    paths: list[_Climb] = [[] for _ in x]
    for iteration in range(_ITERATIONS):
        if not active.any() or out_of_time("climbing to modes"):
            break
        direction = (inverse @ score.unsqueeze(-1)).squeeze(-1)
        length = torch.where(fresh, (1 / direction.norm(dim=-1)).clamp(max=1.0), torch.ones_like(value))
        new_x, new_value, new_score = _line_search(log_joint, x, value, score, direction, length, active)
        moved = active & (new_value > value)
        step, change = new_x - x, score - new_score
        curvature = (step * change).sum(-1)
        good = moved & (curvature > 1e-10 * step.norm(dim=-1) * change.norm(dim=-1))
        inverse = torch.where(good[:, None, None], _update(inverse, step, change, curvature, fresh & good), inverse)
        learned = torch.where(good[:, None, None], inverse, learned)
        # Old curvature may be why a direction led nowhere: reset once to steepest ascent.
        stuck = active & ~moved
        active = (moved & (new_value - value > 1e-9 * (1 + value.abs()))) | (stuck & ~fresh)
        inverse = torch.where((stuck & ~fresh)[:, None, None], eye, inverse)
        fresh = torch.where(stuck, True, fresh & ~good)
        x = torch.where(moved[:, None], new_x, x)
        score = torch.where(moved[:, None], new_score, score)
        value = torch.where(moved, new_value, value)
        if iteration % _EVERY == 0:
            for row in good.nonzero()[:, 0].tolist():
                paths[row].append((x[row], value[row], inverse[row].clone()))
    for row, path in enumerate(paths):
        if not fresh[row] or path:
            path.append((x[row], value[row], learned[row]))
    return [path for path in paths if path]


def _distinct(paths: list[_Climb]) -> list[_Climb]:
    """Return the highest paths, those to different modes before those to the same mode."""
    paths = sorted(paths, key=lambda path: -float(path[-1][1]))
    first: list[_Climb] = []
    others: list[_Climb] = []
    for path in paths:
        is_new = all(_distance(path[-1][0], *other[-1][::2]) > 5 for other in first)
        (first if is_new else others).append(path)
    return (first + others)[:_PATHS]


def _distance(x: Tensor, mode: Tensor, covariance: Tensor) -> float:
    """Return the Mahalanobis distance of a point from a mode."""
    factor, fine = _cholesky(covariance)
    if not fine:
        return math.inf
    return float(torch.linalg.solve_triangular(factor, (x - mode)[:, None], upper=False).norm())


def _line_search(
    log_joint: LogJoint, x: Tensor, value: Tensor, score: Tensor, direction: Tensor, length: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Backtrack until every active climb has risen enough."""
    slope = (score * direction).sum(-1)
    best = x.clone(), value.clone(), score.clone()
    waiting = active.clone()
    for _ in range(20):
        rows = waiting.nonzero()[:, 0]
        if not len(rows):
            break
        trial = x[rows] + length[rows, None] * direction[rows]
        trial_value, trial_score = _value_and_score(log_joint, trial)
        enough = trial_value >= value[rows] + 1e-4 * length[rows] * slope[rows]
        done = rows[enough]
        for old, new in zip(best, (trial, trial_value, trial_score), strict=True):
            old[done] = new[enough]
        waiting[done] = False
        length = torch.where(waiting, length * 0.4, length)
    return best


def _update(inverse: Tensor, step: Tensor, change: Tensor, curvature: Tensor, first: Tensor) -> Tensor:
    """Update the inverse Hessians, ``(starts, dim, dim)``, as BFGS does."""
    scale = torch.where(first, curvature / (change * change).sum(-1).clamp(min=1e-300), torch.ones_like(curvature))
    inverse = inverse * scale[:, None, None]
    rho = 1 / curvature[:, None, None]
    s, y = step.unsqueeze(-1), change.unsqueeze(-1)
    hy = inverse @ y
    return inverse - rho * (hy @ s.mT + s @ hy.mT) + (rho**2 * (y.mT @ hy) + rho) * (s @ s.mT)


def _estimate_elbo(
    log_joint: LogJoint, loc: Tensor, scale_tril: Tensor, noise: Tensor, *, diagonal: bool = False
) -> tuple[Tensor, ...]:
    """Draw from Gaussians ``(k, dim)``; return draws, scores ``(k, draws, dim)``, ELBOs and shares of finite draws."""
    scaled = noise * scale_tril.diagonal(dim1=-2, dim2=-1).unsqueeze(-2) if diagonal else noise @ scale_tril.mT
    draws = loc.unsqueeze(1) + scaled
    value, score = _value_and_score(log_joint, draws.flatten(0, 1))
    value, score = value.view(draws.shape[:2]), score.view(draws.shape)
    log_q = -0.5 * (noise**2).sum(-1) - 0.5 * noise.shape[-1] * math.log(2 * math.pi)
    log_ratio = value - log_q + scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
    elbo = log_ratio.mean(-1) - 2 * log_ratio.std(-1) / log_ratio.shape[-1] ** 0.5
    return draws, score, elbo.nan_to_num(-torch.inf, -torch.inf, -torch.inf), value.isfinite().double().mean(-1)


def _noise(log_joint: LogJoint, generator: torch.Generator, draws: int = 0) -> Tensor:
    """Return standard normal draws and their mirror images; by default enough to estimate a full covariance."""
    number = draws or max(_DRAWS, 2 * min(log_joint.dim, 512))
    half = torch.randn(number // 2, log_joint.dim, dtype=torch.float64, generator=generator, device="cpu")
    return torch.cat([half, -half]).to(log_joint.device)


def _cholesky(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factors, or identities, and whether each exists."""
    factor, info = torch.linalg.cholesky_ex((covariance + covariance.mT) / 2)
    fine = (info == 0) & factor.isfinite().all(-1).all(-1)
    return torch.where(fine[..., None, None], factor, torch.eye(factor.shape[-1]).to(factor)), fine


def _best_of_path(log_joint: LogJoint, path: _Climb, generator: torch.Generator) -> GaussianInit:
    """Return the Gaussian of the best ELBO among those on a path."""
    loc = torch.stack([x for x, _, _ in path])
    factor, fine = _cholesky(torch.stack([inverse for _, _, inverse in path]))
    noise = _noise(log_joint, generator, 32)
    pairs = zip(loc.split(8), factor.split(8), strict=True)
    elbo = torch.cat([_estimate_elbo(log_joint, mean, scale, noise)[2] for mean, scale in pairs])
    elbo = torch.where(fine & elbo.isfinite(), elbo, -torch.inf)
    best = int(elbo.argmax())
    if elbo[best].isfinite():  # the best of many is lucky too: estimate it from new draws
        elbo[best] = _estimate_elbo(log_joint, loc[best, None], factor[best], _noise(log_joint, generator))[2]
    return GaussianInit("pathfinder", loc[best], factor[best], float(elbo[best]))


def _laplace(log_joint: LogJoint, path: _Climb, generator: torch.Generator) -> GaussianInit | None:
    """Return the Gaussian of the Hessian at the end of a path, by central differences scaled by BFGS's estimate."""
    mode, _, inverse = path[-1]
    factor, _ = _cholesky(inverse)
    size = 1e-4 if log_joint.dtype == torch.float64 else 0.2  # by the score's rounding errors
    steps = size * factor.mT
    _, score = _value_and_score(log_joint, torch.cat([mode + steps, mode - steps]))
    ahead, behind = score.chunk(2)
    hessian = -(ahead - behind) @ factor / (2 * size)
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    if not values.isfinite().all() or values.min() < 1e-6 * values.max() or values.max() <= 0:
        return None
    covariance = factor @ (vectors / values) @ vectors.mT @ factor.mT
    scale, fine = _cholesky(covariance)
    if not fine:
        return None
    elbo = _estimate_elbo(log_joint, mode[None], scale[None], _noise(log_joint, generator))[2]
    return GaussianInit("laplace", mode, scale, float(elbo))


def _batch_and_match(
    log_joint: LogJoint,
    first: GaussianInit,
    generator: torch.Generator,
    out_of_time: Callable[[str], bool],
    *,
    diagonal: bool,
) -> list[GaussianInit]:
    """Match the scores of a Gaussian to the posterior's at its draws, repeatedly; return the best one, if any."""
    loc, factor = first.loc, first.scale_tril
    method = "meanfield" if diagonal else "fullrank"
    if diagonal:
        factor = factor.norm(dim=-1).diag()
    best, age = None, 0
    for iteration in range(_ITERATIONS):
        if out_of_time("matching a Gaussian"):
            break
        noise = _noise(log_joint, generator)
        draws, score, elbo, share = _estimate_elbo(log_joint, loc[None], factor[None], noise, diagonal=diagonal)
        if share < 1:
            # The Gaussian reaches beyond the support of the density: shrink it.
            factor = factor * 0.5
            continue
        age += 1
        if best is None or float(elbo) > best.elbo + 0.01:
            best, age = GaussianInit(method, loc, factor, float(elbo)), 0
        if age == _PATIENCE:
            break
        try:
            loc, factor = _match(loc, factor, draws[0], score[0], len(noise) * len(loc) / (iteration + 1), diagonal)
        except torch.linalg.LinAlgError:  # scores too large to be useful, for example far out in a prior
            break
    return [] if best is None else [best]


def _match(
    loc: Tensor, factor: Tensor, draws: Tensor, score: Tensor, rate: float, diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Take one step of batch and match, in closed form, in the coordinates that whiten the current Gaussian."""
    if diagonal:  # no product of matrices, for thousands of latents
        scale = factor.diagonal()
        x, g = (draws - loc) / scale, score * scale
    else:
        x, g = torch.linalg.solve_triangular(factor, (draws - loc).mT, upper=False).mT, score @ factor
    mean_x, mean_g = x.mean(0), g.mean(0)
    x, g, weight = x - mean_x, g - mean_g, rate / (1 + rate)
    if diagonal:
        u = rate * g.square().mean(0) + weight * mean_g**2
        v = 1 + rate * x.square().mean(0) + weight * mean_x**2
        variance = 2 * v / (1 + (1 + 4 * u * v).sqrt())
        if not variance.isfinite().all():
            return loc, factor
        return loc + scale * weight * (mean_x + variance * mean_g), (scale * variance.sqrt()).diag()
    u = rate * g.mT @ g / len(g) + weight * mean_g.outer(mean_g)
    v = torch.eye(len(loc)).to(loc) + rate * x.mT @ x / len(x) + weight * mean_x.outer(mean_x)
    # Solves S U S + S = V: with V = C C', S = C 2 (I + sqrt(I + 4 C' U C))^-1 C'.
    c, _ = _cholesky(v)
    values, vectors = torch.linalg.eigh(c.mT @ u @ c)
    covariance = c @ (vectors * (2 / (1 + (1 + 4 * values.clamp(min=0)).sqrt()))) @ vectors.mT @ c.mT
    new, fine = _cholesky(covariance)
    if not fine:
        return loc, factor
    mean = mean_x * weight + covariance @ mean_g * weight
    return loc + factor @ mean, factor @ new
