"""Weights of given shapes, end to end."""

import torch

from memfold.strategies.sharing.mapping import Span


def make_spans(shapes):
    spans, start = [], 0
    for index, shape in enumerate(shapes):
        stop = start + torch.Size(shape).numel()
        spans.append(Span(f"layer{index}.weight", torch.Size(shape), start, stop))
        start = stop
    return spans
