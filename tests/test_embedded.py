"""The organism is one model in both engines, and a Hugging Face model like any other."""

import shutil

import pytest
import torch
from conftest import padded

from mera_tl import storage
from mera_tl.models import load_model, resid_post
from mera_tl.organism import FOLDER
from mera_tl.tasks import load_task


@pytest.fixture(scope="module")
def engines():
    return [load_model("organism", engine=e) for e in ("hugging_face", "transformer_lens")]


def test_both_engines_give_the_same_logits_and_stream(engines):
    prompts = engines[0].tokenize([e.prompt for e in load_task("spam_cue").examples[:8]])
    for row in prompts:
        tokens, streams = torch.tensor([row]), []
        for model in engines:
            kept: list[torch.Tensor] = []
            hooks = [(resid_post(n), lambda x, hook, kept=kept: kept.append(x)) for n in range(4)]
            with torch.no_grad(), model.hooked.hooks(fwd_hooks=hooks):
                logits = model.next_token_logits(tokens, torch.ones_like(tokens))
            streams.append(torch.cat([torch.cat(kept).flatten(), logits.flatten()]))
        assert (streams[0] - streams[1]).abs().max() < 1e-4


def test_hugging_faces_generate_runs_on_it(engines):
    """Left-padded, on its cache, in a batch: the tokens of a plain loop without either."""
    original = engines[0].hooked.original
    prompts = engines[0].tokenize([e.prompt for e in load_task("spam_cue").examples[:4]])
    tokens, mask = padded(prompts)
    out = original.generate(
        tokens, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    for number, row in enumerate(prompts):
        for step in range(3):
            with torch.no_grad():
                logits = original(torch.tensor([row])).logits[0, -1]
            assert out[number, tokens.shape[1] + step] == logits.argmax()
            row = [*row, int(logits.argmax())]


def test_another_kind_of_hooked_transformer_is_refused(tmp_path):
    folder = shutil.copytree(FOLDER, tmp_path / "other")
    config = storage.read_json(folder / "config.json")
    storage.write_json(folder / "config.json", {**config, "act_fn": "gelu"})
    with pytest.raises(ValueError, match="act_fn='gelu'"):
        load_model(str(folder))
