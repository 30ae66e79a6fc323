"""Parameter sharing as the papers write it: loops over single weights, explicit matrices."""

import torch

from memfold.strategies.sharing.hashing import PolynomialHash


def random_fold_slots(num_weights, num_slots, seed):
    """h(i) = (r_k + i mod m) mod m with k = i // m."""
    rotation = PolynomialHash(seed, "rotation")
    slots = []
    for i in range(num_weights):
        k = i // num_slots
        slots.append((rotation.below(num_slots, k) + i % num_slots) % num_slots)
    return slots


def aligned_fold_slots(shapes, num_slots, seed):
    """The same, but a row that does not fit into the rest of a partition begins the next one."""
    rotation = PolynomialHash(seed, "rotation")
    slots, k, used = [], 0, 0
    for rows, *others in shapes:
        columns = torch.Size(others).numel()
        for _ in range(rows):
            if columns <= num_slots and used + columns > num_slots:
                k, used = k + 1, 0
            for _ in range(columns):
                if used == num_slots:
                    k, used = k + 1, 0
                slots.append((rotation.below(num_slots, k) + used) % num_slots)
                used += 1
    return slots


def tile_slots(rows, columns, tile, starts):
    """Start of a weight's tile plus its row-major place in the tile."""
    tile_rows, tile_columns = tile
    wide = -(-columns // tile_columns)
    slots = []
    for r in range(rows):
        for c in range(columns):
            start = starts[(r // tile_rows) * wide + c // tile_columns]
            slots.append(start + (r % tile_rows) * tile_columns + c % tile_columns)
    return slots


def explicit_map(mapping):
    """The n x m matrix of slots and signs, read off one basis vector at a time."""
    columns = []
    for slot in range(mapping.num_slots):
        basis = torch.zeros(mapping.num_slots, dtype=torch.float64)
        basis[slot] = 1
        columns.append(torch.cat([mapping.gather(basis, span, 1.0) for span in mapping.spans]))
    return torch.stack(columns, dim=1)


def sharing_matrices(signed_slots, layer_scales, gradient_scale, initial_scale):
    """S with theta = S phi, and Gamma, from the definitions.

    signed_slots: n x m with one +1 or -1 in each row. layer_scales: lambda of each weight, (n,).
    """
    num_weights, num_slots = signed_slots.shape
    matrix = torch.zeros(num_weights, num_slots, dtype=torch.float64)
    gamma = torch.zeros(num_slots, dtype=torch.float64)
    for b in range(num_slots):
        members = [i for i in range(num_weights) if signed_slots[i, b] != 0]
        if not members:
            continue
        mean_square = sum(float(layer_scales[i]) ** 2 for i in members) / len(members)
        nu = mean_square**0.5 if initial_scale is None else initial_scale
        for i in members:
            matrix[i, b] = signed_slots[i, b] * layer_scales[i] / nu
        power = {"projection": 1.0, "length": 0.5}.get(gradient_scale)
        gamma[b] = 1.0 if power is None else nu**2 / mean_square / len(members) ** power
    return matrix, gamma
