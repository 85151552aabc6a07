"""The classifier of the probe against explicit least squares, refitted for everything that is left out."""

import numpy as np
import pytest

from refinelens.report.ridge import FOLDS, STRENGTHS, fold_of_questions, held_out_predictions


def explicit_scores(x, targets, others, penalty):
    """Least squares with an intercept that is not penalised, by the normal equations."""
    own = np.hstack([np.ones((len(x), 1)), x])
    penalties = penalty * np.diag([0.0, *np.ones(x.shape[1])])
    weights = np.linalg.solve(own.T @ own + penalties, own.T @ targets)
    return np.hstack([np.ones((len(others), 1)), others]) @ weights


def explicit_predictions(x, y, folds):
    """The same choice of the strength, but every question left out by a fit of its own."""
    n_classes, found = y.max() + 1, np.empty_like(y)
    for fold in np.unique(folds):
        train, test = x[folds != fold], x[folds == fold]
        flat = train.reshape(-1, x.shape[-1])
        train, test = ((part - flat.mean(0)) / flat.std(0) for part in (train, test))
        targets = np.eye(n_classes)[y[folds != fold]]
        values = np.linalg.svd(train.reshape(-1, x.shape[-1]), compute_uv=False) ** 2
        penalties = STRENGTHS * values[values > 1e-9 * values[0]].mean()
        errors = []
        for penalty in penalties:
            error = 0.0
            for q in range(len(train)):
                rest = np.arange(len(train)) != q
                fit = (train[rest].reshape(-1, x.shape[-1]), targets[rest].reshape(-1, n_classes))
                error += ((explicit_scores(*fit, train[q], penalty) - targets[q]) ** 2).sum()
            errors.append(error)
        fit = (train.reshape(-1, x.shape[-1]), targets.reshape(-1, n_classes))
        scores = explicit_scores(*fit, test.reshape(-1, x.shape[-1]), penalties[int(np.argmin(errors))])
        found[folds == fold] = scores.argmax(1).reshape(-1, y.shape[1])
    return found


def problem(rng, n_questions, n_positions, n_features, signal):
    """Features of which two say where the document stands, with noise, and what is the question's own."""
    y = np.tile(np.arange(n_positions), (n_questions, 1))
    x = rng.normal(size=(n_questions, n_positions, n_features)) + 3 * rng.normal(size=(n_questions, 1, n_features))
    x[..., :2] += signal * np.stack([y, y**2], axis=-1)
    return x, y


# More examples than features, and fewer: the two products that are decomposed.
@pytest.mark.parametrize("n_questions, n_features", [(12, 7), (11, 53)])
def test_it_is_explicit_ridge_regression(n_questions, n_features):
    rng = np.random.default_rng(3)
    x, y = problem(rng, n_questions, 3, n_features, 1.5)
    folds = fold_of_questions(n_questions, 0)
    found = held_out_predictions(x, y, folds)
    np.testing.assert_array_equal(found, explicit_predictions(x, y, folds))
    assert 1 / 3 < (found == y).mean() < 1


def test_what_is_held_out_changes_no_other_prediction():
    """Labels and other questions of a fold, whatever they are: its predictions come of the other folds alone."""
    rng = np.random.default_rng(1)
    x, y = problem(rng, 20, 4, 9, 1.0)
    folds = fold_of_questions(20, 5)
    found = held_out_predictions(x, y, folds)
    held = folds == 2
    first = np.flatnonzero(held)[0]
    strange, labels = x.copy(), y.copy()
    strange[held & (np.arange(20) != first)] *= 100
    labels[held] = labels[held][:, ::-1]
    changed = held_out_predictions(strange, labels, folds)
    np.testing.assert_array_equal(changed[first], found[first])
    assert (changed[~held] != found[~held]).any()


@pytest.mark.parametrize("n_questions", [10, 23, 101])
def test_folds_hold_every_question_once(n_questions):
    folds = fold_of_questions(n_questions, 0)
    sizes = np.bincount(folds, minlength=FOLDS)
    assert len(folds) == n_questions and sizes.max() - sizes.min() <= 1
    assert (folds != fold_of_questions(n_questions, 1)).any()


def test_constant_features_say_nothing():
    x, y = np.full((10, 3, 5), 0.1), np.tile(np.arange(3), (10, 1))
    assert (held_out_predictions(x.astype(np.float16), y, fold_of_questions(10, 0)) == y).mean() == pytest.approx(1 / 3)
