"""Backbones of transformers and adapters of peft: found, checked, loaded, joined, merged."""
