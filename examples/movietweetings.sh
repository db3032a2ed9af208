#!/bin/sh
# Movies rated 0 to 10 in tweets (MovieTweetings). Reading reports, for all users:
#   users 21,081
#   items 12,611
#   events 141,695
#
# usage: movietweetings.sh DATA OUT [MAX_USERS [FIT_FLAG ...]]
# DATA holds interactions.parquet and items.parquet; OUT gets the run, and the bank in OUT/inferred.
# USERIP names the program, for example USERIP="python -m userip_fast".
set -eu
data=$1 out=$2 max_users=${3:-1000000000}
shift 2
[ $# -eq 0 ] || shift

${USERIP:-userip} fit --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  --user user_id --item item_id --rating rating --time timestamp --text "{title}[[ ({genres})]]" \
  --template movies --max-users "$max_users" --out "$out" "$@"

# A model knows its columns, text and rules: inference needs the data alone.
${USERIP:-userip} infer --model "$out/model" \
  --interactions "$data/interactions.parquet" --items "$data/items.parquet" \
  --max-users "$max_users" --out "$out/inferred"

${USERIP:-userip} bank lookup "$out/inferred" --on-unknown code 1 2 3
