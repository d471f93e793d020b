"""A word tokenizer, beside the config of a tiny Llama, in a folder: every word of the corpus is one token, so rows can be told apart."""

import json

import pytest

WORDS = 6000


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {"<bos>": 0, "<eos>": 1, "<pad>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %} {{ m['role'] }} {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    transformers.LlamaConfig(
        vocab_size=WORDS + 4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def corpus(tmp_path):
    """Write documents of consecutive words, no word twice: (name, first word, number of documents, words a document) -> file."""

    def write(name, first, documents, length):
        file = tmp_path / name
        texts = [" ".join(f"w{first + d * length + i}" for i in range(length)) for d in range(documents)]
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return file

    return write
