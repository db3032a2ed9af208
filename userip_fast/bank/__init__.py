"""The feature bank: collaborative IDs of all users, on disk, ready for online models.

A CTR model reads the codes as ordinary categorical features; the LLM is not there when it does:

    import torch
    import userip_fast as uf

    bank = uf.FeatureBank.open("BANK")  # milliseconds: the files are memory mapped
    embeddings = torch.nn.ModuleList(
        # one row more than codes: the last one is for users the bank does not know
        torch.nn.Embedding(field["codebook_size"] + 1, 8) for field in bank.fields
    )
    for user_ids, item_ids, clicks in batches:
        codes = torch.from_numpy(bank.lookup(user_ids, on_unknown="code"))  # [B, J] int64
        profile = torch.cat([e(codes[:, j]) for j, e in enumerate(embeddings)], dim=1)  # [B, 8 J]

A bank is a folder of immutable generations (`userip_fast.bank.generations`), each one made of raw
arrays that a program in any language can map (`userip_fast.bank.layout`).
"""

from userip_fast.bank.feature_bank import FeatureBank
from userip_fast.bank.index import KeyTypeError
from userip_fast.bank.writer import BankWriter

__all__ = ["BankWriter", "FeatureBank", "KeyTypeError"]
