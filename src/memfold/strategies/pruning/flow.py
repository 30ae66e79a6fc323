"""Run a network as pipes: what flows in is non-negative, and what flows out depends on every path.

SynFlow (Tanaka et al. 2020, arXiv 2006.05467) measures the flow through networks that are
homogeneous where everything is positive: linear and convolutional layers, ReLU, BatchNorm in
evaluation mode, pooling. Layers that are not would stop the flow or turn it into noise, so they are
replaced while it is measured:

* LayerNorm, RMSNorm, GroupNorm, InstanceNorm, BatchNorm without running statistics: their affine
  part alone. A norm makes its output independent of the scale of its input, and LayerNorm's output
  sums to a constant.
* Softmax, and attention: shares x_j / sum_k x_k, whose denominator counts as a constant. Equal
  inputs give equal shares, as in softmax, but the flow through queries and keys is seen. Of the
  flow through fused attention, queries, keys and values carry a third each.
* Embeddings: the mean row, so that every row is seen, whatever the tokens are.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Pipes", "ones_like_sample", "total_flow"]


class Pipes(TorchFunctionMode):
    """Within this context, functions of torch are replaced as the module's docstring says.

    It sees calls of `torch` and `torch.nn.functional`, from modules or not. Attention masks are
    ignored.
    """

    def __init__(self, *, average_pooling: bool = False) -> None:
        """Enter with `with Pipes():`.

        Args:
            average_pooling: Pool the mean in place of the maximum, which lets only one input
                through.
        """
        super().__init__()
        self._replacements = _POSITIVE | (_AVERAGE if average_pooling else {})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the replacement, or the function itself."""
        replacement = self._replacements.get(getattr(func, "__name__", ""))
        if replacement is not None:
            found = replacement(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return func(*args, **(kwargs or {}))


def ones_like_sample(example: Tensor, *, value: float = 1.0) -> Tensor:
    """Return one float64 sample of the example's shape, every entry `value`; tokens stay."""
    if example.is_floating_point():
        return torch.full_like(example[:1], value, dtype=torch.float64)
    return example[:1]


def total_flow(output: object) -> Tensor:
    """Sum all floating-point tensors in what a model returns, which may be nested."""
    if isinstance(output, Tensor):
        return output.sum() if output.is_floating_point() else output.new_zeros(()).double()
    if isinstance(output, Mapping):
        output = list(output.values())
    if not isinstance(output, list | tuple):
        return torch.zeros((), dtype=torch.float64)
    sums = [total_flow(part) for part in output]
    return sum(sums[1:], sums[0]) if sums else torch.zeros((), dtype=torch.float64)


def _affine(features: Tensor, weight: Tensor | None, bias: Tensor | None, dim: int) -> Tensor:
    """Multiply by `weight` and add `bias` along `dim`; -1 stands for the last dimensions."""
    for function, tensor in ((torch.mul, weight), (torch.add, bias)):
        if tensor is not None:
            shape = (-1,) + (1,) * (features.dim() - 2) if dim == 1 else tensor.shape
            features = function(features, tensor.view(shape))
    return features


def _layer_norm(
    input: Tensor,
    normalized_shape: object,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: object,
    **__: object,
) -> Tensor:
    return _affine(input, weight, bias, -1)


def _rms_norm(
    input: Tensor, normalized_shape: object, weight: Tensor | None = None, *_: object, **__: object
) -> Tensor:
    return _affine(input, weight, None, -1)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: object,
    **__: object,
) -> Tensor:
    return _affine(input, weight, bias, 1)


def _channel_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: object,
    **__: object,
) -> Any:
    return _affine(input, weight, bias, 1) if running_mean is None else NotImplemented


def _embedding(input: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
    return weight.mean(0).expand(*input.shape, -1)


def _softmax(input: Tensor, dim: int | None = None, *_: object, **__: object) -> Any:
    return NotImplemented if dim is None else _shares(input.relu(), dim)


def _shares(flow: Tensor, dim: int) -> Tensor:
    total = flow.sum(dim, keepdim=True).detach()
    equal = 1 / flow.size(dim)
    return torch.where(total > 0, flow / total.masked_fill(total == 0, 1), equal)


def _log_softmax(input: Tensor, *_: object, **__: object) -> Tensor:
    return input


def _attend(query: Tensor, key: Tensor, value: Tensor, *_: object, **__: object) -> Tensor:
    """Stand in for `scaled_dot_product_attention`: (..., H, L, D), (..., H', S, D)."""
    if query.dim() > 3 and key.size(-3) != query.size(-3):
        groups = query.size(-3) // key.size(-3)
        key, value = (tensor.repeat_interleave(groups, -3) for tensor in (key, value))
    # The output is linear in each of the three: without this, they would count the flow thrice.
    query, key, value = (x / 3 + (x - x / 3).detach() for x in (query, key, value))
    return _shares((query @ key.mT).relu(), -1) @ value


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    *_: object,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    **__: object,
) -> tuple[Tensor, None]:
    """Stand in for `multi_head_attention_forward`: inputs (L, B, E) or (L, E)."""
    weights: Iterable[Tensor | None] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if in_proj_weight is not None:
        weights = in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    heads = []
    for inputs, weight, bias in zip((query, key, value), weights, biases, strict=True):
        assert weight is not None
        projected = F.linear(inputs, weight, bias).unflatten(-1, (num_heads, -1))
        heads.append(projected.movedim(0, -2))
    attended = _attend(*heads).movedim(-2, 0).flatten(-2)
    return F.linear(attended, out_proj_weight, out_proj_bias), None


def _average_pool(pool: Callable[..., Tensor]) -> Callable[..., Any]:
    def average(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        steps = dilation if isinstance(dilation, list | tuple) else [dilation]
        if return_indices or any(step != 1 for step in steps):
            return NotImplemented
        return pool(input, kernel_size, stride, padding, ceil_mode)

    return average


def _adaptive_average(pool: Callable[..., Tensor]) -> Callable[..., Any]:
    def average(input: Tensor, output_size: Any, return_indices: bool = False) -> Any:
        return NotImplemented if return_indices else pool(input, output_size)

    return average


_POSITIVE: dict[str, Callable[..., Any]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _channel_norm,
    "batch_norm": _channel_norm,
    "embedding": _embedding,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "scaled_dot_product_attention": _attend,
    "multi_head_attention_forward": _multi_head_attention,
}
_AVERAGE: dict[str, Callable[..., Any]] = {
    "max_pool1d": _average_pool(F.avg_pool1d),
    "max_pool2d": _average_pool(F.avg_pool2d),
    "max_pool3d": _average_pool(F.avg_pool3d),
    "adaptive_max_pool1d": _adaptive_average(F.adaptive_avg_pool1d),
    "adaptive_max_pool2d": _adaptive_average(F.adaptive_avg_pool2d),
    "adaptive_max_pool3d": _adaptive_average(F.adaptive_avg_pool3d),
}
