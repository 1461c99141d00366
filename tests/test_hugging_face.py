"""Any decoder-only model of transformers: the original's numbers, padded, cached and steered."""

from functools import cache

import pytest
import torch
from conftest import GPT2, LLAMA3, SHAPE, original, padded, save_random_checkpoint

from mera_tl.models import decoder_layers, load_model, resid_post

MHA = SHAPE | {"num_key_value_heads": 4}
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
WINDOW = dict(use_sliding_window=True, sliding_window=4, max_window_layers=1)
GEMMA = dict(head_dim=8, sliding_window=4, query_pre_attn_scalar=8)
CAPS = dict(attn_logit_softcapping=5.0, final_logit_softcapping=3.0)
OPT = dict(
    vocab_size=64,
    hidden_size=32,
    ffn_dim=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
    word_embed_proj_dim=32,
)
MOE = SHAPE | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8)
BIASES = dict(attention_bias=True, mlp_bias=True)
KINDS = {
    "llama, llama3 rope": ("Llama", SHAPE | {"rope_parameters": LLAMA3}, "transformer_lens"),
    "llama, yarn rope": ("Llama", SHAPE | {"rope_parameters": YARN}, "hugging_face"),
    "llama, biases": ("Llama", SHAPE | BIASES, "hugging_face"),
    "qwen2, window": ("Qwen2", SHAPE | WINDOW, "transformer_lens"),
    "qwen2, a key per head": ("Qwen2", MHA, "transformer_lens"),
    "qwen3": ("Qwen3", SHAPE | {"head_dim": 8}, "transformer_lens"),
    "gemma2, caps": ("Gemma2", SHAPE | GEMMA | CAPS, "transformer_lens"),
    "gemma2, biases": ("Gemma2", SHAPE | GEMMA | {"attention_bias": True}, "hugging_face"),
    "gemma2, a key per head": ("Gemma2", MHA | GEMMA, "transformer_lens"),
    "gemma2, another activation": (
        "Gemma2",
        SHAPE | GEMMA | {"hidden_activation": "silu"},
        "hugging_face",
    ),
    "gemma3": ("Gemma3Text", SHAPE | GEMMA | {"sliding_window_pattern": 2}, "hugging_face"),
    "mistral": ("Mistral", SHAPE | {"sliding_window": 4}, "transformer_lens"),
    "phi3": ("Phi3", SHAPE, "hugging_face"),
    "olmo2": ("Olmo2", SHAPE, "hugging_face"),
    "gpt2": ("GPT2", GPT2, "transformer_lens"),
    "gpt_neox": ("GPTNeoX", MHA, "hugging_face"),
    "opt": ("OPT", OPT, "hugging_face"),
    "granite": ("Granite", SHAPE | {"logits_scaling": 8.0}, "hugging_face"),
    "smollm3": ("SmolLM3", SHAPE, "hugging_face"),
    "qwen3_moe": ("Qwen3Moe", MOE, "hugging_face"),
    "cohere": ("Cohere", SHAPE, "hugging_face"),
}
"""What the checkpoint is, and the engine that "auto" chooses for it."""
ROWS = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(3)).tolist()
ROWS = [ROWS[0], ROWS[1][:5], ROWS[2][:8]]
known_original = cache(original)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    import transformers

    @cache
    def make(kind):
        name, settings, _ = KINDS[kind]
        config = getattr(transformers, f"{name}Config")(**settings)
        folder = tmp_path_factory.mktemp("families") / "any"
        return str(save_random_checkpoint(config, folder))

    return make


def push(resid):
    """Shift along a fixed direction, by a length that depends on the activation."""
    step = torch.linspace(-1, 1, resid.shape[-1], dtype=resid.dtype) / resid.shape[-1] ** 0.5
    return resid - ((resid @ step).abs() + 0.3)[..., None] * step


def by_hand(folder, row, steered):
    """The original alone, without padding and cache, steered by plain forward hooks."""
    model, streams = known_original(folder), []

    def hook(module, args, output):
        stream = output[0] if isinstance(output, tuple) else output
        stream = push(stream) if steered else stream
        streams.append(stream[0])
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    handles = [layer.register_forward_hook(hook) for layer in decoder_layers(model)]
    with torch.no_grad():
        logits = model(torch.tensor([row]), use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits, torch.stack(streams)


def in_a_batch(model, steered, cached):
    """Logits of the last token of every row, all of them left-padded in one batch."""
    (tokens, mask), layers = padded(ROWS), range(model.n_layers)
    hooks = [(resid_post(n), lambda resid, hook: push(resid)) for n in layers] if steered else []
    with torch.no_grad(), model.hooked.hooks(fwd_hooks=hooks):
        if not cached:
            return model.next_token_logits(tokens, mask)
        memory = model.new_cache(len(ROWS))
        model.next_token_logits(tokens[:, :-2], mask[:, :-2], memory)
        model.next_token_logits(tokens[:, -2:-1], mask[:, -2:-1], memory)
        # Take the token before last back and run it again.
        return model.next_token_logits(tokens[:, -2:], mask[:, -2:], memory.drop_last())


@pytest.mark.parametrize("kind", KINDS)
def test_both_engines_equal_hugging_face(kind, folder_of):
    folder = folder_of(kind)
    plain, steered = ([by_hand(folder, row, s) for row in ROWS] for s in (False, True))
    assert plain[0][0].std() > 0.05 and (plain[0][0] - steered[0][0]).abs().max() > 0.01
    model = load_model(folder, device="cpu")
    assert model.engine == KINDS[kind][2]
    for engine in {"hugging_face", model.engine}:
        model = load_model(folder, device="cpu", engine=engine, check=False)
        for wanted, is_steered in ((plain, False), (steered, True)):
            last = torch.stack([logits[-1] for logits, _ in wanted])
            for cached in (False, True):
                logits = in_a_batch(model, is_steered, cached)
                assert (logits - last).abs().max() < 1e-4 * last.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", ["llama, llama3 rope", "gpt2", "gemma3"])
def test_stopping_at_a_layer_gives_its_residual_stream(kind, folder_of):
    model = load_model(folder_of(kind), device="cpu", engine="hugging_face", check=False)
    _, streams = by_hand(folder_of(kind), ROWS[0], steered=False)
    for layer in range(model.n_layers):
        with torch.no_grad():
            resid = model.hooked(torch.tensor([ROWS[0]]), stop_at_layer=layer + 1)
        assert (resid[0] - streams[layer]).abs().max() < 1e-5
    assert not any(point.functions for point in model.hooked.hook_dict.values())


def test_the_head_gets_its_rows_in_one_piece(folder_of):
    """A slice of the stream takes torch 5 times as long, and 500 times in bfloat16."""
    model = load_model(folder_of("gemma3"), device="cpu", engine="hugging_face", check=False)
    head, came, passed = model.hooked.original.get_output_embeddings(), [], []
    head.register_forward_pre_hook(lambda _, x: came.append(x[0].is_contiguous()), prepend=True)
    head.register_forward_pre_hook(lambda _, x: passed.append(x[0].is_contiguous()))
    in_a_batch(model, steered=True, cached=True)
    assert len(passed) == 3 and all(passed)
    assert not all(came)  # otherwise this shows nothing


def test_what_is_no_plain_decoder_is_refused(tmp_path):
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    folder = save_random_checkpoint(config, tmp_path)
    with pytest.raises(ValueError, match="cannot be run here|does not load"):
        load_model(str(folder), device="cpu")
