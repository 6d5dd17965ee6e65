"""Preference fine-tuning (SimPO, CPO, CPO-SimPO) of causal language models on a Ray cluster."""

__version__ = "0.1.0"
