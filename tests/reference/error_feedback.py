"""Error feedback as GPTQ writes it, row by row; and the error of outputs from outputs alone."""

import torch


def gptq(rows, moments, steps, limit, keeps, damping):
    """Round rows one column after the other; the rest of the row makes up for each error.

    rows, steps: lists of float64 vectors. moments: H of each row. keeps: which entries stay at
    their nearest step. Whole numbers of steps.
    """
    codes = []
    for row, matrix, step, keep in zip(rows, moments, steps, keeps, strict=True):
        inverse = torch.linalg.inv(matrix + damping * torch.eye(len(row), dtype=row.dtype))
        upper = torch.linalg.cholesky(inverse, upper=True)
        left, found = row.clone(), torch.zeros_like(row)
        for j in range(len(row)):
            exact = row[j] if keep[j] else left[j]
            found[j] = (exact / step[j]).round().clamp(-limit, limit)
            error = (left[j] - found[j] * step[j]) / upper[j, j]
            left[j:] -= error * upper[j, j:]
        codes.append(found)
    return codes


def output_form(layers, num_values):
    """Q from the outputs that each stored value alone gives: sum over layers of O'O.

    layers: pairs (outputs, jacobian): a function from a layer's weight to its outputs on all
    samples, and the weight's derivative, of the weight's shape and num_values.
    """
    form = torch.zeros(num_values, num_values, dtype=torch.float64)
    for outputs, jacobian in layers:
        columns = [outputs(jacobian[..., b]).flatten() for b in range(num_values)]
        matrix = torch.stack(columns, dim=1)
        form += matrix.T @ matrix
    return form
