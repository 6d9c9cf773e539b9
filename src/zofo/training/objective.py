"""What the objective of a run needs beside its keys: reward functions, metrics, and who measures it."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from types import FunctionType, MethodType
from typing import Any

from zofo.config import ZOFOConfig
from zofo.errors import ZofoError
from zofo.keys import LOSS
from zofo.methods.black_box import BlackBox
from zofo.methods.objective_settings import NEW_TOKENS
from zofo.models.adapters import AdaptedModel
from zofo.scoring.batch import Batch, collate, with_examples
from zofo.scoring.evaluation import Answer, Evaluator, records_of
from zofo.scoring.generation import AnswerSpan
from zofo.scoring.scorer import Scorer
from zofo.scoring.tokens import Example
from zofo.tasks.metrics import OPTION_METRICS, Metric, compares_options
from zofo.tasks.rewards import REWARD, Reward, Rewards, load_rewards, made_rewards

RewardFuncs = Rewards | Sequence[Reward] | Reward
_OF_REWARDS = ("reward_weights", "reward_timeout", "max_new_tokens")
_SHOWN = 3  # completions at each evaluation
_LONGEST = 100  # characters of a prompt, or of a completion


def run_rewards(args: ZOFOConfig, given: RewardFuncs | None = None) -> Rewards | None:
    """The reward functions of a run: those that are `given`, or those that the key `reward` names, whose files it runs.

    Evaluations measure them in every run that has some; the objective says whether θ follows them.

    Raises:
        ZofoError: if the objective needs some and there are none, or they cannot be loaded.
    """
    if isinstance(given, Rewards):
        return given
    if given is not None and args.reward:
        raise ZofoError(f"reward_funcs is given, and reward is {args.reward}: leave one of them out")
    if given is not None and args.objective not in (LOSS, REWARD):
        raise ZofoError(
            f"reward_funcs is given, but objective is {args.objective}, and evaluations have one of them: set "
            "objective: reward, or loss, or leave reward_funcs out"
        )
    if given is not None:
        return _made([given] if callable(given) else given, args)
    if args.reward:
        return load_rewards(args.reward, args.reward_weights, args.reward_timeout)
    if args.objective == REWARD:
        raise ZofoError("objective is reward, but reward is not given: add reward: FILE.py:function")
    for own in fields(args):
        if own.name in _OF_REWARDS and (value := vars(args)[own.name]) != own.default:
            raise ZofoError(f"{own.name} is {value}, but there is no reward: add reward, or leave {own.name} out")
    return None


def _made(functions: Sequence[Any], args: ZOFOConfig) -> Rewards:
    """Functions of the program that makes the trainer, by their names."""
    found: dict[str, Reward] = {}
    for function in functions:
        if not isinstance(function, FunctionType | MethodType):
            raise ZofoError(f"reward_funcs has {function!r:.80}: give functions made with def")
        if function.__name__ in found:
            raise ZofoError(f"reward_funcs has two functions called {function.__name__}: rename one of them")
        found[function.__name__] = function
    return made_rewards(found, args.reward_weights, args.reward_timeout)


def objective_metrics(
    args: ZOFOConfig, metrics: Sequence[Metric], has_options: bool, rewarded: bool
) -> tuple[Metric, ...]:
    """The metrics of evaluations, with the objective among them; a reward replaces all others.

    Raises:
        ZofoError: if the objective compares options and the metrics texts, or the other way round.
    """
    if rewarded:
        return (REWARD,)
    if args.objective == LOSS or args.objective in metrics:
        return tuple(metrics)
    if compares_options(metrics, has_options) != (args.objective in OPTION_METRICS):
        has, fitting = (
            ("options", "accuracy, f1 or macro_f1") if has_options else ("no options", "exact_match or token_f1")
        )
        raise ZofoError(
            f"objective is {args.objective}, but the rows of this task have {has}: set objective: {fitting}, or reward"
        )
    return (*metrics, args.objective)


def answer_span(args: ZOFOConfig, span: AnswerSpan, rewarded: bool) -> AnswerSpan:
    """How much generated text is an answer: for rewards, all of it."""
    return AnswerSpan.whole(args.max_new_tokens or NEW_TOKENS) if rewarded else span


def require_rewardable(
    rewards: Rewards | None, adapted: AdaptedModel, span: AnswerSpan, rows: Sequence[Example]
) -> None:
    """Refuses rows whose columns the reward functions cannot take, or whose prompts leave no room for completions."""
    if rewards is None or not rows:
        return
    rewards.require_columns(records_of(rows))
    longest = max(len(example.prompt) for example in rows)
    if longest + span.tokens > adapted.positions:
        raise ZofoError(
            f"a prompt of {longest} tokens and max_new_tokens {span.tokens} do not fit into the {adapted.positions} "
            f"positions of the model: lower max_new_tokens, or set max_length: {adapted.positions - span.tokens}"
        )


def collator(args: ZOFOConfig) -> Callable[..., Batch]:
    """What makes a batch of examples; a metric is computed of the examples themselves."""
    return collate if args.objective == LOSS else with_examples


def black_box(args: ZOFOConfig, evaluator: Evaluator, scorer: Scorer) -> BlackBox | None:
    """What zeroth-order steps descend in place of the loss, if they do; the `scorer` counts its tokens."""
    if not args.black_box or not args.method_class.zeroth_order:
        return None
    size = args.per_device_train_batch_size
    return BlackBox(args, replace(evaluator, scorer=scorer, metrics=(args.objective,), batch_size=size))


def shown(rows: Sequence[Example], answers: Sequence[Answer]) -> list[str]:
    """Lines with the rewards of a few completions, the same rows each time; none without rewards."""
    pairs = [*zip(records_of(rows), answers, strict=True)][:_SHOWN]
    return [f"reward {_figures(a.reward)}: {_short(r.asked)} -> {_short(a.text)}" for r, a in pairs]


def _figures(reward: float | None) -> str:
    return "none" if reward is None else f"{reward:.4g}"


def _short(text: str) -> str:
    return repr(text if len(text) <= _LONGEST else f"...{text[-_LONGEST:]}")
