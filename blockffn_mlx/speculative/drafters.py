"""Turns what a user asks for, a kind of draft and a width, into a drafter and a policy."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import load_model

from .. import device
from ..checkpoints import reader as checkpoint
from ..checkpoints.demo import model_folder
from ..checkpoints.eagle_head import build_head, read_frequent, read_head
from ..checkpoints.files import check_folder, objects
from ..checkpoints.hub import download, is_local
from ..checkpoints.links import refuse_links
from ..checkpoints.load import load, unpack
from ..checkpoints.tokenizer_files import open_tokenizer
from .cost import draft_cost, pass_cost
from .drafter import Drafter
from .eagle_drafter import EagleDrafter
from .lookup_drafter import LookupDrafter
from .model_drafter import ModelDrafter
from .policy import AdaptiveWidth, FixedWidth, Policy

# Where a converted model's own draft head lies inside its folder.
DRAFT_FOLDER = "draft"
# What a config counts of a model, and the most there is of it.
COUNT = re.compile(
    r"(num|n)_(hidden_|local_|routed_|shared_|attention_|key_value_)*"
    r"(layers?|experts|heads?)$"
)
MOST = 10_000


def make_drafter(
    spec: str | Path | Drafter | nn.Module | None, model: Any, tokenizer: Any = None
) -> Drafter | None:
    """The drafter that `spec` names.

    Args:
        spec: "none" or None; "lookup"; "auto": the head in the `draft` folder of what the model
            was loaded or converted from, else lookup; a folder or Hub id of an EAGLE head or a
            language model; or a loaded language model, or a drafter.
        model: The target.
        tokenizer: The target's tokenizer, which a draft model's has to equal.

    Raises:
        ValueError: If the folder holds no draft, or one that does not fit the target.
    """
    if spec is None or spec == "none":
        return None
    if spec == "auto":
        spec = own_draft(model) or "lookup"
    if spec == "lookup":
        return LookupDrafter()
    if isinstance(spec, nn.Module):
        return model_drafter(spec, model)
    if not isinstance(spec, (str, Path)):
        return spec
    path = model_folder(spec) if is_local(spec) else download(str(spec))
    if not (path / "config.json").is_file():
        raise ValueError(f"no draft at {path}: give auto, none, lookup, or a draft's folder")
    refuse_links(path)
    if "fc.weight" in checkpoint.open_checkpoint(path):
        drafter = load_draft(path, model)
        if device.compute_backend() == "cpu" and not any("scales" in m for m in model.modules()):
            unpack(drafter.head)  # as the model is, and several times as fast there
        return drafter
    return load_draft_model(path, model, tokenizer)


def load_draft(path: str | Path, model: Any, draft_vocab: int | None = None) -> EagleDrafter:
    """Loads an EAGLE draft head, converted or as published.

    Args:
        path: A folder with config.json, the tensors, and maybe freq_*.pkl / .npy / .json.
        model: The target that it was trained for.
        draft_vocab: Which frequency list to use, by its length; the paper's or the nearest if None.

    Raises:
        ValueError: If the folder holds no EAGLE head, or one for another model.
    """
    path = Path(path)
    config, weights = read_head(path)
    head = build_head(path, config, weights, model)
    return EagleDrafter(head, model, read_frequent(path, model.args.vocab_size, draft_vocab))


def own_draft(model: Any) -> Path | None:
    """The draft head that lies beside a loaded model's weights, or beside those it was made of."""
    origin = getattr(model, "origin", None)
    places = (origin.folder, origin.checkpoint) if origin else ()
    return next((d for place in places if (d := place / DRAFT_FOLDER).is_dir()), None)


def load_draft_model(path: Path, model: Any, tokenizer: Any) -> ModelDrafter:
    """A language model as the drafter: a BlockFFN, or whatever mlx-lm runs."""
    config = checkpoint.read_json(path / "config.json")
    if "model_type" not in config:
        raise ValueError(
            f"{path} is neither an EAGLE head nor a model: it is not a draft of a known kind"
        )
    draft: nn.Module
    if "expert_size" in config:
        draft, draft_tokenizer = load(str(path))
    else:
        draft, draft_tokenizer = load_mlx_lm(path, config)
    if tokenizer is None or draft_tokenizer is None:
        same = getattr(draft.args, "vocab_size", None) == model.args.vocab_size
    else:
        same = draft_tokenizer.get_vocab() == tokenizer.get_vocab()
    if not same:
        raise ValueError(
            f"the draft model {path} has another tokenizer than the model: "
            "take one of the same family, or lookup"
        )
    return model_drafter(draft, model)


def model_drafter(draft: nn.Module, model: Any, cache: list[Any] | None = None) -> ModelDrafter:
    """A loaded language model as the drafter; `cache` as for `ModelDrafter`.

    Raises:
        ValueError: If it has no embedding for some token of the target.
    """
    known = getattr(draft.args, "vocab_size", None)
    if type(known) is not int or known < model.args.vocab_size:
        raise ValueError(
            f"the draft model knows {known} tokens, the model "
            f"{model.args.vocab_size}: take one of the same family, or lookup"
        )
    return ModelDrafter(draft, model.args.vocab_size, cache)


def load_mlx_lm(path: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """A model that mlx-lm has the code for, and its tokenizer; code in the folder never runs.

    Raises:
        ValueError: If mlx-lm cannot load it, or its config asks for more than any model has.
    """
    check_folder(path)
    for part in objects(config):
        for name, value in part.items():
            # mlx-lm makes a Python object for each before it looks at a tensor.
            if COUNT.match(name) and isinstance(value, (int, float)) and not value <= MOST:
                raise ValueError(f"{path}/config.json: {name} {value} makes no sense")
    try:
        # mlx-lm searches with the folder's name as a pattern, so that it gets one without signs.
        with tempfile.TemporaryDirectory() as place:
            link = Path(place) / "model"
            link.symlink_to(path.resolve(), target_is_directory=True)
            draft, _ = load_model(link, trust_remote_code=False)
    except Exception as error:  # whatever a config of any kind leads to
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the draft model {path} cannot be loaded ({reason})") from error
    return draft, open_tokenizer(path)


def make_policy(
    width: int | str | Policy,
    model: Any,
    on_progress: Callable[[int, int], None] | None = None,
    drafter: Drafter | None = None,
) -> Policy:
    """The policy for a width: a number of nodes, "auto" (measures once), or a policy.

    Args:
        width: What is asked for.
        model: The target.
        on_progress: Called with (steps done, steps in all) while measuring.
        drafter: The drafter, whose own time "auto" counts too.

    Raises:
        ValueError: For a number outside 1 to 64, or another word.
    """
    if width == "auto":
        cost = pass_cost(model, on_progress=on_progress)
        return AdaptiveWidth(cost, draft=draft_cost(drafter, model) if drafter else None)
    if isinstance(width, (int, str)):
        if not str(width).isdecimal():
            raise ValueError(f"a draft width is a number from 1 to 64 or auto, not {width!r}")
        return FixedWidth(int(width))
    return width
