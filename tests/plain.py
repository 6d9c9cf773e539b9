"""Bilevel ZOFO written out in plain torch, and small trainers to compare with it."""

import json

import torch
import yaml
from peft import LoraConfig
from torch.nn import functional
from transformers import TrainerCallback

from tiny import save_tiny_model, tiny_model, tiny_tokenizer
from zofo import ZOFOConfig, ZOFOTrainer, direction, noise
from zofo.zo.optimizers import ZerothOrderOptimizer
from zofo.zo.rules import SGD

ONE_TOKEN = [" a", " the"]
MORE_TOKENS = [" great", " terrible"]
_WORDS = ("the film", "a story", "the music of this long evening", "my phone")


def make_rows(count, first=0, options=ONE_TOKEN):
    """Rows with prompts of different lengths, none of them twice."""
    return [
        {
            "prompt": f"{_WORDS[i % len(_WORDS)]} number {i} was",
            "completion": options[(i // 2) % 2],
            "options": list(options),
        }
        for i in range(first, first + count)
    ]


def make_trainer(
    folder, train=None, upper=None, family="llama", model=None, peft=None, eval_rows=None, tokenizer=None, **keys
):
    """A trainer of a tiny model, of `bilevel` as published if `keys`, of its configuration, do not say otherwise."""
    callbacks, reward_funcs = keys.pop("callbacks", None), keys.pop("reward_funcs", None)
    published = {"penalty": 1.0} if keys.get("method", "bilevel") == "bilevel" else {}
    args = ZOFOConfig(
        **{
            **published,
            "output_dir": str(folder),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "zo_learning_rate": 1e-2,
            "lower_steps": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **keys,
        }
    )
    tokenizer = tokenizer or tiny_tokenizer()
    return ZOFOTrainer(
        model or tiny_model(family, vocab_size=len(tokenizer)),
        args,
        make_rows(12) if train is None else train,
        upper_dataset=upper,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft,
        callbacks=callbacks,
        reward_funcs=reward_funcs,
    )


def micro_steps(trainer, epochs=1):
    """The batches of each micro-step of so many epochs, for a trainer of one task."""
    loader = trainer.get_train_dataloader()
    for epoch in range(epochs):
        loader.batch_sampler.set_epoch(epoch)
        for (bundle,) in loader:
            yield bundle


def weights(adapted, part):
    """Copies of the weights of `backbone`, `upper` or `lower`, by name."""
    named = adapted.backbone if part == "backbone" else adapted.adapter_parameters(part)
    assert named
    return {name: parameter.detach().clone() for name, parameter in named.items()}


def trained(folder, *args, **keys):
    """(weights by part, trainer) after training."""
    trainer = make_trainer(folder, *args, **keys)
    trainer.train()
    parts = ("backbone", *trainer.adapted.adapters)
    return {part: weights(trainer.adapted, part) for part in parts}, trainer


def whole_and_resumed(folder, **keys):
    """Trainers after a run, and after one that went on from a checkpoint in the middle of it."""
    half = keys["max_steps"] // 2
    keys = {**keys, "save_strategy": "steps", "save_steps": half}
    whole, again = make_trainer(folder / "whole", **keys), make_trainer(folder / "again", **keys)
    whole.train()
    again.train(resume_from_checkpoint=str(folder / "whole" / f"checkpoint-{half}"))
    return whole, again


def same_run(first, second):
    """Whether two trainers have bitwise equal weights: the backbone, and every adapter."""
    parts = ("backbone", *first.adapted.adapters)
    return all(same(weights(first.adapted, part), weights(second.adapted, part)) for part in parts)


def same(first, second):
    """Whether two dicts of tensors are bitwise equal."""
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def moved(first, second):
    """The names of the tensors that differ."""
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


def assert_close(first, second, atol):
    """Equal within rounding."""
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def write_task(folder):
    """A model, a task and an adapter with dropout, so that the state of the random generators matters."""
    save_tiny_model(folder / "model")
    words = ("film", "story", "phone", "evening")
    rows = [{"text": f"the {words[i % 4]} number {i}", "label": i % 2} for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "name": "tiny",
        "source": "rows.jsonl",
        "prompt": "{{ text }} was",
        "answer": " {{ ['terrible', 'great'][label] }}",
        "options": [" terrible", " great"],
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    LoraConfig(lora_dropout=0.3, target_modules=["q_proj", "v_proj"]).save_pretrained(folder / "dropout")
    return folder


def write_config(folder, name, **keys):
    """A config file for a run, without `output_dir`."""
    paths = {"model": folder / "model", "task": folder / "task.yaml", "adapter": folder / "dropout"}
    config = {
        **{k: str(v) for k, v in paths.items()},
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **keys,
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def applied(w, found, rate, rule=None, **more):
    """Writes what a rule makes of an estimate to a dict of weights."""
    optimizer = ZerothOrderOptimizer(w, rule or SGD(), rate, **more)
    optimizer.propose(found)
    optimizer.step()


class Watch(TrainerCallback):
    """Calls `before` ahead of each optimizer step and `after` behind it."""

    def __init__(self, before=None, after=None):
        self._before = before
        self._after = after

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._before:
            self._before()

    def on_step_end(self, args, state, control, **kwargs):
        if self._after:
            self._after()


def plain_loss(model, batch):
    """The mean loss of a batch: one plain forward for each answer, nothing padded, all logits."""
    segments = batch.get("segments", batch["attention_mask"])

    def log_probabilities(columns, segment):
        rows, positions, tokens = batch["scored"][:, columns]
        read = (segments[rows[0]] == 1) | (segments[rows[0]] == segment)
        ids = batch["input_ids"][rows[0]][read][None]
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :].float()
        return logits.log_softmax(-1)[read.cumsum(0)[positions] - 1, tokens]

    if "gold" not in batch:
        rows = batch["scored"][0]
        return -torch.cat([log_probabilities(rows == row, 1) for row in range(len(segments))]).mean()
    scores = [
        torch.stack([log_probabilities(own[own >= 0], option + 2).mean() for option, own in enumerate(options)])
        for options in batch["slots"]
    ]
    return functional.cross_entropy(torch.stack(scores), batch["gold"])


def at(theta, direction_of, scale, loss):
    """A loss at θ + scale·z, with θ written over and put back."""
    kept = {name: p.clone() for name, p in theta.items()}
    with torch.no_grad():
        for name, p in theta.items():
            p.add_(direction_of[name], alpha=noise.representable(scale))
        value = float(loss())
        for name, p in theta.items():
            p.copy_(kept[name])
    return value


def plain_bilevel(trainer, iterations, penalty_of=lambda number: 0.0):
    """Runs Algorithm 2 of the paper on the trainer's model and batches, with torch's SGD.

    Args:
        trainer: whose model is moved; its own methods are not used.
        iterations: how many; within the first epoch.
        penalty_of: number of the iteration -> λ.
    """
    args, adapted = trainer.args, trainer.adapted
    s, p = (list(adapted.adapter_parameters(adapter).values()) for adapter in ("lower", "upper"))
    s_optimizer = torch.optim.SGD(s, lr=args.learning_rate)
    p_optimizer = torch.optim.SGD(p, lr=args.upper_learning_rate)
    theta = adapted.backbone

    def loss(adapter, batch):
        adapted.use(adapter)
        return plain_loss(adapted.model, batch)

    adapted.model.eval()
    for number, bundle in zip(range(iterations), micro_steps(trainer, epochs=2), strict=False):
        for batch in bundle["lower"]:
            loss("lower", batch).backward()
            torch.nn.utils.clip_grad_norm_(s, args.max_grad_norm)
            s_optimizer.step()
            s_optimizer.zero_grad()
        (of_upper,) = bundle["upper"]
        of_penalty = bundle["penalty"][0] if bundle["penalty"] else None
        strength = penalty_of(number)
        norm = 1 + strength if args.normalize_penalty else 1.0

        def objective(of_upper=of_upper, of_penalty=of_penalty, strength=strength, norm=norm):
            value = float(loss("upper", of_upper))
            if of_penalty is not None:
                value += strength * (float(loss("upper", of_penalty)) - float(loss("lower", of_penalty)))
            return value / norm

        wanted = loss("upper", of_upper)
        if of_penalty is not None:
            wanted = wanted + strength * loss("upper", of_penalty)
        (wanted / norm).backward()
        torch.nn.utils.clip_grad_norm_(p, args.max_grad_norm)
        found = []
        for query in range(args.num_perturbations):
            z = direction(theta, args.seed, number, query)
            here = at(theta, z, 0.0, objective) if args.zo_estimator == "one_sided" else None
            there = at(theta, z, args.zo_eps, objective)
            back = at(theta, z, -args.zo_eps, objective) if here is None else here
            found.append((z, (there - back) / (args.zo_eps * (2 if here is None else 1))))
        p_optimizer.step()
        p_optimizer.zero_grad()
        with torch.no_grad():
            for z, projected in found:
                for name, parameter in theta.items():
                    parameter.add_(z[name], alpha=-args.zo_learning_rate / args.num_perturbations * projected)
