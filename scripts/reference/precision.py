"""How far PyTorch's float32 answers are from the same computation in float64."""

import contextlib
import copy

import torch

# After the name of a tensor, or of a kind of tensors: the distance of PyTorch's float32 from float64.
SUFFIX = ":distance"
# How many times the distance of PyTorch's float32 from float64 another float32 answer may be off: that of
# tests/common/tensors.rs, which says why.
MARGIN = 4.0


@contextlib.contextmanager
def float64():
    """Code of diffusers and transformers that asks for float32 gets float64 here, also where it insists
    (`x.float()`, tables of angles): otherwise a model in float64 would still round like one in float32."""
    names = {"float32": torch.float64, "float": torch.float64, "complex64": torch.complex128}
    kept = {name: getattr(torch, name) for name in names} | {"method": torch.Tensor.float}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    for name, dtype in names.items():
        setattr(torch, name, dtype)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = kept.pop("method")
        for name, dtype in kept.items():
            setattr(torch, name, dtype)
        torch.set_default_dtype(default)


def double(model):
    """A copy of a Z-Image transformer, within `float64()`."""
    exact = copy.deepcopy(model).double()
    # Made anew, in float64, at the first call.
    exact.rope_embedder.freqs_cis = None
    return exact


def distance(found, exact):
    """The largest error over the largest number."""
    assert exact.dtype == torch.float64 and found.dtype != torch.float64
    return (found.double() - exact).abs().max() / exact.abs().max()


def bound(distance):
    """The bound of a float32 answer where PyTorch's is `distance`; the type has it no better than its epsilon."""
    return MARGIN * max(float(distance), torch.finfo(torch.float32).eps)


def error(found, expected):
    """The largest difference of two float32 answers over the largest number expected."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def distances(found, exact):
    """The distances of tensors by name, under the names that a file has for them."""
    return {name + SUFFIX: distance(found[name], exact[name]).float().reshape(1) for name in exact}


def worst_distances(kind_of, found, exact):
    """The largest distance of each kind of tensors, `kind_of` a name: where numbers are few, the distance of
    one case is small by luck."""
    worst = {}
    for name in exact:
        kind = kind_of(name) + SUFFIX
        worst[kind] = max(worst.get(kind, torch.zeros(())), distance(found[name], exact[name]))
    return {kind: value.float().reshape(1) for kind, value in worst.items()}
