"""A recipe's tree in; what its types cannot say out: components, settings, ids, sites and sweeps that do not fit together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saehub.errors import UsageError, did_you_mean
from saehub.recipe.components import check_config, config_class
from saehub.recipe.expand import ENTRY_KEYS, MAX_MEMBERS, combinations
from saehub.recipe.places import Places
from saehub.recipe.schema import Extract
from saehub.recipe.tree import Node, Problem, join, plain
from saehub.recipe.typed import keys_of

if TYPE_CHECKING:
    from saehub.plugins import Catalog, Registered

class Rules(Places):
    """All rules over one tree."""

    def __init__(self, root: Node, catalog: Catalog):
        super().__init__(root)
        self.catalog, self.names_sites = catalog, True

    def run(self) -> list[Problem]:
        """Every problem found; sites and sizes are written back into the tree in their canonical form."""
        extractor = self.extractor()
        self.names_sites = extractor is None or "tokens" in extractor.component.needs
        sites = self.sites()
        ids = self.ids(sites)
        trained = [self.trainer(entry, sites) for entry in self.entries("train")]
        evaluators = [self.user("evaluator", entry, ids) for entry in self.entries("evaluate")]
        for entry in self.entries("export"):
            self.user("exporter", entry, ids)
        for section in ("evaluate", "export"):
            self.unique([entry.get("id") for entry in self.entries(section)])
        self.anonymous()
        for entry in self.entries("saes"):
            self.checkpoint(entry.get("load"))
            self.site_text(entry.get("site"))
        self.completeness(extractor, trained, evaluators, sites)
        self.places()
        return self.problems

    # --- names -------------------------------------------------------------------------------------------------------------

    def unique(self, nodes: list[Node | None]) -> dict[str, Node]:
        """Ids that are valid; a second use of one is reported."""
        seen: dict[str, Node] = {}
        for node in nodes:
            if node is None or not isinstance(node.data, str):
                continue
            self.name(node)
            if node.data in seen:
                first = seen[node.data].mark
                self.report(node, f"the id {node.data!r} stands here a second time", f"the first is in {first.file}, line {first.line}" if first.line else None)
            else:
                seen[node.data] = node
        return seen

    def anonymous(self) -> None:
        """Two evaluations by one component need names to be told apart."""
        seen: set[str] = set()
        for entry in self.entries("evaluate"):
            uses = entry.text("uses")
            if uses is not None and entry.get("id") is None:
                if uses in seen:
                    self.report(entry.get("uses"), f"{uses} evaluates twice", "give this entry an 'id:'")
                seen.add(uses)

    def ids(self, sites: list[str]) -> set[str]:
        """Every id that a `saes:` filter may name: written ones, members of sweeps, one per site."""
        written = self.unique([entry.get("id") for section in ("train", "saes") for entry in self.entries(section)])
        known = set(written)
        for entry in self.entries("train"):
            name, sweep = entry.text("id"), self.sweep(entry, quiet=True)
            if name is None or written[name] is not entry.get("id"):  # a repeated id is reported already
                continue
            made = [name + suffix for suffix, _ in combinations(sweep)] if sweep else [name]
            swept_sites = sweep is not None and "site" in sweep
            if entry.get("site") is None and not swept_sites and len(sites) > 1:
                made += [f"{member}@{site}" for member in made for site in sites]
            for member in made:
                if member != name and member in known:
                    self.report(entry.get("id"), f"a member of this entry is called {member!r}, like another entry", "rename one of them")
            known.update(made)
        return known

    # --- sites -------------------------------------------------------------------------------------------------------------

    def site_text(self, node: Node | None) -> str | None:
        """The canonical form of a site, written back into the tree; an extractor of files has names of its own."""
        if node is None or not isinstance(node.data, str):
            return None
        if not self.names_sites:
            return node.data
        from saehub.sites import Site

        try:
            node.data = str(Site.parse(node.data))
        except UsageError as error:
            self.blame(node, error)
            return None
        return node.data

    def sites(self) -> list[str]:
        extract = self.root.get("extract")
        listed = extract.get("sites") if extract is not None else None
        found: list[str] = []
        for node in listed.items() if listed is not None else ():
            site = self.site_text(node)
            if site is not None and site in found:
                self.report(node, f"the site {site!r} stands here a second time")
            elif site is not None:
                found.append(site)
        return found

    def listed(self, node: Node | None, sites: list[str]) -> None:
        site = self.site_text(node)
        if site is not None and sites and site not in sites:
            self.report(node, f"{site!r} is not among extract.sites{did_you_mean(site, sites)}", f"extracted: {', '.join(sites)}")

    # --- components --------------------------------------------------------------------------------------------------------

    def component(self, kind: str, uses: Node | None) -> Registered | None:
        if uses is None or not isinstance(uses.data, str):
            return None
        try:
            found = self.catalog.find(kind, uses.data)
        except UsageError as error:
            self.blame(uses, error)
            return None
        missing = self.catalog.missing(found)
        if missing:
            extra = found.component.extra
            package = f"'{found.distribution}[{extra}]'" if extra else " ".join(missing)
            verb = "is" if len(missing) == 1 else "are"
            self.report(uses, f"{found.address} needs {', '.join(missing)}, which {verb} not installed", f"pip install {package}", "missing")
        return found

    def settings(self, entry: Node) -> Node:
        """The node under `with`; where there is none, an empty map at the entry."""
        node = entry.get("with")
        return node if node is not None else Node({}, entry.mark, path=join(entry.path, "with"))

    def extractor(self) -> Registered | None:
        extract = self.root.get("extract")
        if extract is not None and not extract.is_map:
            return None
        extract = extract or Node({}, self.root.mark, path="extract")
        uses = extract.get("uses") or Node(Extract.uses, extract.mark, path="extract.uses")
        found = self.component("extractor", uses)
        if found is not None:
            check_config(found, found.address, self.settings(extract), self.problems, uses)
        return found

    def trainer(self, entry: Node, sites: list[str]) -> Registered | None:
        found = self.component("trainer", entry.get("uses"))
        self.listed(entry.get("site"), sites)
        self.listed(entry.get("target_site"), sites)
        if entry.get("target_site") is not None and entry.get("site") is None and len(sites) > 1:
            self.report(entry.get("target_site"), "a target_site needs a site", "add 'site:', the tensor that the SAE reads")
        self.checkpoint(entry.get("init_from"), hub=False)
        sweep = self.sweep(entry)
        if found is not None:
            settings = self.settings(entry)
            if sweep and settings.is_map:
                self.swept_keys(found, entry, sweep)
                for variant in self.variants(entry, settings, sweep):
                    check_config(found, found.address, variant, self.problems, entry.get("uses"))
            else:
                check_config(found, found.address, settings, self.problems, entry.get("uses"))
        swept_sites = entry.get("sweep").get("site") if sweep else None
        for item in swept_sites.items() if swept_sites is not None else ():
            self.listed(item, sites)
        return found

    def sweep(self, entry: Node, quiet: bool = False) -> dict[str, list[Any]] | None:
        """Swept key -> values, where the sweep can be expanded; else None and, unless `quiet`, why not."""
        node = entry.get("sweep")
        if node is None or not node.is_map:
            return None
        wrong = False
        for key, values in node.data.items():
            if not values.is_list or not values.data:
                wrong = True
                if not quiet and values.is_list:
                    self.report(values, "a list with nothing in it", "give the values to try, or delete the key")
            elif not quiet:
                self.sweep_values(key, values)
        if wrong or not node.data:
            return None
        sweep = {key: plain(values) for key, values in node.data.items()}
        count = 1
        for values in sweep.values():
            count *= len(values)
        if count > MAX_MEMBERS:
            if not quiet:
                self.report(node, f"{count:,} combinations, at most {MAX_MEMBERS} in one sweep")
            return None
        return sweep

    def sweep_values(self, key: str, values: Node) -> None:
        if key == "seed":
            for item in values.data:
                if isinstance(item.data, bool) or not isinstance(plain(item), int) or item.data < 0:
                    self.report(item, "a seed is a whole number from 0 on")
        elif key == "site":
            for item in values.data:
                if not isinstance(item.data, str):
                    self.report(item, "a site is text, such as resid_post.2")
        shown = [repr(plain(item)) for item in values.data]
        for index, item in enumerate(values.data):
            if shown.index(shown[index]) < index:
                self.report(item, f"the value {shown[index]} stands here a second time")

    def swept_keys(self, found: Registered, entry: Node, sweep: dict[str, list[Any]]) -> None:
        """Keys that are neither settings of the trainer nor of the entry; they are left out of `sweep`."""
        try:
            cls = config_class(found)
        except Exception:  # reported where the settings are checked
            return
        known = [*(keys_of(cls) if cls is not None else ()), *ENTRY_KEYS]
        node = entry.get("sweep")
        for key in [key for key in sweep if key not in known]:
            hint = f"known: {', '.join(known)}"
            self.report(node.data[key], f"{key!r} cannot be swept: {found.address} has no such setting{did_you_mean(key, known)}", hint, mark=node.keys[key])
            del sweep[key]

    def variants(self, entry: Node, settings: Node, sweep: dict[str, list[Any]]) -> list[Node]:
        """`with` of every member, each swept value with its own place."""
        swept = entry.get("sweep")
        made = []
        for _, chosen in combinations(sweep):  # of no key at all: one, the plain settings
            node = Node(dict(settings.data), settings.mark, dict(settings.keys), settings.path)
            for key, index in chosen.items():
                if key not in ENTRY_KEYS:
                    node.set(key, swept.data[key].data[index], swept.keys[key])
            made.append(node)
        return made

    def user(self, kind: str, entry: Node, ids: set[str]) -> Registered | None:
        """An evaluator or exporter."""
        found = self.component(kind, entry.get("uses"))
        if found is not None:
            check_config(found, found.address, self.settings(entry), self.problems, entry.get("uses"))
        chosen = entry.get("saes")
        for node in chosen.items() if chosen is not None else ():
            if isinstance(node.data, str) and node.data not in ids:
                self.report(node, f"no SAE has the id {node.data!r}{did_you_mean(node.data, ids)}", f"ids: {', '.join(sorted(ids)) or 'none'}")
        return found

    # --- what must be there ------------------------------------------------------------------------------------------------

    def completeness(self, extractor: Registered | None, trainers: list[Any], evaluators: list[Any], sites: list[str]) -> None:
        trains, extract = bool(self.entries("train")), self.root.get("extract")
        if not trains and not self.entries("saes") and not any((self.root.get(key) or Node([], self.root.mark)).data for key in ("train", "saes")):
            self.report(self.root, "nothing to do: neither 'train' nor 'saes' has an entry", "such as train: [{id: topk, uses: native/topk, with: {k: 32}}]")
        if trains and not sites and (extract is None or not (extract.get("sites") and extract.get("sites").data)):
            self.report(extract or self.root, "no sites to train on", "such as extract: {sites: [resid_post.2]}")
        data, train_data, eval_data = self.root.get("data"), self.data("train"), self.data("eval")
        if trains and train_data is None and (extractor is None or "tokens" in extractor.component.needs):
            self.report(data or self.root, "training needs data.train", "such as data: {train: {source: builtin/python-docs, tokens: 1_000_000}}")
        used = [item for item in (extractor if trains else None, *trainers, *evaluators) if item is not None]
        if self.root.get("model") is None or self.root.get("model").data is None:
            for item in used:
                if "model" in item.component.needs:
                    self.report(self.root, f"missing key 'model': {item.address} runs a language model")
                    break
        if trains and extractor is not None and "tokens" in extractor.component.needs and train_data is not None and train_data.is_map:
            mix = train_data.get("mix")
            if mix is None or mix.data == []:
                self.report(mix or train_data, f"no text: {extractor.address} needs a source", "add 'source:', or 'mix:' with several")
        for item in evaluators:
            if item is not None and {"activations", "tokens", "sequences"} & set(item.component.needs) and (eval_data is None or not eval_data.data):
                self.report(data or self.root, f"{item.address} needs a dataset under data.eval", "such as eval: {in_sample: {source: builtin/python-docs}}")
                break
