"""A folder and a seed in; what SAEBench's evals need beside an SAE out: labelled texts, a model that can spell, prompt files, a judge."""

from __future__ import annotations

import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from saehub.api import ModelSpec
from saehub.testing.stage import Stage

BIOS = "LabHC/bias_in_bios_class_set1"
WORDS = {
    0: "ledger audit tax sum", 1: "facade beam brick plan", 2: "court brief law case", 6: "crown molar gum floss", 9: "lens reel scene cut",
    13: "ward clinic shift patient", 21: "lecture thesis campus seminar",
}  # fmt: skip
"""Profession (by SAEBench's number) -> words of its biographies."""
GENDERS = {0: "he his him", 1: "she her hers"}


def write_lines(path: Path, rows: list[dict]) -> None:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def labelled_texts(folder: Path) -> Path:
    """`folder` with a small LabHC/bias_in_bios in the hub's columns, and `own`, two classes of texts of one's own."""
    draw = random.Random(0)
    for part, n in (("train", 30), ("test", 16)):
        bios = [
            {"hard_text": " ".join(draw.choice((WORDS[p] if draw.random() < 0.6 else GENDERS[g]).split()) for _ in range(draw.randint(2, 4))), "profession": p, "gender": g}
            for p in WORDS for g in GENDERS for _ in range(n)
        ]  # fmt: skip
        write_lines(folder / "LabHC" / "bias_in_bios" / f"{part}.jsonl", bios)
        own = [{"text": " ".join(draw.choice(WORDS[p].split()) for _ in range(4)), "label": name} for p, name in ((2, "law"), (6, "teeth")) for _ in range(n)]
        write_lines(folder / "own" / f"{part}.jsonl", own)
    return folder


class SpellingStage(Stage):
    """A model that can spell: constructed, not trained. Each first letter has a direction, planted in the embedding of its words; one block
    of a random Llama follows. Its tokenizer has whole words, the template's among them."""

    WORDS_A_LETTER = 16

    @property
    def spec(self) -> ModelSpec:
        """The model, float32 on the CPU."""
        folder = self.folder / "spelling"
        if not (folder / "config.json").exists():
            spelling_model(folder)
        return ModelSpec(name=str(folder), device="cpu", attention="eager")


class InstructedStage(SpellingStage):
    """The same in two layers and with a chat template: a model that can be asked questions. It knows nothing; a test takes what it says for right."""

    @property
    def spec(self) -> ModelSpec:
        """The model, float32 on the CPU."""
        folder = self.folder / "instructed"
        if not (folder / "config.json").exists():
            spelling_model(folder, bos="<bos>", layers=2, spread=0.4, template=CHAT)
        return ModelSpec(name=str(folder), device="cpu", attention="eager")


CHAT = "{{ bos_token }}<start_of_turn>user\n{{ messages[0]['content'] | trim }}<end_of_turn>\n{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
"""Gemma's turns."""


def spelling_model(folder: Path, d_model: int = 32, bos: str = "<s>", layers: int = 1, spread: float = 0.02, template: str | None = None) -> Path:
    """Write it; `spread` is the standard deviation of the random weights."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    draw = random.Random(0)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    words = {letter: sorted({letter + "".join(draw.choice(alphabet) for _ in range(4)) for _ in range(SpellingStage.WORDS_A_LETTER)}) for letter in alphabet}
    names = [bos, "</s>", "<unk>", "has", "the", "first", "letter", ":", *alphabet.upper(), *(word for group in words.values() for word in group)]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(dict.fromkeys(names))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    config = transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=d_model, intermediate_size=64, num_hidden_layers=layers, initializer_range=spread, num_attention_heads=2, num_key_value_heads=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).float().eval()
    directions = torch.linalg.qr(torch.randn(d_model, d_model, generator=generator))[0][:26]
    with torch.no_grad():
        embedding = 0.05 * torch.randn(len(fast), d_model, generator=generator)
        for name, number in fast.get_vocab().items():
            if name.isalpha():
                embedding[number] += 40.0 * directions[alphabet.index(name[0].lower())]
        model.model.embed_tokens.weight.copy_(embedding)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


class Judge:
    """An OpenAI-compatible server on this machine: it explains by the marked tokens and picks the examples that hold one of them."""

    def __enter__(self) -> Judge:
        judge = self
        self.requests: list[dict] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.requests.append(asked)
                body = json.dumps(judge.answer(asked)).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    @staticmethod
    def answer(asked: dict) -> dict:
        """One completion."""
        text = asked["messages"][-1]["content"]
        if "The activating documents" in text:
            marked = re.findall(r"<<(.*?)>>", text)
            said = "This neuron activates on " + " ".join(sorted(set(marked), key=marked.count)[-3:])
        else:
            explained = set(text.partition("fires on ")[2].partition(".\n")[0])
            numbered = re.findall(r"^(\d+)\. (.*)$", text, flags=re.MULTILINE)
            said = ", ".join(number for number, example in numbered if len(explained & set(example)) >= 2) or "None"
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return {"id": "0", "object": "chat.completion", "created": 0, "model": asked["model"], "choices": [choice]}


class RavelStage(Stage):
    """The tiny Llama with a tokenizer that begins with BOS, and prompts whose right answer is whatever the model says: local RAVEL files."""

    ENTITIES = "abcdefghijklmnop"
    TEMPLATES = {"Country": "x %s", "Language": "yz %s"}

    @property
    def spec(self) -> ModelSpec:
        """The model, float32 on the CPU."""
        from saehub.testing.toys import byte_tokenizer, tiny_model

        folder = self.folder / "ravel-llama"
        if not (folder / "config.json").exists():
            from tokenizers.processors import TemplateProcessing

            tiny_model(folder, "llama")
            words = byte_tokenizer()
            words.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
            words.save_pretrained(folder)
        return ModelSpec(name=str(folder), device="cpu", attention="eager")

    def prompts(self, folder: Path) -> Path:
        """`folder` with adamkarvonen/ravel_prompts for entities of type `city`."""
        words, model = self.model.tokenizer, self.model.hf
        attributes: dict[str, dict[str, str]] = {}
        for entity in self.ENTITIES:
            for name, template in self.TEMPLATES.items():
                ids = torch.tensor([words.encode(template % entity)])
                with torch.no_grad():
                    after = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
                attributes.setdefault(entity, {})[name] = words.decode(after).split('"')[0].strip(' "') or "?"
        target = folder / "adamkarvonen" / "ravel_prompts"
        target.mkdir(parents=True)
        files = {
            "entity_attributes": attributes,
            "attribute_to_prompts": {name: [template] for name, template in self.TEMPLATES.items()},
            "prompt_to_split": dict.fromkeys(self.TEMPLATES.values(), "train"),
            "entity_to_split": dict.fromkeys(self.ENTITIES, "train"),
        }
        for name, content in files.items():
            (target / f"ravel_city_{name}.json").write_text(json.dumps(content))
        return folder


SUBJECT = "human_aging"


def unlearning_files(stage: Stage, folder: Path, n: int = 6) -> dict[str, object]:
    """Settings of `saebench/unlearning`: text and questions about words of the letters e to h to be forgotten, of m to z to be kept; the right
    answers are those that the model gives. Hub layouts in `folder/hub` hold the same questions."""
    vocabulary = sorted(name for name in stage.model.tokenizer.get_vocab() if name.isalpha() and name.islower() and len(name) == 5 and name not in ("first",))
    sides = {"forget": [w for w in vocabulary if w[0] in "efgh"], "retain": [w for w in vocabulary if w[0] >= "m"]}
    draw = random.Random(0)
    for side, words in sides.items():
        write_lines(folder / f"{side}.jsonl", [{"text": " ".join(draw.choice(words) for _ in range(30))} for _ in range(12)])
    for name, side in (("wmdp-bio", "forget"), (SUBJECT, "retain")):
        rows = []
        for _ in range(n):
            row = {"question": " ".join(draw.choice(sides[side]) for _ in range(5)), "choices": draw.sample(sides[side], 4)}
            rows.append({**row, "answer": said(stage, prompt(name, row))})
        write_lines(folder / f"{name}.jsonl", rows)
    for split in ("all", "train", "test"):  # all questions count as known: no toy answers right in all 24 orders
        for name in ("wmdp-bio", f"mmlu-{SUBJECT.replace('_', '-')}"):
            for kind in ("correct", "correct-iff-question", "correct-no-tricks"):
                target = folder / "question_ids" / split / f"{name}_{kind}.csv"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text("".join(f"{number}\n" for number in range(n)))
    hub(folder)
    return {
        "dataset_names": ["wmdp-bio", SUBJECT], "forget": str(folder / "forget.jsonl"), "retain": str(folder / "retain.jsonl"),
        "questions": {name: str(folder / f"{name}.jsonl") for name in ("wmdp-bio", SUBJECT)}, "question_ids": str(folder / "question_ids"),
        "retain_thresholds": [0.05], "n_features_list": [2, 8], "multipliers": [1, 100], "dataset_size": 16, "seq_len": 16,
    }  # fmt: skip


def prompt(name: str, row: dict) -> str:
    """SAEBench's prompt about one question, in Gemma's turns."""
    subject = "biology" if name == "wmdp-bio" else name.replace("_", " ")
    lines = [f"The following are multiple choice questions (with answers) about {subject}.", row["question"]]
    lines += [f"{letter}. {choice}" for letter, choice in zip("ABCD", row["choices"], strict=True)]
    return "<bos><start_of_turn>user\n" + "\n".join(lines) + "<end_of_turn>\n<start_of_turn>model\nAnswer: ("


def said(stage: Stage, text: str) -> int:
    """The letter that the model would say next, as a number from 0 to 3."""
    words = stage.model.tokenizer
    with torch.no_grad():
        logits_V = stage.model.hf(torch.tensor([words.encode(text, add_special_tokens=False)])).logits[0, -1]
    return int(logits_V[torch.tensor(words.convert_tokens_to_ids(list("ABCD")))].argmax())


def hub(folder: Path) -> None:
    """The same in the layout in which the hub's datasets come down, and the corpus under its own name."""
    places = {("cais/wmdp", "wmdp-bio"): "wmdp-bio", ("cais/mmlu", SUBJECT): SUBJECT, ("wikitext", "wikitext-2-raw-v1"): "retain"}
    for (repo, config), name in places.items():
        target = folder / "hub" / repo
        (target / config).mkdir(parents=True)
        (target / config / "test.jsonl").write_text((folder / f"{name}.jsonl").read_text())
        files = f"  - config_name: {config}\n    data_files:\n      - {{split: test, path: {config}/test.jsonl}}\n"
        (target / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    (folder / "hub" / "bio-forget-corpus.jsonl").write_text((folder / "forget.jsonl").read_text())


PERTURBED = {"dataset_names": [BIOS], "n_values": [2], "train_set_size": 24, "test_set_size": 12, "context_length": 16, "probe_epochs": 2}
EXAMPLES = {f"n_{kind}": 1 for kind in ("top_ex_for_generation", "iw_sampled_ex_for_generation", "top_ex_for_scoring", "iw_sampled_ex_for_scoring")}
SETTINGS = {
    "core": {"batch_size_prompts": 4, "seeds": [1, 2]},
    "meta_structure": {"train_steps": 20, "train_batch_size": 32, "seeds": [1, 2]},
    "sae_probes": {"dataset_names": ["119_us_state_TX"], "ks": [1], "reg_type": "l2", "include_llm_baseline": False},
    "sparse_probing": {"dataset_names": ["own"], "k_values": [1], "probe_train_set_size": 24, "probe_test_set_size": 12, "context_length": 16},
    "scr": {**PERTURBED, "pairs": {BIOS: [["professor", "nurse"]]}},
    "tpp": PERTURBED,
    "absorption": {"max_k_value": 1, "k_sparse_probe_num_epochs": 10},
    "ravel": {
        "entity_attribute_selection": {"city": ["Country", "Language"]}, "num_pairs_per_attribute": 12, "top_n_entities": 16, "n_generated_tokens": 2,
        "llm_batch_size": 2, "num_epochs": 1,
    },
    "unlearning": {"retain_thresholds": [0.5], "n_features_list": [2], "multipliers": [20]},
    "autointerp": {**EXAMPLES, "n_latents": 4, "dead_latent_threshold": 3, "buffer": 2, "n_random_ex_for_scoring": 4},
}
"""Evaluator -> settings that are small enough for a test."""


def prepared(word: str, folder: Path) -> tuple[Stage | None, dict]:
    """The model that an evaluator needs (None: any) and its settings on local data, both made in `folder`."""
    stage, with_ = None, {"seeds": [1], **SETTINGS[word]}
    (folder / "stage").mkdir(parents=True, exist_ok=True)
    if word in ("scr", "tpp", "sparse_probing"):
        with_["data_dir"] = str(labelled_texts(folder / "data"))
    if word == "sparse_probing":
        with_["labelled"] = {"own": str(folder / "data" / "own")}
    if word == "absorption":
        stage = SpellingStage(folder / "stage")
    if word == "ravel":
        stage = RavelStage(folder / "stage")
        with_["data_dir"] = str(stage.prompts(folder / "data"))
    if word == "unlearning":
        stage = InstructedStage(folder / "stage")
        with_ = {**unlearning_files(stage, folder / "data", n=2), **with_}
    if word == "autointerp":
        with_["base_url"] = Judge().__enter__().url  # a daemon thread: it ends with the tests
    return stage, with_
