"""The adapter in memory after training and evaluation, however they end, is the one that is deployed."""

import pytest
import torch
from peft import PeftModel

from plain import make_rows, make_trainer
from tiny import token_batch
from zofo import ZofoError
from zofo.scoring.evaluation import Evaluator

ROWS = make_rows(6, first=50)


def is_deployed(trainer):
    return trainer.adapted.model.active_adapter == "upper"


def test_after_training_and_after_every_evaluation(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows=ROWS, max_steps=3, eval_steps=1)
    trainer.train()
    assert is_deployed(trainer)
    trainer.evaluate()
    assert is_deployed(trainer)
    trainer.evaluate(ROWS)
    assert is_deployed(trainer)


@pytest.mark.parametrize("where", ["s", "p"])
def test_after_an_exception_in_a_level(tmp_path, where):
    trainer = make_trainer(tmp_path)

    def fail(*_, **__):
        trainer.adapted.use("lower")
        raise ZofoError("stopped")

    vars(trainer.method)[where].gradient = fail
    with pytest.raises(ZofoError, match="stopped"):
        trainer.train()
    assert is_deployed(trainer)


def test_after_an_exception_in_an_evaluation(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, eval_rows=ROWS)
    whole = Evaluator.answers

    def fail(self, rows):
        if trainer.adapted.model.active_adapter == "lower":
            raise KeyboardInterrupt
        return whole(self, rows)

    monkeypatch.setattr(Evaluator, "answers", fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate()
    assert is_deployed(trainer)


def test_what_is_merged_in_memory_is_what_is_saved(tmp_path):
    trainer = make_trainer(tmp_path, eval_rows=ROWS, learning_rate=1.0)
    trainer.train()
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "run"))
    with torch.no_grad():
        ids = token_batch(vocab_size=trainer.adapted.base.config.vocab_size)
        model = trainer.adapted.model.eval()
        here = model(input_ids=ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, here, rtol=1e-4, atol=1e-4)
        base = type(merged).from_pretrained(tmp_path / "run" / "backbone").eval()
        stored = PeftModel.from_pretrained(base, str(tmp_path / "run" / "upper"))
        torch.testing.assert_close(stored(input_ids=ids).logits, here, rtol=1e-4, atol=1e-4)
