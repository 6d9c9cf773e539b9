"""What `diagnose` can record of a run, and what that costs."""

from zofo.config import ZOFOConfig
from zofo.keys import name_of
from zofo.methods.method import Method
from zofo.models.peft import LOWER
from zofo.training.diagnosis import measured


def left_out(method: Method, config: ZOFOConfig) -> dict[str, str]:
    """What `diagnose` does not record in a run, and why."""
    takes_none = f"method {method.name} takes no zeroth-order step"
    no_step = {"zo_learning_rate is 0" if method.freezes else takes_none: method.zeroth_order_level is None}
    no_lower = f"method {method.name} has no lower adapter beside the upper one here"
    no_lower = "penalty is 0" if LOWER in method.adapters else no_lower
    coupled = any(part.adapter == LOWER for part in method.objective(1.0))
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    no_evaluation = {"there are no evaluations": name_of(config.eval_strategy) == "no"}
    fixed = {"θ is not trained": not config.updates_backbone}
    reasons = {
        "signal_to_noise": no_step | {"a batch of one row has no standard error": rows == 1},
        "penalty_gap": no_step | {no_lower: not coupled},
        "cosine": no_step | {"the backbone is quantised": method.adapted.quantised} | no_evaluation,
        "variance": no_step | {no_lower: not coupled} | no_evaluation,
        "update": fixed,
        "gain": fixed | {"there is no adapter": not method.adapted.adapters},
    }
    first = {name: next((why for why, holds in found.items() if holds), None) for name, found in reasons.items()}
    return {name: why for name, why in first.items() if why is not None}


def cost_line(method: Method, config: ZOFOConfig) -> str:
    """What `diagnose` adds to a run, and what it leaves out."""
    missing = left_out(method, config)
    costs = _at_evaluations(method, config, missing)
    if "gain" not in missing:
        costs.append(f"at the end 2 evaluations on the {config.final_split} rows")
    if "update" not in missing:
        costs.append("at the end a second copy of θ in memory")
    names: dict[str, list[str]] = {}
    for name, why in missing.items():
        names.setdefault(why, []).append(name)
    parts = [*costs] or ["nothing"]
    parts += [f"without {', '.join(names[why])} ({why})" for why in names]
    return f"diagnose adds {'; '.join(parts)}"


def _at_evaluations(method: Method, config: ZOFOConfig, missing: dict[str, str]) -> list[str]:
    level, losses = method.zeroth_order_level, len(method.objective(1.0))
    if level is None or {"cosine", "variance"} <= missing.keys():
        return []
    compares = "variance" not in missing
    forwards = measured(level, compares).evaluations * (2 * losses + 1 if compares else losses)
    rows = config.per_device_train_batch_size
    costs = [f"at each evaluation {forwards} forwards of {rows} rows"]
    if "cosine" not in missing:
        largest = max(p.nbytes for p in level.parameters.values()) / 2**20
        costs.append(
            f"and a backward of {losses * rows} rows, in memory its activations and one gradient at a time, of at most "
            f"{largest:,.1f} MiB"
        )
    return costs if len(costs) == 1 else [" ".join(costs)]
