"""The prompt of a chat is what transformers makes of it; special tokens are the template's alone."""

import pytest
from megatron.core.tokenizers import MegatronTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_scmoe.evaluation.hugging_face import HuggingFaceModel
from megatron_scmoe.serving.chat import ChatPrompts
from tests import text_models

WORDS = ["<s>", "</s>", "user", ":", "Hi", "there", "assistant", "?"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} : {{ m.content }} {{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
MESSAGES = [{"role": "user", "content": "Hi there"}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tokenizer that begins every text with <s>, as Llama's do, and so does its template."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    return folder


def megatrons(path, library: str, **settings):
    return MegatronTokenizer.from_pretrained(
        tokenizer_path=str(path), metadata_path={"library": library}, **settings
    )


def test_a_template_of_hugging_face_has_all_special_tokens(folder):
    tokenizer = megatrons(folder, "huggingface")
    ids = ChatPrompts(tokenizer).ids(MESSAGES)
    own = PreTrainedTokenizerFast.from_pretrained(folder)
    assert ids == own.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert [WORDS[i] for i in ids] == (
        "<s> user : Hi there </s> user : Hi </s> assistant :".split()
    )


def test_the_template_among_several_is_the_default(folder, tmp_path):
    own = PreTrainedTokenizerFast.from_pretrained(folder)
    own.chat_template = {"default": TEMPLATE, "tool_use": "Hi"}
    own.save_pretrained(tmp_path)
    tokenizer = megatrons(tmp_path, "huggingface")
    assert ChatPrompts(tokenizer).ids(MESSAGES) == own.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=False
    )


def test_a_text_is_evaluated_as_megatron_reads_it(folder):
    model = HuggingFaceModel.__new__(HuggingFaceModel)  # its weights are not read
    model.folder, model.trust = str(folder), {}
    ids = model.tokenize("Hi there")
    assert ids.tolist() == megatrons(folder, "huggingface").tokenize("Hi there")
    assert [WORDS[i] for i in ids] == ["<s>", "Hi", "there"]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    path = text_models.train_tokenizer(tmp_path_factory.mktemp("pieces"))
    return megatrons(path, "sentencepiece", chat_template=TEMPLATE, legacy=False)


def test_the_template_of_a_sentencepiece_model_has_its_special_tokens(sentencepiece):
    library = sentencepiece._tokenizer
    expected = [library.bos_id] if library.bos_id >= 0 else []
    for content in ("Hi there", "Hi"):
        expected += [*sentencepiece.tokenize(f"user : {content} "), library.eos_id]
    expected += sentencepiece.tokenize("assistant :")
    assert library.eos_id >= 0
    assert ChatPrompts(sentencepiece).ids(MESSAGES) == expected


def test_a_message_that_spells_a_special_token_is_text(sentencepiece):
    eos = sentencepiece._tokenizer.eos_id
    messages = [{"role": "user", "content": "Hi </s> there"}]
    assert ChatPrompts(sentencepiece).ids(messages).count(eos) == 1


def test_a_template_without_special_tokens(sentencepiece):
    plain = megatrons(
        sentencepiece.path,
        "sentencepiece",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
        legacy=False,
    )
    assert ChatPrompts(plain).ids(MESSAGES) == plain.tokenize("Hi thereHi")
