"""Tiny random models of every supported family, a tokenizer and text for them; all built in code and seeded.

Nothing here is trained. Weights are drawn so that every part counts: biases and norms are away from their initial
zeros and ones, projections have unit gain, and logits differ enough for greedy decoding to be stable.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import random
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bolaco import api
from bolaco.checkpoint.info import CompressedInfo
from bolaco.data.texts import Texts
from bolaco.factorize.store import FactorStore
from bolaco.recipe.recipe import Recipe, applicable, make_recipe, recipe_values
from bolaco.runs.session import open_source, texts_for

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
UNK, BOS, EOS, PAD = range(4)
_LEXICON = """
articles: the a one some every this that no
adjectives: small large old new quiet loud red green cold warm early late long short heavy light
nouns: river house garden child teacher engine letter window road market winter summer song story village ship
  mountain farmer doctor kitchen
verbs: sees finds carries leaves follows opens builds writes sings watches keeps crosses paints sells hears
adverbs: slowly often never quickly again today together alone
prepositions: near under behind above beside through without along
joints: and but while because when
"""


def _lexicon() -> dict[str, list[str]]:
    words: dict[str, list[str]] = {}
    kind = ""
    for line in _LEXICON.strip().splitlines():
        head, colon, rest = line.partition(":")
        kind = head if colon else kind
        words.setdefault(kind, []).extend((rest if colon else head).split())
    return words


LEXICON = _lexicon()
WORDS = (".", ",", *(word for words in LEXICON.values() for word in words))
VOCABULARY = 96
POSITIONS = 128


def english(words: int, seed: int = 0) -> str:
    """At least ``words`` words of sentences, in paragraphs of six."""
    draw = random.Random(seed)

    def pick(kind: str) -> str:
        return draw.choice(LEXICON[kind])

    def noun_phrase() -> list[str]:
        adjective = [pick("adjectives")] if draw.random() < 0.5 else []
        return [pick("articles"), *adjective, pick("nouns")]

    def clause() -> list[str]:
        rest = [pick("prepositions"), *noun_phrase()] if draw.random() < 0.5 else [pick("adverbs")]
        return [*noun_phrase(), pick("verbs"), *noun_phrase(), *rest]

    sentences: list[str] = []
    count = 0
    while count < words:
        parts = clause()
        if draw.random() < 0.4:
            parts[-1] += ","
            parts += [pick("joints"), *clause()]
        count += len(parts)
        sentences.append(" ".join(parts).capitalize() + ".")
    paragraphs = [" ".join(sentences[i : i + 6]) for i in range(0, len(sentences), 6)]
    return "\n".join(paragraphs) + "\n"


def write_english(path: Path, words: int, seed: int = 0) -> Path:
    """A text file of :func:`english`."""
    path.write_text(english(words, seed), encoding="utf-8")
    return path


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Words and punctuation of :func:`english`, one token each; with ``bos`` it puts BOS before a text itself."""
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL[UNK]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[UNK],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        model_max_length=POSITIONS,
    )


def build(model_type: str, seed: int = 0, **values: Any) -> PreTrainedModel:
    """A causal model of a family in evaluation mode, float32, with random weights."""
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": VOCABULARY}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**(ids | values)), dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim == 1:  # biases start at zero, norms at one (Gemma's at zero)
                parameter.add_(0.3 * noise)
            elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(noise / 32**0.5)
    return model.eval()


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}


def tiny_llama(**overrides: Any) -> PreTrainedModel:
    """Llama with grouped queries."""
    return build("llama", **(_SIZES | overrides))


def _llama_biased() -> PreTrainedModel:
    return tiny_llama(num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)


def _mistral() -> PreTrainedModel:
    return build("mistral", **_SIZES, sliding_window=12)


def _qwen2() -> PreTrainedModel:
    return build("qwen2", **_SIZES, tie_word_embeddings=True)


def _qwen3() -> PreTrainedModel:
    return build("qwen3", **_SIZES, head_dim=16)


def _gemma() -> PreTrainedModel:
    return build("gemma", **_SIZES, head_dim=16)


def _gemma2() -> PreTrainedModel:
    return build(
        "gemma2",
        **_SIZES,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=12,
        layer_types=["sliding_attention", "full_attention"],
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    )


def _gemma3_text() -> PreTrainedModel:
    sizes = _SIZES | {"num_hidden_layers": 3}
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    return build("gemma3_text", **sizes, head_dim=16, query_pre_attn_scalar=16, sliding_window=12, layer_types=kinds)


def _phi3() -> PreTrainedModel:
    return build("phi3", **_SIZES, original_max_position_embeddings=POSITIONS)


def _granite() -> PreTrainedModel:
    multipliers = {
        "embedding_multiplier": 2.0,
        "logits_scaling": 1.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.4,
    }
    return build("granite", **_SIZES, **multipliers, tie_word_embeddings=True)


def _olmo2() -> PreTrainedModel:
    return build("olmo2", **_SIZES)


def _smollm3() -> PreTrainedModel:
    sizes = _SIZES | {"num_hidden_layers": 4}  # the fourth has no rotary embedding
    return build("smollm3", **sizes)


def _gpt2() -> PreTrainedModel:
    return build("gpt2", n_embd=32, n_inner=48, n_layer=2, n_head=4, n_positions=POSITIONS)


def _opt(**overrides: Any) -> PreTrainedModel:
    values = {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "word_embed_proj_dim": 32,
    }
    return build("opt", **(values | overrides))


def _opt_post_norm() -> PreTrainedModel:
    """As OPT-350M: the norm after the residual, and embeddings narrower than the decoder."""
    return _opt(do_layer_norm_before=False, word_embed_proj_dim=24)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama_biased": _llama_biased,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "phi3": _phi3,
    "granite": _granite,
    "olmo2": _olmo2,
    "smollm3": _smollm3,
    "gpt2": _gpt2,
    "opt": _opt,
    "opt_post_norm": _opt_post_norm,
}


def tiny_deep(family: str, layers: int = 6) -> PreTrainedModel:
    """The tiny model of a family with more blocks; what differs from block to block goes on in its pattern."""
    config = FAMILIES[family]().config
    values = config.to_dict()
    before = config.num_hidden_layers
    for name, value in values.items():
        if "layer" in name and isinstance(value, list) and len(value) == before:
            values[name] = [value[i % before] for i in range(layers)]
    for name in ("num_hidden_layers", "n_layer"):
        if name in values:
            values[name] = layers
    for name in ("model_type", "architectures", "dtype", "transformers_version"):
        values.pop(name, None)
    return build(config.model_type, **values)


def save_tiny(folder: Path, model: PreTrainedModel | None = None, tokenizer: Any = None) -> Path:
    """A Hugging Face folder with a model (Llama by default) and its tokenizer."""
    folder = Path(folder)
    (model or tiny_llama()).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def token_blocks(sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token blocks ``[sequences, length]`` of :func:`english`."""
    ids: Sequence[int] = tiny_tokenizer()(english(2 * sequences * length, seed), verbose=False).input_ids
    return torch.tensor(ids[: sequences * length]).view(sequences, length)


# Small enough for tests: the other settings of a recipe are its defaults.
TINY: dict[str, Any] = {
    "calibration.sequences": 8,
    "calibration.seq_len": 32,
    "calibration.batch": 3,
    "validation.candidates": 6,
    "validation.sequences": 3,
    "validation.allocations": 2,
    "search.initial": 1,
    "search.rank_multiple": 4,
    "evaluation.windows": 4,
}


def slow(*values: Any, id: str | None = None) -> Any:
    """A row of a table of parameters whose code the other rows run as well: it is left to ``make test-slow``."""
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


# Plain, norms of query and key, windows and caps, kinds of layers, fused projections, Conv1D, norms after and biases.
QUICK_FAMILIES = ("llama", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "opt_post_norm")


def mostly_slow(values: Iterable[Any], *quick: Any) -> list[Any]:
    """Rows of one value each: all but the ``quick`` ones are :func:`slow`."""
    rows = list(values)
    assert set(quick) <= set(rows), quick
    return [value if value in quick else slow(value) for value in rows]


@functools.cache
def scratch() -> Path:
    """A folder for what tests share; it goes with the process."""
    folder = tempfile.TemporaryDirectory(prefix="bolaco-tests-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def text_file() -> Path:
    """A text long enough for :data:`TINY`."""
    return write_english(scratch() / "text.txt", 1000)


def tiny_recipe(**values: Any) -> Recipe:
    """A recipe of :data:`TINY` size; ``values`` as for :func:`recipe_values`, with ``search="hand"`` by default.

    The sizes of :data:`TINY`, and ``trials``, are for recipes that have such fields; ``options`` are not chosen from.
    """
    given = {"keep": 0.7, "search": "hand", "calibration": str(text_file())} | values
    options = given.pop("options", {})
    preset = given.pop("preset", "bolaco-5x1")
    sizes = TINY | ({"search.trials": given.pop("trials")} if "trials" in given else {})
    sizes = applicable(sizes, recipe_values(**given), preset)
    return make_recipe(recipe_values(**given, options=sizes | options | {"model": "tiny"}), preset)


@dataclass(frozen=True)
class Compressed:
    """A finished run: the original in memory, the folder, and the work folder, which was kept."""

    original: PreTrainedModel
    recipe: Recipe
    path: Path
    work: Path
    info: CompressedInfo

    @property
    def factors(self) -> FactorStore:
        """The factors that the run left in its work folder."""
        (folder,) = self.work.glob("factors-*")
        return FactorStore(folder)

    @property
    def texts(self) -> Texts:
        """The texts that the run used."""
        return texts_for(self.recipe, open_source("tiny", self.original, tiny_tokenizer()))

    def stage(self, name: str) -> Path:
        """The folder that a stage left in the work folder; there must be one."""
        (found,) = [path for path in self.work.glob(f"{name}-*") if path.is_dir()]
        return found


def compress_tiny(model: PreTrainedModel, out: Path, **values: Any) -> Compressed:
    """Compresses a model into ``out`` through the whole pipeline."""
    recipe = tiny_recipe(**values)
    work = out.with_name(out.name + ".work")
    result = api.run(recipe, out, work=work, keep_work=True, model=model, tokenizer=tiny_tokenizer())
    return Compressed(model, recipe, result.path, work, result.info)


_finished: dict[Path, Compressed] = {}


def compressed(family: str, keep: float = 0.7, search: str = "hand", method: str = "afm") -> Compressed:
    """A family's tiny model, compressed once for all tests; leave the folder as it is."""
    out = scratch() / f"{family}-{keep}-{search}-{method}"
    if out not in _finished:
        _finished[out] = compress_tiny(FAMILIES[family](), out, keep=keep, search=search, trials=3, method=method)
    return _finished[out]


def compressed_once(family: str, layers: int | None = None, **values: Any) -> Compressed:
    """A family's tiny model through the pipeline with these values, once for all tests; leave the folder as it is.

    ``layers`` takes :func:`tiny_deep` instead of the two to four blocks of the family.
    """
    key = hashlib.sha256(repr((family, layers, sorted(values.items()))).encode()).hexdigest()[:16]
    out = scratch() / f"{family}-{key}"
    if out not in _finished:
        _finished[out] = compress_tiny(tiny_deep(family, layers) if layers else FAMILIES[family](), out, **values)
    return _finished[out]
