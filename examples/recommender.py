"""Codes, their probabilities and affinities as inputs of two recommenders: LightGBM and DCN.

usage: python examples/recommender.py DATA [MAX_USERS]

DATA holds interactions.parquet and items.parquet (user_id, item_id, timestamp; item_id, title).
Profiles are learned on half of the users. The others are known by their first ten events; the
later ones are rows, each against an item drawn by popularity. A quarter of these users is tested.
"""

import sys

import lightgbm
import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.ranking import DCN

import userip_fast as uf

FIRST = 10


def main(data: str, max_users: str = "1000000") -> None:
    log = uf.read_interactions(
        f"{data}/interactions.parquet", f"{data}/items.parquet", time="timestamp", on_bad="skip"
    ).head_users(int(max_users))
    half = np.arange(log.num_users) % 2 == 0
    settings = {
        "data": {"behaviour_context": "independent"},
        "em": {"estep": "posterior"},
        "lm": {"quantization": "none"},
    }
    model = uf.fit(
        log.select_users(np.flatnonzero(half)),
        fields=[uf.ProfileField("taste", "", codebook_size=16)],
        config=settings,
        show=True,
    )

    # Rows: later events (label 1), each with an item drawn by popularity (label 0).
    others = log.select_users(np.flatnonzero(~half & (log.history_lengths > FIRST)))
    place = np.arange(others.num_events) - others.offsets[:-1][others.users_of_events()]
    positive = others.item_index[place >= FIRST]
    user = np.repeat(others.users_of_events()[place >= FIRST], 2)
    random = np.random.default_rng(0)
    item = np.stack([positive, random.choice(others.item_index, len(positive))], axis=1).ravel()
    label = np.tile([1.0, 0.0], len(positive)).astype(np.float32)
    train = user % 4 > 0

    # What the model says of users and items it has never met, by their events and texts alone.
    keys, texts = np.asarray(others.item_keys), others.item_text.to_pylist()
    by_key = dict(zip(others.item_keys.to_pylist(), texts))
    known = [keys[others.item_index[a : a + FIRST]].tolist() for a in others.offsets[:-1]]
    probabilities = model.profile(known, texts=by_key)
    codes = probabilities.argmax(1)
    affinity = np.log(model.affinity(probabilities, list(by_key), by_key))
    popularity = np.log1p(log.select_users(np.flatnonzero(half)).item_counts())

    base = {"popularity": popularity[item]}
    ours = {
        **{f"p{k}": probabilities[user, k] for k in range(16)},
        "affinity": affinity[user, item],
    }
    for name, dense, sparse in (
        ("popularity alone", base, {}),
        ("with profiles", {**base, **ours}, {"code": codes[user]}),
    ):
        table = np.column_stack([*dense.values(), *sparse.values()])
        trees = lightgbm.LGBMClassifier(verbose=-1, num_threads=2).fit(table[train], label[train])
        scores = {"LightGBM": trees.predict_proba(table[~train])[:, 1]}
        scores["DCN"] = dcn(dense, sparse, label, train)
        for recommender, score in scores.items():
            print(f"{name} in {recommender}: AUC {roc_auc_score(label[~train], score):.4f}")


def dcn(dense, sparse, label, train):
    """Scores of the test rows by torch-rechub's deep and cross network."""
    torch.manual_seed(0)
    features = [DenseFeature(n) for n in dense] + [SparseFeature(n, 16, 8) for n in sparse]
    net = DCN(features, n_cross_layers=2, mlp_params={"dims": [64], "dropout": 0.1})
    scaled = {n: (x - x[train].mean()) / (x[train].std() + 1e-9) for n, x in dense.items()}
    x = {n: torch.tensor(v, dtype=torch.float32) for n, v in scaled.items()}
    x |= {n: torch.tensor(v) for n, v in sparse.items()}
    rows, optimizer = torch.from_numpy(np.flatnonzero(train)), torch.optim.Adam(net.parameters())
    for _ in range(3):
        for some in rows[torch.randperm(len(rows))].split(1024):
            p = net({n: v[some] for n, v in x.items()})
            loss = torch.nn.functional.binary_cross_entropy(p, torch.from_numpy(label)[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        net.eval()
        return net({n: v[torch.from_numpy(~train)] for n, v in x.items()}).numpy()


if __name__ == "__main__":
    main(*sys.argv[1:])
