"""What users do with the Hub, done with adapters of both types. Run by test_hub.py in a process of its own.

Directly: `python -m pytest -p tests.integrations.hub.plugin tests/integrations/hub/checks.py`.
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.adapters.hotswap import hotswap_adapter
from hyperadapt_peft.adapters.loading import load_adapters
from hyperadapt_peft.version import INSTALL
from tests.integrations.conftest import tiny_tokenizer
from tests.tiny import build


CONFIGS = {"hyperadapt": HyperAdaptConfig, "surm": SurmConfig}
WEIGHTS = "adapter_model.safetensors"
api = HfApi()
_, batch, _ = build("llama")


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch).logits


def base_model():
    return AutoModelForCausalLM.from_pretrained("user/base")


def randomize(model, seed=0):
    """Give every trainable parameter values of its own: as after training, and not what `init_weights` makes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


def adapted(method="hyperadapt", seed=0, **config):
    return randomize(get_peft_model(base_model(), CONFIGS[method](task_type="CAUSAL_LM", **config)), seed)


def card(repo):
    return ModelCard.load(repo)


def has_usage(text, method="hyperadapt"):
    lines = (
        f"import hyperadapt_peft  # registers {method.upper()}",
        INSTALL,
        "Base model: `user/base`",
    )
    return all(text.count(line) == 1 for line in lines)


@pytest.fixture(scope="module", autouse=True)
def base(hub):
    build("llama")[0].push_to_hub("user/base")
    return logits(base_model())


@pytest.fixture(scope="module", params=CONFIGS)
def pushed(base, request):
    """A repository with an adapter, and the outputs it must have."""
    model = adapted(request.param)
    repo = f"user/{request.param}"
    model.push_to_hub(repo, tags=["mine"])
    assert set(api.list_repo_files(repo)) == {"README.md", "adapter_config.json", WEIGHTS}
    assert not torch.equal(logits(model), base)
    return repo, logits(model)


def native(repo, **kwargs):
    model = base_model()
    model.load_adapter(repo, **kwargs)
    return model


# Round trips


@pytest.mark.parametrize(
    "pull",
    [
        lambda repo: PeftModel.from_pretrained(base_model(), repo),
        AutoPeftModelForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        native,
    ],
    ids=["PeftModel", "AutoPeftModel", "AutoModel", "load_adapter"],
)
def test_outputs_are_bit_identical_after_push_and_pull(pushed, pull):
    repo, expected = pushed
    assert torch.equal(logits(pull(repo)), expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_push_of_a_transformers_model_with_an_adapter(method):
    model = base_model()
    model.add_adapter(CONFIGS[method]())
    repo, expected = f"user/native-{method}", logits(randomize(model))
    model.push_to_hub(repo)
    for pulled in (PeftModel.from_pretrained(base_model(), repo), AutoModelForCausalLM.from_pretrained(repo)):
        assert torch.equal(logits(pulled), expected)
    assert has_usage(card(repo).text, method)


def test_revisions():
    models = {revision: adapted(seed=seed) for seed, revision in enumerate(["main", "v2"])}
    for revision, model in models.items():
        model.push_to_hub("user/versions", revision=revision)
    api.create_tag("user/versions", tag="release", revision="v2")
    commit = api.model_info("user/versions", revision="v2").sha
    swapped = adapted(seed=2)
    for revision in ("v2", "main", "release", commit):
        expected, options = logits(models["main" if revision == "main" else "v2"]), {"revision": revision}
        pulled = PeftModel.from_pretrained(base_model(), "user/versions", **options)
        hotswap_adapter(swapped, "user/versions", **options)
        for model in (pulled, native("user/versions", adapter_kwargs=options), swapped):
            assert torch.equal(logits(model), expected)
    auto = AutoPeftModelForCausalLM.from_pretrained("user/versions", revision="v2")
    assert torch.equal(logits(auto), expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_several_adapters_in_one_repository(method):
    model = adapted(method)
    model.add_adapter("other", CONFIGS[method](task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.set_adapter("other")
    randomize(model, seed=1)
    repo = f"user/several-{method}"
    model.push_to_hub(repo)
    assert f"other/{WEIGHTS}" in api.list_repo_files(repo)

    expected = {"other": logits(model)}
    model.set_adapter("default")
    expected["default"] = logits(model)
    pulled = PeftModel.from_pretrained(base_model(), repo)
    pulled.load_adapter(repo, "other", subfolder="other")
    for name, output in expected.items():
        pulled.set_adapter(name)
        assert torch.equal(logits(pulled), output)
    assert torch.equal(logits(native(repo, adapter_kwargs={"subfolder": "other"})), expected["other"])
    direct = PeftModel.from_pretrained(base_model(), repo, subfolder="other")
    assert torch.equal(logits(direct), expected["other"])
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
        PeftModel.from_pretrained(base_model(), repo, subfolder="absent")


@pytest.mark.parametrize("method", CONFIGS)
def test_many_repositories_at_once(method):
    pushed, expected = {}, {}
    for seed, name in enumerate(["one", "two", "three"]):
        model = adapted(method, seed)
        pushed[name] = f"user/many-{method}-{name}"
        model.push_to_hub(pushed[name], revision="v1")
        expected[name] = logits(model)
    pulled = adapted(method, seed=9)
    before = logits(pulled)
    with pytest.raises(ValueError, match="The adapter absent of user/absent cannot be loaded, and so none was"):
        load_adapters(pulled, {**pushed, "absent": "user/absent"}, revision="v1")
    assert list(pulled.peft_config) == ["default"] and torch.equal(logits(pulled), before)
    load_adapters(pulled, pushed, revision="v1")
    for name, output in expected.items():
        pulled.set_adapter(name)
        assert torch.equal(logits(pulled), output)
        assert pulled.peft_config[name].base_model_name_or_path == "user/base"


def snippet(repo):
    """The Python of a repository's card, filled in."""
    code = re.search(r"```python\n(.*?)```", card(repo).text, re.DOTALL).group(1)
    return code.replace('"..."', repr(repo)).replace("base_model = ...", "base_model = base_model()")


def test_a_new_process_without_a_network_needs_the_card_only(hub, tmp_path):
    code, expected = "import torch; from tests.integrations.hub.checks import base_model, logits\n", {}
    for method in CONFIGS:
        repo, model = f"user/offline-{method}", adapted(method)
        model.push_to_hub(repo)
        PeftModel.from_pretrained(base_model(), repo)  # into the cache
        code += f"{snippet(repo)}\ntorch.save(logits(model), {str(tmp_path / method)!r})\n"
        expected[method] = logits(model)
    requests = len(hub.log)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(torch.equal(torch.load(tmp_path / method), expected[method]) for method in CONFIGS)
    assert len(hub.log) == requests


# Refusals


@pytest.fixture(scope="module")
def private():
    model = adapted()
    model.push_to_hub("user/private", private=True)
    return logits(model)


def causes(error):
    """The chain of exceptions that a traceback shows: PEFT says what was not found, the client says why."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def test_a_private_repository_with_a_token(private):
    assert torch.equal(logits(PeftModel.from_pretrained(base_model(), "user/private")), private)
    assert torch.equal(logits(native("user/private", adapter_kwargs={"token": os.environ["HF_TOKEN"]})), private)


@pytest.mark.parametrize(
    "repo, options, cause, message",
    [
        ("private", {"token": False}, RepositoryNotFoundError, "401 .*make sure you are authenticated"),
        ("private", {"token": "hf_wrong"}, HfHubHTTPError, "401 .*Invalid credentials"),
        ("absent", {}, RepositoryNotFoundError, "404 .*Repository Not Found for url: .*/user/absent/"),
        ("private", {"revision": "v9"}, RevisionNotFoundError, "Revision Not Found for url: .*/resolve/v9/"),
        ("gated", {}, GatedRepoError, "403 .*Cannot access gated repo"),
    ],
    ids=["no token", "wrong token", "no repository", "no revision", "gated"],
)
def test_what_cannot_be_had_is_refused(hub, base, private, repo, options, cause, message, tmp_path):
    options = {**options, "cache_dir": tmp_path}
    if repo == "gated" and "user/gated" not in hub.repos:
        adapted().push_to_hub("user/gated")
        hub.repos["user/gated"].gated = True
    model = base_model()
    with pytest.raises(ValueError, match=f"Can't find 'adapter_config.json' at 'user/{repo}'") as refusal:
        PeftModel.from_pretrained(model, f"user/{repo}", **options)
    reason = next(error for error in causes(refusal.value) if isinstance(error, cause))
    assert re.search(message, str(reason), re.DOTALL)
    with pytest.raises((OSError, ValueError), match=f"user/{repo}|v9"):
        model.load_adapter(f"user/{repo}", adapter_kwargs=options)
    assert torch.equal(logits(model), base) and not hasattr(model, "peft_config")


DAMAGES = {  # what arrives, and who refuses it
    "half": (lambda data: data[: len(data) // 2], OSError, "Consistency check failed: file should be of size"),
    "header": (lambda data: b"\xff" * 8 + data[8:], SafetensorError, "header too large"),
    "names": (lambda data: data[:20] + b"\0" * 20 + data[40:], SafetensorError, "invalid JSON in header"),
}
STORED = {
    "half": (DAMAGES["half"][0], SafetensorError, "incomplete metadata, file not fully covered|header too large"),
    "appended": (lambda data: data + b"more", SafetensorError, "incomplete metadata, file not fully covered"),
    "empty": (lambda data: b"", SafetensorError, "header too small"),
}


@pytest.mark.parametrize("damage", [*DAMAGES, *(f"stored {name}" for name in STORED)])
def test_a_damaged_file_is_refused_and_outputs_stay(hub, base, damage, tmp_path):
    repo, model = f"user/damaged-{damage.replace(' ', '-')}", adapted("hyperadapt" if damage in DAMAGES else "surm")
    model.push_to_hub(repo)
    do, error, message = DAMAGES.get(damage) or STORED[damage.removeprefix("stored ")]
    if damage in DAMAGES:  # on its way
        hub.damage = lambda path, data: do(data) if path.startswith(f"/{repo}/") and path.endswith(WEIGHTS) else data
    else:  # on the Hub, with the right headers for it
        files = hub.repos[repo].commits[api.model_info(repo).sha]
        files[WEIGHTS] = do(files[WEIGHTS])
    expected = logits(model)
    plain = base_model()
    try:
        with pytest.raises(error, match=message):
            model.load_adapter(repo, "other")
        with pytest.raises((OSError, SafetensorError)):
            plain.load_adapter(repo, adapter_kwargs={"cache_dir": tmp_path})
    finally:
        hub.damage = None
    assert torch.equal(logits(model), expected) and model.active_adapter == "default"
    assert torch.equal(logits(plain), base)
    if damage in DAMAGES:  # the client may have kept the damaged file
        model.load_adapter(repo, "other", force_download=True)
        model.set_adapter("other")
        assert torch.equal(logits(model), expected)


def test_a_dropped_connection_is_resumed(hub):
    model = adapted()
    model.push_to_hub("user/dropped")
    PeftConfig.from_pretrained("user/dropped")  # only the weights are left to download
    body = len(hub.repos["user/dropped"].commits[api.model_info("user/dropped").sha][WEIGHTS])
    plain, hub.drop_after = base_model(), body // 2
    assert torch.equal(logits(PeftModel.from_pretrained(plain, "user/dropped")), logits(model))
    assert hub.drop_after is None


# The card


def test_the_card_survives_the_push(pushed):
    repo, _ = pushed
    method = repo.removeprefix("user/")
    pushed_card = card(repo)
    assert has_usage(pushed_card.text, method)
    assert {"mine", method} <= set(pushed_card.data.tags) and pushed_card.data.base_model == "user/base"


def test_a_second_push_keeps_what_was_written_by_hand():
    model = adapted()
    model.push_to_hub("user/edited")
    edited = card("user/edited")
    edited.text += "\nWritten by hand.\n"
    edited.data.license = "mit"
    edited.push_to_hub("user/edited")
    randomize(model, seed=1).push_to_hub("user/edited", tags=["second"])
    again = card("user/edited")
    assert has_usage(again.text) and "Written by hand." in again.text
    assert again.data.license == "mit" and {"second", "hyperadapt"} <= set(again.data.tags)


def test_the_card_of_a_repository_without_a_default_adapter_names_the_subfolder():
    model = get_peft_model(base_model(), SurmConfig(task_type="CAUSAL_LM"), adapter_name="other")
    randomize(model).push_to_hub("user/other")
    assert has_usage(card("user/other").text, "surm")
    names = {"base_model": base_model}
    exec(snippet("user/other"), names)  # noqa: S102
    assert torch.equal(logits(names["model"]), logits(model))


def test_the_card_of_a_pushed_config():
    HyperAdaptConfig(base_model_name_or_path="user/base").push_to_hub("user/config")
    assert has_usage(card("user/config").text)
    assert isinstance(PeftConfig.from_pretrained("user/config"), HyperAdaptConfig)


@pytest.mark.parametrize("how", ["PeftModel", "add_adapter"])
def test_the_card_of_a_trainer(how, tmp_path):
    if how == "PeftModel":
        model = adapted()
    else:
        model = base_model()
        model.add_adapter(HyperAdaptConfig())
    rows = [{key: value[0] for key, value in batch.items()}] * 2
    repo = f"trainer-{how.lower()}"
    arguments = TrainingArguments(str(tmp_path / repo), max_steps=1, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.push_to_hub()
    pulled = PeftModel.from_pretrained(base_model(), f"user/{repo}")
    assert torch.equal(logits(pulled), logits(model))
    text = card(f"user/{repo}").text
    assert "## Training procedure" in text and has_usage(text)


def test_the_card_of_sentence_transformers(tmp_path):
    st = pytest.importorskip("sentence_transformers")
    build("bert")[0].bert.push_to_hub("user/encoder")
    tiny_tokenizer().push_to_hub("user/encoder")
    model = st.SentenceTransformer("user/encoder", device="cpu")
    model.add_adapter(HyperAdaptConfig(task_type="FEATURE_EXTRACTION"))
    model.push_to_hub("user/sentences")
    text = card("user/sentences").text
    assert "SentenceTransformer(" in text and text.count("import hyperadapt_peft ") == 1


def test_other_uploads_are_left_alone(tmp_path):
    model = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    model.push_to_hub("user/lora")
    text = card("user/lora").content
    assert "hyperadapt" not in text.lower() and "library_name: transformers" in text  # transformers' card, as ever
    adapted().save_pretrained(tmp_path / "adapter")
    project = "---\nlicense: mit\n---\n# A project\n"
    (tmp_path / "README.md").write_text(project)
    (tmp_path / "adapter_config.json").write_text("no JSON")
    api.upload_folder(repo_id="user/lora", folder_path=tmp_path)
    assert card("user/lora").content == project
