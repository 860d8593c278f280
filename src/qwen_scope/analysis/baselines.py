"""What a rule of features has to beat: the usual classifiers on residuals and on the bare text (scikit-learn)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64

from qwen_scope.errors import FormatError, InputError
from qwen_scope.files import Fields, read_object, write_text

FORMAT, VERSION = "qwen-scope-student", 1
TERMS, NGRAMS, FOLDS = 20_000, (1, 4), 5

Scored = tuple[Bool[np.ndarray, " items"], Float64[np.ndarray, " items"]]


def logistic(
    x: Float[np.ndarray, "seeds d"], labels: Bool[np.ndarray, " seeds"], test: Float[np.ndarray, "items d"]
) -> Scored:
    """Logistic regression on standardised vectors, usually mean-pooled residuals: decisions and scores on `test`."""
    found = fitted(x, labels).decision_function(test)
    return found > 0, np.asarray(found, np.float64)


def fitted(x: np.ndarray, labels: np.ndarray) -> Any:
    """A standardiser and a logistic regression behind it."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(x, labels)


def mean_difference(
    x: Float[np.ndarray, "seeds d"], labels: Bool[np.ndarray, " seeds"], test: Float[np.ndarray, "items d"]
) -> Scored:
    """The projection on the difference of the class means, cut half-way between them."""
    x, test = x.astype(np.float64), test.astype(np.float64)
    positive, negative = x[labels].mean(0), x[~labels].mean(0)
    found = (test - (positive + negative) / 2) @ (positive - negative)
    return found > 0, found


def best_layer(pooled: Mapping[int, Float[np.ndarray, "seeds d"]], labels: Bool[np.ndarray, " seeds"]) -> int:
    """The layer where logistic regression does best under cross-validation among the seeds; the first of equals.

    Raises:
        InputError: too few seeds of a class to be split in two.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    folds = min(FOLDS, int(labels.sum()), int((~labels).sum()))
    if folds < 2:
        raise InputError("a baseline needs at least two seeds of each class")
    split = StratifiedKFold(folds, shuffle=True, random_state=0)

    def accuracy(layer: int) -> float:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        return float(cross_val_score(model, pooled[layer], labels, cv=split).mean())

    return max(sorted(pooled), key=lambda layer: round(accuracy(layer), 6))


@dataclass(frozen=True, eq=False)
class Student:
    """TF-IDF of character n-grams with logistic regression: stands alone, without any language model.

    Trained on true labels it is a baseline, trained on the labels of a rule it is the rule's shortcut. Its file is
    JSON, read without running anything.

    Attributes:
        vocabulary: the n-grams, in order.   idf, weights: one number for each.   intercept: what is added.
        about: what it was trained on.
    """

    vocabulary: tuple[str, ...]
    idf: Float64[np.ndarray, " terms"]
    weights: Float64[np.ndarray, " terms"]
    intercept: float
    about: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def fit(
        cls, texts: Sequence[str], labels: Bool[np.ndarray, " texts"], about: dict[str, Any] | None = None
    ) -> Student:
        """Train on labelled texts.

        Raises:
            InputError: labels of one class only, or no text with a character.
        """
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        if len(set(labels.tolist())) < 2:
            raise InputError("a student needs texts of both classes; the labels are all the same")
        vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=NGRAMS, max_features=TERMS, sublinear_tf=True)
        try:
            matrix = vectors.fit_transform(texts)
        except ValueError as error:
            raise InputError("a student needs texts with at least one character") from error
        model = LogisticRegression(C=10.0, max_iter=2000).fit(matrix, labels)
        terms = tuple(vectors.get_feature_names_out().tolist())
        return cls(
            terms,
            np.asarray(vectors.idf_, np.float64),
            model.coef_[0].astype(np.float64),
            float(model.intercept_[0]),
            about or {},
        )

    def scores(self, texts: Sequence[str]) -> Float64[np.ndarray, " texts"]:
        """The log-odds of being positive."""
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectors = TfidfVectorizer(
            analyzer="char_wb", ngram_range=NGRAMS, sublinear_tf=True, vocabulary=list(self.vocabulary)
        )
        vectors.idf_ = self.idf
        return np.asarray(vectors.transform(texts) @ self.weights + self.intercept, np.float64)

    def predict(self, texts: Sequence[str]) -> Bool[np.ndarray, " texts"]:
        """Which texts are positive."""
        return self.scores(texts) > 0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file: `format`, `version`, `vocabulary`, `idf`, `weights`, `intercept`, `about`."""
        data = {
            "format": FORMAT,
            "version": VERSION,
            "vocabulary": self.vocabulary,
            "idf": self.idf.tolist(),
            "weights": self.weights.tolist(),
            "intercept": self.intercept,
            "about": self.about,
        }
        write_text(path, json.dumps(data, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Student:
        """Read a file that `save` wrote.

        Raises:
            NotFoundError: there is none.   FormatError: it is no student of this version.
        """
        found = Fields(read_object(path), f"the student {path}")
        found.header(VERSION, FORMAT)
        keys = ("format", "version", "vocabulary", "idf", "weights", "intercept", "about")
        found = Fields(found.data, found.what, keys)
        vocabulary = tuple(found.items("vocabulary"))
        idf, weights = (np.array(found.numbers(name), np.float64) for name in ("idf", "weights"))
        if not all(isinstance(term, str) for term in vocabulary) or len(set(vocabulary)) < len(vocabulary):
            raise FormatError(f"the vocabulary of {found.what} is a list of n-grams, each once")
        if not vocabulary or not len(idf) == len(weights) == len(vocabulary):
            raise FormatError(f"{found.what} does not have one finite idf and weight for each n-gram")
        return cls(vocabulary, idf, weights, found.number("intercept"), found.object("about"))


def text_baseline(texts: Sequence[str], labels: Bool[np.ndarray, " seeds"], test: Sequence[str]) -> Scored:
    """TF-IDF with logistic regression: decisions and scores on `test`."""
    found = Student.fit(texts, labels).scores(test)
    return found > 0, found
