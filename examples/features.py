"""Codes, probabilities and affinities of a bank as features of LightGBM and torch-rechub's DCN.

usage: python examples/features.py RUN ROWS

RUN is of `userip fit ... --profiles --out RUN`. ROWS is a Parquet file of user_id, item_id and
label (0 or 1), in time order, later than the events that RUN has read; the last fifth is tested.
Nothing here opens a language model.
"""

import sys

import lightgbm
import numpy as np
import pyarrow.parquet as pq
import torch
from sklearn.metrics import roc_auc_score
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.ranking import DCN

from userip_fast.serve import Server


def features(server, rows):
    """Per row the user's codes, p(code) of all codes, and the affinity of his codes for the item;
    users whom the bank lacks have the reserved code and the prior, unknown items no affinity."""
    users, u = np.unique(rows["user_id"].to_numpy(), return_inverse=True)
    items, i = np.unique(rows["item_id"].to_numpy(), return_inverse=True)
    codes, p = (f(users, on_unknown="code") for f in (server.lookup, server.lookup_profiles))
    affinity = np.nan_to_num(np.log(server.affinity(p, items.tolist())))
    sparse = {field["name"]: codes[u, j] for j, field in enumerate(server.fields)}
    return sparse, {"affinity": affinity[u, i], **{f"p{k}": x[u] for k, x in enumerate(p.T)}}


def main(run, rows):
    server, table = Server.open(f"{run}/model", bank=f"{run}/bank"), pq.read_table(rows)
    sparse, dense = features(server, table)
    label = table["label"].to_numpy().astype(np.float32)
    cut = len(label) * 4 // 5

    x = np.column_stack([*sparse.values(), *dense.values()])
    trees = lightgbm.LGBMClassifier(verbose=-1, num_threads=2)
    trees.fit(x[:cut], label[:cut], categorical_feature=list(range(len(sparse))))
    print(f"LightGBM: AUC {roc_auc_score(label[cut:], trees.predict_proba(x[cut:])[:, 1]):.4f}")

    torch.manual_seed(0)
    sizes = {field["name"]: field["codebook_size"] + 1 for field in server.fields}
    inputs = [SparseFeature(n, sizes[n], 8) for n in sparse] + [DenseFeature(n) for n in dense]
    net = DCN(inputs, n_cross_layers=2, mlp_params={"dims": [32], "dropout": 0.1})
    told = {n: torch.tensor(v) for n, v in {**sparse, **dense}.items()}
    y, adam = torch.from_numpy(label), torch.optim.Adam(net.parameters(), 3e-3)
    for some in (batch for _ in range(5) for batch in torch.randperm(cut).split(512)):
        p = net({n: v[some] for n, v in told.items()})
        adam.zero_grad()
        torch.nn.functional.binary_cross_entropy(p, y[some]).backward()
        adam.step()
    score = net.eval()({n: v[cut:] for n, v in told.items()}).detach().numpy()
    print(f"DCN: AUC {roc_auc_score(label[cut:], score):.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
