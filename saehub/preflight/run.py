"""A plan's context in; every check of its sites, its stream and its loaded SAEs out: `saehub doctor --recipe`, and what a run asks before it trains."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from saehub.errors import FormatError, SaehubError, StageFailed
from saehub.preflight.checks import Check, Sample, check_site, check_stream

if TYPE_CHECKING:
    from saehub.api import Rows
    from saehub.data.tokens import TokenDataset
    from saehub.pipeline.context import Context
    from saehub.pipeline.plan import Plan
    from saehub.preflight.order import Order

SEQUENCES = 16
"""Sequences looked at: enough for every check, a few forward passes of the model."""
FILE_BYTES = 128 << 20
"""Bytes of stored activations that are looked at."""


def preflight(context: Context, tokens: TokenDataset | None = None) -> list[Check]:
    """All checks. `tokens`: a dataset to read from (None: the run's own training text, else its first evaluation text)."""
    plan = context.plan
    sites = sites_of(plan)
    if tokens is None and plan.of("tokens"):
        first = next((stage for stage in plan.of("tokens") if plan.store.complete("tokens", stage.key)), None)
        tokens = context.tokens(first.spec["name"]) if first else None
    model = context.model if tokens is not None else None
    found: list[Check] = []
    if sites:
        try:
            sample = read(context, tokens, sites)
        except FormatError as error:  # files that cannot be trained on
            return [Check("activations", "failed", " — ".join(filter(None, (error.what, error.why))), error.fix)]
        for site in sites:
            found += check_site(site, sample, model)
        found += check_stream(sample, model)
    if model is not None and tokens is not None:
        found += _loaded(context, tokens)
    return found


def sites_of(plan: Plan) -> list[str]:
    """The sites that are trained on; those of the recipe where nothing is trained and nothing was loaded."""
    jobs = [stage.spec["job"] for stage in plan.of("train")]
    return list(dict.fromkeys(site for job in jobs for site in (job.site, job.target_site) if site))


def read(context: Context, tokens: TokenDataset | None, sites: list[str]) -> Sample:
    """The first language-model batch, at most `SEQUENCES` sequences of it; of files, which cost no model, `FILE_BYTES` of rows from all over them."""
    import torch

    from saehub.api import Rows

    plan, extract = context.plan, context.plan.recipe.extract
    session = context.open_extractor(tokens, sites)
    try:
        rows = session.rows(0) if tokens is not None else _many(session)
        total = sum(session.kept(batch) for batch in range(session.n_batches)) if tokens is None else None
    finally:
        session.close()
    width = tokens.context if tokens is not None else None
    n = min(len(rows.keep_N), SEQUENCES * width) if width else len(rows.keep_N)
    cut: Any = lambda column: None if column is None else column[:n]  # noqa: E731
    rows = Rows({site: acts[:n] for site, acts in rows.acts.items()}, rows.keep_N[:n], cut(rows.token_ids_N), cut(rows.positions_N), cut(rows.sequences_N))
    train = plan.recipe.data.train if plan.recipe.data else None
    settings = {
        "dtype": extract.dtype, "normalize": extract.normalize, "block": extract.block, "lm_batch": extract.lm_batch, "context": width,
        "batch": max((stage.spec["job"].batch for stage in plan.of("train")), default=None), "exclude": list(train.exclude) if train else [], "of": total,
    }  # fmt: skip
    tokens_BT = rows.token_ids_N.view(-1, width).to(torch.int64) if width and rows.token_ids_N is not None else None
    return Sample(rows, tokens_BT, settings, _order(plan, tokens, settings))


def _many(session: Any) -> Rows:
    """Rows of the first batches of a session over files, whose order is a random one."""
    import torch

    from saehub.api import Rows

    first = session.rows(0)
    one = sum(acts.numel() * acts.element_size() for acts in first.acts.values())
    parts = [first, *(session.rows(batch) for batch in range(1, min(session.n_batches, FILE_BYTES // max(one, 1))))]

    def join(columns: list[Any]) -> Any:
        return None if columns[0] is None else torch.cat(columns)

    acts = {site: torch.cat([part.acts[site] for part in parts]) for site in first.acts}
    names = ("keep_N", "token_ids_N", "positions_N", "sequences_N")
    return Rows(acts, *(join([getattr(part, name) for part in parts]) for name in names))


def _order(plan: Plan, tokens: TokenDataset | None, settings: dict[str, Any]) -> Order | None:
    """The order of the stream that this plan gives its trainers."""
    from saehub.preflight.order import first_block
    from saehub.seeds import derive

    if tokens is None or not plan.of("train"):
        return None
    batches, seed = plan.totals["batches_per_block"], derive("stream", plan.recipe.seed)
    return first_block(tokens, seed=seed, lm_batch=settings["lm_batch"], batches_per_block=batches, rows=plan.totals["rows"], batch=settings["batch"] or 1)


def _loaded(context: Context, tokens: TokenDataset) -> list[Check]:
    """The site scan of every SAE that the recipe loads."""
    from saehub.checkpoint.load import load
    from saehub.preflight.scan import scan

    found = []
    n = min(SEQUENCES, tokens.n_sequences)
    tokens_BT, keep_BT = tokens.tokens(0, n), tokens.keep(0, n)
    for stage in context.plan.of("load"):
        name = stage.spec["id"]
        try:
            sae = load(stage.spec["load"])
            site = stage.spec["site"] or sae.provenance.get("site")
            if site:
                found.append(scan(name, sae, site, tokens_BT, keep_BT, context.model))
        except SaehubError as error:
            found.append(Check(f"{name}: site", "warning", f"could not be scanned: {error.what}", error.fix))
    return found


def before_work(context: Context) -> None:
    """Ask everything once, tell what is not in order, and stop the run where a check failed."""
    found = preflight(context)
    context.facts["preflight"] = [asdict(check) for check in found]
    for check in found:
        if check.status in ("warning", "failed"):
            context.events("warning", None, text=f"preflight: {check.name}: {check.detail}" + (f" (fix: {check.fix})" if check.fix else ""))
    failed = [check for check in found if check.status == "failed"]
    if failed:
        raise StageFailed(
            f"preflight: {failed[0].name} failed" + (f", and {len(failed) - 1} more" if len(failed) > 1 else ""),
            where="before any work", why=failed[0].detail, fix=failed[0].fix or "saehub doctor --recipe R",
        )  # fmt: skip
    asked = [check for check in found if check.status == "ok"]
    if asked:
        context.events("log", None, text=f"preflight: {len(asked)} check{'s' if len(asked) > 1 else ''} in order")


def for_recipe(plan: Plan) -> list[Check]:
    """The checks of a recipe that was not run yet: a small sample of its text is packed in a temporary folder."""
    from saehub.data.tokens import TokenPolicy, build
    from saehub.pipeline.context import Context
    from saehub.pipeline.events import Events

    context = Context(plan, Events())
    try:
        stage = next(iter(plan.of("tokens")), None)
        if stage is None:
            return preflight(context)
        policy = TokenPolicy(**{**stage.spec["policy"], "exclude": tuple(stage.spec["policy"]["exclude"])})
        with TemporaryDirectory(prefix="saehub-preflight-") as folder:
            rows = min(stage.spec["rows"], max(SEQUENCES * policy.context, plan.recipe.extract.block))  # the order of a block is that of a whole one
            mix = [(entry, entry.weight) for entry in stage.spec["mix"]]
            tokens = build(mix, plan.model, policy, Path(folder) / "tokens", rows=rows, calibration=0, seed=stage.spec["seed"], repeat=stage.spec["repeat"])
            return preflight(context, tokens)
    finally:
        context.close()
