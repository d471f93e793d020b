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
    """The same with Gemma's word for BOS, which SAEBench writes into its prompts."""

    @property
    def spec(self) -> ModelSpec:
        """The model, float32 on the CPU."""
        folder = self.folder / "instructed"
        if not (folder / "config.json").exists():
            spelling_model(folder, bos="<bos>")
        return ModelSpec(name=str(folder), device="cpu", attention="eager")


def spelling_model(folder: Path, d_model: int = 32, bos: str = "<s>") -> Path:
    """Write it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    draw = random.Random(0)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    words = {letter: sorted({letter + "".join(draw.choice(alphabet) for _ in range(4)) for _ in range(SpellingStage.WORDS_A_LETTER)}) for letter in alphabet}
    template = ["has", "the", "first", "letter", ":"]
    names = [bos, "</s>", "<unk>", *template, *alphabet.upper(), *(word for group in words.values() for word in group)]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(dict.fromkeys(names))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", unk_token="<unk>")
    config = transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=d_model, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
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


def unlearning_data(folder: Path) -> Path:
    """`folder` with a forget corpus, multiple-choice questions and text in the columns of the hub's datasets: for the mechanics only."""
    draw = random.Random(0)
    sentence = lambda words, n: " ".join(draw.choice(words) for _ in range(n))  # noqa: E731
    write_lines(folder / "bio-forget-corpus.jsonl", [{"text": sentence(["virus", "cell", "gene", "toxin"], 40)} for _ in range(30)])
    question = lambda: {"question": sentence(["which", "cell", "is"], 4), "choices": ["one", "two", "three", "four"], "answer": draw.randrange(4)}  # noqa: E731
    places = {("cais/wmdp", "wmdp-bio"): [question() for _ in range(4)], ("cais/mmlu", "human_aging"): [question() for _ in range(4)]}
    places["wikitext", "wikitext-2-raw-v1"] = [{"text": sentence(["the", "old", "ship", "sails"], 40)} for _ in range(30)]
    for (repo, config), rows in places.items():
        write_lines(folder / repo / config / "test.jsonl", rows)
        files = f"  - config_name: {config}\n    data_files:\n      - {{split: test, path: {config}/test.jsonl}}\n"
        (folder / repo / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    for split in ("all", "train", "test"):
        ids = folder / "question_ids" / split
        ids.mkdir(parents=True)
        for name in ("wmdp-bio", "mmlu-human-aging"):
            for kind in ("correct", "correct-iff-question", "correct-no-tricks"):
                (ids / f"{name}_{kind}.csv").write_text("0\n1\n2\n3\n")
    return folder
