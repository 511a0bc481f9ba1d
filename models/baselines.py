"""Published recommenders on the same split as ours, by the `implicit` library: what the pipeline has to beat.

`fit` once, `recommend` for both views of the protocol, `models.metrics.evaluate` on the slates.
"""

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
from implicit.als import AlternatingLeastSquares
from implicit.bpr import BayesianPersonalizedRanking
from implicit.nearest_neighbours import TFIDFRecommender
from implicit.recommender_base import RecommenderBase
from implicit.utils import ParameterWarning
from scipy.sparse import csr_matrix
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

View = Literal["new", "all"]
"""Whether items the user had in training may be recommended (`all`) or neither are nor count as relevant (`new`)."""


BASELINES: Mapping[str, Callable[[int], RecommenderBase]] = MappingProxyType(
    {
        "ItemKNN": lambda seed: TFIDFRecommender(K=20, num_threads=1),
        "ALS": lambda seed: AlternatingLeastSquares(factors=64, num_threads=1, random_state=seed),
        "BPR": lambda seed: BayesianPersonalizedRanking(num_threads=1, random_state=seed),
    }
)
"""By name, from a seed; what is not named here is the library's default. ItemKNN: 20 neighbours by the cosine of TF-IDF
weights (Sarwar et al. 2001). ALS: 64 factors (Hu et al. 2008). BPR: 100 factors (Rendle et al. 2009)."""


def fit(name: str, interactions: csr_matrix, seed: int = 0) -> RecommenderBase:
    """Fits a baseline to the training interactions, users x items, one count or weight a pair; one thread."""
    # The library checks the thread count when a model is made, and warns of a conversion that its neighbour models do.
    with threadpool_limits(1, "blas"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ParameterWarning)
        model = BASELINES[name](seed)
        model.fit(interactions.astype(np.float32), show_progress=False)
    return model


def recommend(
    model: RecommenderBase, interactions: csr_matrix, users: npt.NDArray[np.int64], k: int, view: View
) -> npt.NDArray[np.int64]:
    """Slates [U, k] of item columns, best first, for rows `users` of the interactions; -1 where nothing is left."""
    liked = interactions[users]
    width = min(k, interactions.shape[1])
    with threadpool_limits(1, "blas"):
        items, scores = model.recommend(
            users, liked.astype(np.float32), width, filter_already_liked_items=view == "new"
        )
    # What the library could not fill it fills with the lowest float or, for neighbours, with filtered items.
    empty = scores <= np.finfo(np.float32).min
    if view == "new":
        empty |= np.asarray(liked[np.arange(len(users))[:, None], np.maximum(items, 0)].todense()) != 0
    slates = np.full((len(users), k), -1, np.int64)
    slates[:, :width] = np.where(empty, -1, items)
    return slates
