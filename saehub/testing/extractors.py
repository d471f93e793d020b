"""An extractor in; a report out on determinism a batch, row order, exclusion, one pass for all sites, and an untouched model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.api import Extractor, ExtractorSession, Rows
from saehub.testing.conformance import (
    ConformanceReport,
    Subject,
    common_checks,
    difference,
    expect,
    other_random_state,
    raises_cleanly,
    resolve,
    run_checks,
    scratch,
    world_unchanged,
)
from saehub.testing.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor

    from saehub.data.model import ModelHandle
    from saehub.data.tokens import TokenDataset
    from saehub.pipeline.components import Components

SITES = ("resid_post.0", "mlp_out.1", "resid_pre.1")
LM_BATCH = 4


class Bench:
    """The extractor under test and what it reads."""

    def __init__(self, subject: Subject, model: ModelHandle | None, tokens: TokenDataset | None, sites: Sequence[str], stage: Stage | None):
        self.subject, self.model, self.tokens, self.sites, self.stage = subject, model, tokens, tuple(sites), stage

    def open(self, sites: Sequence[str] | None = None, lm_batch: int = LM_BATCH) -> ExtractorSession:
        """A session of a fresh extractor."""
        extractor: Extractor = self.subject.make()
        return extractor.open(self.model, self.tokens, list(self.sites if sites is None else sites), lm_batch=lm_batch)

    def all_rows(self, sites: Sequence[str] | None = None, lm_batch: int = LM_BATCH) -> list[Rows]:
        """Every batch of a fresh session."""
        session = self.open(sites, lm_batch)
        try:
            return [session.rows(batch) for batch in range(session.n_batches)]
        finally:
            session.close()


def check_extractor(
    component: Any,
    with_: Mapping[str, Any] | None = None,
    *,
    sites: Sequence[str] | None = None,
    model: ModelHandle | None = None,
    tokens: TokenDataset | None = None,
    tolerance: float = 1e-5,
    only: Collection[str] | None = None,
    workers: Components | None = None,
    stage: Stage | None = None,
) -> ConformanceReport:
    """Everything that `saehub.api.Extractor` promises.

    Args:
        component: `"plugin/name"`, a `Registered`, or `(Class, config)`.
        with_: settings, as in a recipe (the first two forms).
        sites: at least two sites it can read; default: three of a tiny Llama.
        model, tokens: what it reads. Default: a tiny random Llama and packed text where the registration `needs` them, else nothing.
        tolerance: greatest relative difference (Frobenius) from a plain hook of ours, where a tiny model is read.
        only: names of the checks to run; None: all.
        workers: worker processes to use and to leave running, so that several components share one import of their library; None: own ones.
        stage: a tiny model and text to reuse between suites (`saehub.testing.stage.Stage(folder)`); None: new ones.
    """
    subject = resolve("extractor", component, with_, workers)
    needs = subject.registered.component.needs if subject.registered else ()
    with scratch() as folder:
        if model is None and "model" in needs:
            stage = stage or Stage(Path(folder))
            model, tokens = stage.model, stage.tokens()
        else:
            stage = None
        bench = Bench(subject, model, tokens, sites or SITES, stage)
        checks: list[tuple[str, Callable[[], str | None]]] = [
            *common_checks(subject),
            ("well-formed rows", lambda: _well_formed(bench)),
            ("batch i is a function of i", lambda: _pure(bench)),
            ("kept without running", lambda: _kept(bench)),
            ("one pass as each site alone", lambda: _one_pass(bench)),
            ("row order", lambda: _row_order(bench)),
            ("batch size changes no row", lambda: _batch_size(bench, tolerance)),
            ("rows belong to the caller", lambda: _no_alias(bench)),
            ("unknown sites refused", lambda: _unknown_site(bench)),
            ("surroundings untouched", lambda: _surroundings(bench)),
        ]
        if stage is not None:
            checks.append(("equals a plain hook", lambda: _plain_hook(bench, tolerance)))
        return run_checks("extractor", subject.name, checks, only, subject.close)


def as_tensors(rows: Rows) -> dict[str, Tensor]:
    """One batch as a flat table."""
    given = {"keep_N": rows.keep_N, "token_ids_N": rows.token_ids_N, "positions_N": rows.positions_N, "sequences_N": rows.sequences_N}
    return dict(rows.acts) | {name: tensor for name, tensor in given.items() if tensor is not None}


def _well_formed(bench: Bench) -> str:
    import torch

    session = bench.open()
    expect(session.n_batches >= 2, f"{session.n_batches} batches: give this suite data for at least two")
    expect(set(session.widths) == set(bench.sites), f"widths of {sorted(session.widths)}, asked for {sorted(bench.sites)}")
    total = 0
    for batch in range(session.n_batches):
        rows = session.rows(batch)
        n = len(rows.keep_N)
        total += n
        expect(rows.keep_N.dtype == torch.bool and rows.keep_N.dim() == 1, f"keep_N is {rows.keep_N.dtype} {list(rows.keep_N.shape)}")
        for site in bench.sites:
            acts = rows.acts[site]
            expect(list(acts.shape) == [n, session.widths[site]], f"{site}: {list(acts.shape)}, expected {[n, session.widths[site]]}")
            expect(acts.is_floating_point() and not acts.requires_grad, f"{site}: {acts.dtype}, requires_grad {acts.requires_grad}")
            expect(bool(torch.isfinite(acts).all()), f"{site}: not finite in batch {batch}")
        for name in ("token_ids_N", "positions_N", "sequences_N"):
            values = getattr(rows, name)
            expect(values is None or (values.dtype == torch.int64 and list(values.shape) == [n]), f"{name} is {values}")
    session.close()
    return f"{session.n_batches} batches, {total} rows, {', '.join(f'{site} {width}' for site, width in session.widths.items())}"


def _pure(bench: Bench) -> str:
    session = bench.open()
    last = session.n_batches - 1
    forward = [as_tensors(session.rows(batch)) for batch in range(last + 1)]
    again = as_tensors(session.rows(0))  # after all others, and out of order
    session.close()
    gap = difference(forward[0], again)
    expect(not gap, f"batch 0 read again: {gap}")
    with other_random_state(7):
        fresh = bench.open()
        gap = difference(forward[last], as_tensors(fresh.rows(last)))
        fresh.close()
    expect(not gap, f"batch {last} of a fresh session, first and alone: {gap}")
    return f"{last + 1} batches, out of order and in a fresh session"


def _kept(bench: Bench) -> str:
    session = bench.open()
    calls: list[int] = []
    hook = bench.model.hf.register_forward_pre_hook(lambda *_: calls.append(1)) if bench.model is not None else None
    counts = [session.kept(batch) for batch in range(session.n_batches)]
    if hook is not None:
        hook.remove()
    expect(not calls, "kept() runs the model")
    found = [int(session.rows(batch).keep_N.sum()) for batch in range(session.n_batches)]
    session.close()
    expect(counts == found, f"kept() says {counts}, rows() keeps {found}")
    return f"{sum(counts)} rows kept"


def _one_pass(bench: Bench) -> str:
    together = bench.all_rows()
    for site in bench.sites:
        for batch, (all_sites, alone) in enumerate(zip(together, bench.all_rows([site]), strict=True)):
            expect(list(alone.acts) == [site], f"asked for {site}, got {list(alone.acts)}")
            gap = difference({site: all_sites.acts[site]}, alone.acts)
            expect(not gap, f"batch {batch}: {gap}")
    return f"{len(bench.sites)} sites"


def _row_order(bench: Bench) -> str:
    import torch

    batches = bench.all_rows()
    if batches[0].sequences_N is None or batches[0].positions_N is None:
        return "rows without sequences"
    for number, rows in enumerate(batches):
        steps, moves = rows.sequences_N.diff(), rows.positions_N.diff()
        expect(bool((steps >= 0).all()), f"batch {number} is not in sequence order")
        expect(bool((moves[steps == 0] == 1).all()), f"batch {number}: positions within a sequence do not count up by one")
    sequences, positions = (torch.cat([getattr(rows, name) for rows in batches]) for name in ("sequences_N", "positions_N"))
    pairs = torch.stack([sequences, positions], 1)
    expect(len(pairs.unique(dim=0)) == len(pairs), "a position of a sequence is delivered twice")
    if bench.tokens is None:
        return f"{len(set(sequences.tolist()))} sequences"
    tokens, seen = bench.tokens, 0
    for rows in batches:
        ids, first = rows.token_ids_N, int(rows.sequences_N[0])
        count = len(ids) // tokens.context
        expect(torch.equal(ids, tokens.tokens(first, first + count).flatten()), f"token ids of sequences {first} … are not the dataset's")
        expect(torch.equal(rows.keep_N, tokens.keep(first, first + count).flatten()), f"keep_N of sequences {first} … is not the dataset's")
        seen += count
    expect(seen == tokens.n_sequences, f"{seen} of {tokens.n_sequences} sequences delivered")
    return f"{seen} sequences, ids and exclusions as in the dataset"


def _batch_size(bench: Bench, tolerance: float) -> str:
    small, large = bench.all_rows(), bench.all_rows(lm_batch=2 * LM_BATCH)
    worst = 0.0
    for site in bench.sites:
        a, b = (_aligned(batches, site) for batches in (small, large))
        expect(a.shape == b.shape, f"{site}: {len(a)} rows with lm_batch {LM_BATCH}, {len(b)} with {2 * LM_BATCH}")
        worst = max(worst, float((a - b).norm() / b.norm()))
    expect(worst <= tolerance, f"relative difference {worst:.2g} between lm_batch {LM_BATCH} and {2 * LM_BATCH}")
    return f"relative difference {worst:.1g}"


def _aligned(batches: list[Rows], site: str) -> Tensor:
    """float64 [rows, d] in an order that does not depend on how rows were grouped: by sequence and position, else by value."""
    import numpy as np
    import torch

    x_ND = torch.cat([rows.acts[site].detach().double() for rows in batches])
    if batches[0].sequences_N is not None and batches[0].positions_N is not None:
        keys = [torch.cat([getattr(rows, name) for rows in batches]).numpy() for name in ("positions_N", "sequences_N")]
    else:
        keys = list(x_ND.numpy().T[::-1])
    return x_ND[np.lexsort(keys)]


def _no_alias(bench: Bench) -> str:
    session = bench.open()
    rows = session.rows(0)
    kept = {name: tensor.clone() for name, tensor in as_tensors(rows).items()}
    for acts in rows.acts.values():
        acts.fill_(float("nan"))
    session.rows(1)
    gap = difference(kept, as_tensors(session.rows(0)))
    session.close()
    expect(not gap, f"a caller that overwrites its rows changes what comes next: {gap}")
    return ""


def _unknown_site(bench: Bench) -> str:
    return raises_cleanly(lambda: bench.open(["no_such_site.99"]), "a site that does not exist")


def _surroundings(bench: Bench) -> str:
    before = _model_state(bench.model)
    with world_unchanged():
        session = bench.open()
        session.rows(0)
        during = _model_state(bench.model)
        session.close()
    after = _model_state(bench.model)
    if bench.model is None:
        return "random states, gradient mode, dtype, threads, environment"
    expect(not difference(before[0], during[0]) and not difference(before[0], after[0]), "the model's parameters changed")
    expect(before[1] == after[1], f"hooks or modes left on the model after close(): {before[1]} became {after[1]}")
    return "the model's weights, hooks and mode; random states, gradient mode, dtype, threads, environment"


def _model_state(model: ModelHandle | None) -> tuple[dict[str, Tensor], tuple]:
    if model is None:
        return {}, ()
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.hf.modules())
    weights = {name: weight.detach().clone() for name, weight in model.hf.state_dict().items()}
    return weights, (hooks, model.hf.training, any(weight.requires_grad for weight in model.hf.parameters()))


def _plain_hook(bench: Bench, tolerance: float) -> str:
    rows = bench.all_rows()[0]
    first = int(rows.sequences_N[0])
    tokens_BT = bench.tokens.tokens(first, first + len(rows.keep_N) // bench.tokens.context)
    worst = 0.0
    for site in bench.sites:
        wanted = bench.stage.reference(site, tokens_BT).double()
        worst = max(worst, float((rows.acts[site].double() - wanted).norm() / wanted.norm()))
    expect(worst <= tolerance, f"relative difference {worst:.2g} from a plain hook (allowed {tolerance:g})")
    return f"relative difference {worst:.1g}"
