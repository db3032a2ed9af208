#!/bin/sh
# MovieTweetings 142k: ratings from 0 to 10, with time.
#
#     examples/movietweetings.sh DATA OUT [MAX_USERS]
#
# DATA holds interactions.parquet and items.parquet; OUT gets run/ and bank/. MAX_USERS (1000 by
# default, the first in hash order; 0 for all) keeps it to minutes on a laptop CPU.
#
# What reading must report:
#     21,081 users, 12,611 items, 141,695 events; no bad row
set -eu
data=${1:?folder with interactions.parquet and items.parquet}
out=${2:?folder for run/ and bank/}
users=${3:-1000}
userip=${USERIP:-userip}
if [ "$users" = 0 ]; then some=""; else some="--max-users $users"; fi

# shellcheck disable=SC2086  # $some is a flag and its value, or nothing
$userip fit \
  --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  --user user_id --item item_id --rating rating --time timestamp \
  --text "{title}[[ ({genres})]]" \
  --template movies --max-tokens 128 ${USERIP_FIT_FLAGS:-} $some \
  --out "$out/run"

# shellcheck disable=SC2086
$userip infer \
  --model "$out/run/model" \
  --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  $some --out "$out/bank"

$userip bank lookup "$out/bank" 7326 8715 5644
