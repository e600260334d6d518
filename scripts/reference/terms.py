"""Writes tests/reference/terms.safetensors: values and gradients of the regularizers.

    python3 -m pip install torch safetensors numpy
    python3 scripts/reference/terms.py

Everything is float64 and autograd of stock PyTorch, written from the formulas in the documentation:
dense matrices of pairs, no blocks, no analytic gradients. All inputs are exact in bfloat16, so that
the same reference holds whatever the type in which the crate is given them. The largest distance of each
kind of result from the same in float32 is beside them.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from precision import worst_distances
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[2] / "tests" / "reference" / "terms.safetensors"


def every_case(dtype):
    """Inputs and results, by the names that they have in the file."""
    torch.set_default_dtype(dtype)
    torch.manual_seed(7)
    tensors = {}

    def draw(*shape, scale=1.0, offset=0.0):
        values = torch.randn(shape, dtype=torch.float64) * scale + offset
        return values.bfloat16().to(torch.get_default_dtype())

    def record(case, loss, **leaves):
        """The value of a scalar and its gradient in every leaf; zeros where it does not depend on one."""
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        tensors[f"{case}/value"] = loss.detach().reshape(1)
        for (name, leaf), gradient in zip(leaves.items(), gradients):
            tensors[f"{case}/grad_{name}"] = torch.zeros_like(leaf) if gradient is None else gradient

    # Eq. 7, mean and variance of samples or of channels.

    def moments(x, dims):
        m = x.mean(dims)
        return m, ((x - m.reshape(m.shape + (1,) * len(dims))) ** 2).mean(dims)

    def mean_variance(x, mu, var, dims, floor):
        m, v = moments(x, dims)
        log_v = torch.where(v >= floor, v.log(), torch.log(torch.tensor(floor)) + v / floor - 1)
        return (0.5 * ((v + (m - mu) ** 2) / var - 1 - (log_v - torch.log(var)))).mean()

    x = (draw(4, 3, 4, 5) * torch.tensor([1.0, 0.5, 2.0, 0.125]).reshape(4, 1, 1, 1)).requires_grad_()
    batches = [draw(n, 3, 4, 5, scale=0.5 + k, offset=0.25 * k) for k, n in enumerate([5, 2, 3])]
    mu, var = draw(3), draw(3).abs() + 0.5
    tensors |= {"mv/x": x.detach().clone(), "mv/mu": mu, "mv/var": var}
    tensors |= {f"mv/batch_{k}": batch for k, batch in enumerate(batches)}
    IMAGE, CHANNEL = (1, 2, 3), (2, 3)
    record("mv_sample", mean_variance(x, torch.tensor(0.075), torch.tensor(0.81), IMAGE, 1e-6), x=x)
    record("mv_floor", mean_variance(x, torch.tensor(0.075), torch.tensor(0.81), IMAGE, 0.5), x=x)
    record("mv_channel", mean_variance(x, mu, var, CHANNEL, 1e-6), x=x)
    for name, dims in [("sample", IMAGE), ("channel", CHANNEL)]:
        averages = [[t.mean(0) for t in moments(batch, dims)] for batch in batches]
        record(f"mv_measured_{name}", mean_variance(x, *averages[0], dims, 1e-6), x=x)
        for decay in [0.75, 1.0]:
            # The textbook form: weights decay^(k - i), divided by their sum.
            weights = [decay ** (len(batches) - 1 - i) for i in range(len(batches))]
            target = [
                sum(w * a[j] for w, a in zip(weights, averages)) / sum(weights) for j in range(2)
            ]
            case = f"mv_running_{name}_{decay}"
            record(case, mean_variance(x, *target, dims, 1e-6), x=x)
            tensors[f"{case}/mu"], tensors[f"{case}/var"] = (t.reshape(-1) for t in target)

    # MMD: E k(x, x') + E k(y, y') - 2 E k(x, y).

    def squared_distances(a, b):
        return ((a[:, None, :] - b[None, :, :]) ** 2).sum(-1)

    def bandwidth(a, b, kind):
        points = torch.cat([a, b]).detach()
        i, j = torch.triu_indices(len(points), len(points), 1)
        d2 = squared_distances(points, points)[i, j]
        return {"median": d2.median, "mean": d2.mean}[kind]() if isinstance(kind, str) else kind

    def distance(a, b):
        d2 = squared_distances(a, b)
        # The square root of a zero has no gradient; its branch must not see it.
        return torch.where(d2 > 0, torch.where(d2 > 0, d2, 1.0).sqrt(), 0.0)

    def mmd(a, b, kernel, unbiased):
        name, unit, scales = kernel
        width = None if name == "energy" else bandwidth(a, b, unit)

        def k(p, q):
            if name == "energy":
                return -distance(p, q)
            d2 = squared_distances(p, q)
            if name == "gaussian":
                return sum(torch.exp(-d2 / (s * width)) for s in scales) / len(scales)
            return sum(s * width / (s * width + d2) for s in scales) / len(scales)

        def own(p):
            m = len(p)
            pairs = k(p, p)
            return (pairs.sum() - pairs.diagonal().sum()) / (m * (m - 1)) if unbiased else pairs.mean()

        terms = own(a), own(b), -2 * k(a, b).mean()
        return sum(terms), sum(abs(term.detach()) for term in terms)

    x, y = draw(6, 2, 3, 2).requires_grad_(), draw(9, 2, 3, 2, scale=1.5, offset=0.5)
    with torch.no_grad():
        x[3] = x[0]  # Two equal samples: distance 0 off the diagonal.
    projection = draw(4, 12, scale=0.5)
    tensors |= {"mmd/x": x.detach().clone(), "mmd/y": y, "mmd/projection": projection}
    DAN, WAE = [0.25, 0.5, 1, 2, 4], [0.1, 0.2, 0.5, 1, 2, 5, 10]
    KERNELS = {
        "gaussian_median": ("gaussian", "median", DAN),
        "gaussian_mean": ("gaussian", "mean", DAN),
        "gaussian_fixed": ("gaussian", 3.0, [1.0]),
        "imq_mean": ("imq", "mean", WAE),
        "energy": ("energy", None, None),
    }
    for name, kernel in KERNELS.items():
        for estimator in ["unbiased", "biased"]:
            for features in ["flat", "tanh"]:
                f = (lambda t: t.flatten(1)) if features == "flat" else (
                    lambda t: torch.tanh(t.flatten(1) @ projection.T)
                )
                value, scale = mmd(f(x), f(y), kernel, estimator == "unbiased")
                case = f"mmd_{name}_{estimator}_{features}"
                record(case, value, x=x)
                # What the value is a small difference of, and its rounding error relative to.
                tensors[f"{case}/scale"] = scale.reshape(1)

    # GAN: D is a small network of the noised sample, the time and the condition.

    B, D, H, K = 5, 6, 7, 3
    x, y = draw(B, D).requires_grad_(), draw(B, D, scale=1.5, offset=0.5)
    noise, perturbation = draw(B, D), draw(B, D)
    tau = torch.tensor([0.125, 0.25, 0.5, 0.75, 0.875])
    cond, real_cond = draw(B, H), draw(B, H)
    w1, u, w2 = (t.requires_grad_() for t in (draw(H, D, scale=0.5), draw(H), draw(K, H)))
    names = dict(y=y, noise=noise, perturbation=perturbation, tau=tau, cond=cond)
    names |= dict(x=x, real_cond=real_cond, w1=w1, u=u, w2=w2)
    tensors |= {f"gan/{name}": t.detach().clone() for name, t in names.items()}

    def critic(x_t, c):
        return torch.tanh(x_t @ w1.T + tau[:, None] * u + c) @ w2.T

    def renoise(sample):
        return tau[:, None] * sample + (1 - tau[:, None]) * noise

    softplus = lambda t: torch.logaddexp(t, torch.zeros(()))
    GAN = {
        "non_saturating": (
            lambda r, f: softplus(f).mean() + softplus(-r).mean(),
            lambda r, f: softplus(-f).mean(),
        ),
        "hinge": (lambda r, f: F.relu(1 - r).mean() + F.relu(1 + f).mean(), lambda r, f: -f.mean()),
        "relativistic": (lambda r, f: softplus(f - r).mean(), lambda r, f: softplus(r - f).mean()),
    }
    GAMMA, WEIGHT, SIGMA = 0.5, 100.0, 0.01
    for name, (critic_loss, generator_loss) in GAN.items():
        record(f"gan_{name}_generator", generator_loss(
            critic(renoise(y), real_cond).detach(), critic(renoise(x), cond)
        ), x=x)
        for penalty in ["none", "r1", "approximate_r1"]:
            fake, real = renoise(x.detach()), renoise(y).requires_grad_()
            real_logits = critic(real, real_cond)
            loss = critic_loss(real_logits, critic(fake, cond))
            if penalty == "r1":
                (slope,) = torch.autograd.grad(real_logits.mean(1).sum(), real, create_graph=True)
                loss = loss + GAMMA / 2 * (slope**2).sum(1).mean()
            if penalty == "approximate_r1":
                moved = critic(real + SIGMA * perturbation, real_cond)
                loss = loss + WEIGHT * ((real_logits - moved) ** 2).mean()
            record(f"gan_{name}_critic_{penalty}", loss, w1=w1, u=u, w2=w2)

    # Heads: linear, group norm of two groups, SiLU, linear, mean over positions; one logit a level.

    LEVELS, WIDTH = [draw(3, 4), draw(3, 5, 2, 3)], 16
    logits, leaves = [], {}
    for k, level in enumerate(LEVELS):
        tensors[f"heads/level_{k}"] = level.clone()
        h = level.reshape(3, level.shape[1], -1).transpose(1, 2).requires_grad_()
        head = dict(mix=draw(WIDTH, level.shape[1]), bias=draw(WIDTH), scale=draw(WIDTH))
        head |= dict(offset=draw(WIDTH), read=draw(1, WIDTH), constant=draw(1))
        tensors |= {f"heads/{k}.{name}": t.clone() for name, t in head.items()}
        leaves |= {f"{k}.{name}": t.requires_grad_() for name, t in head.items()}
        z = (h @ head["mix"].T + head["bias"]).transpose(1, 2).reshape(3, 2, -1)
        z = (z - z.mean(2, keepdim=True)) / (z.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        z = z.reshape(3, WIDTH, -1).transpose(1, 2) * head["scale"] + head["offset"]
        logits.append(((z * torch.sigmoid(z)) @ head["read"].T + head["constant"]).mean(1))
    tensors["heads/logits"] = torch.cat(logits, 1)
    record("heads", tensors["heads/logits"].mul(0.125).exp().sum(), **leaves)
    return {name: t.detach().contiguous() for name, t in tensors.items()}


def parts(cases):
    """What is compared, in the unit in which its error counts, under names that end in their kind."""
    tensors = {}
    for name, value in cases.items():
        case, _, what = name.rpartition("/")
        if case == "heads" and what in ("logits", "value") or name.startswith("heads/grad_"):
            tensors[f"{name}:heads"] = value
        elif what == "value":
            scale = exact[f"{case}/scale"] if case.startswith("mmd_") else exact[name]
            # Beside the unit, the largest number, an error of the value is relative to it.
            tensors[f"{name}:value"] = torch.cat([value, scale.to(value.dtype)])
        elif what.startswith("grad_"):
            kind = "_of_approximate_r1" if case.endswith("approximate_r1") else ""
            tensors[f"{name}:gradient{kind}"] = value
        elif case.startswith("mv_running"):
            tensors[f"{name}:target"] = value
    return tensors


found, exact = every_case(torch.float32), every_case(torch.float64)
tensors = exact | worst_distances(lambda name: name.rsplit(":", 1)[1], parts(found), parts(exact))
OUT.parent.mkdir(exist_ok=True)
save_file(tensors, OUT)
print(f"{OUT}: {len(tensors)} tensors, {OUT.stat().st_size} bytes")
