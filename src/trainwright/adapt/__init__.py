"""Fine-tuning in little memory: adapters beside frozen weights, and frozen weights in fewer bits.

lora.py       what an adapter is, and which linear layers get one: a rewrite of the config tree, no torch
quantize.py   the same for weights in fewer bits, no torch
frozen.py     modules that hold a fixed weight: linear, embedding, head
linear.py     the modules of adapted linear layers; ops.py their arithmetic, forward and backward
setup.py      what training calls on a built model: random adapters, what is trained
peft.py       adapter folders in PEFT's format, both ways
merge.py      adapters added into the full-precision base
"""
