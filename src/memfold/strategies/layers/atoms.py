"""Atoms and coefficients that the weights of repeated layers start as."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["fit", "legendre", "nearest", "spread"]


def legendre(num_layers: int, num_terms: int) -> Tensor:
    """Return P_k(t_l) for k < K at L points evenly spaced in [-1, 1]: float64, shape (L, K)."""
    points = np.linspace(-1, 1, num_layers)
    return torch.from_numpy(np.polynomial.legendre.legvander(points, num_terms - 1))


def nearest(num_layers: int, num_atoms: int) -> Tensor:
    """Return 1 for the atom of a layer's place, of atoms evenly spaced, else 0: shape (L, S)."""
    owners = torch.arange(num_layers, device="cpu") * num_atoms // num_layers
    return torch.eye(num_atoms, device="cpu")[owners]


def spread(layers: Tensor, num_atoms: int, *, polynomial: bool) -> tuple[Tensor, Tensor]:
    """Take evenly spaced layers for atoms, and for each layer the one that it is nearest to.

    Args:
        layers: The weights of one projection, shape (L, ...).
        num_atoms: S.
        polynomial: Whether coefficients are `legendre`: all layers then start as the first one,
            which the constant polynomial stands for.

    Returns:
        Atoms (S, ...) and coefficients (L, S); at S = L, the layers themselves.
    """
    if polynomial:
        atoms = torch.zeros(num_atoms, *layers.shape[1:]).to(layers)
        atoms[0] = layers[0]
        return atoms, legendre(len(layers), num_atoms)
    mixed = nearest(len(layers), num_atoms)
    return layers[mixed.argmax(0).to(layers.device)].clone(), mixed


def fit(layers: Tensor, num_atoms: int, *, polynomial: bool) -> tuple[Tensor, Tensor]:
    """Fit atoms and coefficients to weights by least squares: the principal components.

    Args:
        layers: See `spread`.
        num_atoms: See `spread`.
        polynomial: Whether coefficients are `legendre`, and atoms alone are fitted.

    Returns:
        See `spread`; float64.
    """
    flat = layers.double().flatten(1)
    if polynomial:
        mixed = legendre(len(layers), num_atoms)
        atoms = torch.linalg.lstsq(mixed, flat).solution
    else:
        mixed = torch.linalg.eigh(flat @ flat.T).eigenvectors.flip(1)[:, :num_atoms]
        atoms = mixed.T @ flat
    return atoms.view(num_atoms, *layers.shape[1:]), mixed
