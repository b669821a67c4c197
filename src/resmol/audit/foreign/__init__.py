"""Runs of transformers' Trainer: what their JSON and safetensors files say, and what contradicts itself in them."""
