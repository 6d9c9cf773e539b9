"""Zeroth-order mathematics on tensors: perturbed evaluation, estimates, rules, optimizers, the bilevel step."""
