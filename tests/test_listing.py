"""What `mera models` lists: causal language models, with family, size and engine."""

from mera_tl.models import describe_models, model_names


def test_names_are_of_causal_language_models():
    names = model_names()
    assert names[0] == "organism" and "google/gemma-2-2b" in names[:8] and len(names) > 1000
    assert not any("t5-small" in name or "hubert" in name for name in names)


def test_what_is_refused_as_quantised_is_not_listed():
    names = model_names()
    refused = ("4bit", "8bits", "-AWQ", "-GPTQ-Int4", "-quantized.w8a8", "-FP8")
    assert not [name for name in names if name.endswith(refused)]
    assert [name for name in names if "16bit" in name] and "Qwen/Qwen2.5-3B" in names


def test_a_description_has_family_size_engine_and_where_it_is():
    (found,) = [m for m in describe_models("gemma-2-2B") if m["name"] == "google/gemma-2-2b"]
    assert found["family"] == "Gemma2ForCausalLM" and found["size"] == "2B"
    assert found["engine"] == "transformer_lens" and found["offline"] in (True, False)
    phi = describe_models("Phi3ForCausalLM")
    assert phi and {model["engine"] for model in phi} == {"hugging_face"}
    assert describe_models("organism")[0]["offline"] is True
    assert describe_models("no such model") == []
