"""Steerings that leave mera_tl: as a control vector, and as a few lines of torch."""

import contextlib
import io
from dataclasses import replace

import pytest
import torch
from conftest import certified, random_probe, talking_task

from mera_tl import Adaptive, Additive, Steering
from mera_tl.steering import control_vectors, export_control_vector, generate


@pytest.fixture
def additive(models):
    return Steering(random_probe(models["llama"]), rule=Additive(0.7), layers=(1, 2))


def test_a_control_vector_is_read_back_as_the_shift_of_every_token(models, additive, tmp_path):
    gguf = pytest.importorskip("gguf")
    path = export_control_vector(additive, tmp_path / "new" / "vector.gguf")
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ValueError, match="cannot be written"):
        export_control_vector(additive, path / "vector.gguf")
    tensors = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(path).tensors}
    assert sorted(tensors) == ["direction.1", "direction.2"]
    ids = torch.tensor([[4, 5, 6, 7]])
    for layer, vector in ((1, tensors["direction.1"]), (2, tensors["direction.2"])):
        name, hook = additive.fwd_hooks()[layer - 1]
        resid = torch.randn(1, 4, 32)
        point = models["llama"].hooked.hook_dict[name]
        torch.testing.assert_close(hook(resid, point) - resid, vector.expand(1, 4, 32))
    # llama.cpp adds them to the output of layers 1 and 2: so does this, with the same logits.
    model = models["llama"]
    add = [
        (f"blocks.{layer}.hook_resid_post", lambda r, hook, v=tensors[f"direction.{layer}"]: r + v)
        for layer in (1, 2)
    ]
    both = [model.hooked.run_with_hooks(ids, fwd_hooks=h) for h in (add, additive.fwd_hooks())]
    torch.testing.assert_close(*both)


def test_the_command_line_exports_what_was_certified(models, additive, tmp_path, mera):
    gguf = pytest.importorskip("gguf")
    decision = certified(models["llama"], talking_task(models["llama"]), additive)
    folder, path = decision.save(tmp_path / "steering"), tmp_path / "vector.gguf"
    assert mera("export", "--steering", folder, "-o", path).out.strip() == str(path)
    tensors = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(path).tensors}
    for layer, vector in control_vectors(additive).items():
        assert torch.equal(tensors[f"direction.{layer}"], torch.tensor(vector))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rule": Adaptive(0.0)}, "moves each token as far as its score asks"),
        ({"layers": (0, 1)}, "cannot steer layer 0"),
        ({"positions": "last"}, "to every token, not only 'last'"),
        ({"first_k": 4}, "cannot stop a control vector"),
        ({"direction": torch.ones(2, 3, 32)}, "depends on the answer"),
    ],
)
def test_what_llama_cpp_cannot_apply_is_refused(additive, tmp_path, change, reason):
    with pytest.raises(ValueError, match=reason):
        export_control_vector(replace(additive, **change), tmp_path / "vector.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        *(("llama", positions) for positions in ("all", "last", "final", "generated")),
        ("gemma2", "all"),
        ("gpt2", "last"),
    ],
)
def test_the_lines_in_the_readme_generate_the_same_tokens(
    models, checkpoints, tmp_path, monkeypatch, family, positions
):
    model, task = models[family], talking_task(models[family])
    steering = Steering(random_probe(model, scale=3.0), positions=positions).at(0.3)
    folder = certified(model, task, steering).save(tmp_path / "steering")
    card = (folder / "README.md").read_text()
    code = card.split("Without `mera_tl`")[1].split("```python\n")[1].split("```")[0]
    lines = [x for x in code.splitlines() if x and not x.startswith(("import", "from"))]
    assert "mera_tl" not in code and len(lines) <= 18
    prompt = task.examples[0].prompt
    code = code.replace('"MODEL"', repr(str(checkpoints[family]))).replace("PROMPT", prompt)
    monkeypatch.chdir(folder)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        scope = {}
        exec(code, scope)
    (said,) = scope["model"].generate(**scope["tokens"], max_new_tokens=8, do_sample=False)
    n = scope["tokens"]["input_ids"].shape[1]
    (reply,) = generate(model, [prompt], steering, max_new_tokens=8)
    end = 8 if 2 not in said[n:].tolist() else said[n:].tolist().index(2)
    assert tuple(said[n : n + end].tolist()) == reply.tokens
    assert prompt.split()[0] in out.getvalue()
