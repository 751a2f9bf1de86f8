"""How many experts a text leaves out, layer by layer. usage: sparsity_of_a_text.py [MODEL]"""

import sys

import mlx.core as mx

import blockffn_mlx as bf
from blockffn_mlx.models.activation import routed_indices

TEXT = "The cat sat on the mat and looked at the rain, which fell on the roof all afternoon."

model, tokenizer = bf.load(sys.argv[1] if len(sys.argv) > 1 else "demo")
report = bf.sparsity(model, mx.array(tokenizer.encode(TEXT)), chunk=8)
layers = routed_indices(model)  # those without a router do not count
for layer, token, chunk in zip(layers, report.tls_per_layer, report.cls_per_layer, strict=True):
    print(f"layer {layer:2}: a token leaves out {token:.1%} of the experts, 8 tokens {chunk:.1%}")
print(f"TLS {report.tls:.1%}, CLS_8 {report.cls:.1%}, reuse {report.reuse:.1%}")
