"""With transformer-lens 4, which has no `HookedTransformer`: all but one engine works.

Run by `make test-next` in an environment of its own; skipped where transformer-lens is older.
"""

from importlib.metadata import version

import pytest

import mera_tl
from mera_tl.models import describe_models, load_model

pytestmark = pytest.mark.skipif(
    int(version("transformer-lens").split(".")[0]) < 4, reason="transformer-lens is older than 4"
)


def test_every_module_imports():
    import importlib
    import pkgutil

    for module in pkgutil.walk_packages(mera_tl.__path__, "mera_tl."):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as absent:  # an extra that this environment lacks is named
            assert "mera-tl[evals]" in str(absent), module.name


def test_the_organism_is_read_probed_and_steered():
    model = load_model("organism")
    assert model.engine == "hugging_face"
    train, _, test = mera_tl.load_task("spam_cue").split(seed=0)
    probe = mera_tl.fit_error_probe(mera_tl.collect(model, train))
    plain = mera_tl.evaluate(model, test)
    hooks = mera_tl.Steering(probe).at(0.3).fwd_hooks()
    steered = mera_tl.evaluate(model, test, hooks)
    assert 0.5 < plain.accuracy < 0.8 and steered.n_steered.sum() > 0
    assert (steered.probs - plain.probs).abs().max() > 0.01


def test_a_checkpoint_of_a_family_runs_as_hugging_face_does(checkpoints):
    for path in checkpoints.values():
        assert load_model(str(path), device="cpu").engine == "hugging_face"


def test_what_needs_transformer_lens_3_says_so(checkpoints):
    with pytest.raises(ValueError, match="transformer-lens>=3.9,<4"):
        load_model(str(checkpoints["llama"]), device="cpu", engine="transformer_lens")
    from mera_tl.sae import load_saes

    with pytest.raises(ValueError, match="transformer-lens 3"):
        load_saes("organism", "all", load_model("organism"))
    assert {model["engine"] for model in describe_models("gpt2")} == {"hugging_face"}
