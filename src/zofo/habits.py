"""What users of other libraries and of MeZO's scripts write by habit, and what to write here: data for the messages."""

import re
from collections.abc import Collection, Iterable, Mapping, Sized
from pathlib import Path
from typing import Any, cast

from zofo.errors import ZofoError, did_you_mean

# Keys that have another name here.
RENAMED = {
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps",
    "accumulation_steps": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "num_steps": "max_steps",
    "train_steps": "max_steps",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "max_len": "max_length",
    "model_max_length": "max_length",
    "model_name_or_path": "model",
    "model_name": "model",
    "base_model": "model",
    "pretrained": "model",
    "torch_dtype": "dtype",
    "precision": "dtype",
    "evaluation_strategy": "eval_strategy",
    "wd": "weight_decay",
    "warmup": "warmup_steps",
    "grad_clip": "max_grad_norm",
    "optimizer": "optim",
    "optimizer_in_bwd": "optimizer_in_backward",
    "scheduler": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "patience": "early_stopping_patience",
    "resume": "resume_from_checkpoint",
    "output": "output_dir",
    "out_dir": "output_dir",
    "output_folder": "output_dir",
    "no_cuda": "use_cpu",
    "train_file": "data",
    "data_path": "data",
    "data_files": "data",
    "text_column": "text",
    "label_column": "label",
    "task_name": "task",
    "trainer": "method",
    "num_train": "train_size",
    "num_dev": "dev_size",
    "num_eval": "test_size",
    "eps": "zo_eps",
    "epsilon": "zo_eps",
    "zo_epsilon": "zo_eps",
    "zo_lr": "zo_learning_rate",
    "upper_lr": "upper_learning_rate",
    "reward_funcs": "reward",
    "reward_function": "reward",
    "max_completion_length": "max_new_tokens",
    "lower_lr": "learning_rate",
    "lambda": "penalty",
    "system": "system_prompt",
}
_PEFT_FILE = "write a PEFT config with LoraConfig(...).save_pretrained(FOLDER) and give adapter: FOLDER"
_LOADED = "zofo train loads models itself; in Python, give ZOFOTrainer a model that from_pretrained has loaded so"
_QUANTISED = "give a model that is stored quantised, with method: fo and an adapter (docs/models.md)"
_TASK_FILE = "write a task file with source: ID, or ID:CONFIG, and give it as task (docs/tasks.md)"
_ANSWER_ONLY = "the loss is that of the answer alone: leave it out"
_UNPACKED = "batches hold rows of similar length instead, and options share their prompt: leave it out"
# Other keys that have no effect here or do not exist.
INSTEAD = {
    "do_train": "zofo train always trains; method: none does not",
    "do_eval": "give eval_steps to evaluate during a run",
    "do_predict": "zofo train always scores the test rows at the end",
    "bf16": "it switches autocast on, which zofo does not use: set dtype: bfloat16",
    "fp16": "it switches autocast on, which zofo does not use: set dtype: float16",
    "bf16_full_eval": "set dtype: bfloat16",
    "fp16_full_eval": "set dtype: float16",
    "auto_find_batch_size": "see zofo estimate, and set per_device_train_batch_size and gradient_accumulation_steps",
    "accelerator_config": "set gradient_accumulation_steps",
    "ignore_data_skip": "a run that is resumed goes on with the rows that are next",
    "push_to_hub": "upload the run folder with hf upload",
    "warmup_ratio": "write warmup_steps: a number below 1 is a fraction of the run",
    "packing": _UNPACKED,
    "eval_packing": _UNPACKED,
    "group_by_length": _UNPACKED,
    "completion_only_loss": _ANSWER_ONLY,
    "assistant_only_loss": _ANSWER_ONLY,
    "dataset_text_field": "a row has a prompt and an answer: write a task file, or give data, text and label",
    "dataset_name": _TASK_FILE,
    "dataset_config": _TASK_FILE,
    "dataset_config_name": _TASK_FILE,
    "dataset": f"for a file give data, text and label; for a Hub data set {_TASK_FILE}",
    "use_peft": "write adapter: lora, or adapter: none without one",
    "use_lora": "write adapter: lora, or adapter: none without one",
    "lora": "write adapter: lora",
    "prefix_tuning": "write adapter: prefix",
    "lora_rank": "write lora_r",
    "lora_dropout": _PEFT_FILE,
    "lora_modules_to_save": _PEFT_FILE,
    "load_in_4bit": _QUANTISED,
    "load_in_8bit": _QUANTISED,
    "model_init_kwargs": _LOADED,
    "attn_implementation": _LOADED,
    "trust_remote_code": "zofo never runs code from a model's own folder: leave it out",
    "early_stopping_threshold": "any improvement counts: leave it out, and give early_stopping_patience",
    "device": "a GPU is used where torch sees one: leave it out, or set use_cpu: true",
    "linear_probing": "write zo_parameters: [head]",
}

_FO_LORA = "write method: fo with adapter: lora"
_QLORA = "LoRA on a quantised model is method: fo with adapter: lora and a model that is stored quantised"
_OTHER_PEFT = "write its config with config.save_pretrained(FOLDER) and give adapter: FOLDER (docs/models.md)"
# Values of keys, in lower case, with `_` for `-`.
VALUES = {
    "method": {
        "lora": f"LoRA is an adapter: {_FO_LORA}",
        "qlora": f"{_QLORA} (docs/models.md)",
        "peft": f"PEFT by backpropagation: {_FO_LORA}, prefix or prompt",
        "fo_lora": _FO_LORA,
        "prefix": "prefix tuning is an adapter: write method: fo with adapter: prefix",
        "prompt": "prompt tuning is an adapter: write method: fo with adapter: prompt",
        "mezo": "write method: zo with adapter: none",
        "mezo_lora": "write method: zo with adapter: lora",
        "zo_sgd": "write method: zo with adapter: none",
        "sft": "write method: fo, with adapter: lora, or adapter: none to train all weights",
        "ft": "write method: fo with adapter: none",
        "full": "full fine-tuning: write method: fo with adapter: none",
        "finetune": "full fine-tuning: write method: fo with adapter: none",
        "regular": "write method: fo with adapter: none",
        "zofo": "Bilevel ZOFO: write method: bilevel",
        "bilevel_zofo": "write method: bilevel",
        "zero_shot": "write method: none",
        "zeroshot": "write method: none",
    },
    "adapter": {
        "qlora": f"{_QLORA} (docs/models.md)",
        "dora": f"DoRA is LoraConfig(use_dora=True): {_OTHER_PEFT}",
        "ia3": _OTHER_PEFT,
        "adalora": "AdaLoRA keeps some of its parameters fixed, which zofo refuses: write lora",
        "full": "write adapter: none to train without one",
        "no": "write adapter: none to train without one",
        "prefix_tuning": "write adapter: prefix",
        "prompt_tuning": "write adapter: prompt",
    },
    "dtype": {
        "bf16": "write bfloat16",
        "fp16": "write float16",
        "half": "write float16",
        "fp32": "write float32",
        "float": "write float32",
        "auto": "write float32, bfloat16 or float16",
    },
    "optim": {
        "adam": "write adamw_torch",
        "adamw": "write adamw_torch",
        "adamw_hf": "write adamw_torch",
        "lomo": "write sgd, with optimizer_in_backward: true",
        "adalomo": "write adafactor, with optimizer_in_backward: true",
    },
}

# Public names of the data of built-in tasks, and sets that people ask for; without what is no letter or digit.
TASKS = {
    "sst": "its two classes are sst2",
    "trec": "question_types has TREC's questions and coarse classes",
    "trec6": "question_types has TREC's questions and coarse classes",
    "smsspamcollection": "write sms_spam",
    "commitmentbank": "write cb",
    "wscfixed": "write wsc",
    "winograndexl": "winogrande is its set m; for another, write a task file",
    "winograndem": "write winogrande",
    "superglue": "its tasks are boolq, cb, copa, multirc, record, rte, wic and wsc",
    "glue": "its tasks here are sst2 and rte",
    "squadv2": "squad is version 1.1, in which every question has an answer",
    "rottentomatoes": "movie_reviews has sentences from there, rated by other people",
    "mr": "movie_reviews has sentences of that kind",
    "imdb": "movie_reviews is similar; for IMDB itself, write a task file with source: stanfordnlp/imdb",
    "sst5": "sst2 has the same sentences with two classes",
    "amazonpolarity": "amazon_reviews is similar",
    "cr": "amazon_reviews is similar",
    "tweeteval": "tweets is similar",
    "agnews": "none is similar; write a task file with source: fancyzhx/ag_news",
    "gsm8k": "none is similar; write a task file with source: openai/gsm8k:main",
    "hellaswag": "copa is similar; or write a task file with source: Rowan/hellaswag",
    "mnli": "rte and cb are similar; or write a task file with source: nyu-mll/glue:mnli",
}

# Arguments of transformers' Trainer and trl's SFTTrainer.
_TEXTS_FIRST = "make the texts before, such as dataset.map(lambda row: {'prompt': ..., 'completion': ...})"
_KEYS_OF_OPTIMIZERS = "optimizers are made from keys of ZOFOConfig: optim and learning_rate, or zo_optimizer"
ARGUMENTS = {
    "tokenizer": "write processing_class=",
    "config": "write args=",
    "dataset": "write train_dataset=",
    "lora_config": "write peft_config=",
    "data_collator": "batches are made by zofo itself: leave it out",
    "compute_metrics": "zofo chooses options or generates text, and has no logits to hand over: write metrics=, with "
    "names or functions (predictions, references) -> number",
    "preprocess_logits_for_metrics": "zofo has no logits to hand over: write metrics=",
    "compute_loss_func": "the loss is a key: ZOFOConfig(loss='options') or 'lm'",
    "formatting_func": _TEXTS_FIRST,
    "dataset_text_field": _TEXTS_FIRST,
    "dataset_kwargs": _TEXTS_FIRST,
    "dataset_num_proc": "rows are tokenised at once, in one process: leave it out",
    "max_seq_length": "write ZOFOConfig(max_length=...)",
    "packing": _UNPACKED,
    "optimizers": _KEYS_OF_OPTIMIZERS,
    "optimizer_cls_and_kwargs": _KEYS_OF_OPTIMIZERS,
    "model_init": "give the model itself as model, and make a trainer for each run",
    "model_init_kwargs": "load the model with from_pretrained(..., **model_init_kwargs), and give it as model",
}

# Columns of rows that have no prompt and completion.
COLUMNS = {
    "text": "text alone says not what is asked and what is answered: divide it into prompt and completion",
    "input_ids": "zofo tokenises rows itself: give the texts prompt and completion",
    "chosen": "zofo learns one right answer, not a preference: call chosen completion",
    "instruction": "join instruction and input to prompt, and call the answer completion",
    "question": "call question prompt and answer completion",
    "input": "call input prompt and output completion",
}

# Options of the command line that are no keys of a run, with a verb that has them.
OPTIONS = {
    "config": "train",
    "memory_only": "estimate",
    "harness": "eval",
    "split": "eval",
    "scoring": "eval",
    "batch_size": "eval",
    "run": "eval",
    "log_samples": "eval",
}


def key_hint(name: str, known: Collection[str], otherwise: str, keys: Collection[str] = ()) -> str:
    """What to write in place of an unknown key, where `known` ones may stand, and some of the `keys` of zofo train not.

    Examples:
        >>> key_hint("lr", ["learning_rate", "seed"], "")
        'write learning_rate'
        >>> key_hint("sede", ["learning_rate", "seed"], "")
        'did you mean seed?'
    """
    if RENAMED.get(name) in known:
        return f"write {RENAMED[name]}"
    if name in keys:
        return "it is a key of zofo train"
    if name in OPTIONS:
        return f"it is an option of zofo {OPTIONS[name]}"
    return INSTEAD.get(name) or did_you_mean(name, known, otherwise)


def refuse_values(values: Mapping[str, Any]) -> None:
    """Refuses values of keys that mean something here, but have other words."""
    for key, habits in VALUES.items():
        value = values.get(key)
        if not isinstance(value, str) or (key == "adapter" and Path(value).expanduser().exists()):
            continue
        if hint := habits.get(value.lower().replace("-", "_")):
            raise ZofoError(f"{key} is {value!r}, which is no {key} here: {hint}")


def refuse_arguments(given: Mapping[str, Any], known: Iterable[str], keys: Collection[str]) -> None:
    """Refuses arguments that the trainer does not have; `keys` are those of its configuration."""
    for name, value in given.items():
        if name in ARGUMENTS:
            if value is None:
                continue
            hint = ARGUMENTS[name]
        elif name in keys:
            hint = f"it is a key: write ZOFOConfig({name}=...)"
        else:
            hint = did_you_mean(name, known, f"there are {', '.join(known)}")
        raise ZofoError(f"ZOFOTrainer takes no {name}: {hint}")


def task_hint(name: str, known: Collection[str]) -> str:
    """What to give in place of an unknown task.

    Examples:
        >>> task_hint("SST-2", ["sst2", "rte"])
        'did you mean sst2?'
    """
    own = "a task of your own is the path of a .yaml file (docs/tasks.md)"
    if re.search(r"\.(csv|tsv|jsonl?|parquet|txt)(\.gz)?$", name.lower()):
        return f"zofo train takes a table as data, with text and label, and leaves its task.yaml; {own}"
    plain = {re.sub("[^a-z0-9]", "", word): word for word in known}
    spoken = [re.sub("[^a-z0-9]", "", part) for part in (name.lower(), *reversed(re.split("[/:]", name.lower())))]
    for word in spoken:
        if word in plain:
            return f"did you mean {plain[word]}?"
        if word in TASKS:
            return TASKS[word]
    if "/" in name:
        return f"for a Hub data set write a task file with source: {name}; {own}"
    every = f"there are {', '.join(known)}."
    return f"{did_you_mean(name, known, every)} {own[0].upper()}{own[1:]}"


def column_hint(row: Mapping[str, Any]) -> str:
    """How a row without prompt and completion is mended."""
    return next((hint for column, hint in COLUMNS.items() if column in row), "")


def dataset_hint(name: str, rows: Any) -> str | None:
    """Why these are no rows that can be trained on, if they are none, and what to give; `name` is the argument's."""
    if isinstance(rows, str):
        return f"{name} is the text {rows!r}: give the rows, such as datasets.load_dataset({rows!r})['train']"
    if isinstance(rows, Mapping):
        keys = [str(key) for key in cast("Mapping[Any, Any]", rows)]
        if {"prompt", "messages", "text"} & set(keys):
            return f"{name} is a dict of columns: write datasets.Dataset.from_dict({name})"
        first = f", such as that of {keys[0]!r}" if keys else ""
        return f"{name} is a dict with {', '.join(keys) or 'nothing'} in it, not rows: give one of its values{first}"
    if not isinstance(rows, Sized):
        return f"{name} is a {type(rows).__name__}, and zofo must know how many rows there are: write list({name})"
    return None
