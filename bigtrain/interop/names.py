"""Which tensor of a foreign directory holds which parameter of ours, in every naming that is read.

Our names are Hugging Face's Llama names without "model."; GPT-2 has names of its own, keeps matrices transposed
(Conv1D) and query, key and value in one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import NamedTuple

from bigtrain.checkpoint.boxes import Box, Index

Shapes = Mapping[str, Index]


class Source(NamedTuple):
    """Where a parameter lies: the whole of `tensor`, or the part of its last dimension that begins at `start`."""

    tensor: str
    start: int = 0
    transposed: bool = False

    def box(self, box: Box) -> Box:
        """A box of the parameter as a box of the foreign tensor."""
        offset, sizes = (box.offset[::-1], box.sizes[::-1]) if self.transposed else box
        return Box((*offset[:-1], offset[-1] + self.start), sizes)


Names = dict[str, Source]
"""Our name -> where it lies."""

_GPT2 = {
    "input_layernorm": "ln_1",
    "post_attention_layernorm": "ln_2",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}
_GPT2_OUTSIDE = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}


def hugging_face_names(family: str, shapes: Shapes) -> Names:
    """The names under which `transformers` keeps parameters of these names and shapes."""
    if family == "gpt2":
        return {name: _gpt2(name, shapes) for name in shapes}
    return {name: Source(name if name == "lm_head.weight" else f"model.{name}") for name in shapes}


def _gpt2(name: str, shapes: Shapes) -> Source:
    module, _, last = name.rpartition(".")
    if module == "lm_head":
        return Source(name)
    if module in _GPT2_OUTSIDE:
        return Source(f"transformer.{_GPT2_OUTSIDE[module]}.{last}")
    _, layer, inner = module.split(".", 2)
    place = f"transformer.h.{layer}"
    transposed = len(shapes[name]) == 2
    leaf = inner.removeprefix("self_attn.")
    if leaf in ("q_proj", "k_proj", "v_proj"):
        start = ("q_proj", "k_proj", "v_proj").index(leaf) * shapes[name][0]
        return Source(f"{place}.attn.c_attn.{last}", start, transposed)
    return Source(f"{place}.{_GPT2[inner]}.{last}", 0, transposed)


def foreign_shapes(names: Names, shapes: Shapes) -> dict[str, Index]:
    """The shapes of the tensors that hold parameters of these shapes, in the order of the model."""
    found: dict[str, Index] = {}
    for name, source in names.items():
        shape = shapes[name][::-1] if source.transposed else shapes[name]
        before = found.get(source.tensor)
        found[source.tensor] = shape if before is None else (*shape[:-1], before[-1] + shape[-1])
    return found


def namings(family: str | None, shapes: Shapes) -> Iterator[tuple[str, Names]]:
    """Every naming in which these parameters may be found, with a word for people, the usual ones first.

    With and without the prefix of the model without its head ("model.", "transformer."), with one more "model."
    as wrappers add it. `family` None: no Hugging Face model is this one, only our own names are tried.
    """
    ours = {name: Source(name) for name in shapes}
    bases = [("bigtrain's names", ours)]
    if family is not None:
        theirs = hugging_face_names(family, shapes)
        bare = {n: s._replace(tensor=s.tensor.removeprefix("transformer.")) for n, s in theirs.items()}
        bases = [("Hugging Face names", theirs), *bases, ("Hugging Face names without a prefix", bare)]
    for word, names in bases:
        yield word, names
        yield f'{word} after "model."', {n: s._replace(tensor="model." + s.tensor) for n, s in names.items()}


def best_naming(family: str | None, shapes: Shapes, found: Collection[str]) -> tuple[str, Names]:
    """The naming most of whose tensors are among `found`; the first of equals."""
    return max(namings(family, shapes), key=lambda one: sum(s.tensor in found for s in one[1].values()))
