"""What two threads see that are in the middle of a model at the same time."""

import threading

import torch

__all__ = ["check_threads_keep_apart"]


def check_threads_keep_apart(model, blocks, inputs):
    """Let two threads meet after each block, and compare their outputs with those of one."""
    meeting, found = threading.Barrier(2), [None, None]
    expected = [model(x) for x in inputs]

    def meet(*_):
        meeting.wait(10)

    for block in blocks:
        block.register_forward_hook(meet)

    def run(number):
        found[number] = model(inputs[number])

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
