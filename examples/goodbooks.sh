#!/bin/sh
# Goodbooks-10k sample: ratings of books, no timestamps (histories in a seeded fixed order).
#
#     examples/goodbooks.sh DATA OUT [MAX_USERS]
#
# DATA holds interactions.parquet and items.parquet; OUT gets run/ and bank/. MAX_USERS (1000 by
# default, the first in hash order; 0 for all) keeps it to minutes on a laptop CPU.
#
# What reading must report:
#     2,672 users, 10,000 items, 298,176 events; no bad row
set -eu
data=${1:?folder with interactions.parquet and items.parquet}
out=${2:?folder for run/ and bank/}
users=${3:-1000}
userip=${USERIP:-userip}
if [ "$users" = 0 ]; then some=""; else some="--max-users $users"; fi

# shellcheck disable=SC2086  # $some is a flag and its value, or nothing
$userip fit \
  --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  --user user_id --item item_id --rating rating \
  --text "{title}[[ ({genres})]]" \
  --template books --max-tokens 128 ${USERIP_FIT_FLAGS:-} $some \
  --out "$out/run"

# shellcheck disable=SC2086
$userip infer \
  --model "$out/run/model" \
  --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  $some --out "$out/bank"

$userip bank lookup "$out/bank" 40106 4522 31086
