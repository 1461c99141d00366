"""Readout `options` against lm-evaluation-harness, on a multiple-choice task of its own format."""

import json

import pytest
import torch
from conftest import SHARED

from mera_tl.inference import evaluate
from mera_tl.models import load_model
from mera_tl.tasks import Example, Task

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra: pip install 'mera-tl[evals]'")

SMS = SHARED / "models" / "sms-llama"
TEXTS = ("win a free prize now", "see you at home", "ok , bring the red bird", "urgent ! call us")


def log_likelihoods(path, prompts, choices, folder):
    """Return what the harness gives every choice after every prompt, "prompt choice"."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = "\n".join(json.dumps({"prompt": prompt, "gold": 0}) for prompt in prompts)
    (folder / "rows.jsonl").write_text(rows)
    config = {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": choices,
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "choice.yaml").write_text(json.dumps(config))  # JSON is YAML
    result = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(path), device="cpu", batch_size=4, dtype="float32"),
        tasks=["local_choice"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = sorted(result["samples"]["local_choice"], key=lambda sample: sample["doc_id"])
    return torch.tensor([[float(r[0]) for r in s["filtered_resps"]] for s in samples])


@pytest.mark.parametrize("which", ["tiny", "sms-llama"])
def test_options_agree_with_lm_evaluation_harness(which, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    if which == "sms-llama" and not SMS.is_dir():
        pytest.skip("sms-llama is not at hand")
    path = SMS if which == "sms-llama" else checkpoints["llama"]
    options = ("spam", "ham") if which == "sms-llama" else ("good film", "bird")
    forms = [(o, o.upper(), o.capitalize()) if which == "sms-llama" else (o,) for o in options]
    variants = [[space + f for f in every for space in ("", " ")] for every in forms]
    if which == "tiny":  # its tokenizer drops spaces: both are one variant
        variants = [each[:1] for each in variants]
    prompts = [f"question : {text} . spam or ham ? answer :" for text in TEXTS]
    examples = tuple(Example(i, prompt, options, 0) for i, prompt in enumerate(prompts))
    task = Task("sms", examples, "all")
    model = load_model(str(path), device="cpu")
    run = evaluate(model, task)
    logs = log_likelihoods(path, prompts, [v for each in variants for v in each], tmp_path)
    sums = logs.reshape(len(prompts), len(options), -1).logsumexp(-1).softmax(-1)
    assert (run.probs - sums).abs().max() < 1e-4
    one = logs.reshape(len(prompts), len(options), -1)[..., 0].softmax(-1)
    if which == "sms-llama":  # control: a single variant is not what is read
        assert (run.probs - one).abs().max() > 1e-3
