"""What the command line prints: tables of results, codes and checks."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table

from userip_fast.core.late import Late
from userip_fast.core.visible import visible

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from userip_fast.bank import FeatureBank
    from userip_fast.bank.parquet import Best
    from userip_fast.cli.doctor import Check
    from userip_fast.data import Interactions, InteractionStream
    from userip_fast.jobs.tune import Choice
    from userip_fast.model.fitted import Model

METHODS = {
    "gradient": "userip, gradient E-step",
    "posterior": "userip, posterior E-step",
    "posterior_random": "the same from random codewords",
    "amortised": "amortised: a head learned its answers",
    "paper": "the published recipe",
    "kmeans_states": "k-means on mean LM states",
    "oracle": "Bayes-optimal labelling",
}


def print_scores(metrics: Mapping[str, Any]) -> None:
    """NMI and ARI of each field against the planted trait, and what a user costs."""
    fields = metrics["fields"]
    table = Table("method", title=f"{metrics['users']} users, seeds {metrics['seeds']}")
    for name in fields:
        table.add_column(f"{name}\nNMI", justify="right")
        table.add_column("\nARI", justify="right")
    table.add_column("LM passes\nper user", justify="right")
    first = next(iter(fields.values()))
    for method in first["nmi"]:
        scores = [
            f"{f[measure][method]:.3f}" for f in fields.values() for measure in ("nmi", "ari")
        ]
        cost = first["forward_equivalents"].get(method)
        table.add_row(METHODS.get(method, method), *scores, "" if cost is None else f"{cost:.0f}")
    _print(table)
    if (agreement := metrics.get("amortised_agreement")) is not None:
        print(f"the head alone has {agreement:.1%} of new users as the posterior E-step has them")


def print_choices(choices: Sequence[Choice]) -> None:
    """Numbers of codes by what they are worth on users held out, the likeliest first."""
    table = Table("codes", "ELBO\nper user", "gain", title="users held out", show_lines=False)
    names = list(choices[0].codes)
    for name in names:
        table.add_column(f"{name}\nin use", justify="right")
        table.add_column("\nstable", justify="right")
    table.add_column("LM passes\nper user", justify="right")
    for c in choices:
        values = [
            value
            for name in names
            for value in (
                f"{c.perplexity[name]:.1f}",
                "-" if c.stability is None else f"{c.stability[name]:.0%}",
            )
        ]
        codes = " x ".join(map(str, c.codes.values()))
        row = (codes, f"{c.elbo:.3f}", f"{c.gain:.3f}", *values, f"{c.forward_equivalents:.0f}")
        table.add_row(*row)
    _print(table)


def print_ctr(result: Mapping[str, Any]) -> None:
    """AUC by feature and backbone, what stands beside it, and how the IDs compare."""
    from userip_fast.report.words import codes_in_words, in_words, left_out_in_words

    rows = result["rows"]
    first = f", first {result['first']}" if result["first"] else ""
    backbones = dict.fromkeys(b for by in result["auc"].values() if by for b in by)
    floor = ", ".join(f"{n.replace('_', ' ')} {x:.4f}" for n, x in result["floor"].items())
    table = Table(
        "AUC",
        title=f"{result['protocol']}{first}; {escape(result['label'])}; {rows['test']:,} test rows "
        f"of {rows['test_users']:,} users; alone: {floor}",
    )
    for backbone in backbones:
        table.add_column(backbone, justify="right")
    for feature in result["settings"]["features"]:
        by = result["auc"][feature]
        if by is None:
            table.add_row(feature, escape(result["reasons"][feature]))
        else:
            table.add_row(feature, *(in_words(by[b]) if b in by else "" for b in backbones))
    _print(table)
    if ranking := result["ranking"]:
        for name, by in ranking.items():
            print(
                f"ranking by {name}: Recall@20 {by['recall20']:.4f}, NDCG@100 {by['ndcg100']:.4f}"
            )
    for seed, codes in result["codes"].items():
        print(visible(f"codes, seed {seed}: {codes_in_words(codes)}"))
    for backbone, compared in result["paired"].items():
        pairs = {f"ids - {f}": d for f, d in compared.get("against", {}).items()
                 if f in ("none", compared["best_cluster"])}  # fmt: skip
        pairs |= {name: d for name, d in compared.items() if " - " in name}
        for name, d in pairs.items():
            low, high = d["ci95"]
            print(
                f"{backbone}: {name} = {d['difference']:+.4f}  95% [{low:+.4f}, {high:+.4f}]  "
                f"p {d['p']:.3f}"
            )
    for line in left_out_in_words(result.get("left_out")):
        print(line)
    for warning in result["warnings"]:
        print(visible(f"warning: {warning}"))


def print_cards(cards: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Each code of each field in words."""
    for name, codes in cards.items():
        table = Table(name, "users", "words", "typical items", title_justify="left")
        for card in codes:
            words, items = ", ".join(card["words"]), ", ".join(card["items"])
            table.add_row(str(card["code"]), str(card["users"]), escape(words), escape(items))
        _print(table)


def print_results(
    title: str,
    data: Interactions | InteractionStream,
    model: Model,
    bank: FeatureBank,
    seconds: float,
    nll: float,
    told: Mapping[str, int],
    paths: Mapping[str, Path],
) -> None:
    """What `fit` and `infer` read, did, found and wrote."""
    import torch

    lm, dropped = model.lm, data.report
    why = ", ".join(f"{count:,} {rule}" for rule, count in dropped.counts.items())
    order = "in time order" if data.ordered else "no times: in a fixed order drawn by the seed"
    rows = {
        "users": f"{len(bank):,}",
        "items": f"{data.num_items:,}",
        "events": f"{data.num_events:,}, {order}",
        "told to the LM": f"{told['told']:,} of {told['events']:,} events; {told['users_cut']:,} "
        f"users cut, {100 * told['unknown'] / max(1, told['tokens']):.1f} % unknown tokens",
        "rows dropped": f"{dropped.rows_bad:,} bad{f' ({why})' if why else ''}, "
        f"{dropped.rows_filtered:,} filtered",
        "users too short": f"{dropped.short_users:,} (below {dropped.min_history} events)",
        "LM": f"{'embedded' if lm.embedded else lm.source}, {lm.quantization}, "
        + ("not opened" if isinstance(lm, Late) and not lm.is_made else f"on {lm.device}"),
        "speed": f"{len(bank) / seconds:,.1f} users/s, {seconds:,.1f} s",
        "NLL": f"{nll:.4f} nats per loss weight",
    }
    codes = torch.from_numpy(bank.codes().astype("int64"))
    for j, (f, book) in enumerate(zip(bank.fields, model.codebooks)):
        usage = book.usage(codes[:, j])
        rows[f"field {f['name']}"] = (
            f"{len(book) - usage.dead} of {len(book)} codes used, perplexity {usage.perplexity:.2f}"
        )
    rows |= {name: str(path) for name, path in paths.items()}
    table = Table("", "", title=escape(title), title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, escape(value))
    _print(table)


def print_codes(
    bank: FeatureBank, users: Sequence[str], on_unknown: str, best: Best | None = None
) -> None:
    """Codes of users given as text, and what they mean. Of a bank with profiles also how likely
    they are, with what else is likely; and with `best` the best items."""
    from userip_fast.bank.checks import split_fields

    keys, names = bank.coerce_keys(users), [f["name"] for f in bank.fields]
    codes = bank.lookup(keys, on_unknown=on_unknown)
    kept = bank.info()["profiles"] or best is not None
    profiles = bank.lookup_profiles(keys, on_unknown) if kept else None
    items = [[]] * len(keys) if best is None or profiles is None else _in_a_line(*best(profiles))
    table = Table("user", *names, *(["best items"] if best else []))
    parts = None if profiles is None else split_fields(bank.fields, profiles)
    for i, (key, row) in enumerate(zip(keys.to_pylist(), codes.tolist())):
        cells = [f"{code}: {bank.describe(name, code)}" for name, code in zip(names, row)]
        if parts is not None:
            cells = [c + _likely(p[i], k) for c, p, k in zip(cells, parts, row)]
        table.add_row(*map(escape, [str(key), *cells, *items[i]]))
    _print(table)


def _likely(p: NDArray[np.float32], code: int) -> str:
    """How likely a code is, and which others are: those of 5 % or more, three at most."""
    if code >= len(p):
        return ""
    others = [k for k in p.argsort()[::-1][:4].tolist() if k != code and p[k] >= 0.05][:3]
    more = "".join(f", {k} {p[k]:.0%}" for k in others)
    return f" ({p[code]:.0%}{more})"


def _in_a_line(items: NDArray[Any], scores: NDArray[np.float32]) -> list[list[str]]:
    """Of each user a cell."""
    rows = zip(items.tolist(), scores.tolist())
    return [[", ".join(f"{k} ({s:.3g})" for k, s in zip(*row))] for row in rows]


def print_checks(checks: Sequence[Check]) -> None:
    """What the doctor found."""
    table = Table("check", "error", "budget", "")
    for c in checks:
        verdict = "ok" if c.passed else "[bold red]FAILED[/]"
        table.add_row(c.name, f"{c.error:.2e}", f"{c.budget:.2e}", verdict)
    _print(table)


class _Visible:
    """A table whose cells cannot steer the terminal."""

    def __init__(self, table: Table) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.table, options):
            yield Segment(visible(segment.text), segment.style, segment.control)


def _print(table: Table) -> None:
    """As wide as the terminal; wide enough not to wrap where the output goes to a file."""
    width = None if sys.stdout.isatty() else 160
    Console(highlight=False, width=width).print(_Visible(table))
