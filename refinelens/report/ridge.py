"""Ridge classification, cross-validated over questions, in fp64.

Least squares to one-hot classes with an intercept, features standardised over the training questions. The strength is
chosen among those by leaving out each of them in turn, which has a closed form: with the matrix H that makes fitted
values of targets, the residuals of question Q in the fit without it are ``(I - H_QQ)^-1 (y_Q - fitted_Q)``, the block
form of the residuals of leave-one-out (Allen 1974, Technometrics 16:125).
"""

from __future__ import annotations

import numpy as np

FOLDS = 5
STRENGTHS = 10.0 ** np.arange(-4, 5)  # times the mean eigenvalue of the features' products
NO_DIRECTION = 1e-12  # of the largest eigenvalue: smaller ones are rounding


def fold_of_questions(n_questions: int, seed: int) -> np.ndarray:
    """Which of `FOLDS` folds each question is held out in, int64 ``[n_questions]``, drawn by the seed."""
    return np.random.default_rng(seed).permutation(n_questions) % FOLDS


def held_out_predictions(x: np.ndarray, y: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """The class of every example by a classifier that was fitted without its question's fold, int64 ``[q, m]``.

    Args:
        x: ``[q, m, d_model]`` features of ``m`` examples of each question.
        y: ``[q, m]`` int classes, from 0.
        folds: ``[q]`` from `fold_of_questions`.
    """
    targets = np.eye(int(y.max()) + 1)[y]
    found = np.empty(y.shape, np.int64)
    for fold in np.unique(folds):
        held = folds == fold
        found[held] = _fit_and_predict(x[~held].astype(float), targets[~held], x[held].astype(float)).argmax(-1)
    return found


def _fit_and_predict(x: np.ndarray, targets: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Scores ``[held-out questions, m, classes]`` of other examples."""
    n_questions, m, n_features = x.shape
    flat = x.reshape(-1, n_features)
    varies = np.ptp(flat, axis=0) > 0
    flat, others = flat[:, varies], others[..., varies]
    centre, scale = flat.mean(0), flat.std(0)
    flat, others = (flat - centre) / scale, (others - centre) / scale
    values, directions = _principal(flat)
    z = flat @ directions  # [n, r], its products are diagonal
    mean = targets.reshape(-1, targets.shape[-1]).mean(0)
    centred = (targets - mean).reshape(len(z), -1)
    moments = z.T @ centred  # [r, classes]
    blocks = z.reshape(n_questions, m, -1)
    strengths = STRENGTHS * (values.mean() if len(values) else 1.0)
    errors = [_left_out_error(blocks, centred.reshape(n_questions, m, -1), moments, values + s) for s in strengths]
    best = values + strengths[int(np.argmin(errors))]
    return others @ (directions @ (moments / best[:, None])) + mean


def _principal(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues ``[r]`` of ``x^T x`` that are not 0 and their directions ``[d, r]``, by the smaller product."""
    n, d = x.shape
    if not d:
        return np.zeros(0), np.zeros((0, 0))
    values, vectors = np.linalg.eigh(x.T @ x if n >= d else x @ x.T)
    kept = values > NO_DIRECTION * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    return values, vectors if n >= d else x.T @ (vectors / np.sqrt(values))


def _left_out_error(z: np.ndarray, targets: np.ndarray, moments: np.ndarray, weights: np.ndarray) -> float:
    """Squared error of every question in the fit without it; ``z`` ``[q, m, r]``, ``targets`` centred."""
    n_questions, m, _ = z.shape
    residuals = targets - z @ (moments / weights[:, None])
    hat = (z / weights) @ z.transpose(0, 2, 1) + 1.0 / (n_questions * m)  # of the intercept
    return float((np.linalg.solve(np.eye(m) - hat, residuals) ** 2).sum())
