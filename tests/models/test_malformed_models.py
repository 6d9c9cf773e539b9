"""A hundred broken folders of models and adapters, made by seeded mutations: each is refused in one line."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tiny import save_tiny_model, tiny_model
from zofo.errors import ZofoError
from zofo.models.load import load_model
from zofo.models.peft import attach

SEEDS = range(100)


def tensors_of(folder):
    file = next(folder.glob("*.safetensors"))
    return file, load_file(file)


def some_tensor(tensors, rng, ndim=0):
    return rng.choice(sorted(name for name, tensor in tensors.items() if tensor.ndim >= ndim))


def rewrite(folder, change):
    file, tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def truncate(folder, rng):
    file, _ = tensors_of(folder)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size - 1)])


def damage_the_header(folder, rng):
    file, _ = tensors_of(folder)
    content = bytearray(file.read_bytes())
    content[rng.randrange(8, 40)] = 0
    file.write_bytes(bytes(content))


def lose_a_tensor(folder, rng):
    rewrite(folder, lambda tensors: tensors.pop(some_tensor(tensors, rng)))


def add_a_tensor(folder, rng):
    name = rng.choice(["model.layers.9.mlp.up_proj.weight", "extra", "base_model.model.lora_C.weight"])
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(2, 2)}))


def change_a_shape(folder, rng):
    def change(tensors):
        name = some_tensor(tensors, rng)
        tensors[name] = torch.cat([tensors[name], tensors[name]], dim=rng.randrange(tensors[name].ndim))

    rewrite(folder, change)


def rename_a_tensor(folder, rng):
    def change(tensors):
        name = some_tensor(tensors, rng)
        tensors[name + "_"] = tensors.pop(name)

    rewrite(folder, change)


def make_integers(folder, rng):
    def change(tensors):
        name = some_tensor(tensors, rng, 2)
        tensors[name] = (100 * tensors[name]).to(torch.int8)

    rewrite(folder, change)


def put_a_pickle_in_place(folder, rng):
    file, tensors = tensors_of(folder)
    file.unlink()
    torch.save(tensors, folder / rng.choice(["pytorch_model.bin", "adapter_model.bin", "model.pt"]))


def config_file(folder):
    return next(folder / name for name in ("config.json", "adapter_config.json") if (folder / name).exists())


def remove_the_config(folder, rng):
    config_file(folder).unlink()


def cut_the_config(folder, rng):
    text = config_file(folder).read_text()
    config_file(folder).write_text(text[: rng.randrange(len(text) - 3)])


def set_in_config(folder, **values):
    content = json.loads(config_file(folder).read_text())
    config_file(folder).write_text(json.dumps({**content, **values}))


def hostile_model_value(folder, rng):
    key = rng.choice(["hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size"])
    set_in_config(folder, **{key: rng.choice([-1, 0, 10**9, "x", [1], {}, 1.5e300, None])})


def another_size(folder, rng):
    key = rng.choice(["hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_key_value_heads"])
    value = json.loads(config_file(folder).read_text())[key]
    set_in_config(folder, **{key: value * 2 if key != "num_hidden_layers" else value + rng.choice([-1, 1])})


def another_kind_of_model(folder, rng):
    set_in_config(folder, model_type=rng.choice(["nosuch", "../../model", "", "bert", "t5", None, 7]))


def code_of_its_own(folder, rng):
    kind = rng.choice(["AutoConfig", "AutoModelForCausalLM"])
    set_in_config(folder, model_type="mine", auto_map={kind: "mine.Mine", "AutoConfig": "mine.Config"})
    (folder / "mine.py").write_text("raise SystemExit('code was run')")


def shards_that_are_not_there(folder, rng):
    file, tensors = tensors_of(folder)
    file.unlink()
    save_file(tensors, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    names = rng.choice(["model-00002-of-00002.safetensors", "../other.safetensors", "/etc/passwd", "x.bin"])
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def weights_under_another_name(folder, rng):
    torch.save(tensors_of(folder)[1], folder / "other.bin")
    set_in_config(folder, transformers_weights=rng.choice(["other.bin", "../other.safetensors", "/tmp/x.safetensors"]))


def an_adapter_in_the_same_folder(folder, rng):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}))


def break_the_tokenizer(folder, rng):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[: rng.randrange(1000)])


def hostile_adapter_value(folder, rng):
    key, values = rng.choice([
        ("peft_type", ["nosuch", "", None, 7, "../x"]), ("r", [-1, 0, "x", [1], 7]),
        ("target_modules", [["nosuch"], 7, ["q_proj", "nosuch"][1:], "[", None]),
    ])  # fmt: skip
    set_in_config(folder, **{key: rng.choice(values)})


WEIGHTS = (
    truncate, damage_the_header, lose_a_tensor, add_a_tensor, change_a_shape, rename_a_tensor, put_a_pickle_in_place,
    remove_the_config, cut_the_config,
)  # fmt: skip
OF_MODELS = (
    *WEIGHTS, make_integers, hostile_model_value, hostile_model_value, hostile_model_value, another_size,
    another_kind_of_model, code_of_its_own, shards_that_are_not_there, weights_under_another_name,
    an_adapter_in_the_same_folder, break_the_tokenizer,
)  # fmt: skip
OF_ADAPTERS = (*WEIGHTS, hostile_adapter_value, hostile_adapter_value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folders of a model and an adapter that are as they should be."""
    folder = tmp_path_factory.mktemp("whole")
    save_tiny_model(folder / "model")
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj", "v_proj"])).save_pretrained(folder / "adapter")
    load_model(str(folder / "model"))
    attach(tiny_model(), str(folder / "adapter"))
    return folder


def contents(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


@pytest.mark.filterwarnings("ignore")  # what the libraries say before they fail is theirs
@pytest.mark.parametrize("seed", SEEDS)
def test_a_broken_folder_is_refused_in_one_line(whole, seed, tmp_path):
    rng = random.Random(seed)
    part = rng.choice(["model", "model", "adapter"])
    folder = tmp_path / part
    shutil.copytree(whole / part, folder)
    mutation = rng.choice(OF_MODELS if part == "model" else OF_ADAPTERS)
    mutation(folder, rng)
    before, names = contents(tmp_path), sorted(f.name for f in Path.cwd().iterdir())
    with pytest.raises(ZofoError) as caught:
        load_model(str(folder)) if part == "model" else attach(tiny_model(), str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert part in message
    assert len(message) < 600
    assert contents(tmp_path) == before
    assert sorted(f.name for f in Path.cwd().iterdir()) == names


def test_the_mutations_are_all_used():
    used = set()
    for seed in SEEDS:
        rng = random.Random(seed)
        part = rng.choice(["model", "model", "adapter"])
        used.add(rng.choice(OF_MODELS if part == "model" else OF_ADAPTERS))
    assert used == {*OF_MODELS, *OF_ADAPTERS}
