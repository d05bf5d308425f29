"""Contrastive losses as matrices of all pairs, in NumPy's float64 or longdouble: the truth for those in tiles."""

import numpy as np

WIDE = np.longdouble


def kept_pairs(number, columns, ids=None, where=None):
    """bool [N, M]: which pairs are there."""
    kept = np.ones((number, columns), bool)
    if ids is not None:
        ids = np.asarray(ids)
        same = np.zeros((number, columns), bool)
        same[:, : len(ids)] = ids[:number, None] == ids[None, :]
        kept &= ~same | np.eye(number, columns, dtype=bool)
    if where is not None:
        kept[~where] = False
        kept[:, :number] &= where[None, :]
    return kept


def products(x, y, kept):
    """What a hidden row holds is not looked at."""
    x, y = (np.where(kept.any(axis)[:, None], rows, 0).astype(WIDE) for rows, axis in ((x, 1), (y, 0)))
    return x, y, x @ y.T


def softmax_losses(x, y, scale, symmetric=True, ids=None, where=None):
    """(losses [N], the gradients of sum(u * losses) by x, y and scale as a function of u)."""
    number, columns = len(x), len(y)
    kept = kept_pairs(number, columns, ids, where)
    counts = kept.diagonal()
    x, y, product = products(x, y, kept)
    scale = WIDE(scale)
    z = np.where(kept, scale * product, -np.inf)

    def one_way(z):
        """[N]: log(1 + sum_{j != i} exp(z_ij - z_ii)), from terms that are all >= 0; and exp(z_ij - z_ii)."""
        with np.errstate(invalid="ignore"):
            e = np.exp(z[:number] - z.diagonal()[:, None])
        e[~counts] = 0
        others = e * ~np.eye(number, e.shape[1], dtype=bool)
        return np.log1p(others.sum(1)), others

    def slope(others):
        """By z: p_ij, and p_ii - 1 = -sum_{j != i} p_ij."""
        p = others / (1 + others.sum(1, keepdims=True))
        p[np.arange(number), np.arange(number)] = -p.sum(1)
        return p

    (a, of_rows), (b, of_columns) = one_way(z), one_way(z.T)
    losses = (a + b) / 2 if symmetric else a

    def gradients(u):
        u = np.asarray(u, WIDE)[:, None] / (2 if symmetric else 1)
        dz = u * slope(of_rows)
        if symmetric:
            dz[:, :number] += (u * slope(of_columns)).T
        return scale * dz @ y, scale * dz.T @ x, np.sum(dz * product)

    return losses, gradients


def sigmoid_losses(x, y, scale, bias, ids=None, where=None):
    """(losses [N], the gradients of sum(u * losses) by x, y, scale and bias)."""
    number, columns = len(x), len(y)
    kept = kept_pairs(number, columns, ids, where)
    x, y, product = products(x, y, kept)
    sign = np.where(np.eye(number, columns, dtype=bool), -1, 1)
    z = sign * (WIDE(scale) * product + WIDE(bias))
    losses = np.where(kept, np.maximum(z, 0) + np.log1p(np.exp(-abs(z))), 0).sum(1)

    def gradients(u):
        dz = np.where(kept, np.asarray(u, WIDE)[:, None] * sign / (1 + np.exp(-z)), 0)
        return WIDE(scale) * dz @ y, WIDE(scale) * dz.T @ x, np.sum(dz * product), np.sum(dz)

    return losses, gradients
