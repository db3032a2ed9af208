"""What metrics.json tells of a run."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from userip_fast._version import __version__
from userip_fast.codebook.names import named_share
from userip_fast.data import Data
from userip_fast.em.trainer import FitResult
from userip_fast.jobs.run_folder import command_line
from userip_fast.model.everyone import Everyone
from userip_fast.model.fitted import Model


def log_record(data: Data) -> dict[str, Any]:
    """Of the log."""
    return {
        "items": data.num_items,
        "events": data.num_events,
        "rated": data.rated,
        "time_ordered": data.ordered,
        "dropped": data.report.to_dict(),
    }


def run_record(
    model: Model,
    about: dict[str, Any],
    learned: FitResult,
    records: list[dict[str, Any]],
    everyone: Everyone,
    seconds: float,
) -> dict[str, Any]:
    """All of it.

    Args:
        about: The log's.
        records: Of the rounds of EM.
        seconds: That the fit took.
    """
    lm, trainer, users = model.lm, model.ready_trainer(), everyone.source.num_users
    usage = {
        f.name: book.usage(z.long())
        for f, book, z in zip(model.config.fields, model.codebooks, everyone.codes.T)
    }
    return {
        "run": {
            "userip_fast": __version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command_line(),
        },
        "data": {"users": users, **about, "told": asdict(everyone.tally.told)},
        "lm": {
            "source": "embedded" if lm.embedded else lm.source,
            "fingerprint": lm.fingerprint,
            "quantization": lm.quantization,
            "dtype": str(lm.dtype).removeprefix("torch."),
            "device": str(lm.device),
            "hidden_size": lm.hidden_size,
        },
        "fit": {
            "seconds": seconds,
            "users_per_second": users / seconds,
            "nll_per_weight": everyone.tally.nll_per_weight,
            "forward_equivalents": everyone.tally.forward_equivalents,
            "rounds": len(records),
            "input_wait_share": trainer.waited_s / max(trainer.swept_s, 1e-9),
            "processes": trainer.processes.world,
        },
        "fields": {
            name: {
                "codes": len(u.counts),
                "perplexity": u.perplexity,
                "dead": u.dead,
                "named": named_share(everyone.cards[name]),
                "counts": u.counts.tolist(),
            }
            for name, u in usage.items()
        },
        **({"amortised": asdict(learned.head_report)} if learned.head_report else {}),
        "model_fingerprint": model.fingerprint,
        "seed": model.config.em.seed,
    }
