"""An evaluator in; a report out on well-formed rows, determinism, independence of batch size and company, and untouched SAEs and models."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.api import Measurement
from saehub.errors import SaehubError
from saehub.jsonio import canonical
from saehub.testing.conformance import (
    ConformanceReport,
    Subject,
    common_checks,
    difference,
    expect,
    other_random_state,
    resolve,
    run_checks,
    scratch,
    world_unchanged,
)
from saehub.testing.stage import Stage

if TYPE_CHECKING:
    from saehub.checkpoint.sae import SAE
    from saehub.pipeline.components import Components
    from saehub.pipeline.evaluate import HubEvalContext

SITE = "resid_post.0"
EXTRACTOR = "native/hf"
DEFINITION = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+/\d+")


class Bench:
    """Two SAEs of a tiny model, two datasets, and the evaluator under test."""

    def __init__(self, subject: Subject, folder: Path, saes: Mapping[str, SAE] | None, stage: Stage | None = None):
        self.subject, self.folder, self._given = subject, folder, saes
        self.stage = stage or Stage(folder)
        self.needs = set(subject.registered.component.needs) if subject.registered else {"model", "tokens"}
        self._cache: dict[tuple, list[Measurement]] = {}

    @cached_property
    def saes(self) -> dict[str, Path]:
        """id -> checkpoint folder."""
        from saehub.checkpoint.format import save
        from saehub.testing.saes import fit_to

        tokens = self.stage.tokens("in_sample")
        x_ND = self.stage.reference(SITE, tokens.tokens(0, min(40, tokens.n_sequences)))
        saes = self._given or {"first": fit_to(x_ND, seed=1), "second": fit_to(x_ND, d_sae=48, k=4, seed=2)}
        return {name: save(sae, self.folder / "saes" / name, site=SITE) for name, sae in saes.items()}

    def context(
        self, ids: tuple[str, ...] | None = None, *, lm_batch: int = 4, seed: int = 0, saes: Mapping[str, Path] | None = None
    ) -> HubEvalContext:
        """What the hub would give the evaluator."""
        from dataclasses import asdict

        from saehub.pipeline.evaluate import open_context

        paths = dict(saes or self.saes)
        texts = ("in_sample", "out_of_sample") if self.needs & {"tokens", "sequences"} else ()
        spec = {
            "subjects": [{"id": name, "path": str(paths[name]), "site": SITE, "target_site": None} for name in (ids or tuple(paths))],
            "model": asdict(self.stage.spec) if "model" in self.needs else None,
            "datasets": {name: str(self.stage.tokens(name).path) for name in texts},
            "extractor": {"address": EXTRACTOR, "config": {}},
            "seed": seed,
            "device": "cpu",
            "work_dir": str(self.folder / "work"),
            "lm_batch": lm_batch,
            "measured": self._measured(paths) if "measurements" in self.needs else [],
        }
        return open_context(spec, model=self.stage.model if "model" in self.needs else None)

    def _measured(self, paths: Mapping[str, Path]) -> list[dict]:
        """What the evaluators that this one reads (`reads` of its settings) say about the suite's SAEs, with their default settings."""
        rows: list[dict] = []
        for address, settings in getattr(self.subject.config, "reads", {}).items():
            key = (address, *map(str, paths.values()))
            if key not in self._cache:
                other = Bench(resolve("evaluator", address, dict(settings)), self.folder, None, self.stage)
                self._cache[key] = other.rows(other.context(tuple(paths), saes=paths))
            rows += [row.to_json() for row in self._cache[key]]
        return rows

    def rows(self, context: HubEvalContext) -> list[Measurement]:
        """The evaluator's measurements, from its plugin's worker where it has one."""
        from saehub.pipeline.evaluate import rows_of

        return rows_of(self.subject.make().evaluate(context), self.subject.name)

    def measured(self, ids: tuple[str, ...] | None = None, lm_batch: int = 4) -> list[Measurement]:
        """`rows`, remembered."""
        key = (ids, lm_batch)
        if key not in self._cache:
            self._cache[key] = self.rows(self.context(ids, lm_batch=lm_batch))
        return self._cache[key]


def check_evaluator(
    component: Any,
    with_: Mapping[str, Any] | None = None,
    *,
    saes: Mapping[str, SAE] | None = None,
    tolerance: float = 1e-4,
    only: Collection[str] | None = None,
    workers: Components | None = None,
    stage: Stage | None = None,
) -> ConformanceReport:
    """Everything that `saehub.api.Evaluator` promises, on SAEs of a tiny Llama's residual stream and two small texts.

    Args:
        component: `"plugin/name"`, a `Registered` (run in a worker where it `requires` a library), or `(Class, config)`.
        with_: settings, as in a recipe (the first two forms); choose small budgets.
        saes: at least two SAEs with d_in 32 to measure instead of the suite's two TopK ones.
        tolerance: greatest relative change of a value when only the language-model batch size changes.
        only: names of the checks to run; None: all.
        workers: worker processes to use and to leave running, so that several components share one import of their library; None: own ones.
        stage: a tiny model and texts to reuse between suites (`saehub.testing.stage.Stage(folder)`); None: new ones.
    """
    subject = resolve("evaluator", component, with_, workers)
    with scratch() as folder:
        bench = Bench(subject, Path(folder), saes, stage)
        checks: list[tuple[str, Callable[[], str | None]]] = [
            *common_checks(subject),
            ("measures every SAE", lambda: _measures(bench)),
            ("well-formed measurements", lambda: _well_formed(bench)),
            ("one definition, one meaning", lambda: _definitions(bench)),
            ("same question, same answer", lambda: _deterministic(bench)),
            ("batch size changes no value", lambda: _batch_size(bench, tolerance)),
            ("each SAE as if alone", lambda: _alone(bench)),
            ("SAEs and model untouched", lambda: _untouched(bench)),
            ("what does not fit is not measured", lambda: _misfit(bench)),
        ]
        return run_checks("evaluator", subject.name, checks, only, subject.close)


def _measures(bench: Bench) -> str:
    rows = bench.measured()
    expect(rows, "no measurement at all")
    expect(all(isinstance(row, Measurement) for row in rows), f"rows of type {sorted({type(row).__name__ for row in rows})}")
    for name in bench.saes:
        expect(any(name in row.subjects for row in rows), f"no row about {name!r}, not even one that says why not")
    ok = [row for row in rows if row.status == "ok"]
    expect(ok, f"nothing was measured: {rows[0].reason}")
    return f"{len(rows)} rows, {len(ok)} ok: {', '.join(sorted({row.metric for row in ok}))}"


def _well_formed(bench: Bench) -> str:
    from saehub.checkpoint.format import read_header

    hashes = {name: read_header(path)["tensors_hash"] for name, path in bench.saes.items()}
    keys: set[tuple] = set()
    for row in bench.measured():
        who = f"{row.metric} ({', '.join(row.subjects)}; {row.dataset})"
        expect(
            row.metric and row.evaluator and DEFINITION.fullmatch(row.definition),
            f"{who}: definition {row.definition!r}, expected 'name.metric/1'",
        )
        expect(set(row.subjects) <= set(bench.saes), f"{who}: was not asked about")
        expect(
            tuple(row.subject_hashes) == tuple(hashes[name] for name in row.subjects), f"{who}: subject_hashes are not those of its SAEs"
        )
        expect(row.dataset is None or row.dataset_hash, f"{who}: names a dataset, but not its hash")
        expect(
            row.better in ("higher", "lower", "none") and row.status in ("ok", "failed", "not_measured"),
            f"{who}: {row.better}, {row.status}",
        )
        if row.status == "ok":
            expect(isinstance(row.value, (int, float)) and abs(row.value) < float("inf"), f"{who}: value {row.value!r}")
            has_error = row.stderr is not None or (row.ci_low is not None and row.ci_high is not None)
            expect(has_error or row.note, f"{who}: neither a standard error, nor an interval, nor a note that says why there is none")
            expect(row.stderr is None or 0 <= row.stderr < float("inf"), f"{who}: stderr {row.stderr!r}")
            ordered = row.ci_low is None or row.ci_high is None or row.ci_low <= row.value <= row.ci_high
            expect(ordered, f"{who}: {row.value} is outside [{row.ci_low}, {row.ci_high}]")
            expect(row.stderr is None or (row.n is not None and row.n > 0), f"{who}: n is {row.n!r}")
        else:
            expect(row.value is None and row.reason, f"{who}: {row.status} with value {row.value!r} and reason {row.reason!r}")
        canonical(row.to_json())
        key = (row.metric, row.subjects, row.dataset, row.definition)
        expect(key not in keys, f"{who}: there twice")
        keys.add(key)
    return f"{len(keys)} rows"


def _definitions(bench: Bench) -> str:
    meanings: dict[str, tuple] = {}
    for row in bench.measured():
        meaning = (row.metric.partition("@")[0], row.better)  # `dead_share@1e-04`: one formula at another setting
        expect(meanings.setdefault(row.definition, meaning) == meaning, f"{row.definition} means {meanings[row.definition]} and {meaning}")
    return f"{len(meanings)} definitions"


def _table(rows: list[Measurement]) -> dict[tuple, Measurement]:
    return {(row.metric, row.subjects, row.dataset, row.definition): row for row in rows}


def _deterministic(bench: Bench) -> str:
    with other_random_state(11):
        again = _table(bench.rows(bench.context()))
    first = _table(bench.measured())
    expect(first.keys() == again.keys(), f"other rows the second time: {sorted(map(str, first.keys() ^ again.keys()))[:3]}")
    for key, row in first.items():
        expect(
            (row.value, row.stderr, row.n) == (again[key].value, again[key].stderr, again[key].n),
            f"{key[0]}: {row.value}, then {again[key].value}",
        )
    return f"{len(first)} rows bit for bit"


def _close(left: Measurement, right: Measurement, tolerance: float) -> str:
    if left.status != right.status:
        return f"{left.status} and {right.status}"
    for name in ("value", "stderr"):
        a, b = getattr(left, name), getattr(right, name)
        if (a is None) != (b is None):
            return f"{name} {a} and {b}"
        if a is not None and abs(a - b) > tolerance * max(abs(a), abs(b), left.stderr or 0.0, 1e-6):
            return f"{name} {a:.8g} and {b:.8g}"
    return ""


def _batch_size(bench: Bench, tolerance: float) -> str:
    small, large = _table(bench.measured()), _table(bench.measured(None, 16))
    expect(small.keys() == large.keys(), "other rows with another lm_batch")
    for key, row in small.items():
        gap = _close(row, large[key], tolerance)
        expect(not gap, f"{key[0]} of {key[1]} with lm_batch 4 and 16: {gap}")
    return f"{len(small)} rows, lm_batch 4 and 16"


def _alone(bench: Bench) -> str:
    if "several_saes" in bench.needs:
        return "compares SAEs"
    together = _table(bench.measured())
    for name in bench.saes:
        alone = _table(bench.measured((name,)))
        expected = {key for key in together if key[1] == (name,)}
        expect({key for key in alone if key[1] == (name,)} == expected, f"{name}: other rows when it is alone")
        for key in expected:
            gap = _close(together[key], alone[key], 1e-9)
            expect(not gap, f"{key[0]} of {name}, in company and alone: {gap}")
    return f"{len(bench.saes)} SAEs"


def _untouched(bench: Bench) -> str:
    context = bench.context()
    before = {subject.id: {name: tensor.clone() for name, tensor in subject.sae.tensors().items()} for subject in context.subjects}
    weights = {name: w.clone() for name, w in context.model.hf.state_dict().items()} if context.model else {}
    hooks = _hooks(context)
    with world_unchanged():
        bench.rows(context)
    for subject in context.subjects:
        gap = difference(before[subject.id], subject.sae.tensors())
        expect(not gap, f"{subject.id} was changed: {gap}")
    if context.model:
        gap = difference(weights, context.model.hf.state_dict())
        expect(not gap and hooks == _hooks(context), f"the model was changed: {gap or 'hooks or mode'}")
    return "SAEs, model weights, hooks and mode; random states, gradient mode, dtype, threads, environment"


def _hooks(context: HubEvalContext) -> tuple:
    if not context.model:
        return ()
    modules = list(context.model.hf.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules), context.model.hf.training


def _misfit(bench: Bench) -> str:
    from saehub.checkpoint.format import save
    from saehub.testing.saes import random_sae

    if not bench.needs & {"model", "tokens", "activations", "sequences"}:
        return "looks at the tensors alone"
    wrong = {
        name: save(random_sae("topk", d_in=20, seed=seed), bench.folder / "wrong" / name, site=SITE) for seed, name in enumerate(bench.saes)
    }
    try:
        rows = bench.rows(bench.context(saes=wrong))
    except SaehubError as error:
        return f"refused: {str(error).splitlines()[0]}"
    except Exception as error:
        raise AssertionError(
            f"an SAE of another width ended in {type(error).__name__}: {error}; return rows with a reason, or a saehub error"
        ) from error
    # What is measured all the same (the model's own loss, a baseline) cannot depend on the SAE: these differ in their tensors only.
    # A number about the weights alone (no dataset) is as true of them as of any SAE.
    values: dict[tuple, set] = {}
    for row in rows:
        if row.status == "ok" and row.dataset is not None:
            values.setdefault((row.metric, row.dataset, row.definition), set()).add(row.value)
    bad = [key[0] for key, found in values.items() if len(found) > 1]
    expect(not bad, f"{', '.join(bad)}: 'measured' on SAEs that read 20 numbers of a row of 32")
    for name in wrong:
        reasons = sorted({row.reason or "" for row in rows if row.status != "ok" and name in row.subjects})
        expect(reasons and all(reasons), f"{name} reads 20 numbers of a row of 32, and no row says that it was not measured, and why")
    return reasons[0]
