"""Links in folders that others made: none may lead out of its folder."""

from fnmatch import fnmatch
from pathlib import Path

# What is read of a checkpoint: weights, configs, tokenizer files and a draft's frequency lists.
READ = ("*.json", "*.jinja", "*.model", "*.txt", "*.bin", "*.pt", "*.safetensors", "freq_*")
TEMPLATES = "additional_chat_templates"  # a folder that transformers reads too


def refuse_links(folder: Path):
    """Refuses a folder whose files are links to files outside it.

    What such a link names would be read as the folder's own, copied into what is made of it, and
    published with that. The Hub's cache links its snapshots to files beside them: those are fine.

    Raises:
        ValueError: If a file that would be read is such a link.
    """
    inside = folder.resolve()
    places = [inside]
    for snapshot in (inside, inside.parent):  # a model, or the draft inside one
        if snapshot.parent.name == "snapshots":
            places.append(snapshot.parent.parent / "blobs")
    templates = folder / TEMPLATES
    found = [file for file in folder.iterdir() if any(fnmatch(file.name, name) for name in READ)]
    for file in found + (list(templates.iterdir()) if templates.is_dir() else []):
        target = file.resolve()
        if not any(target.is_relative_to(place) for place in places):
            raise ValueError(
                f"{file} is a link to a file outside its folder ({target}), and is not followed: "
                "put the file itself there."
            )
