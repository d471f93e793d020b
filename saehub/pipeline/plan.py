"""A checked recipe in; stages with content keys, sizes and cache state out. Pure, and torch is never imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saehub.api import Job, ModelShape, ModelSpec, owns_its_loop
from saehub.errors import RecipeError, SaehubError
from saehub.pipeline import estimate, keys, passes
from saehub.pipeline.cautions import OWN_LOOP, cautions_of, grouped
from saehub.pipeline.pairs import refusals
from saehub.pipeline.workspace import Store, free_bytes, home
from saehub.plugins import Catalog, Registered
from saehub.seeds import derive

if TYPE_CHECKING:
    from saehub.recipe.schema import Recipe


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    id: str
    """Such as `train/native-k32`."""
    kind: str
    """tokens, activations, load, train, evaluate or export."""
    key: str
    """Content key: equal keys, equal results."""
    where: Path
    """Folder in the store."""
    component: str | None = None
    """Address of the component that does it."""
    inputs: tuple[str, ...] = ()
    """Ids of the stages it needs."""
    cached: bool = False
    """Finished before."""
    partial: bool = False
    """Half done: it will go on from its last state."""
    detail: dict[str, Any] = field(default_factory=dict)
    """Numbers for people: rows, steps, bytes, widths."""
    spec: dict[str, Any] = field(default_factory=dict)
    """What its executor needs."""
    missing: tuple[str, ...] = ()
    """Libraries that are not installed."""


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do."""

    recipe: Recipe
    catalog: Catalog
    base: Path
    run_dir: Path
    stages: tuple[Stage, ...]
    model: ModelSpec | None
    shape: ModelShape | None
    fingerprint: str | None
    warnings: tuple[str, ...] = ()
    totals: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None
    """The run folder that was asked for."""

    @property
    def store(self) -> Store:
        """The store its stages live in."""
        return Store(self.base)

    def of(self, kind: str) -> list[Stage]:
        """The stages of one kind."""
        return [stage for stage in self.stages if stage.kind == kind]

    def stage(self, stage_id: str) -> Stage:
        """The stage with that id."""
        return next(stage for stage in self.stages if stage.id == stage_id)

    def to_json(self) -> dict:
        """For `--json`."""
        shown = ("id", "kind", "key", "component", "inputs", "cached", "partial", "detail", "missing")
        return {
            "schema": 1,
            "recipe": self.recipe.name,
            "run_dir": str(self.run_dir),
            "model": asdict(self.model) if self.model else None,
            "model_fingerprint": self.fingerprint,
            "stages": [{**{name: getattr(stage, name) for name in shown}, "where": str(stage.where)} for stage in self.stages],
            "totals": {name: value for name, value in self.totals.items() if name != "stream"},
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class PlanProblem:
    """A recipe that reads well but cannot be done, and where it says so."""

    path: str
    message: str
    fix: str | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" + (f"\n    fix: {self.fix}" if self.fix else "")


def make_plan(
    recipe: Recipe,
    catalog: Catalog,
    *,
    base: Path | None = None,
    out: Path | None = None,
    strict_cache: bool = False,
    locate: Callable[[str, str, str | None], Any] = PlanProblem,
    contents: bool = True,
) -> Plan:
    """Plan `recipe`; raises RecipeError with every problem found.

    `strict_cache`: results made with other library versions are misses. `locate` (`saehub.recipe.locator`) gives problems their place in
    the file. `contents=False` reads no model, text or checkpoint, for the problems alone: the keys of such a plan mean nothing.
    """
    from saehub.recipe import expand_sweeps

    return _Planner(expand_sweeps(recipe), catalog, Path(base).absolute() if base else home(), out, strict_cache, locate, contents).plan()


def _policy(train: Any) -> dict[str, Any]:
    """How text becomes tokens; evaluation-only recipes get the defaults of TrainData."""
    if train is None:
        from saehub.recipe.schema import TrainData

        train = TrainData(tokens=1)
    return {"context": train.context, "bos": train.bos, "exclude": list(train.exclude), "template": train.template}


class _Planner:
    def __init__(self, recipe: Recipe, catalog: Catalog, base: Path, out: Path | None, strict_cache: bool, locate: Any, contents: bool):
        self.locate = locate
        self.tree_hash = keys.tree_hash if contents else str
        self.source_identity = keys.source_identity if contents else asdict
        self.contents = contents
        self.recipe, self.catalog, self.base, self.out = recipe, catalog, base, out
        self.store = Store(base)
        self.strict_cache = strict_cache
        self.problems: list[Any] = []
        self.warnings: list[str] = []
        self.stages: list[Stage] = []

    def plan(self) -> Plan:
        recipe = self.recipe
        extractor, extract_config = self._component("extractor", recipe.extract.uses, recipe.extract.with_, "extract")
        self.needs_text = extractor is None or "tokens" in extractor.component.needs
        self.model, self.shape, self.fingerprint = self._model(extractor)
        if not self.problems:
            self.files = extract_config.describe() if extractor and not self.needs_text else None
            self.widths = self._widths(extract_config)
            self._tokens()
            self.stream = self._stream(extractor, extract_config)
            subjects = [*self._train(), *self._loads()]
            self._evaluate(subjects)
            self._export(subjects)
            if not recipe.train and not recipe.saes:
                self._problem("train", "nothing to do: the recipe neither trains SAEs nor loads any", "add a train entry, or saes: [{id: …, load: PATH}]")
        if self.problems:
            raise RecipeError(
                f"{len(self.problems)} problem{'s' if len(self.problems) > 1 else ''} in the plan of {recipe.name}",
                self.problems,
                fix="edit the recipe (or what --set says), then plan it again",
            )
        totals = self._totals()
        run_key = keys.stage_key("run", name=recipe.name, stages=[stage.key for stage in self.stages])
        run_dir = Path(self.out).absolute() if self.out else self.base / "runs" / f"{recipe.name}-{run_key[:8]}"
        return Plan(
            recipe, self.catalog, self.base, run_dir, tuple(self.stages), self.model, self.shape, self.fingerprint, tuple(self.warnings), totals, self.out
        )

    # What the recipe is about

    def _problem(self, path: str, message: str, fix: str | None = None) -> None:
        self.problems.append(self.locate(path, message, fix))

    def _caught(self, path: str, error: SaehubError) -> None:
        self._problem(path, " — ".join(part for part in (error.what, error.why) if part), error.fix)

    def _component(self, kind: str, name: str, with_: dict, path: str) -> tuple[Registered | None, Any]:
        from saehub.recipe.check import make_config

        try:
            registered = self.catalog.find(kind, name)
            return registered, make_config(registered, with_)
        except SaehubError as error:
            self._caught(path, error)
            return None, None

    def _model(self, extractor: Registered | None) -> tuple[ModelSpec | None, ModelShape | None, str | None]:
        from saehub.data.model import fingerprint, read_shape

        entry = self.recipe.model
        if entry is None:
            if extractor and "model" in extractor.component.needs:
                self._problem("model", f"{extractor.address} needs a model", "model: {name: builtin/tiny-llama}")
            return None, None, None
        spec = entry.spec()
        try:
            shape = read_shape(entry.name, entry.revision, entry.shape)
        except SaehubError as error:
            self._caught("model.name", error)
            return spec, None, None
        try:
            found = fingerprint(spec) if self.contents else "not read"
        except SaehubError as error:
            self._caught("model", error)
            return spec, shape, None
        if "@?" in found:  # planned from a declared shape: the hub is only needed at run
            self.warnings.append(f"{entry.name} is not on this machine: sizes are those that model.shape declares, and running fetches it from the hub")
        return spec, shape, found

    def _widths(self, config: Any) -> dict[str, int]:
        from saehub.sites import Site

        widths: dict[str, int] = {}
        for index, name in enumerate(self.recipe.extract.sites):
            try:
                if self.files is not None:
                    widths[name] = self.files["widths"][name]
                else:
                    site = Site.parse(name)
                    widths[str(site)] = site.width(self.shape) or self._module_width(site)
                if reason := config.refusal(str(site), self.shape) if self.files is None and hasattr(config, "refusal") else None:
                    self._problem(f"extract.sites.{index}", reason)
            except SaehubError as error:
                self._caught(f"extract.sites.{index}", error)
            except KeyError:
                self._problem(f"extract.sites.{index}", f"the files hold no site {name!r}", f"there are: {', '.join(self.files['widths'])}")
        return widths

    def _module_width(self, site: Any) -> int:
        from saehub.activations.widths import site_width  # the one thing in a plan that needs torch: a module outside the tables

        return site_width(self.recipe.model.spec(), site, self.shape)

    # Tokens

    def _tokens(self) -> None:
        from saehub.data.model import has_chat_template

        data = self.recipe.data
        if not self.needs_text:
            return
        self.policy = _policy(data.train)
        if data.train is None and self.recipe.train:
            self._problem("data.train", "training needs text", "data: {train: {source: builtin/python-docs, tokens: 1_000_000}}")
            return
        train = data.train
        if self.shape and self.policy["context"] > self.shape.context:
            self._problem(
                "data.train.context",
                f"{self.policy['context']} is longer than the {self.shape.context} tokens that {self.recipe.model.name} accepts",
                f"context: {self.shape.context}, or less",
            )
        if self.policy["template"] == "chat" and self.contents and self.model and has_chat_template(self.model) is False:
            self._problem("data.train.template", f"the tokenizer of {self.model.name} has no chat template", "an instruct model, or no template")
        calibration = self.recipe.extract.calibration
        if self.recipe.train:
            self._token_stage("train", train.mix, train.tokens, calibration, train.repeat, {"share": [entry.weight for entry in train.mix]})
        for name, entry in data.eval.items():
            self._token_stage(name, entry.mix, entry.tokens, 0, False, {})

    def _token_stage(self, name: str, mix: Iterable[Any], rows: int, calibration: int, repeat: bool, detail: dict) -> None:
        mix = tuple(mix)
        spec = {
            "name": name,
            "mix": mix,
            "policy": self.policy,
            "rows": rows,
            "calibration": calibration,
            "repeat": repeat,
            # Text to evaluate on is the same whatever the seed, so that runs over seeds are compared on the same sequences.
            "seed": derive("tokens", name, self.recipe.seed if name == "train" else 0),
        }
        key = keys.stage_key("tokens", **{**spec, "mix": [self.source_identity(entry) for entry in mix]}, tokenizer=self.fingerprint)
        text = " + ".join(f"{entry.source} ({entry.split})" for entry in mix)
        self._add(Stage(f"tokens/{name}", "tokens", key, Path(), spec=spec, detail={"source": text, "rows": rows, **detail}))

    # The stream and what is trained on it

    def _stream(self, extractor: Registered | None, config: Any) -> dict:
        extract, train = self.recipe.extract, self.recipe.data.train if self.recipe.data else None
        context = train.context if train else 1
        text = {stage.spec["name"]: stage.key for stage in self.stages}
        identity = {
            "extractor": keys.component_identity(extractor, config) if extractor else None,
            "model": self.fingerprint,
            "model_dtype": self.model.dtype if self.model else None,
            "attention": self.model.attention if self.model else None,
            "weight_processing": "none",
            "tokens": text.get("train"),
            "files": self.files["hash"] if self.files else None,
            "dtype": extract.dtype,
            "normalize": extract.normalize,
            "lm_batch": extract.lm_batch,
            "block": extract.block,
            "calibration": extract.calibration,
            "seed": derive("stream", self.recipe.seed),
        }
        reserved = -(-extract.calibration // extract.lm_batch) * extract.lm_batch  # calibration takes whole batches
        rows = train.tokens if train else (self.files["rows"] - reserved if self.files else 0)
        if self.recipe.train and rows <= 0 and self.files:
            self._problem("extract.calibration", f"{extract.calibration} calibration rows leave none of {self.files['rows']} to train on", "a smaller calibration")
        return {
            "identity": identity,
            "rows": rows,
            "batches_per_block": max(1, extract.block // (extract.lm_batch * context)),
            "extractor": extractor.address if extractor else None,
            "config": config,
            "repeat": bool(train and train.repeat),
        }

    def _train(self) -> list[Stage]:
        made = []
        for entry, site in self._each_site():
            path = f"train.{entry.id}"
            registered, config = self._component("trainer", entry.uses, entry.with_, path)
            target = self._canonical(entry.target_site)
            absent = [name for name in (site, target) if name is not None and name not in self.widths]
            if absent and set(map(self._canonical, self.recipe.extract.sites)) <= set(self.widths):  # else that was said already
                self._problem(f"{path}.site", f"{absent[0]} is not extracted", f"extract.sites: [{', '.join([*self.widths, absent[0]])}]")
            if registered is None or absent:
                continue
            batch, rows = int(getattr(config, "batch", 4096)), self.stream["rows"]
            if (wrong := batch < 1):
                self._problem(f"{path}.with.batch", f"batch is {batch}; it must be at least 1")
                batch = 1
            seed = self.recipe.seed if entry.seed is None else entry.seed
            job = Job(
                entry.id if entry.site or len(self.widths) == 1 else f"{entry.id}@{site}",
                site,
                target,
                self.widths[site],
                self.widths[target or site],
                rows // batch,
                batch,
                rows,
                seed,
                self.recipe.extract.calibration,
                init_from=entry.init_from,
                normalize=self.recipe.extract.normalize,
            )
            if job.steps < 1:
                self._problem(f"{path}.with.batch", f"one batch of {batch} rows is more than the {rows} rows of the stream", "fewer rows a batch, or more data.train.tokens")
                continue
            for problem in self._problems_of(registered, config, job):
                knob = str(problem).split()[0].rstrip(":")  # `k is 99, …`: the problem belongs to that setting
                if wrong and knob == "batch":
                    continue
                self._problem(f"{path}.with.{knob}" if hasattr(config, knob) else f"{path}.with", str(problem))
            made.append(self._train_stage(registered, config, job, entry))
        self.warnings += grouped({stage.id.partition("/")[2]: stage.spec["cautions"] for stage in made})
        made.sort(key=lambda stage: stage.spec["own_loop"])  # those that share the stream first
        self.stages += made
        return made

    def _problems_of(self, registered: Registered, config: Any, job: Job) -> Iterator[str]:
        """What a trainer's config says against a job."""
        yield from config.check(job) if hasattr(config, "check") else ()
        if not owns_its_loop(registered.component):
            return
        if not self.needs_text or self.shape is None:
            yield f"{registered.address} runs the language model, which {self.stream['extractor']} does not; extract: {{uses: native/hf, …}} and a model"
        elif hasattr(config, "check_model"):
            yield from config.check_model(job, self.shape, self.policy["context"])

    def _each_site(self) -> Iterator[tuple[Any, str]]:
        """Each entry with its site: one SAE for every extracted site where it names none, with ids `id@site`."""
        for entry in self.recipe.train:
            for site in [self._canonical(entry.site)] if entry.site else list(self.widths):
                yield entry, site

    def _canonical(self, name: str | None) -> str | None:
        if name is None or self.files is not None:
            return name
        from saehub.sites import Site

        return str(Site.parse(name))

    def _train_stage(self, registered: Registered, config: Any, job: Job, entry: Any) -> Stage:
        plain_job = {name: value for name, value in asdict(job).items() if name not in ("device", "init_from", "normalize")}
        key = keys.stage_key(
            "train",
            component=keys.component_identity(registered, config),
            job=plain_job,
            stream=self.stream["identity"],
            init_from=self.tree_hash(Path(job.init_from)) if job.init_from else None,
        )
        d_sae = int(config.d_sae(job)) if hasattr(config, "d_sae") and not self.problems else 0
        detail = {"site": job.site, "rows": job.rows, "steps": job.steps, "batch": job.batch, "d_in": job.d_in, "d_sae": d_sae}
        detail["memory"] = int(config.memory(job)) if hasattr(config, "memory") and not self.problems else estimate.sae_bytes(job, d_sae)
        if job.target_site:
            detail["target_site"] = job.target_site
        inputs = ("tokens/train",) if self.needs_text else ()
        own_loop = owns_its_loop(registered.component)
        cautions = () if self.problems else (*cautions_of(config, job), *([OWN_LOOP] if own_loop else []))
        spec = {"job": job, "config": config, "cautions": cautions, "own_loop": own_loop}
        if own_loop:
            detail["loop"] = "its own"
        stage = Stage(f"train/{job.id}", "train", key, Path(), registered.address, inputs, detail=detail, spec=spec)
        return self._locate(stage, registered)

    def _loads(self) -> list[Stage]:
        made = []
        for entry in self.recipe.saes:
            identity: Any = entry.load
            if not str(entry.load).startswith("hf://"):
                if not Path(entry.load).exists():
                    self._problem(f"saes.{entry.id}.load", f"{entry.load} does not exist", "a checkpoint folder, or hf://org/repo/folder")
                    continue
                identity = self.tree_hash(Path(entry.load))
            key = keys.stage_key("load", source=identity, site=entry.site)
            spec = {"load": entry.load, "site": entry.site, "id": entry.id}
            made.append(self._locate(Stage(f"load/{entry.id}", "load", key, Path(), spec=spec, detail={"from": entry.load, "site": entry.site})))
        self.stages += made
        return made

    # What is done with the SAEs

    def _chosen(self, entry: Any, subjects: list[Stage]) -> list[Stage]:
        if entry.saes is None:
            return subjects
        return [stage for stage in subjects if {(name := stage.id.partition("/")[2]), name.partition("@")[0]} & set(entry.saes)]

    def _evaluate(self, subjects: list[Stage]) -> None:
        text = {stage.spec["name"]: stage.key for stage in self.stages if stage.kind == "tokens" and stage.spec["name"] != "train"}
        found = [(index, entry, *self._component("evaluator", entry.uses, entry.with_, f"evaluate.{entry.id or entry.uses}")) for index, entry in enumerate(self.recipe.evaluate)]
        # An evaluator that judges measurements comes after those that make them, wherever the recipe lists it.
        for index, entry, registered, config in sorted(found, key=lambda item: item[2] is not None and "measurements" in item[2].component.needs):
            if registered is None:
                continue
            needs = set(registered.component.needs)
            if needs & {"model", "tokens", "sequences"} and not self.needs_text:
                self._problem(
                    f"evaluate.{entry.id or entry.uses}",
                    f"{registered.address} needs {', '.join(sorted(needs))}, which {self.stream['extractor']} does not give",
                    "extract: {uses: native/hf, …}, or evaluators that need activations only",
                )
                continue
            if needs & {"tokens", "sequences"} and not text:
                self._problem(f"evaluate.{entry.id or entry.uses}", f"{registered.address} needs a dataset", "data.eval: {in_sample: {source: …}}")
                continue
            chosen = self._chosen(entry, subjects)
            if "several_saes" in needs and len(chosen) < 2:
                self._problem(f"evaluate.{entry.id or entry.uses}", f"{registered.address} compares SAEs and got {len(chosen)}", "train or load another one")
                continue
            self.warnings += refusals(registered.address, needs, config, chosen)
            name = entry.id or registered.address
            groups = [chosen] if "several_saes" in needs else [[stage] for stage in chosen]
            self.warnings += map(str, config.warnings() if chosen and hasattr(config, "warnings") else ())
            made = []
            for group in groups:
                suffix = "" if "several_saes" in needs else "/" + group[0].id.partition("/")[2]
                measured = self._measured_about(group) if "measurements" in needs else []
                if "measurements" in needs and not measured:
                    reads = ", ".join(f"{{uses: {address}}}" for address in getattr(config, "reads", {}))
                    fix = f"add {reads} to evaluate" if reads else "add an evaluator that measures"
                    self.warnings.append(f"{registered.address} judges what others measured, and nothing measures {group[0].id.partition('/')[2]}: {fix}")
                key = keys.stage_key(
                    "evaluate",
                    component=keys.component_identity(registered, config),
                    subjects=[stage.key for stage in group],
                    ids=[stage.id.partition("/")[2] for stage in group],
                    datasets=text,
                    model=self.fingerprint,
                    model_dtype=self.model.dtype if self.model else None,
                    attention=self.model.attention if self.model else None,
                    lm_batch=self.recipe.extract.lm_batch,
                    seed=derive("evaluate", name, self.recipe.seed),
                    **({"measured": [stage.key for stage in measured]} if measured else {}),
                )
                inputs = (*(f"tokens/{dataset}" for dataset in text), *(stage.id for stage in [*group, *measured]))
                spec = {"config": config, "subjects": [stage.id for stage in group], "seed": derive("evaluate", name, self.recipe.seed), "entry": index}
                stage = Stage(f"evaluate/{name}{suffix}", "evaluate", key, Path(), registered.address, inputs, spec=spec, detail={"datasets": list(text)})
                made.append(self._locate(stage, registered))
            self.stages += made
            if self.contents and hasattr(config, "lacking") and not all(stage.cached for stage in made):
                self._lacking(f"evaluate.{entry.id or entry.uses}", registered.address, config)

    def _lacking(self, path: str, address: str, config: Any) -> None:
        """What this machine lacks to run an evaluator; where the model itself is not here, it will run elsewhere, and that is a warning."""
        for setting, what, fix in config.lacking(self.model, self.shape):
            if "@?" in (self.fingerprint or ""):
                self.warnings.append(f"{address}: {what}; where it runs: {fix}")
            else:
                self._problem(f"{path}.with.{setting}" if setting in getattr(self._entry(path), "with_", {}) else path, f"{address}: {what}", fix)

    def _entry(self, path: str) -> Any:
        return next((entry for entry in self.recipe.evaluate if path == f"evaluate.{entry.id or entry.uses}"), None)

    def _measured_about(self, group: list[Stage]) -> list[Stage]:
        """The evaluations planned so far that measure an SAE of `group`."""
        ids = {stage.id for stage in group}
        return [stage for stage in self.of("evaluate") if ids & set(stage.spec["subjects"])]

    def _export(self, subjects: list[Stage]) -> None:
        for entry in self.recipe.export:
            registered, config = self._component("exporter", entry.uses, entry.with_, f"export.{entry.id or entry.uses}")
            if registered is None:
                continue
            for stage in self._chosen(entry, subjects):
                sae_id = stage.id.partition("/")[2]
                key = keys.stage_key("export", component=keys.component_identity(registered, config), subject=stage.key)
                spec = {"config": config, "subject": stage.id}
                made = Stage(f"export/{entry.id or registered.name}/{sae_id}", "export", key, Path(), registered.address, (stage.id,), spec=spec)
                self.stages.append(self._locate(made, registered))

    # Cache state and totals

    def _add(self, stage: Stage) -> None:
        self.stages.append(self._locate(stage))

    def _locate(self, stage: Stage, registered: Registered | None = None) -> Stage:
        cached = self.store.complete(stage.kind, stage.key)
        if cached and self.strict_cache:
            from saehub.pipeline.environment import same_place

            cached = same_place(self.store.manifest(stage.kind, stage.key).get("environment", {}))
        states = sorted(self.store.state_path(stage.key).glob("step-*")) if stage.kind == "train" and not cached else []
        if states:
            stage.detail["resume_step"] = int(states[-1].name.removeprefix("step-"))
        missing = tuple(self.catalog.missing(registered)) if registered else ()
        return replace(stage, where=self.store.path(stage.kind, stage.key), cached=cached, partial=bool(states), missing=missing)

    def _totals(self) -> dict[str, Any]:
        extract, rows = self.recipe.extract, self.stream["rows"]
        per_token = sum(self.widths.values()) * estimate.BYTES[extract.dtype]
        trains = self.of("train")
        streams = any(not stage.spec["own_loop"] for stage in trains)
        total = per_token * rows
        totals = {
            "bytes_per_token": per_token,
            "activation_bytes": total if streams else 0,
            "block_memory": estimate.block_bytes(extract.block, list(self.widths.values()), extract.dtype),
            "model_memory": estimate.model_bytes(self.shape, self.model.dtype) if self.shape and self.model else 0,
            "disk_free": free_bytes(self.base),
        }
        totals |= {"rows": rows, "batches_per_block": self.stream["batches_per_block"], "repeat": self.stream["repeat"], "stream": self.stream["identity"]}
        totals |= (found := passes.totals(trains, self.model.device if self.model else "auto", totals))
        self.warnings += passes.warnings(trains, found)
        totals["store"] = self._store_choice(total, totals["disk_free"]) if streams else "none"
        totals["peak_memory"] = totals["train_memory"] + totals["block_memory"] + totals["model_memory"]
        return totals

    def of(self, kind: str) -> list[Stage]:
        return [stage for stage in self.stages if stage.kind == kind]

    def _store_choice(self, total: int, free: int) -> str:
        """`auto` keeps blocks on disk while the run lasts if they fit `store_limit` and half of the free disk; else nothing is stored."""
        extract = self.recipe.extract
        fits = total <= free / 2
        if extract.store == "disk" and not fits:
            raise RecipeError(
                f"extract.store: disk would write {estimate.human(total)}, more than half of the {estimate.human(free)} free at {self.base}",
                fix="store: none, fewer data.train.tokens, dtype: bfloat16, or export SAEHUB_HOME=/path/with/space",
            )
        if extract.store != "auto":
            return extract.store
        return "spool" if fits and total <= int(extract.store_limit) else "none"
