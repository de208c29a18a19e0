"""Tiny models of many architectures, with random weights and the quickstart's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from copris_lightning.quickstart.warm_start import character_tokenizer

_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_local_experts": 4}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "phi3": {"original_max_position_embeddings": 512},
    "gemma": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 64},
    "gpt2": {
        "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 512, "tie_word_embeddings": True,
    },
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.1, "layerdrop": 0.1},
    "olmo2": {},
    "granite": {"logits_scaling": 1.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "smollm3": {"no_rope_layers": [1, 0]},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**_EXPERTS, "router_jitter_noise": 0.1},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "cohere": {"logit_scale": 0.0625, "tie_word_embeddings": True},
    "gpt_neox": {"tie_word_embeddings": False, "hidden_dropout": 0.1},
    "phimoe": {
        **_EXPERTS, "router_jitter_noise": 0.01, "attention_bias": True, "lm_head_bias": True,
    },
    "deepseek_v3": {
        "moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 32, "num_key_value_heads": 2,
    },
    "gpt_oss": {**_EXPERTS, "layer_types": ["full_attention", "sliding_attention"]},
}  # fmt: skip
"""Model type, and what differs from the common settings."""

REFUSED = {
    "gemma2": "final_logit_softcapping=30.0",
    "cohere": "logit_scale=0.0625",
}
"""Those that cannot be trained, and what the error names."""

NOT_ON_THIS_ENGINE = ("phimoe", "deepseek_v3", "gpt_oss", "gpt_neox")
"""Those that vLLM's CPU build does not run, or computes otherwise (gpt_neox); what is sent of them
is tested all the same."""

TRAINED = [name for name in ARCHITECTURES if name not in {*REFUSED, *NOT_ON_THIS_ENGINE}]
"""Those that are trained."""


def tiny_architecture(model_type: str, directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Saves a random model of an architecture and a character tokenizer in ``directory``."""
    tokenizer = character_tokenizer()
    settings = {**_COMMON, **ARCHITECTURES[model_type], **changes}
    config = AutoConfig.for_model(
        model_type,
        # transformers reads it as Qwen2's own tokenizer, which adds <|endoftext|>.
        vocab_size=len(tokenizer) + (model_type == "qwen2"),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        **settings,
    )
    spread = 0.8 if model_type == "gemma3_text" else 2.0  # its norms make logits large
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            # No two weights alike, norms, biases and buffers of checkpoints included.
            for tensor in model.state_dict().values():
                if tensor.dim() > 1:
                    tensor.normal_(0.0, spread / tensor.shape[-1] ** 0.5)
                else:
                    tensor.add_(0.1 * torch.randn_like(tensor))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
