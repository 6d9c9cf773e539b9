"""Whether the keys of an objective go together: what it needs, and what it cannot have."""

from collections.abc import Collection

from zofo.errors import ZofoError
from zofo.keys import AUTO, BY_EVALUATIONS, INFINITE, LOSS, OBJECTIVE_KEYS, Keys, name_of
from zofo.methods.method import Method
from zofo.tasks.metrics import MEANS, TEXT_METRICS
from zofo.tasks.rewards import REWARD, require_name

GENERATED = (REWARD, *TEXT_METRICS)  # objectives of the text that is generated
NEW_TOKENS = 64  # of a completion, if nobody says


def settle_objective(keys: Keys, method: type[Method], given: Collection[str]) -> list[str]:
    """What follows from the objective where nobody says otherwise; returns lines that say so.

    Raises:
        ZofoError: if keys that were `given` do not go together with it.
    """
    _require_method(keys, method)
    _require_rewards(keys)
    if not keys.black_box or not method.keys_used >= OBJECTIVE_KEYS:
        return []
    _require_population(keys, method)
    if keys.zo_distribution == "low_rank":
        _settle_rows(keys, given)
    if keys.objective in GENERATED and not method.backpropagates and "loss" not in given:
        keys.loss = "lm"  # options are not compared
    choosing = keys.load_best_model_at_end or name_of(keys.lr_scheduler_type) in BY_EVALUATIONS
    if choosing and keys.metric_for_best_model is None and keys.objective != LOSS:
        keys.metric_for_best_model = keys.objective
    return [*_settled_rate(keys, given), *_consequences(keys, method)]


def _require_method(keys: Keys, method: type[Method]) -> None:
    if keys.objective == LOSS or method.keys_used >= OBJECTIVE_KEYS:
        return
    why = "takes no zeroth-order step on an objective of its own"
    if method.backpropagates:
        why = "backpropagates, and that has no gradient"
    raise ZofoError(
        f"objective is {keys.objective}, but method {method.name} {why}: set method: zo or bilevel, or leave it out"
    )


def _require_rewards(keys: Keys) -> None:
    """Refuses rewards beside another metric as the objective, and names that can be none."""
    if keys.reward and keys.objective not in (LOSS, REWARD):
        raise ZofoError(
            f"reward is {keys.reward}, but objective is {keys.objective}, and evaluations have one of them: set "
            "objective: reward, or loss, or leave reward out"
        )
    for name in keys.reward or ():
        require_name(name)
    if keys.reward and keys.reward_weights is not None and len(keys.reward_weights) != len(keys.reward):
        raise ZofoError(
            f"reward_weights has {len(keys.reward_weights)} numbers, and reward {len(keys.reward)} names: give one "
            "number for each reward, in their order"
        )


def _require_population(keys: Keys, method: type[Method]) -> None:
    """Refuses a shaping that nothing could be learned by, and what needs the values as they are."""
    if keys.shaping != "none" and keys.zo_estimator == "one_sided" and keys.num_perturbations == 1:
        raise ZofoError(
            f"zo_shaping {keys.shaping} compares the members of a population, but zo_estimator one_sided with "
            "num_perturbations 1 has one, whose value is always 0: raise num_perturbations, or set zo_estimator: "
            "two_sided, or zo_shaping: none"
        )
    if keys.zo_shaping_over == "prompt":
        if keys.shaping == "none":
            raise ZofoError("zo_shaping_over is prompt, but zo_shaping is none: give zo_shaping, or leave it out")
        if keys.objective not in (LOSS, REWARD, *MEANS):
            raise ZofoError(
                f"zo_shaping_over is prompt, but {keys.objective} is of all rows of a step together, and no row has "
                "one of its own: set zo_shaping_over: all"
            )
    if keys.diagnose:
        what = keys.objective if keys.objective != LOSS else f"zo_shaping {keys.shaping}"
        raise ZofoError(
            f"diagnose compares with the gradient of the loss, but steps descend another objective ({what}): leave "
            "one of them out"
        )
    if keys.zo_learning_rate == 0 and keys.objective != LOSS:
        raise ZofoError(
            f"objective is {keys.objective}, but zo_learning_rate 0 freezes θ, which alone could follow it: leave one "
            "of them out"
        )
    if method.backpropagates and keys.penalty == 0 and keys.objective != LOSS:
        raise ZofoError(
            f"penalty is 0, but objective {keys.objective} has no gradient, so that nothing would train the adapter "
            "upper: raise penalty, or set penalty: infinite, or method: zo"
        )


def _settle_rows(keys: Keys, given: Collection[str]) -> None:
    """All members of a population are measured on the same rows."""
    if keys.zo_rows == "own" and "zo_rows" in given:
        raise ZofoError(
            "zo_rows is own, but the members of a population are compared with each other on the same rows "
            f"(objective {keys.objective}, zo_shaping {keys.shaping}): set zo_rows: shared"
        )
    keys.zo_rows = "shared"


def _settled_rate(keys: Keys, given: Collection[str]) -> list[str]:
    """An automatic rate is found from curvatures of the loss, and from its noise: shaped values have a usual rate."""
    if keys.zo_learning_rate != AUTO:
        return []
    if "zo_learning_rate" in given or keys.shaping == "none":
        raise ZofoError(
            f"zo_learning_rate is auto, which is found from the curvature of the loss and the noise of its rows, but "
            f"objective is {keys.objective} with zo_shaping {keys.shaping}: give a number; with shaped values, leave "
            "it out for the usual one"
        )
    usual = "zo_eps / 2" if keys.zo_optimizer == "sign" else "zo_eps² / 2"  # an update by zo_eps / 2 either way
    keys.zo_learning_rate = keys.zo_eps / 2 if keys.zo_optimizer == "sign" else keys.zo_eps**2 / 2
    return [
        f"zo_learning_rate is not given: {usual} = {keys.zo_learning_rate:.3g}, as is usual for shaped values; with "
        "objective and shaping it is the first thing to tune"
    ]


def _consequences(keys: Keys, method: type[Method]) -> list[str]:
    """Lines that say what a run does which its keys do not."""
    lines: list[str] = []
    if method.backpropagates and keys.objective != LOSS:
        who = "the adapter follows G, its cross-entropy, alone"
        if keys.penalty != INFINITE:
            who = "p follows λ G and s follows G, their cross-entropy, alone"
        lines.append(f"objective {keys.objective} has no gradient: θ follows it by forward passes; {who}")
    if keys.shaping != "none" and keys.num_perturbations == 1:
        lines.append(
            f"zo_shaping {keys.shaping} of two members, at θ + εz and θ - εz, is the sign of their difference: with "
            "more num_perturbations its size counts as well"
        )
    return lines
