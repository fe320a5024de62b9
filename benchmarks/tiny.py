"""Every causal language model of transformers as a tiny random model: what a change must work on beyond one family.

    python benchmarks/tiny.py
    python benchmarks/tiny.py --types llama qwen3_next gemma3n_text

A type's default configuration is shrunk by rules on the names of its attributes, so that each kind of layer it has is
still there. The table says what each model does: a forward pass, and greedy generation with a cache against the argmax
of passes without one.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

VOCABULARY = 128
HIDDEN = 64
# Standard deviation of initial weights: at a width of 64, the usual 0.02 gives logits that are all alike.
SPREAD = 0.1

# What cannot run as a causal decoder on tokens alone.
NOT_DECODERS: dict[str, str] = {
    "cpmant": "every token attends to every other: a model of prefixes",
    "gemma3n": "its vision tower needs the package timm (gemma3n_text is its decoder)",
    "gemma4_assistant": "a drafter: takes hidden states, keys and values of the model that it drafts for, not tokens",
    "gemma4_unified_assistant": "a drafter: takes hidden states, keys and values of another model, not tokens",
    "musicgen": "AutoModelForCausalLM gives the decoder's class the whole configuration: it has no attribute 'dropout'",
    "musicgen_melody": "AutoModelForCausalLM gives the decoder's class the whole configuration: no attribute 'dropout'",
}

# What transformers itself does not do with a type that is a decoder.
REMARKS: dict[str, str] = {
    "blt": "generate needs num_hidden_layers, which BltConfig has not",
    "emu3": "from_config takes the text half, whose type AutoModelForCausalLM cannot load again",
    "mllama": "as emu3; and without an image, blocks of cross-attention are skipped",
    "prophetnet": "relative positions of the predicting stream are mixed up: logits depend on the length of a sequence",
    "rwkv": "a step with a state mixes the sequences of a batch; one sequence is right",
    "xlm": "generate puts a mask token last and predicts there",
    "xlnet": "generate adds a token to predict at, and fails for more than one sequence",
    **dict.fromkeys(
        ["camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"],
        "generate numbers positions from 0, a forward pass from pad_token_id + 1",
    ),
}

# Names of attributes and their value, or the default's if that is smaller, wherever it is not None.
_SIZES: list[tuple[str, Any]] = [
    (
        "vocab_size vocab_size_per_layer_input audio_vocab_size decoder_vocab_size unpadded_vocab_size "
        "shape_vocab_size pronunciation_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base codebook_size "
        "num_position_embeddings",
        VOCABULARY,
    ),
    (
        "hidden_size d_model n_embd emb_dim embedding_size embedding_dim word_embed_proj_dim lru_width out_hidden_size "
        "output_embedding_size shape_embed_dim pronunciation_embed_dim ple_embed_dim input_embedding_size input_size "
        "projector_input_dim projector_output_dim vision_output_dim output_channels nemo_conv_channels prompt_mid_dim "
        "ext_pw_out_channel depthwise_separable_out_channel adapter_in_dim adapter_out_dim adapter_input_size "
        "hidden_size_global",
        HIDDEN,
    ),
    (
        "intermediate_size ffn_dim n_inner encoder_ffn_dim decoder_ffn_dim d_ff d_inner dff dim_ff feed_forward_size "
        "ffn_hidden_size dense_intermediate_size intermediate_size_mlp mlp_dim",
        96,
    ),
    (
        "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size",
        48,
    ),
    (
        "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads "
        "decoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
        "num_attention_heads_per_layer linear_num_value_heads linear_num_heads",
        4,
    ),
    ("num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads", 2),
    (
        "head_dim attention_head_dim attention_head_size dim_head d_head d_kv kv_channels swa_head_dim v_head_dim "
        "qk_nope_head_dim kv_lora_rank index_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim",
        16,
    ),
    ("q_lora_rank o_lora_rank hidden_size_per_layer_input router_hidden_size image_size crop_size", 32),
    ("laurel_rank adapter_rank gated_norm_rank qk_rope_head_dim rotary_dim", 8),
    ("num_experts num_local_experts n_routed_experts moe_num_experts", 4),
    (
        "num_experts_per_tok moe_topk moe_k moe_top_k top_k_experts zero_expert_num "
        "n_shared_experts num_shared_experts moe_num_shared_experts",
        2,
    ),
    # With few heads that choose keys, many scores are zero, and the choice among these is up to the number of keys.
    ("index_n_heads", 8),
    ("n_groups o_groups altup_num_inputs hc_mult index_topk_blocks", 2),
    ("hc_lowrank local_attention_window_len patch_size index_block_size", 4),
    # State spaces: twice the width is 8 heads of 16.
    ("mamba_n_heads mamba_num_heads n_mamba_heads mamba_d_state ssm_state_size state_size", 8),
    ("mamba_d_head mamba_head_dim", 16),
    ("mamba_dt_rank time_step_rank", 4),
    # Shorter than the 12 tokens of the check, so that windows and chunks count.
    (
        "sliding_window attention_window_size attention_chunk_size window_size sliding_window_size local_attention "
        "index_topk floor_scale log_scaling_n_floor block_size mamba_chunk_size chunk_size",
        8,
    ),
    ("compress_rates", {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}),
    (
        "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
        "context_length original_max_position_embeddings rel_extent",
        256,
    ),
    # Kinds of layers by period: four layers have them all.
    ("attn_layer_period", 4),
    ("attn_layer_offset", 2),
    ("initializer_range init_std", SPREAD),
    ("logit_scale logits_mup_width_multiplier", 1.0),
]
SIZES: dict[str, Any] = {name: value for names, value in _SIZES for name in names.split()}

# Names of the number of layers.
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers")
DEPTHS += ("num_blocks",)
OTHER_DEPTHS = ("encoder_layers", "num_encoder_layers", "depth")
# Attributes that say which layers are special: by positions, as the number of first layers, as the number of last ones.
POSITIONS = ("mlp_only_layers", "full_attn_idxs", "cross_attention_layers", "moe_layers")
POSITIONS += ("global_attn_indexes", "attn_layer_indices")
FIRST = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
LAST = ("num_kv_shared_layers",)

# Model type -> what the rules on names do not give.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    # The defaults of these have attention only, or state spaces only; the released models have both.
    "lfm2": {"full_attn_idxs": None, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    # The defaults of these have no dense layer, or no experts at all; the released models have both.
    "deepseek_v2": {"first_k_dense_replace": 1, "num_experts_per_tok": 2},
    "dots1": {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1},
    # The default has a single expert.
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    # The defaults of these lack what the model reads.
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "qwen4_exp_text": {
        "indexer_n_heads": 8,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    # The defaults of these see later tokens.
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    # Layers by a rule rather than by a list: the kinds follow from their number.
    "jamba": {"num_hidden_layers": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    # One block of weights is shared by the hybrid layers, so there are two.
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    # Layers are run several times over: their number follows from those of one stack.
    "hrm_text": {"num_layers_per_stack": None, "num_hidden_layers": 2, "embedding_scale": None},
    # A dense layer, as in the larger of the released models, beside both kinds of the default.
    "llama4_text": {
        "layer_types": ["chunked_attention", "chunked_attention", "full_attention"],
        "no_rope_layers": [1, 1, 0],
        "moe_layers": [1, 2],
    },
    # Every sixth layer starts a block of residual attention, and the first with a window is such a one.
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid"]},
    # The first layer lacks a norm that the others have.
    "modernbert-decoder": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    # Its window is a matter of the cache only.
    "moshi": {"sliding_window": 256},
    # Its number of heads goes by the name that other models give to heads of attention.
    "mamba2": {"num_heads": 8},
    # The others' state spaces have heads of 16; its heads are 8 wide.
    "falcon_h1": {"mamba_d_ssm": 64},
    # The sum of the two parts of a head of the layers with a window, which differ from the others'.
    "dots3_note_text": {"head_dim": 32},
    # The widths of keys and values are rounded up to 64.
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "reformer": {"axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 48], "hash_seed": 0},
}


def types() -> list[str]:
    """Every model type that has a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The type's default configuration, shrunk, with each kind of layer of it."""
    config = _shrink(AutoConfig.for_model(model_type))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def _shrink(config: PreTrainedConfig, tower: bool = False) -> PreTrainedConfig:
    config.allow_global_per_layer_attribute_access = True
    base = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in base}
    depth_name = next((name for name in DEPTHS if own.get(name) is not None), None)
    layers = own[depth_name] if depth_name else getattr(config, "num_hidden_layers", 0)
    chosen = _choose_layers(own, layers, tower)
    values: dict[str, Any] = {}
    for name, value in own.items():
        if isinstance(value, PreTrainedConfig):
            values[name] = _shrink(value, tower=not name.startswith(("text", "decoder")))
        elif name in DEPTHS:
            values[name] = len(chosen) if value is not None else None
        elif name in OTHER_DEPTHS:
            values[name] = value and (len(chosen) or 1)
        else:
            values[name] = _shrink_value(name, value, layers, chosen)
    _agree(values, own)
    if getattr(config, "is_heterogeneous", False):
        values["per_layer_config"] = _overrides(config, values, chosen)
    values |= EXCEPTIONS.get(config.model_type, {})
    if values.get("layer_types") and depth_name:
        values[depth_name] = len(values["layer_types"])
    return type(config)(**values)


def _choose_layers(own: dict[str, Any], layers: int, tower: bool) -> list[int]:
    """Layers of the default such that each of their kinds is there; two where all are alike, to have an order."""
    lists = {n: v for n, v in own.items() if isinstance(v, (list, tuple)) and len(v) == layers and n not in POSITIONS}
    marks = {n: own[n] for n in (*POSITIONS, *FIRST, *LAST) if own.get(n)}

    def kind(layer: int) -> tuple[str, ...]:
        listed = [str(value[layer]) for name, value in lists.items() if name.endswith(("types", "block_type"))]
        marked = [str(_marked(name, value, layer, layers)) for name, value in marks.items()]
        return (*listed, *marked)

    chosen: dict[tuple[str, ...], int] = {}
    for layer in range(layers):
        chosen.setdefault(kind(layer), layer)
    found = list(chosen.values())
    if len(found) == 1 and not tower:
        found = [found[0], *[layer for layer in range(layers) if layer != found[0]][:1]]
    return sorted(found)


def _marked(name: str, value: Any, layer: int, layers: int) -> bool:
    if name in POSITIONS:
        return layer in value
    return layer < value if name in FIRST else layer >= layers - value


def _shrink_value(name: str, value: Any, layers: int, chosen: Sequence[int]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if name in POSITIONS:
        return [place for place, layer in enumerate(chosen) if layer in value]
    if name in FIRST or name in LAST:
        return sum(_marked(name, value, layer, layers) for layer in chosen)
    if name.endswith(("_token_id", "_token_index", "_token_ids")):
        return _token(name, value)
    if isinstance(value, (list, tuple)) and layers and len(value) == layers:
        return [_shrink_value(name, value[layer], 0, ()) for layer in chosen]
    if name == "rope_parameters":
        return _shrink_rope(value)
    size = SIZES.get(name, value)
    return min(size, value) if isinstance(size, int) and isinstance(value, int) else size


def _token(name: str, value: Any) -> Any:
    """The usual special tokens are the first; those that stand for images and the like the last."""
    first = {"pad": 0, "bos": 1, "eos": 2, "decoder": 1, "sep": 2}
    token = first.get(name.split("_")[0], VOCABULARY - 1 - sum(name.encode()) % 32)
    return [token] if isinstance(value, list) else token


def _shrink_rope(rope: Any) -> Any:
    if not isinstance(rope, dict):
        return rope
    rope = {name: _shrink_rope(value) for name, value in rope.items()}
    if "original_max_position_embeddings" in rope:
        rope |= {"original_max_position_embeddings": 64, "factor": 4.0}
    if "max_position_embeddings" in rope:
        rope["max_position_embeddings"] = SIZES["max_position_embeddings"]
    return rope


def _overrides(config: PreTrainedConfig, values: dict[str, Any], chosen: Sequence[int]) -> dict[int, dict[str, Any]]:
    """What single layers have of their own, in the same proportion to the others as in the default."""
    found = {}
    for place, layer in enumerate(chosen):
        special = config._heterogeneity_spec.per_layer_overrides.get(layer, {})
        ratios = {name: own / getattr(config, name) for name, own in special.items()}
        found[place] = {name: max(1, round(values[name] * ratio)) for name, ratio in ratios.items()}
    return {place: special for place, special in found.items() if special}


def _agree(values: dict[str, Any], own: dict[str, Any]) -> None:
    """Attributes that the default has equal, or that a model needs to be, stay so."""
    for name in ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"):
        if own.get(name, 1) != 1 and own.get("kv_lora_rank"):
            values[name] = values["num_attention_heads"]
    if own.get("qk_rope_head_dim") and own.get("head_dim") == own["qk_rope_head_dim"]:
        values["head_dim"] = values["qk_rope_head_dim"]
    if own.get("qk_rope_head_dim") and own.get("qk_nope_head_dim"):
        both = values["qk_rope_head_dim"] + values["qk_nope_head_dim"]
        if own.get("qk_head_dim"):
            values["qk_head_dim"] = both
        if own.get("head_dim") == own["qk_rope_head_dim"] + own["qk_nope_head_dim"]:
            values["head_dim"] = both
    if own.get("attention_hidden_size"):
        values["attention_hidden_size"] = HIDDEN * own["attention_hidden_size"] // own["hidden_size"]
        if own.get("attention_head_dim"):
            values["attention_head_dim"] = values["attention_hidden_size"] // values["num_attention_heads"]
    for name in ("head_dim", "num_key_value_heads"):
        if name in own and own[name] is None:
            values[name] = SIZES[name]
    groups = next((name for name in ("n_group", "num_expert_group") if own.get(name)), None)
    if groups:
        values[groups] = min(own[groups], 2)
        values["topk_group"] = 1


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the type in float32, its weights the same for a seed."""
    if model_type in NOT_DECODERS:
        raise ValueError(f"{model_type}: {NOT_DECODERS[model_type]}")
    config = tiny_config(model_type)
    before = torch.are_deterministic_algorithms_enabled()
    # Memory that a model leaves as it comes is then filled with NaN, so that it is found below.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    finally:
        torch.use_deterministic_algorithms(before)
    _enliven(model, seed)
    return model.eval()


@torch.no_grad()
def _enliven(model: PreTrainedModel, seed: int) -> None:
    """Random values where a fresh model has zeros, constants or nothing: such layers would hide a wrong result."""
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        values = parameter.data
        noise = torch.randn(values.shape, generator=generator)
        if not values.isfinite().all():
            values.copy_(noise * SPREAD)
        elif values.ndim < 2 and bool((values == values.flatten()[0]).all()):
            # Scales and biases. One number alone may close a gate.
            values.add_(noise * SPREAD if values.numel() > 1 else 0.5 * (values == 0))
        elif values.ndim >= 2 and values.square().mean() < (SPREAD / 4) ** 2:
            values.copy_(noise * SPREAD)
        elif values.ndim >= 2 and bool((values == values.flatten()[0]).all()):
            values.add_(noise * SPREAD)


def token_batch(rows: int = 2, length: int = 12, seed: int = 0) -> Tensor:
    """Tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY - 34, (rows, length), generator=generator)


@torch.no_grad()
def generates(model: PreTrainedModel, tokens: Tensor, count: int = 6) -> tuple[bool, float]:
    """Whether generation with a cache gives the tokens that passes without one give; and how far logits differ."""
    # A model's own settings may end the text, or force or forbid a token.
    model.generation_config = GenerationConfig(
        pad_token_id=0, do_sample=False, max_new_tokens=count, output_logits=True, return_dict_in_generate=True
    )
    made = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    difference = 0.0
    for cached in made.logits:
        logits = model(input_ids=tokens, use_cache=False).logits[:, -1]
        difference = max(difference, float((logits - cached).abs().max()))
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    return torch.equal(made.sequences, tokens), difference


def experts(model: nn.Module) -> str:
    """How experts are kept: as a list of modules, stacked in parameters with three axes, in flat ones, or none."""
    found = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and "expert" in name.rpartition(".")[2]:
            return "list"
        if "expert" in name + type(module).__name__.lower() and "shared" not in name:
            found |= {parameter.ndim for parameter in module.parameters(recurse=False)}
    return "stacked" if 3 in found else "flat" if found else "-"


def layer_kinds(model: nn.Module) -> list[str]:
    """The kinds of blocks in the largest list of modules: class, children, and how often."""
    lists = [m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and "layers.0" not in name]
    if not lists:
        return []
    blocks = max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))
    counts = Counter(
        f"{type(block).__name__}({', '.join(f'{n}={type(c).__name__}' for n, c in block.named_children())})"
        for block in blocks
    )
    return [f"{count}x {kind}" for kind, count in counts.items()]


def check(model_type: str) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]}
    start = time.perf_counter()
    stage = "build"
    try:
        model = tiny_model(model_type)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        row["layers"] = layer_kinds(model)
        row["experts"] = experts(model)
        stage = "forward"
        tokens = token_batch()
        with torch.no_grad():
            logits = model(input_ids=tokens, use_cache=False).logits
        sound = all(bool(p.isfinite().all()) for p in [*model.parameters(), logits])
        row["forward"] = sound and logits.shape[:2] == tokens.shape
        row["spread"] = float(logits.std())
        stage = "generate"
        row["generate"], row["difference"] = generates(model, tokens)
    except Exception as error:  # noqa: BLE001  (a table of what fails)
        row["error"] = f"{stage}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row["seconds"] = time.perf_counter() - start
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=types(), choices=types(), metavar="TYPE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    say = {True: "yes", False: "no", None: "-"}
    counts: Counter[str] = Counter()
    print(f"{'type':26} {'class':34} parameters forward spread generate difference experts seconds")
    for model_type in options.types:
        row = {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], "seconds": 0.0}
        if model_type in NOT_DECODERS:
            row["error"] = f"no decoder: {NOT_DECODERS[model_type]}"
        else:
            row = check(model_type)
        counts.update(["types", *[name for name in ("parameters", "forward", "generate") if row.get(name)]])
        print(
            f"{model_type:26} {row['class']:34} {row.get('parameters', 0):>10,} {say[row.get('forward')]:7} "
            f"{row.get('spread', 0):6.2f} {say[row.get('generate')]:8} {row.get('difference', 0):10.1e} "
            f"{row.get('experts', '-'):7} {row['seconds']:7.2f}"
        )
        print(*[f"    {line}" for line in row.get("layers", [])], sep="\n", end="\n" if row.get("layers") else "")
        for line in (row.get("error"), REMARKS.get(model_type)):
            if line:
                print(f"    ! {line}")
    print(
        f"{counts['types']} types: {counts['parameters']} are built, {counts['forward']} have finite logits, "
        f"{counts['generate']} generate the same with a cache as without"
    )


if __name__ == "__main__":
    main()
