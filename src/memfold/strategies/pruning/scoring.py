"""How much each weight matters before training: SNIP, GraSP and SynFlow.

All three look at a copy of the model, which is not touched: not its buffers either, nor its mode.
The copy is in the mode in which the authors of each method score: evaluation for SNIP and SynFlow,
training for GraSP, where BatchNorm normalises by the statistics of each batch. What GraSP and
SynFlow keep are the *largest* scores, as in SNIP.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from memfold.compression.samples import Batch, Loss
from memfold.errors import InputError
from memfold.strategies.pruning.flow import Pipes, ones_like_sample, total_flow
from memfold.strategies.pruning.masks import PackedMask
from memfold.strategies.pruning.replica import replicate, reseed, scoring_mode, wide_dtype

__all__ = [
    "check_scores",
    "grasp_scores",
    "snip_scores",
    "synflow_scores",
]


def snip_scores(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    samples: Sequence[Batch],
    loss: Loss,
    *,
    kept: Sequence[PackedMask] | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Score weights by |g theta|, with g the gradient of the mean loss over all samples.

    |g_q theta_q| is what the loss changes, in first order, when weight q is removed. Lee et al.
    2019, "SNIP", arXiv 1810.02340. How the samples are batched makes no difference.

    Args:
        model: The dense model, which maps a batch of inputs to what the loss takes.
        parameters: State-dict name -> parameter of the model.
        samples: See `memfold.compression.samples`.
        loss: (output, target) -> scalar: the mean over the batch.
        kept: What is left of the parameters, the rest being zero; `None` for all.
        seed: Of layers that are random in evaluation too.

    Returns:
        One tensor per parameter, of its shape, float32 or float64.

    Raises:
        InputError: The loss is no scalar, a score is not finite, or all are zero.
    """
    with scoring_mode(model, _device(parameters)):
        copy, weights = replicate(model, list(parameters.values()), wide_dtype(model), kept=kept)
        gradients = _mean_gradients(weights, _losses(copy, weights[0], samples, loss, seed))
        pairs = zip(gradients, weights, strict=True)
        scores = [gradient.mul_(weight.detach()).abs_() for gradient, weight in pairs]
    check_scores("snip", dict(zip(parameters, weights, strict=True)), scores)
    return scores


def grasp_scores(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    samples: Sequence[Batch],
    loss: Loss,
    *,
    kept: Sequence[PackedMask] | None = None,
    temperature: float = 200.0,
    seed: int = 0,
) -> list[Tensor]:
    """Score weights by theta (H g): gradient and Hessian of the mean loss over all samples.

    Removing weight q changes the squared gradient norm by -2 theta_q (H g)_q in first order, so
    those with the largest scores stay. Wang et al. 2020, "GraSP", arXiv 2002.07376. In training
    mode: how the samples are batched makes a difference to models with BatchNorm or dropout alone.

    Args:
        model: The dense model; its output must be one tensor.
        parameters: State-dict name -> parameter of the model.
        samples: See `memfold.compression.samples`.
        loss: (output, target) -> scalar: the mean over the batch.
        kept: What is left of the parameters, the rest being zero; `None` for all.
        temperature: The outputs (logits) are divided by it.
        seed: Of dropout, which falls on the same places for g and for H.

    Returns:
        One tensor per parameter, of its shape, float32 or float64.

    Raises:
        InputError: The loss is no scalar, a score is not finite, or all are zero.
    """
    with scoring_mode(model, _device(parameters)):
        copy, weights = replicate(
            model, list(parameters.values()), wide_dtype(model), kept=kept, training=True
        )

        def losses() -> Iterator[Tensor]:
            return _losses(copy, weights[0], samples, loss, seed, temperature)

        gradients = _mean_gradients(weights, losses())

        def aligned() -> Iterator[Tensor]:
            for part in losses():
                if not part.requires_grad:
                    continue
                slopes = torch.autograd.grad(part, weights, create_graph=True, allow_unused=True)
                pairs = zip(gradients, slopes, strict=True)
                yield sum(((g * s).sum() for g, s in pairs if s is not None), part.new_zeros(()))

        products = _mean_gradients(weights, aligned())
        scores = [hg.mul_(w.detach()) for hg, w in zip(products, weights, strict=True)]
    check_scores("grasp", dict(zip(parameters, weights, strict=True)), scores)
    return scores


def synflow_scores(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    example: Tensor,
    kept: Sequence[PackedMask] | None = None,
) -> list[Tensor]:
    """Score weights by |theta dR/dtheta|, R = sum of f(1; |theta|): how much flows through each.

    In float64, on the absolute values of all parameters and buffers, for one input of ones.
    Tanaka et al. 2020, arXiv 2006.05467. Layers in which the flow is not conserved are replaced by
    those in `memfold.strategies.pruning.flow`.

    Args:
        model: The dense model.
        parameters: State-dict name -> parameter of the model.
        example: A batch of inputs; of floating-point ones only the shape matters.
        kept: What is left of the parameters, the rest being zero; `None` for all.

    Returns:
        One float64 tensor per parameter, of its shape.

    Raises:
        InputError: Nothing flows from the input to the output, or R overflows.
    """
    device = _device(parameters)
    with scoring_mode(model, device):
        copy, weights = replicate(model, list(parameters.values()), torch.float64, kept=kept)
        _make_positive(copy)
        with Pipes():
            flow = total_flow(copy(ones_like_sample(example.to(device))))
        named = dict(zip(parameters, weights, strict=True))
        _check_flow(flow, named)
        reason = _dead_layer(named)
        scores = _products_with_gradients(flow, weights)
    check_scores("synflow", parameters, scores, reason)
    return scores


def check_scores(
    strategy: str,
    parameters: Mapping[str, Tensor],
    scores: Sequence[Tensor],
    reason: str | None = None,
) -> None:
    """Check that scores say which weights matter.

    Args:
        strategy: Which one scores.
        parameters: State-dict name -> what was scored.
        scores: One tensor per parameter.
        reason: Why all may be zero, where the parameters cannot tell any more.

    Raises:
        InputError: A score is not finite, or all are zero; the message names the layer.
    """
    for name, score in zip(parameters, scores, strict=True):
        # NaN and infinity are among the extremes; a tensor of what is finite takes room.
        if not torch.stack(score.aminmax()).isfinite().all():
            raise InputError(
                f"compression={strategy}: the scores of {name} are not finite; look for infinite "
                "or NaN weights, inputs and losses"
            )
    if not any(score.any() for score in scores):
        reason = reason or _dead_layer(parameters)
        raise InputError(f"compression={strategy}: every score is zero; {reason}")


def _dead_layer(parameters: Mapping[str, Tensor]) -> str:
    """Say why nothing passes."""
    for name, parameter in parameters.items():
        # Row by row, which ends at the first: all at once would make as many truth values.
        if not any(row.any() for row in parameter):
            return (
                f"{name} has no weights but zeros: initialise or exclude it, or when it was "
                "pruned in an earlier round, give a larger ratio or compression.scope=layer"
            )
    return f"nothing passes from the input through {next(iter(parameters))} to the output"


def _check_flow(flow: Tensor, parameters: Mapping[str, Tensor]) -> None:
    value = flow.item()
    if value > 0 and flow.isfinite():
        return
    if value == 0:
        reason = _dead_layer(parameters)
    elif flow.isnan() and all(p.isfinite().all() for p in parameters.values()):
        reason = (
            "a layer divides by zero, as weight norm does when it keeps no weight of a row: "
            "exclude it, or give a larger ratio"
        )
    elif not flow.isfinite():
        bad = [name for name, p in parameters.items() if not p.isfinite().all()]
        reason = f"look at the weights of {bad[0]}" if bad else "scale the weights down"
    else:
        reason = "the model subtracts or takes logarithms, and needs another strategy"
    raise InputError(f"compression=synflow: the flow R through the model is {value}; {reason}")


@torch.no_grad()
def _make_positive(copy: nn.Module) -> None:
    for parameter in copy.parameters():
        parameter.abs_()
    for module in copy.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                # The -inf of an attention mask keeps its meaning.
                module._buffers[name] = torch.where(buffer.isinf(), buffer, buffer.abs())


def _losses(
    copy: nn.Module,
    like: Tensor,
    samples: Sequence[Batch],
    loss: Loss,
    seed: int,
    temperature: float = 1.0,
) -> Iterator[Tensor]:
    """Yield each batch's loss times its share of the samples; their sum is the mean loss.

    It is the same at every call: no batch sees what another has left in buffers.
    """
    reseed(like.device, seed)
    total = sum(len(inputs) for inputs, _ in samples)
    for batch in samples:
        inputs, targets = (
            t.to(like.device, like.dtype if t.is_floating_point() else t.dtype) for t in batch
        )
        buffers = {name: buffer.clone() for name, buffer in copy.named_buffers()}
        output = functional_call(copy, buffers, (inputs,))
        if temperature != 1:
            if not isinstance(output, Tensor):
                raise InputError(
                    f"compression=grasp needs a model with one output tensor, got {type(output)}"
                )
            output = output / temperature
        value = loss(output, targets)
        if not (isinstance(value, Tensor) and value.numel() == 1):
            raise InputError("loss= must return a tensor with one element, the mean of the batch")
        yield value.sum() * (len(inputs) / total)


def _mean_gradients(weights: Sequence[Tensor], losses: Iterable[Tensor]) -> list[Tensor]:
    """Sum up the gradients of `losses`, layer by layer; a weight that none depends on has zeros."""
    for part in losses:
        if part.requires_grad:
            part.backward(inputs=list(weights))
    sums = []
    for weight in weights:
        gradient, weight.grad = weight.grad, None
        sums.append(torch.zeros_like(weight) if gradient is None else gradient)
    return sums


@torch.no_grad()
def _products_with_gradients(scalar: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Return |weight d scalar / d weight|, in the place of the weights.

    A gradient is gone before there is the next one.
    """
    found: set[int] = set()  # of numbers: a cycle of references would keep the weights

    def multiply(weight: Tensor) -> None:
        assert weight.grad is not None
        weight.mul_(weight.grad).abs_()
        weight.grad = None
        found.add(id(weight))

    for weight in weights:
        weight.register_post_accumulate_grad_hook(multiply)
    if scalar.requires_grad:
        scalar.backward(inputs=list(weights))
    return [w.detach() if id(w) in found else torch.zeros_like(w) for w in weights]


def _device(parameters: Mapping[str, Tensor]) -> torch.device:
    return next(iter(parameters.values())).device
