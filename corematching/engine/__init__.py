"""Turns a method's decisions into real sparsity inside a stock transformers model."""
