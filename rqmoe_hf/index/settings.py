"""What a collection is: decided when it is made, and kept in its manifest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from ..bundled import bundled_name
from ..modeling_rqmoe import RQMoEModel
from ..saving import maker_record
from .storage import CHOICES, FORMAT, MAX_LISTS

Metric = Literal["cosine", "inner_product", "l2"]
Kind = Literal["auto", "flat", "ivf"]
Rescore = Literal["auto", "floats", "codes", "tables"]
Duplicates = Literal["error", "skip", "replace"]


def make_settings(
    quantizer: RQMoEModel,
    metric: str,
    kind: str,
    num_lists: int | None,
    encoder: Any,
    num_codebooks: int | None,
    keep_floats: bool,
) -> dict[str, Any]:
    """The settings of a new collection; the arguments are those of `RQMoEIndex`.

    Raises:
        ValueError: If one of them is not possible.
    """
    check_choice("metric", metric, CHOICES["metric"])
    check_choice("kind", kind, CHOICES["kind"])
    if num_lists is not None and not 1 <= num_lists <= MAX_LISTS:
        raise ValueError(f"num_lists must lie between 1 and {MAX_LISTS:,}, got {num_lists}.")
    quantizer._require_initialized("make an index")
    config = quantizer.config
    steps = config.num_codebooks if num_codebooks is None else num_codebooks
    if not 1 <= steps <= config.num_codebooks:
        raise ValueError(f"num_codebooks must lie between 1 and {config.num_codebooks}, got {num_codebooks}.")
    source = _lasting(quantizer.name_or_path or "")
    made_by = maker_record(quantizer, steps) | {"model": bundled_name(source) or source}
    return {
        "format": FORMAT,
        "quantizer": made_by,
        "metric": metric,
        "kind": kind,
        "num_lists": num_lists,
        "keep_floats": keep_floats,
        "encoder": _lasting(encoder) if isinstance(encoder, str) else None,
    }


def _lasting(name: str) -> str:
    """A name that means the same from every working directory: of a folder the absolute path, of others as it is."""
    return str(Path(name).absolute()) if name and Path(name).is_dir() else name


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises a ValueError unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def check_search(settings: dict[str, Any], rescore: Rescore, **numbers: int | None) -> Rescore:
    """What ranks shortlists of a search, "auto" decided.

    Raises:
        ValueError: If the settings do not allow it, or one of the numbers is below 1.
    """
    check_choice("rescore", rescore, ("auto", "floats", "codes", "tables"))
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}.")
    if rescore == "floats" and not settings["keep_floats"]:
        raise ValueError("This index has no floats: make it with keep_floats=True, or use rescore='codes'.")
    if rescore != "auto":
        return rescore
    return "floats" if settings["keep_floats"] else "codes"
