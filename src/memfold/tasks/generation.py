"""Tokens drawn from a language model, one after the other."""

import inspect

import torch
from torch import Tensor, nn

from memfold.tasks.task import logits_of

__all__ = ["generate"]


@torch.inference_mode()
def generate(
    net: nn.Module,
    prompt: Tensor,
    num_tokens: int,
    *,
    length: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Draw the tokens that follow a prompt.

    A network whose `forward` has a parameter `kv_cache`, as that of `gpt`, computes each token
    once; any other sees the last `length` tokens each time.

    Args:
        net: Tokens (1, L) to logits (1, L, vocabulary), in evaluation mode.
        prompt: int64 (P,), at least one, on the device of `net`.
        num_tokens: To draw.
        length: Tokens that the network takes, at most.
        temperature: The logits are divided by it; above 0.
        seed: Of the draws.

    Returns:
        int64 (num_tokens,), on the CPU: what was drawn, without the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    has_cache = "kv_cache" in inspect.signature(net.forward).parameters
    tokens, cache, seen = prompt, [], 0
    for _ in range(num_tokens):
        if has_cache and seen + 1 < length and cache:
            output = net(tokens[None, -1:], kv_cache=cache)
            seen += 1
        else:  # where the cache is full, half of what was seen goes on
            start = max(len(tokens) - (length if not has_cache else length // 2 or 1), 0)
            cache, seen = [], len(tokens) - start
            arguments = {"kv_cache": cache} if has_cache else {}
            output = net(tokens[None, start:], **arguments)
        logits = logits_of(output)[0, -1].float().cpu() / temperature
        drawn = torch.multinomial(logits.softmax(0), 1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)])
    return tokens[len(prompt) :].cpu()
