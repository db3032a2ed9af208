"""A Feast repository that serves the codes of a bank.

    userip bank export BANK examples/feast/codes.parquet --layout feast
    cd examples/feast && feast apply && feast materialize-incremental $(date -u +%Y-%m-%dT%H:%M:%S)

    store = feast.FeatureStore(".")
    store.get_online_features(["codes:taste"], entity_rows=[{"user_id": 3}]).to_dict()

Replace the fields by those of your bank (`userip bank info BANK`). An export with --probabilities
and --model MODEL --top 20 has lists too: Field(name="taste_p", dtype=Array(Float32)), and likewise
top_items (Array(Int64), or of String) and top_scores (Array(Float32)).
"""

from datetime import timedelta

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Int32, String

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)

codes = FeatureView(
    name="codes",
    entities=[user],
    ttl=timedelta(days=0),  # codes stay valid until the next export
    schema=[
        Field(name="taste", dtype=Int32),
        Field(name="habit", dtype=Int32),
        Field(name="model_fingerprint", dtype=String),
    ],
    source=FileSource(path="codes.parquet", timestamp_field="event_timestamp"),
)
