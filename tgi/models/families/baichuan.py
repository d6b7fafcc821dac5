"""Baichuan 1 and 2: the 7B rotate, the 13B have ALiBi."""

from tgi.core.model_config import ModelShape, Qkv, Raw
from tgi.models.config import Family, keys_of
from tgi.models.families.gpt import alibi_slopes


def _baichuan(raw: Raw, shape: ModelShape) -> dict[str, object]:
    return {
        "qkv": Qkv(("W_pack",)),
        "slopes": alibi_slopes(shape.heads) if raw["alibi"] else None,
        # What Baichuan 2's config tells it by: no other key does.
        "unit_head": shape.vocab == 125696,
    }


def _sizes(raw: dict[str, object]) -> None:
    """Only the 13B's config names its length ``model_max_length`` alone."""
    raw["alibi"] = raw.get("max_position_embeddings") is None
    if raw["alibi"]:
        raw["max_position_embeddings"] = raw.get("model_max_length")


BAICHUAN = Family(_baichuan, keys_of("alibi model_max_length z_loss_weight _from_model_config"), sizes=_sizes)
